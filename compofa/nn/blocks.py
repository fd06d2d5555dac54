"""The blocks that networks are made of, built from :class:`LayerSpec`.

A block takes its convolutions from :attr:`LayerSpec.convs`, under the same names. Supernets,
their subnets and extracted networks have the same blocks. :func:`register_block` adds a kind.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compofa.errors import SpaceError
from compofa.networks.kinds import ConvSpec, LayerKind, LayerSpec, register_kind, se_channels
from compofa.networks.network_spec import ACTS
from compofa.nn.channels import by_importance, permute, reorder_outputs

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
}


def activation(name: str) -> nn.Module:
    """Return a new in-place activation module; ``none`` is the identity."""
    return ACTIVATIONS[name](inplace=True) if name != "none" else nn.Identity()


class ConvBN(nn.Sequential):
    """Same-padded convolution, batch normalisation, activation; added to its input if residual."""

    def __init__(self, spec: ConvSpec, eps: float, momentum: float, residual: bool = False) -> None:
        norm = nn.BatchNorm2d(spec.out_channels, eps=eps, momentum=momentum)
        super().__init__(OrderedDict(conv=conv2d(spec), bn=norm, act=activation(spec.act)))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.act(self.bn(self.conv(x)))
        return x + y if self.residual else y


def conv2d(spec: ConvSpec) -> nn.Conv2d:
    """Build the same-padded convolution that ``spec`` describes."""
    return nn.Conv2d(
        spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.kernel // 2,
        groups=spec.groups, bias=spec.bias,
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their means (Hu et al., CVPR 2018)."""

    def __init__(self, reduce: ConvSpec, expand: ConvSpec) -> None:
        super().__init__()
        self.reduce = conv2d(reduce)
        self.expand = conv2d(expand)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` of shape [n, channels, h, w]."""
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * nn.functional.hardsigmoid(gate)


class MBConv(nn.Module):
    """Inverted residual block: 1x1 expand, depthwise k x k, SE, 1x1 project."""

    def __init__(self, spec: LayerSpec, eps: float, momentum: float) -> None:
        super().__init__()
        convs = {conv.name: conv for conv in spec.convs}
        self.expand = ConvBN(convs["expand"], eps, momentum) if spec.expand else None
        self.depthwise = ConvBN(convs["depthwise"], eps, momentum)
        gate = convs.get("se.reduce"), convs.get("se.expand")
        self.se = SqueezeExcite(*gate) if spec.se_channels else None
        self.project = ConvBN(convs["project"], eps, momentum)
        self.residual = spec.residual

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.expand(x) if self.expand is not None else x
        y = self.depthwise(y)
        if self.se is not None:
            y = self.se(y)
        y = self.project(y)
        return x + y if self.residual else y

    def sort_channels(self, widths: Sequence[int]) -> None:
        """Order the middle channels, and the hidden ones of SE, by importance.

        See :func:`compofa.nn.sorting.sort_channels`, also for ``widths``.
        """
        order = by_importance(self.project.conv.weight, widths)
        for part in (self.expand, self.depthwise):
            reorder_outputs(part.conv, part.bn, order)
        gate = self.se
        if gate is not None:
            permute(gate.reduce.weight, order, 1)
            permute(gate.expand.weight, order)
            permute(gate.expand.bias, order)
        permute(self.project.conv.weight, order, 1)
        if gate is not None:
            hidden = by_importance(gate.expand.weight, [se_channels(width) for width in widths])
            permute(gate.reduce.weight, hidden)
            permute(gate.reduce.bias, hidden)
            permute(gate.expand.weight, hidden, 1)


class Bottleneck(nn.Module):
    """Residual block of ResNet50D: 1x1 reduce, k x k with the stride, 1x1 expand, ReLU after it.

    Where the shape changes, the shortcut is an average pool, a 1x1 convolution and BN (He et al.,
    CVPR 2019).
    """

    def __init__(self, spec: LayerSpec, eps: float, momentum: float) -> None:
        super().__init__()
        parts = {conv.name: ConvBN(conv, eps, momentum) for conv in spec.convs}
        self.conv1, self.conv2, self.conv3 = parts["conv1"], parts["conv2"], parts["conv3"]
        stride = spec.stride
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.downsample = parts.get("downsample")
        self.act = activation(spec.act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.conv3(self.conv2(self.conv1(x)))
        if self.downsample is not None:
            x = self.downsample(self.pool(x))
        return self.act(x + y)

    def begin_as_input(self) -> None:
        """Initialise the block to compute its input, where shapes allow (Goyal et al., 2017)."""
        if self.downsample is None:
            nn.init.zeros_(self.conv3.bn.weight)

    def sort_channels(self, widths: Sequence[int]) -> None:
        """Order both inner widths by importance, each by the convolution behind it.

        See :func:`compofa.nn.sorting.sort_channels`, also for ``widths``.
        """
        for part, behind in ((self.conv2, self.conv3), (self.conv1, self.conv2)):
            order = by_importance(behind.conv.weight, widths)
            reorder_outputs(part.conv, part.bn, order)
            permute(behind.conv.weight, order, 1)


class GlobalPool(nn.Module):
    """Mean over the feature map, kept as [n, channels, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels, h, w] to [n, channels, 1, 1]."""
        return x.mean((2, 3), keepdim=True)


def _build_conv(spec: LayerSpec, eps: float, momentum: float) -> nn.Module:
    return ConvBN(*spec.convs, eps, momentum, spec.residual)


def _build_mix(spec: LayerSpec, eps: float, momentum: float) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=conv2d(*spec.convs), act=activation(spec.act)))


Builder = Callable[[LayerSpec, float, float], nn.Module]
"""Builds a layer from what it is and the epsilon and momentum of its batch normalisations."""

_BUILDERS: dict[str, Builder] = {
    "conv": _build_conv,
    "mbconv": MBConv,
    "bottleneck": Bottleneck,
    "maxpool": lambda spec, *_: nn.MaxPool2d(spec.kernel, spec.stride, spec.kernel // 2),
    "pool": lambda spec, *_: GlobalPool(),
    "mix": _build_mix,
    "linear": lambda spec, *_: nn.Linear(spec.in_channels, spec.out_channels),
}


def register_block(kind: LayerKind, build: Builder) -> None:
    """Add a kind of block, so that networks with it can be built.

    Args:
        kind: Its convolutions and how its choices become shapes.
        build: A module class (or function) that takes a :class:`LayerSpec`, epsilon and momentum,
            and holds a :class:`ConvBN` under the name of each of ``spec.convs``, ``None`` under
            that of one that is left out. It computes the same whatever parts it is given: a subnet
            runs the supernet's module with narrower convolutions.

    Raises:
        SpaceError: There is another kind of that name.
    """
    register_kind(kind)
    _BUILDERS[kind.name] = build


def register_activation(name: str, module: type[nn.Module]) -> None:
    """Add an activation, a module class that takes ``inplace``, under a name for tables.

    Raises:
        SpaceError: There is another of that name.
    """
    if ACTIVATIONS.setdefault(name, module) is not module:
        raise SpaceError(f"expected a new activation, got {name}, which is known")
    if name not in ACTS:
        ACTS.append(name)


def build_layer(spec: LayerSpec, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """Build the module that ``spec`` describes, with torch's default weights.

    Args:
        spec: Its kind and shapes.
        eps: Epsilon of its batch normalisations.
        momentum: Momentum of its batch normalisations.
    """
    return _BUILDERS[spec.kind](spec, eps, momentum)


def build_layers(specs: tuple[LayerSpec, ...], eps: float, momentum: float) -> dict[str, nn.Module]:
    """Build the layers that ``specs`` describe, by name; torch's generators are as before."""
    with torch.random.fork_rng(devices=[]):
        return {spec.name: build_layer(spec, eps, momentum) for spec in specs}
