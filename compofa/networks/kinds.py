"""Kinds of layers: what each is made of.

A kind says in one place which convolutions a layer has (its multiply-accumulates, parameters,
modules and the part of a supernet's weights that it uses follow from them) and how the choices of a
block become its shapes. :data:`KINDS` holds those of the published families; a family of one's own
adds its block with :func:`register_kind`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from compofa.errors import SpaceError
from compofa.space.subnet import Block, Number, as_number


@dataclass(frozen=True)
class ConvSpec:
    """One convolution of a layer, or its matrix product (a 1x1 convolution of one pixel).

    Attributes:
        name: Module path inside the layer; empty where it is the layer itself.
        size: Side of the output feature map in pixels.
        in_channels: Input channels.
        out_channels: Output channels.
        kernel: Kernel size.
        stride: Stride.
        groups: Groups; as many as channels in a depthwise convolution.
        act: Activation behind it.
        norm: Whether batch normalisation follows.
        bias: Whether it has a bias.
    """

    name: str
    size: int
    in_channels: int
    out_channels: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    act: str = "none"
    norm: bool = True
    bias: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of its weight."""
        return self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel

    @property
    def weights(self) -> int:
        """Elements of its weight."""
        return self.out_channels * (self.in_channels // self.groups) * self.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image, the bias not counted."""
        return self.size**2 * self.weights

    @property
    def params(self) -> int:
        """Learned parameters, those of its batch normalisation included."""
        return self.weights + (2 * self.norm + self.bias) * self.out_channels


@dataclass(frozen=True)
class LayerSpec:
    """One layer or block, with the shapes of what goes in and comes out.

    Attributes:
        kind: Key of :data:`KINDS`, such as ``conv`` (convolution, BN, activation), ``mbconv``
            (inverted residual block) or ``pool`` (global average).
        name: Where it stands in the network: the module path.
        in_size: Side of the input feature map in pixels.
        out_size: Side of the output feature map in pixels.
        in_channels: Input channels.
        out_channels: Output channels (classes of a ``linear``).
        mid_channels: Channels of a block's inner convolution; 0 elsewhere.
        kernel: Kernel size.
        stride: Stride.
        act: Activation, ``relu``, ``relu6``, ``hswish``, … or ``none``.
        se_channels: Hidden channels of squeeze-and-excitation; 0 without.
        expand: Whether a block has its first 1x1 convolution.
        residual: Whether a block adds its input to its output.
        downsample: Whether it does so through an average pool and a 1x1 convolution with BN.
        options: What else its kind needs to know: pairs (name, number).
    """

    kind: str
    name: str
    in_size: int
    out_size: int
    in_channels: int
    out_channels: int
    mid_channels: int = 0
    kernel: int = 1
    stride: int = 1
    act: str = "none"
    se_channels: int = 0
    expand: bool = False
    residual: bool = False
    downsample: bool = False
    options: tuple[tuple[str, Number], ...] = ()

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """The convolutions of the layer, in the order of its modules; a pool has none."""
        return KINDS[self.kind].convs(self)

    def option(self, name: str) -> Number:
        """Return one of :attr:`options`; 0 where it has none of the name."""
        return dict(self.options).get(name, 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: convolutions and matrix products, no biases.

        The convention of the published tables.
        """
        return sum(conv.macs for conv in self.convs)

    @property
    def params(self) -> int:
        """Learned parameters; BN's running statistics are not counted."""
        return sum(conv.params for conv in self.convs)

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of its convolutions, by their names in a state dict."""
        named = {}
        for conv in self.convs:
            path = ".".join(filter(None, [self.name, conv.name, "conv" if conv.norm else ""]))
            named[f"{path}.weight"] = conv.shape
        return named


class Fields(Protocol):
    """Turns the choices of a block into fields of its :class:`LayerSpec`."""

    def __call__(
        self, stage: Any, values: Mapping[str, Number], ins: int, outs: int, first: bool
    ) -> dict[str, Any]:
        """Return the fields beyond sizes, channels, stride and activation.

        Args:
            stage: The row of the backbone's table.
            values: The choices of the block, by name.
            ins: Input channels.
            outs: Output channels.
            first: Whether it is the first block of its stage.
        """


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer.

    Attributes:
        name: Key in :data:`KINDS`.
        convs: Returns the convolutions of a layer, in the order of its modules. One that is left
            out (an optional part of a block) is left out of its module too.
        fields: Turns the choices of a block into fields of its :class:`LayerSpec`; ``None`` for
            layers that are no blocks of a stage.
        block: Returns the choices that a layer of this kind stands for: the inverse of ``fields``.
        options: Names of the :attr:`LayerSpec.options` that ``fields`` sets.
    """

    name: str
    convs: Callable[[LayerSpec], tuple[ConvSpec, ...]]
    fields: Fields | None = None
    block: Callable[[LayerSpec], Block] | None = None
    options: tuple[str, ...] = ()


def divisible8(value: float) -> int:
    """Round to the nearest multiple of 8, at least 8 and never below 0.9 of ``value``."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def mid_channels(channels: int, expand: Number) -> int:
    """Return the middle width of a block: ``divisible8(round(channels * expand))``.

    An inverted block's is relative to its input channels, a bottleneck's to its output channels.
    """
    return divisible8(round(channels * expand))


def se_channels(mid: int) -> int:
    """Return the hidden width of squeeze-and-excitation on ``mid`` channels."""
    return divisible8(mid // 4)


def ratio(part: int, whole: int) -> Number:
    """Return an expand ratio from two widths, to four digits."""
    return as_number(round(part / whole, 4))


def _conv(layer: LayerSpec) -> tuple[ConvSpec, ...]:
    return (
        ConvSpec(
            "", layer.out_size, layer.in_channels, layer.out_channels, layer.kernel, layer.stride,
            act=layer.act,
        ),
    )  # fmt: skip


def _conv_fields(
    stage: Any, values: Mapping[str, Number], ins: int, outs: int, first: bool
) -> dict[str, Any]:
    return {"kernel": values["kernel"], "residual": True}


def _mbconv(layer: LayerSpec) -> tuple[ConvSpec, ...]:
    mid, after = layer.mid_channels, layer.out_size
    found = [
        ConvSpec(
            "depthwise", after, mid, mid, layer.kernel, layer.stride, groups=mid, act=layer.act
        )
    ]
    if layer.expand:
        found.insert(0, ConvSpec("expand", layer.in_size, layer.in_channels, mid, act=layer.act))
    if layer.se_channels:
        found.append(ConvSpec("se.reduce", 1, mid, layer.se_channels, norm=False, bias=True))
        found.append(ConvSpec("se.expand", 1, layer.se_channels, mid, norm=False, bias=True))
    return (*found, ConvSpec("project", after, mid, layer.out_channels))


def _mbconv_fields(
    stage: Any, values: Mapping[str, Number], ins: int, outs: int, first: bool
) -> dict[str, Any]:
    mid = mid_channels(ins, values["expand"])
    return {
        "mid_channels": mid,
        "kernel": values["kernel"],
        "se_channels": se_channels(mid) if stage.se else 0,
        "expand": True,
        "residual": not first,
    }


def _mix(layer: LayerSpec) -> tuple[ConvSpec, ...]:
    return (ConvSpec("conv", layer.out_size, layer.in_channels, layer.out_channels, norm=False),)


def _linear(layer: LayerSpec) -> tuple[ConvSpec, ...]:
    return (
        ConvSpec("", layer.out_size, layer.in_channels, layer.out_channels, norm=False, bias=True),
    )


def _none(layer: LayerSpec) -> tuple[ConvSpec, ...]:
    return ()


KINDS: dict[str, LayerKind] = {
    kind.name: kind
    for kind in (
        LayerKind("conv", _conv, _conv_fields, lambda layer: (layer.kernel, 1)),
        LayerKind(
            "mbconv", _mbconv, _mbconv_fields,
            lambda layer: (layer.kernel, ratio(layer.mid_channels, layer.in_channels)),
        ),
        LayerKind("mix", _mix),
        LayerKind("linear", _linear),
        LayerKind("maxpool", _none),
        LayerKind("pool", _none),
    )
}  # fmt: skip
"""Kinds of layers by name: ``conv`` (convolution with BN and activation; in a stage with its input
added), ``mbconv`` (inverted residual block), ``mix`` (1x1 convolution without BN), ``linear``,
``maxpool``, ``pool`` (global average), and those that families add."""


def register_kind(kind: LayerKind) -> LayerKind:
    """Add a kind of layer to :data:`KINDS`.

    Raises:
        SpaceError: There is another kind of that name.
    """
    if KINDS.setdefault(kind.name, kind) != kind:
        raise SpaceError(f"expected a new kind of layer, got {kind.name}, which is known")
    return kind
