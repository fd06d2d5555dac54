"""Loading weights into a network: match names, derive kernels, check everything, then copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compofa.errors import CheckpointError
from compofa.io.formats.names import in_slots, to_ours
from compofa.nn.elastic import ElasticKernel, transform_kernel
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet

_LISTED = 4


def load_state(
    net: Supernet | StaticNetwork, state: Mapping[str, Tensor], source: str = "state dict"
) -> None:
    """Copy ``state`` into ``net``; on an error, ``net`` is unchanged.

    The names of OFA, CompOFA and MMRazor are recognised. A depthwise kernel larger than the
    network's is cropped to its centre, through its kernel matrices if there are any. Kernel
    matrices that ``state`` lacks become the identity.

    Args:
        net: The network.
        state: Names and tensors.
        source: Name of ``state`` in error messages.

    Raises:
        CheckpointError: Weights are missing, extra, misshapen or not finite, or BN
            variances are negative; all are listed.
    """
    tensors = {name: value for name, value in state.items() if _is_weight(name, value)}
    if len(tensors) < len(state) or not tensors:
        raise CheckpointError(
            f"{source}: expected a mapping from names to dense tensors, "
            f"got {len(tensors)} among {len(state)} entries"
        )
    if isinstance(net, Supernet):
        tensors = to_ours(tensors, net.spec.space.slots)
    else:
        tensors = to_ours(*in_slots(tensors, net.depths))
    tensors = {
        name: value.detach().to("cpu", torch.float32 if value.is_floating_point() else None)
        for name, value in tensors.items()
    }
    target = net.state_dict()
    tensors = _fit_kernels(net, tensors, source)
    for name, value in target.items():
        if name not in tensors and ".matrices." in name:
            tensors[name] = torch.eye(len(value))
        elif name not in tensors and name.endswith(".num_batches_tracked"):
            tensors[name] = torch.zeros_like(value)
    copy_checked(net, tensors, source)


def copy_checked(net: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a network with the same names; on an error, it is unchanged.

    Raises:
        CheckpointError: As :func:`load_state`.
    """
    problems = _problems(tensors, net.state_dict())
    if problems:
        raise CheckpointError(f"{source} does not fit this network: " + "; ".join(problems))
    net.load_state_dict(tensors)


def _is_weight(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        return False
    return value.layout is torch.strided and not value.is_quantized and not value.is_meta


def _problems(tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in target if name not in tensors]
    extra = [name for name in tensors if name not in target]
    common = [name for name in target if name in tensors]
    misshapen = [
        f"{name} (expected {list(target[name].shape)}, got {list(tensors[name].shape)})"
        for name in common
        if tensors[name].shape != target[name].shape
    ]
    broken = [
        name
        for name in common
        if tensors[name].is_complex() or not bool(torch.isfinite(tensors[name]).all())
    ]
    negative = [
        name
        for name in common
        if name.endswith(".running_var") and name not in broken and bool((tensors[name] < 0).any())
    ]
    return [
        f"{len(names)} {label}: " + ", ".join(names[:_LISTED]) + (", …" * (len(names) > _LISTED))
        for label, names in (
            ("missing", missing),
            ("extra", extra),
            ("misshapen", misshapen),
            ("not finite", broken),
            ("negative variances", negative),
        )
        if names
    ]


def _fit_kernels(
    net: Supernet | StaticNetwork, tensors: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Derive the depthwise kernels of ``net`` from larger ones in ``tensors``."""
    fitted = dict(tensors)
    sizes = net.kernel_sizes if isinstance(net, Supernet) else {}
    for path, kernels in sizes.items():
        elastic = isinstance(net.get_submodule(path), ElasticKernel)
        weight = fitted.get(f"{path}.conv.weight")
        if weight is None:
            continue
        if weight.ndim != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
            continue
        largest, *smaller = sorted(kernels, reverse=True)
        for size in range(weight.shape[-1] - 2, largest - 1, -2):
            matrix = fitted.pop(f"{path}.matrices.{size}", None)
            if matrix is not None and matrix.shape != (size**2, size**2):
                raise CheckpointError(
                    f"{source}: expected a kernel matrix of {size**2} x {size**2} for {path}, "
                    f"got {list(matrix.shape)}"
                )
            weight = transform_kernel(weight, matrix, size)
        fitted[f"{path}.conv.weight"] = weight
        for size in range(largest - 2, 0, -2) if not elastic else ():
            matrix = fitted.get(f"{path}.matrices.{size}")
            if matrix is not None and (not smaller or _is_identity(matrix)):
                del fitted[f"{path}.matrices.{size}"]
    return fitted


def _is_identity(matrix: Tensor) -> bool:
    return matrix.ndim == 2 and torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype))
