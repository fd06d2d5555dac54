"""Subnets as plain networks over a supernet's weights, and kernels derived from larger ones.

A subnet uses the first channels of each of the supernet's convolutions and the centre of its
depthwise kernels. :func:`bind` makes the subnet's layers out of the supernet's: the same kinds of
modules, holding those parts of its tensors. Where the supernet has kernel matrices, a smaller
depthwise kernel is the centre of the next larger one, multiplied by a learned matrix (Cai et al.,
ICLR 2020, section 3.3); one pair of matrices per block, shared by its channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compofa.errors import TrainingError
from compofa.networks.kinds import LayerSpec
from compofa.nn.blocks import ConvBN

Take = Callable[[nn.Parameter, tuple[slice, ...]], Tensor]
"""Makes the tensor that a subnet computes with from a parameter of the supernet and a part of it.

The part is an index, empty for all of the parameter."""


def centre(weight: Tensor, kernel: int) -> Tensor:
    """Return the central ``kernel`` x ``kernel`` part of filters [..., K, K]."""
    start = (weight.shape[-1] - kernel) // 2
    return weight[..., start : start + kernel, start : start + kernel]


def transform_kernel(weight: Tensor, matrix: Tensor | None, kernel: int) -> Tensor:
    """Derive a smaller depthwise filter from the next larger one.

    Args:
        weight: Filters, shape [channels, 1, K, K] with K > ``kernel``.
        matrix: Shape [kernel**2, kernel**2], multiplied from the left; ``None`` is the identity.
        kernel: Size wanted.
    """
    part = centre(weight, kernel)
    if matrix is None:
        return part
    return F.linear(part.reshape(len(weight), -1), matrix).view(len(weight), 1, kernel, kernel)


class ElasticKernel(ConvBN):
    """Depthwise convolution with BN and activation, whose smaller kernels go through matrices.

    Args:
        part: The plain one with the largest kernel, whose modules it takes over.
        kernels: Kernel sizes it can take.

    Attributes:
        kernels: Kernel sizes it can take, the largest first.
        kernel: The one it runs with; the largest at first.
        matrices: For each smaller kernel the matrix that derives it from the next larger one.
    """

    def __init__(self, part: ConvBN, kernels: Sequence[int]) -> None:
        nn.Sequential.__init__(self, OrderedDict(part.named_children()))
        self.residual = part.residual
        self.kernels = tuple(sorted(kernels, reverse=True))
        self.kernel = self.kernels[0]
        self.matrices = nn.ParameterDict(
            {str(kernel): torch.eye(kernel**2) for kernel in self.kernels[1:]}
        )

    def filters(self) -> Tensor:
        """Return the depthwise filters [channels, 1, kernel, kernel]."""
        weight = self.conv.weight
        for size in self.kernels[1:]:
            if size >= self.kernel:
                weight = transform_kernel(weight, self.matrices[str(size)], size)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels, h, w] to [n, channels, h / stride, w / stride]."""
        conv = self.conv
        y = F.conv2d(x, self.filters(), None, conv.stride, self.kernel // 2, groups=conv.groups)
        return self.act(self.bn(y))


def sliced(parameter: nn.Parameter, part: tuple[slice, ...]) -> Tensor:
    """Take a part in the graph: gradients reach the parameter itself."""
    return parameter[part] if part else parameter


def viewed(parameter: nn.Parameter, part: tuple[slice, ...]) -> nn.Parameter:
    """Return a part as a separate parameter that shares the memory of values and gradient.

    A parameter without a gradient is given zeros. Without grad mode none of this is done, and what
    is returned requires no gradient.
    """
    learns = parameter.requires_grad and torch.is_grad_enabled()
    if learns and parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if not part and learns == parameter.requires_grad:
        return parameter
    view = nn.Parameter(parameter.detach()[part], learns)
    if learns:
        if view.shape[1:] == parameter.shape[1:]:
            view.grad = parameter.grad[part]
        else:  # autograd warns of a gradient whose memory has gaps
            hook = partial(_move_gradient, parameter, parameter.grad, parameter.grad[part])
            view.register_post_accumulate_grad_hook(hook)
    return view


def _move_gradient(
    parameter: nn.Parameter, gradient: Tensor, part: Tensor, view: nn.Parameter
) -> None:
    """Add a view's gradient to its part of the parameter's, where that is still the one viewed."""
    if parameter.grad is not gradient:
        raise TrainingError(
            "expected the supernet's gradients to be those that a subnet was bound to, got "
            f"{'none' if parameter.grad is None else 'others'}: clear them with "
            "zero_grad(set_to_none=False), or bind the subnet again"
        )
    part.add_(view.grad)
    view.grad = None


def bind(layer: nn.Module, whole: LayerSpec, spec: LayerSpec, take: Take) -> nn.Module:
    """Return the layer that ``spec`` describes, made of a part of a larger one.

    Args:
        layer: The larger layer, of the same kind; it stays as it is.
        whole: What ``layer`` is.
        spec: What to return; nowhere larger. Convolutions that it lacks are left out.
        take: :func:`sliced` or :func:`viewed`.

    Returns:
        A layer in the same mode, whose BN statistics are views.
    """
    bound = twin(layer)
    kept = spec.convs
    if len(kept) < len(whole.convs):
        names = {conv.name for conv in kept}
        for conv in whole.convs:
            if conv.name not in names:
                path, _, last = _left_out(conv.name, names).rpartition(".")
                bound.get_submodule(path)._modules[last] = None
    for conv in kept:
        module, kernel = bound, conv.kernel
        for name in conv.name.split(".") if conv.name else ():
            module = module._modules[name]
        if isinstance(module, ElasticKernel):
            module.kernel, kernel = conv.kernel, module.kernels[0]
            matrices = module.matrices._parameters
            matrices.update({name: take(matrix, ()) for name, matrix in matrices.items()})
        if isinstance(module, ConvBN):
            _narrow(module.bn, (conv.out_channels,), take)
            vars(module.bn)["num_features"] = conv.out_channels
            module = module.conv
        channels = (conv.out_channels, conv.in_channels // conv.groups)
        if isinstance(module, nn.Linear):
            _narrow(module, channels, take)
            vars(module).update(in_features=conv.in_channels, out_features=conv.out_channels)
            continue
        _narrow(module, (*channels, kernel, kernel), take)
        vars(module).update(
            in_channels=conv.in_channels,
            out_channels=conv.out_channels,
            groups=conv.groups,
            kernel_size=(kernel, kernel),
            padding=(kernel // 2, kernel // 2),
        )
    return bound


def _left_out(name: str, kept: Collection[str]) -> str:
    """Return the outermost module around a convolution that holds none of those ``kept``."""
    parts = name.split(".")
    paths = (".".join(parts[:end]) for end in range(1, len(parts)))
    return next((p for p in paths if not any(k.startswith(f"{p}.") for k in kept)), name)


def twin(module: nn.Module) -> nn.Module:
    """Copy a module and those in it; they share their tensors and hooks."""
    copy = object.__new__(type(module))
    state = vars(copy)
    state.update(vars(module))
    for held in ("_parameters", "_buffers", "_modules"):
        state[held] = state[held].copy()
    for name, child in copy._modules.items():
        if child is not None:
            copy._modules[name] = twin(child)
    return copy


def _narrow(module: nn.Module, shape: tuple[int, ...], take: Take) -> None:
    """Let a module hold the part of its tensors for which its weight has ``shape``."""
    have = module._parameters["weight"].shape
    part: tuple[slice, ...] = ()
    if have != shape:  # the first channels, the central pixels
        starts = (0, 0, *((side - shape[-1]) // 2 for side in have[2:]))
        part = tuple(slice(at, at + size) for at, size in zip(starts, shape, strict=False))
    for name, value in module._parameters.items():
        if value is not None:
            module._parameters[name] = take(value, part[: value.ndim])
    for name, value in module._buffers.items() if part else ():
        module._buffers[name] = value[part[: value.ndim]]
