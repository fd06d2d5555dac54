"""Layouts: a backbone and a subnet resolved to layers with their real shapes.

A :class:`~compofa.networks.kinds.LayerSpec` is the only input to multiply-accumulates, parameters,
latency keys and the building of networks.
"""

from __future__ import annotations

from dataclasses import replace

from compofa.errors import SpaceError
from compofa.networks.backbone import Backbone, PlainLayer, Stage
from compofa.networks.kinds import KINDS, LayerSpec
from compofa.space.subnet import Subnet


def layout(backbone: Backbone, subnet: Subnet, classes: int = 1000) -> tuple[LayerSpec, ...]:
    """Resolve ``subnet`` on ``backbone`` to its layers, in the order they run.

    Args:
        backbone: Widths and strides.
        subnet: Blocks and resolution.
        classes: Outputs of the classifier.

    Raises:
        SpaceError: The numbers of stages or choices differ, a width is none of the backbone's, or
            the resolution is below 1.
    """
    if len(subnet.stages) != len(backbone.stages):
        raise SpaceError(
            f"backbone {backbone.name} has {len(backbone.stages)} stages, "
            f"got a subnet with {len(subnet.stages)}"
        )
    if subnet.resolution < 1:
        raise SpaceError(f"expected a resolution of at least 1 pixel, got {subnet.resolution}")
    if len(subnet.outer) != backbone.outer_count:
        raise SpaceError(
            f"backbone {backbone.name} has {backbone.outer_count} elastic widths, "
            f"got a subnet with {len(subnet.outer)}"
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
        width, fields = _width(backbone, subnet, stage), KINDS[stage.kind].fields
        if fields is None:
            raise SpaceError(f"expected a kind of block for a stage, got {stage.kind}")
        for position, block in enumerate(blocks):
            values = dict(zip(backbone.names, block, strict=True))
            stride = stage.stride if position == 0 else 1
            after = strided(size, stride)
            layers.append(
                LayerSpec(
                    stage.kind, f"stages.{index}.{position}", size, after, channels, width,
                    stride=stride, act=stage.act,
                    **fields(stage, values, channels, width, position == 0),
                )
            )  # fmt: skip
            channels, size = width, after
    for row in backbone.head:
        layers.append(_plain(backbone, subnet, row, size, channels))
        size, channels = layers[-1].out_size, layers[-1].out_channels
    layers.append(LayerSpec("linear", "classifier", size, size, channels, classes))
    return tuple(layers)


def _width(backbone: Backbone, subnet: Subnet, row: Stage | PlainLayer) -> int:
    """Return the output channels of a row of the table in ``subnet``."""
    if row.choice is None:
        return backbone.width(row.width)
    index = subnet.outer[row.choice]
    if index not in range(len(backbone.widths)):
        raise SpaceError(
            f"width {row.choice + 1}: expected an index from 0 to {len(backbone.widths) - 1}, "
            f"got {index}"
        )
    return backbone.width(row.width * backbone.widths[int(index)])


def _plain(
    backbone: Backbone, subnet: Subnet, row: PlainLayer, size: int, channels: int
) -> LayerSpec:
    """Resolve a layer outside the stages that gets feature maps [channels, size, size]."""
    return LayerSpec(
        kind=row.kind,
        name=row.name,
        in_size=size,
        out_size=1 if row.kind == "pool" else strided(size, row.stride),
        in_channels=channels,
        out_channels=_width(backbone, subnet, row) if row.width else channels,
        mid_channels=channels if row.kind == "mbconv" else 0,
        kernel=row.kernel,
        stride=row.stride,
        act=row.act,
        residual=row.residual,
    )


def strided(size: int, stride: int) -> int:
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
        out = 1 if layer.kind == "pool" else strided(size, layer.stride)
        resized.append(replace(layer, in_size=size, out_size=out))
        size = out
    return tuple(resized)


def macs(layers: tuple[LayerSpec, ...]) -> int:
    """Sum the multiply-accumulates of ``layers`` for one image."""
    return sum(layer.macs for layer in layers)


def params(layers: tuple[LayerSpec, ...]) -> int:
    """Sum the learned parameters of ``layers``."""
    return sum(layer.params for layer in layers)


def weight_shapes(layers: tuple[LayerSpec, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the convolutions' weights of ``layers``, by name in a state dict."""
    return {name: shape for layer in layers for name, shape in layer.weights.items()}
