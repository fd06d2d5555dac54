"""Layouts: a backbone and a subnet resolved to layers with their real shapes.

A :class:`LayerSpec` is the only input to multiply-accumulates, parameters, latency keys and the
building of static networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compofa.backbones import Backbone, divisible8
from compofa.errors import SpaceError
from compofa.subnet import Number, Subnet


@dataclass(frozen=True)
class LayerSpec:
    """One layer or block, with the shapes of what goes in and comes out.

    Attributes:
        kind: ``conv`` (convolution, BN, activation), ``mbconv`` (inverted residual block),
            ``pool`` (global average), ``mix`` (1x1 convolution without BN) or ``linear``.
        name: Where it stands in the network: the module path.
        in_size: Side of the input feature map in pixels.
        out_size: Side of the output feature map in pixels.
        in_channels: Input channels.
        out_channels: Output channels (classes of a ``linear``).
        mid_channels: Channels of a block's depthwise convolution; 0 elsewhere.
        kernel: Kernel size.
        stride: Stride.
        act: Activation, ``relu``, ``relu6``, ``hswish`` or ``none``.
        se_channels: Hidden channels of squeeze-and-excitation; 0 without.
        expand: Whether a block has its first 1x1 convolution.
        residual: Whether a block adds its input to its output.
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

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image: convolutions and matrix products, no biases.

        The convention of the published tables.
        """
        pixels = self.out_size**2
        if self.kind == "pool":
            return 0
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
        if self.kind == "pool":
            return 0
        if self.kind == "linear":
            return (self.in_channels + 1) * self.out_channels
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
    """Return the middle width of a block: ``divisible8(round(in * expand))``."""
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
        SpaceError: The numbers of stages differ, or the resolution is below 1.
    """
    if len(subnet.stages) != len(backbone.stages):
        raise SpaceError(
            f"backbone {backbone.name} has {len(backbone.stages)} stages, "
            f"got a subnet with {len(subnet.stages)}"
        )
    if subnet.resolution < 1:
        raise SpaceError(f"expected a resolution of at least 1 pixel, got {subnet.resolution}")
    stem, channels = backbone.width(backbone.stem_width), backbone.width(backbone.first_width)
    size = shrink(subnet.resolution, backbone.stem_stride)
    layers = [
        LayerSpec("conv", "stem", subnet.resolution, size, 3, stem, kernel=3,
                  stride=backbone.stem_stride, act=backbone.stem_act),
        LayerSpec("mbconv", "first", size, size, stem, channels, stem, kernel=3,
                  act=backbone.first_act, residual=backbone.first_residual),
    ]  # fmt: skip
    for index, (stage, blocks) in enumerate(zip(backbone.stages, subnet.stages, strict=True)):
        width = backbone.width(stage.width)
        for position, (kernel, expand) in enumerate(blocks):
            stride = stage.stride if position == 0 else 1
            mid = mid_channels(channels, expand)
            layers.append(
                LayerSpec(
                    kind="mbconv",
                    name=f"stages.{index}.{position}",
                    in_size=size,
                    out_size=shrink(size, stride),
                    in_channels=channels,
                    out_channels=width,
                    mid_channels=mid,
                    kernel=kernel,
                    stride=stride,
                    act=stage.act,
                    se_channels=se_channels(mid) if stage.se else 0,
                    expand=True,
                    residual=position > 0,
                )
            )
            channels, size = width, shrink(size, stride)
    for part in backbone.head:
        width = backbone.width(part.width) if part.width else channels
        side = 1 if part.kind == "pool" else size
        layers.append(LayerSpec(part.kind, part.name, size, side, channels, width, act=part.act))
        channels, size = width, side
    layers.append(LayerSpec("linear", "classifier", size, size, channels, classes))
    return tuple(layers)


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
