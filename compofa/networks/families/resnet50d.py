"""ResNet50D as Once-for-All's supernet, after He et al., CVPR 2019.

Kernels are fixed; depths, expand ratios and the output widths of the stem and of each stage are
elastic. The first stage is the stem's residual convolution, which a subnet may leave out: it shares
its width with the convolution before it, and has no expand ratio. Once-for-All's config format has
no ``ks``; ``e`` has 18 expand ratios, ``d`` five depths that count the blocks beyond the least of
each stage (0 or 2 for the stem), ``w`` six indices of width multipliers: the stem's middle and
output widths, then those of the four stages. Its weights are named ``input_stem`` and
``blocks.i.conv1``, ``conv2``, ``conv3`` and ``downsample``; MMRazor has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from compofa.networks.backbone import Backbone, PlainLayer, Stage
from compofa.networks.kinds import (
    ConvSpec,
    LayerKind,
    LayerSpec,
    mid_channels,
    ratio,
    register_kind,
)
from compofa.networks.weight_names import DOUBLED, WeightNames, inverted, replace_prefix
from compofa.space.choice import Choice
from compofa.space.config import ConfigFormat, StageFormat
from compofa.space.subnet import Block, Number

EXPANDS = (0.2, 0.25, 0.35)
WIDTHS = (0.65, 0.8, 1.0)


def _convs(layer: LayerSpec) -> tuple[ConvSpec, ...]:
    """Return 1x1 reduce, k x k with the stride, 1x1 expand, and the shortcut's 1x1."""
    ins, mid, outs = layer.in_channels, layer.mid_channels, layer.out_channels
    after = layer.out_size
    found = [
        ConvSpec("conv1", layer.in_size, ins, mid, act=layer.act),
        ConvSpec("conv2", after, mid, mid, layer.kernel, layer.stride, act=layer.act),
        ConvSpec("conv3", after, mid, outs),
    ]
    if layer.downsample:
        found.append(ConvSpec("downsample", after, ins, outs))
    return tuple(found)


def _fields(
    stage: Any, values: Mapping[str, Number], ins: int, outs: int, first: bool
) -> dict[str, Any]:
    mid = mid_channels(outs, values["expand"])
    return {
        "mid_channels": mid, "kernel": values["kernel"], "residual": True, "downsample": first
    }  # fmt: skip


def _block(layer: LayerSpec) -> Block:
    """Return kernel and expand ratio: the least of Once-for-All's that gives its channels."""
    out, mid = layer.out_channels, layer.mid_channels
    known = (expand for expand in EXPANDS if mid_channels(out, expand) == mid)
    return layer.kernel, next(known, ratio(mid, out))


register_kind(LayerKind("bottleneck", _convs, _fields, _block))


def _stage_format(least: int) -> StageFormat:
    return StageFormat(tuple((more, least + more) for more in range(3)), least + 2)


FORMAT = ConfigFormat(
    ("kernel", "expand"),
    "width",
    keys=(("d", "depth"), ("e", "expand"), ("w", "width")),
    stages=(StageFormat(((0, 0), (2, 1)), 0), *map(_stage_format, (2, 2, 4, 2))),
    count=6,
    unwritten=(3, 1),
)
"""Once-for-All's config format of it."""

_PREFIXES = (
    ("input_stem.0.", "stem."),
    ("input_stem.1.conv.", "stages.0.0."),
    ("input_stem.2.", "stem_out."),
    ("classifier.linear.", "classifier."),
)
_OFA_BLOCK = re.compile(r"blocks\.(\d+)\.((?:conv[123]|downsample)\..+)")
_BLOCKS = [
    f"stages.{stage}.{position}."
    for stage, how in enumerate(FORMAT.stages)
    for position in range(how.slots)
]
_SINGLE = re.compile(r"\b(conv|bn|linear)\.(?=[^.]+$)")


def _from_ofa(name: str, slots: int) -> str:
    name = replace_prefix(name, _PREFIXES[:3])
    name = replace_prefix(DOUBLED.sub(r"\1.", name), _PREFIXES[3:])
    block = _OFA_BLOCK.fullmatch(name)
    if block is None or int(block[1]) >= len(_BLOCKS):
        return name
    return _BLOCKS[int(block[1])] + block[2]


def _to_ofa(name: str, slots: int) -> str:
    name = replace_prefix(name, inverted(_PREFIXES))
    name = _SINGLE.sub(r"\1.\1.", name)
    for index, place in enumerate(_BLOCKS):
        if name.startswith(place):
            return f"blocks.{index}.{name[len(place) :]}"
    return name


def _places(depths: Sequence[int], slots: int) -> list[int]:
    firsts = accumulate([how.slots for how in FORMAT.stages[:-1]], initial=0)
    pairs = [*zip(firsts, depths, strict=False)][1:]
    return [first + place for first, depth in pairs for place in range(depth)]


WEIGHT_NAMES = (
    WeightNames(
        "ofa", "input_stem.", "stem_out.", _from_ofa, _to_ofa, _places,
        ("input_stem.1.", "input_stem.2."),
    ),
)  # fmt: skip

_STEM_OUT = PlainLayer("stem_out", "conv", 64, "relu", 3, choice=1)
_STEM_POOL = PlainLayer("stem_pool", "maxpool", kernel=3, stride=2)
_BOTTLENECKS = Stage(256, 1, "relu", (3,), kind="bottleneck", choice=2)

RESNET50D = Backbone(
    name="resnet50d",
    stem=(PlainLayer("stem", "conv", 32, "relu", 3, 2, choice=0),),
    stages=(
        Stage(32, 1, "relu", (3,), depths=(0, 1), kind="conv", choice=0, only=(1,)),
        replace(_BOTTLENECKS, before=(_STEM_OUT, _STEM_POOL)),
        replace(_BOTTLENECKS, width=512, stride=2, choice=3),
        replace(_BOTTLENECKS, width=1024, stride=2, choice=4, depths=(4, 5, 6)),
        replace(_BOTTLENECKS, width=2048, stride=2, choice=5),
    ),
    head=(PlainLayer("pool", "pool"),),
    choices=(Choice("kernel", (3,)), Choice("expand", EXPANDS)),
    simple=((0, 0.2), (1, 0.25), (2, 0.35)),
    format=FORMAT,
    widths=WIDTHS,
    weight_names=WEIGHT_NAMES,
)
"""``simple`` couples 0, 1 or 2 blocks beyond the minimum with expand ratios 0.2, 0.25, 0.35."""

RESNET50D_SMALL_IMAGES = replace(
    RESNET50D,
    name="resnet50d_small_images",
    stem=(replace(RESNET50D.stem[0], stride=1),),
    stages=(
        RESNET50D.stages[0],
        replace(RESNET50D.stages[1], before=(_STEM_OUT,)),
        *RESNET50D.stages[2:],
    ),
)
"""For images up to about 48 pixels: the first two stride-2 steps and the pool are dropped."""

BACKBONES = (RESNET50D, RESNET50D_SMALL_IMAGES)


def widths_of(layers: Sequence[LayerSpec]) -> tuple[int, ...]:
    """Return which width multipliers a ResNet50D has; none unless all are Once-for-All's."""
    channels = {layer.name: layer.out_channels for layer in layers}
    rows = {"stem": RESNET50D.stem[0], "stem_out": _STEM_OUT}
    rows |= {f"stages.{number}.0": row for number, row in enumerate(RESNET50D.stages) if number}
    found = []
    for name, row in rows.items():
        known = [RESNET50D.width(row.width * mult) for mult in WIDTHS]
        if channels.get(name) not in known:
            return ()
        found.append(known.index(channels[name]))
    blocks = [name.split(".")[1] for name in channels if name.startswith("stages.")]
    depths = [blocks.count(str(stage)) for stage in range(len(FORMAT.stages))]
    pairs = zip(depths, FORMAT.stages, strict=True)
    fits = all(depth in [blocks for _, blocks in how.depths] for depth, how in pairs)
    return tuple(found) if fits else ()
