"""Layouts: a backbone and a subnet resolved to layers with their real shapes.

A :class:`LayerSpec` is the only input to multiply-accumulates, parameters, latency keys and the
building of static networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compofa.backbones import Backbone, PlainLayer, Stage, divisible8
from compofa.errors import SpaceError
from compofa.subnet import Number, Subnet

_POOLS = ("pool", "maxpool")


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
    def macs(self) -> int:
        """Multiply-accumulates for one image: convolutions and matrix products, no biases.

        The convention of the published tables.
        """
        pixels = self.out_size**2
        if self.kind in _POOLS:
            return 0
        if self.kind == "bottleneck":
            mid = self.mid_channels
            total = self.in_size**2 * self.in_channels * mid
            total += pixels * mid * (mid * self.kernel**2 + self.out_channels)
            return total + self.downsample * pixels * self.in_channels * self.out_channels
        if self.kind != "mbconv":
            return pixels * self.in_channels * self.out_channels * self.kernel**2
        total = pixels * self.mid_channels * (self.kernel**2 + self.out_channels)
        total += 2 * self.mid_channels * self.se_channels
        if self.expand:
            total += self.in_size**2 * self.in_channels * self.mid_channels
        return total

    @property
    def params(self) -> int:
        """Learned parameters; BN's running statistics are not counted."""
        if self.kind in _POOLS:
            return 0
        if self.kind == "linear":
            return (self.in_channels + 1) * self.out_channels
        if self.kind == "bottleneck":
            mid, inner = self.mid_channels, self.mid_channels * self.kernel**2
            total = (self.in_channels + 2 + inner + 2) * mid + (mid + 2) * self.out_channels
            return total + self.downsample * (self.in_channels + 2) * self.out_channels
        if self.kind != "mbconv":
            bn = 2 * self.out_channels if self.kind == "conv" else 0
            return self.in_channels * self.out_channels * self.kernel**2 + bn
        mid, se = self.mid_channels, self.se_channels
        total = mid * (self.kernel**2 + 2) + (mid + 2) * self.out_channels
        if se:
            total += 2 * mid * se + mid + se
        if self.expand:
            total += (self.in_channels + 2) * mid
        return total


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
