"""Layouts: a backbone and a subnet resolved to layers with their real shapes.

A :class:`LayerSpec` is the only input to multiply-accumulates, parameters, latency keys and the
building of networks. What a kind of layer is made of stands in :attr:`LayerSpec.convs` alone: its
counts, its modules and the part of a supernet's weights that it uses follow from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compofa.errors import SpaceError
from compofa.networks.backbones import Backbone, PlainLayer, Stage, divisible8
from compofa.space.subnet import Number, Subnet


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
        kind: ``conv`` (convolution, BN, activation), ``mbconv`` (inverted residual block),
            ``bottleneck`` (residual block of ResNet), ``maxpool``, ``pool`` (global average),
            ``mix`` (1x1 convolution without BN) or ``linear``.
        name: Where it stands in the network: the module path.
        in_size: Side of the input feature map in pixels.
        out_size: Side of the output feature map in pixels.
        in_channels: Input channels.
        out_channels: Output channels (classes of a ``linear``).
        mid_channels: Channels of a block's inner convolution; 0 elsewhere.
        kernel: Kernel size.
        stride: Stride.
        act: Activation, ``relu``, ``relu6``, ``hswish`` or ``none``.
        se_channels: Hidden channels of squeeze-and-excitation; 0 without.
        expand: Whether a block has its first 1x1 convolution.
        residual: Whether a block adds its input to its output.
        downsample: Whether it does so through an average pool and a 1x1 convolution with BN.
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

    @property
    def convs(self) -> tuple[ConvSpec, ...]:
        """The convolutions of the layer, in the order of its modules; a pool has none."""
        ins, mid, outs = self.in_channels, self.mid_channels, self.out_channels
        shape = {"kernel": self.kernel, "stride": self.stride, "act": self.act}
        before, after = self.in_size, self.out_size
        if self.kind == "mbconv":
            found = [ConvSpec("depthwise", after, mid, mid, groups=mid, **shape)]
            if self.expand:
                found.insert(0, ConvSpec("expand", before, ins, mid, act=self.act))
            if self.se_channels:
                gate = {"norm": False, "bias": True}
                found.append(ConvSpec("se.reduce", 1, mid, self.se_channels, **gate))
                found.append(ConvSpec("se.expand", 1, self.se_channels, mid, **gate))
            return (*found, ConvSpec("project", after, mid, outs))
        if self.kind == "bottleneck":
            found = [
                ConvSpec("conv1", before, ins, mid, act=self.act),
                ConvSpec("conv2", after, mid, mid, **shape),
                ConvSpec("conv3", after, mid, outs),
            ]
            if self.downsample:
                found.append(ConvSpec("downsample", after, ins, outs))
            return tuple(found)
        if self.kind == "conv":
            return (ConvSpec("", after, ins, outs, **shape),)
        if self.kind == "mix":
            return (ConvSpec("conv", after, ins, outs, norm=False),)
        if self.kind == "linear":
            return (ConvSpec("", after, ins, outs, norm=False, bias=True),)
        return ()

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


def mid_channels(in_channels: int, expand: Number) -> int:
    """Return the middle width of a block: ``divisible8(round(in * expand))``.

    A bottleneck's is relative to its output channels.
    """
    return divisible8(round(in_channels * expand))


def se_channels(mid: int) -> int:
    """Return the hidden width of squeeze-and-excitation on ``mid`` channels."""
    return divisible8(mid // 4)


def layout(backbone: Backbone, subnet: Subnet, classes: int = 1000) -> tuple[LayerSpec, ...]:
    """Resolve ``subnet`` on ``backbone`` to its layers, in the order they run.

    Args:
        backbone: Widths and strides.
        subnet: Blocks and resolution.
        classes: Outputs of the classifier.

    Raises:
        SpaceError: The numbers of stages or widths differ, a width is none of the backbone's, or
            the resolution is below 1.
    """
    if len(subnet.stages) != len(backbone.stages):
        raise SpaceError(
            f"backbone {backbone.name} has {len(backbone.stages)} stages, "
            f"got a subnet with {len(subnet.stages)}"
        )
    if subnet.resolution < 1:
        raise SpaceError(f"expected a resolution of at least 1 pixel, got {subnet.resolution}")
    if len(subnet.widths) != backbone.choices:
        raise SpaceError(
            f"backbone {backbone.name} has {backbone.choices} elastic widths, "
            f"got a subnet with {len(subnet.widths)}"
        )
    layers: list[LayerSpec] = []
    size, channels = subnet.resolution, 3
    for row in backbone.stem:
        layers.append(_plain(backbone, subnet, row, size, channels))
        size, channels = layers[-1].out_size, layers[-1].out_channels
    for index, (stage, blocks) in enumerate(zip(backbone.stages, subnet.stages, strict=True)):
        for row in stage.before:
            layers.append(_plain(backbone, subnet, row, size, channels))
            size, channels = layers[-1].out_size, layers[-1].out_channels
        width, inverted = _width(backbone, subnet, stage), stage.kind == "mbconv"
        for position, (kernel, expand) in enumerate(blocks):
            stride = stage.stride if position == 0 else 1
            mid = mid_channels(channels if inverted else width, expand)
            layers.append(
                LayerSpec(
                    kind=stage.kind,
                    name=f"stages.{index}.{position}",
                    in_size=size,
                    out_size=shrink(size, stride),
                    in_channels=channels,
                    out_channels=width,
                    mid_channels=mid if stage.kind != "conv" else 0,
                    kernel=kernel,
                    stride=stride,
                    act=stage.act,
                    se_channels=se_channels(mid) if stage.se else 0,
                    expand=inverted,
                    residual=position > 0 or not inverted,
                    downsample=position == 0 and stage.kind == "bottleneck",
                )
            )
            channels, size = width, shrink(size, stride)
    for row in backbone.head:
        layers.append(_plain(backbone, subnet, row, size, channels))
        size, channels = layers[-1].out_size, layers[-1].out_channels
    layers.append(LayerSpec("linear", "classifier", size, size, channels, classes))
    return tuple(layers)


def _width(backbone: Backbone, subnet: Subnet, row: Stage | PlainLayer) -> int:
    """Return the output channels of a row of the table in ``subnet``."""
    if row.choice is None:
        return backbone.width(row.width)
    index = subnet.widths[row.choice]
    if not 0 <= index < len(backbone.widths):
        raise SpaceError(
            f"w: expected an index from 0 to {len(backbone.widths) - 1} as number "
            f"{row.choice + 1}, got {index}"
        )
    return backbone.width(row.width * backbone.widths[index])


def _plain(
    backbone: Backbone, subnet: Subnet, row: PlainLayer, size: int, channels: int
) -> LayerSpec:
    """Resolve a layer outside the stages that gets feature maps [channels, size, size]."""
    return LayerSpec(
        kind=row.kind,
        name=row.name,
        in_size=size,
        out_size=1 if row.kind == "pool" else shrink(size, row.stride),
        in_channels=channels,
        out_channels=_width(backbone, subnet, row) if row.width else channels,
        mid_channels=channels if row.kind == "mbconv" else 0,
        kernel=row.kernel,
        stride=row.stride,
        act=row.act,
        residual=row.residual,
    )


def shrink(size: int, stride: int) -> int:
    """Return the side of a feature map after a same-padded convolution: ``ceil(size/stride)``."""
    return -(-size // stride)


def at_resolution(layers: tuple[LayerSpec, ...], resolution: int) -> tuple[LayerSpec, ...]:
    """Return ``layers`` with the sizes of feature maps that an image of this side gives.

    Args:
        layers: A whole network, in the order it runs.
        resolution: Side of the image in pixels.
    """
    resized, size = [], resolution
    for layer in layers:
        out = 1 if layer.kind == "pool" else shrink(size, layer.stride)
        resized.append(replace(layer, in_size=size, out_size=out))
        size = out
    return tuple(resized)


def macs(layers: tuple[LayerSpec, ...]) -> int:
    """Sum the multiply-accumulates of ``layers`` for one image."""
    return sum(layer.macs for layer in layers)


def params(layers: tuple[LayerSpec, ...]) -> int:
    """Sum the learned parameters of ``layers``."""
    return sum(layer.params for layer in layers)
