"""BN calibration: the statistics of one subnet, measured on its own activations.

A supernet's running statistics mix those of all subnets it was trained with, so a subnet needs
its own (Yu and Huang, ICCV 2019; Cai et al., ICLR 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compofa.distributed.backend import Backend, SingleProcess
from compofa.errors import DataError
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Subnet


def calibrate(
    network: Supernet | StaticNetwork,
    batches: Iterable[Tensor],
    subnet: Subnet | None = None,
    backend: Backend | None = None,
    bar: bool = False,
) -> StaticNetwork:
    """Return a copy of a subnet whose BN statistics are exactly those of the images.

    Mean and variance are pooled over all images, so that the variance between batches counts,
    and every layer sees inputs that the finished statistics before it normalised. The result
    therefore does not depend on how the images are cut into batches, nor, but for the last bits of
    double precision, on how they are spread over ranks.

    Each layer's input is kept for all images: about 3 GB for 2,000 images of 224 pixels. With
    one batch a single pass does; with several, each block is run once for each of its
    normalisations.

    Args:
        network: A supernet or an extracted network; it stays as it is.
        batches: Normalised images [n, 3, r, r], all of one resolution, on the network's device.
        subnet: Which of a supernet's networks; by default the active one.
        backend: Ranks that call this together, each with its own images (or none).
        bar: Whether to show a progress bar.

    Returns:
        An independent network in evaluation mode.

    Raises:
        DataError: There are no images, or activations that are not finite numbers.
        SpaceError: The supernet has no such subnet.
    """
    if isinstance(network, Supernet):
        static = extract(network, subnet or network.active)
    else:
        static = copy.deepcopy(network)
    static.eval()
    backend = backend or SingleProcess()
    features = [batch for batch in batches if len(batch)]
    counts = backend.gather(len(features))
    if not any(counts):
        raise DataError("calibration needs images, got none")
    with torch.no_grad():
        units = list(static.units())
        for unit in tqdm(
            units, "calibration", unit="block", leave=False, mininterval=0.5, disable=not bar
        ):
            norms = [module for module in unit.modules() if isinstance(module, nn.BatchNorm2d)]
            if set(counts) == {1}:
                with _measured_on_the_way(norms, backend):
                    features = [unit(features[0])]
                continue
            for norm in norms:
                _set_statistics(norm, _inputs(unit, norm, features), backend)
            features = [unit(feature) for feature in features]
    _require_finite(static)
    return static


def _require_finite(network: StaticNetwork) -> None:
    """Check what was measured: NaN and overflow in a layer's input show in its statistics."""
    for name, module in network.named_modules():
        if not isinstance(module, nn.BatchNorm2d):
            continue
        if not bool((module.running_mean + module.running_var).isfinite().all()):
            raise DataError(
                f"calibration: expected finite activations, got NaN or infinite ones before {name}:"
                " check the weights, and the mean and standard deviation that images are "
                "normalised with"
            )


class _Moments(NamedTuple):
    """Statistics of a number of values a channel.

    Attributes:
        count: Values a channel.
        mean: float64 [channels].
        var: Population variance, float64 [channels].
    """

    count: int
    mean: Tensor
    var: Tensor


def _set_statistics(norm: nn.BatchNorm2d, inputs: Iterable[Tensor], backend: Backend) -> None:
    """Set mean and population variance pooled over ``inputs``, and over all ranks'."""
    pooled = _pooled(map(_moments, inputs))
    if backend.size > 1:
        sent = pooled and _Moments(pooled.count, pooled.mean.cpu(), pooled.var.cpu())
        pooled = _pooled(filter(None, backend.gather(sent)))
    norm.running_mean.copy_(pooled.mean)
    norm.running_var.copy_(pooled.var)


def _moments(x: Tensor) -> _Moments:
    # The batch normalisation kernel itself: ten times faster on a CPU than torch.var_mean.
    _, mean, inverse = torch.native_batch_norm(
        x.float(), None, None, None, None, training=True, momentum=0.0, eps=0.0
    )
    if x.device.type == "mps":  # which has no double precision
        mean, inverse = mean.cpu(), inverse.cpu()
    var = torch.where(inverse > 0, inverse.double() ** -2, 0.0)  # it gives 0 for variance 0
    return _Moments(x.numel() // x.shape[1], mean.double(), var)


def _pooled(parts: Iterable[_Moments]) -> _Moments | None:
    """Pool statistics by Chan's parallel update, in their order; ``None`` if there are none."""
    total = None
    for part in parts:
        if total is None:
            total = part
            continue
        count = total.count + part.count
        share, delta = part.count / count, part.mean - total.mean
        var = (1 - share) * total.var + share * part.var + share * (1 - share) * delta**2
        total = _Moments(count, total.mean + share * delta, var)
    return total


@contextmanager
def _measured_on_the_way(norms: Iterable[nn.BatchNorm2d], backend: Backend) -> Iterator[None]:
    """Let every normalisation take its statistics from the one batch that passes."""
    hooks = [
        norm.register_forward_pre_hook(lambda module, args: _set_statistics(module, args, backend))
        for norm in norms
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def _inputs(unit: nn.Module, norm: nn.Module, features: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what ``norm`` gets when ``unit`` runs on each of ``features``."""

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _ReachedError(args[0])

    hook = norm.register_forward_pre_hook(stop)
    try:
        for feature in features:
            try:
                unit(feature)
            except _ReachedError as reached:
                yield reached.value
    finally:
        hook.remove()
