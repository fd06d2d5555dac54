"""What the families of inverted residual blocks share: MobileNetV3 and ProxylessNAS.

Once-for-All writes their subnets with ``ks`` and ``e``, a number for each of four block slots per
stage, and ``d``, a depth per stage. It names blocks ``blocks.i.mobile_inverted_conv`` (newer files
``blocks.i.conv``), nests elastic layers once more (``conv.conv.weight``) and calls a block's parts
``inverted_bottleneck``, ``depth_conv`` and ``point_linear``. MMRazor names blocks ``layer{n}.{j}``
under ``architecture.backbone`` and the parts ``expand_conv``, ``depthwise_conv``, ``linear_conv``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from compofa.networks.weight_names import DOUBLED, WeightNames, inverted, replace_prefix
from compofa.space.choice import Choice
from compofa.space.config import ConfigFormat

CHOICES = (Choice("kernel", (3, 5, 7)), Choice("expand", (3, 4, 6)))
"""What Once-for-All's inverted blocks choose."""
SIMPLE = ((2, 3), (3, 4), (4, 6))
"""CompOFA's heuristic (section 3.2): pairs (depth, expand ratio)."""
FORMAT = ConfigFormat(
    ("kernel", "expand"),
    keys=(("ks", "kernel"), ("e", "expand"), ("d", "depth")),
    slots=4,
    whole=("kernel",),
)
"""Once-for-All's config format."""

_PREFIXES = (
    ("first_conv.", "stem."),
    ("final_expand_layer.", "final_expand."),
    ("feature_mix_layer.", "mix."),
    ("classifier.linear.", "classifier."),
)
_PARTS = (
    ("depth_conv.se.fc.", "se."),
    ("inverted_bottleneck.", "expand."),
    ("depth_conv.", "depthwise."),
    ("point_linear.", "project."),
)
_OFA_BLOCK = re.compile(r"blocks\.(\d+)\.(?:mobile_inverted_conv|conv)\.(.+)")
_OFA_MATRIX = re.compile(r"conv\.\d+to(\d+)_matrix$")

RAZOR = "architecture.backbone."
_RAZOR_PREFIXES = (
    (f"{RAZOR}first_conv.", "stem."),
    (f"{RAZOR}last_conv.final_expand_layer.", "final_expand."),
    (f"{RAZOR}last_conv.feature_mix_layer.", "mix."),
    ("architecture.head.fc.", "classifier."),
)
_RAZOR_PARTS = (
    ("se.conv1.conv.", "se.reduce."),
    ("se.conv2.conv.", "se.expand."),
    ("expand_conv.", "expand."),
    ("depthwise_conv.", "depthwise."),
    ("linear_conv.", "project."),
)
_RAZOR_BLOCK = re.compile(rf"{re.escape(RAZOR)}layer(\d+)\.(\d+)\.(.+)")
_RAZOR_MATRIX = re.compile(r"conv\.trans_matrix_\d+to(\d+)$")

_OWN_BLOCK = re.compile(r"(?:first|stages\.(\d+)\.(\d+))\.(.+)")
_OWN_MATRIX = re.compile(r"matrices\.(\d+)$")


def _from_ofa(name: str, slots: int) -> str:
    name = DOUBLED.sub(r"\1.", name)
    block = _OFA_BLOCK.fullmatch(name)
    if block is None:
        return replace_prefix(name, _PREFIXES)
    index, part = int(block[1]), replace_prefix(block[2], _PARTS)
    part = _OFA_MATRIX.sub(r"matrices.\1", part)
    if index == 0:
        return f"first.{part}"
    stage, position = divmod(index - 1, slots)
    return f"stages.{stage}.{position}.{part}"


def _to_ofa(name: str, slots: int) -> str:
    block = _OWN_BLOCK.fullmatch(name)
    if block is None:
        return replace_prefix(name, inverted(_PREFIXES))
    part = replace_prefix(block[3], inverted(_PARTS))
    if block[1] is None:
        return f"blocks.0.mobile_inverted_conv.{part}"
    part = re.sub(r"^(\w+)\.(conv|bn)\.", r"\1.\2.\2.", part)
    part = _OWN_MATRIX.sub(lambda m: f"conv.{int(m[1]) + 2}to{m[1]}_matrix", part)
    index = 1 + int(block[1]) * slots + int(block[2])
    return f"blocks.{index}.mobile_inverted_conv.{part}"


def _from_mmrazor(name: str, slots: int) -> str:
    block = _RAZOR_BLOCK.fullmatch(name)
    if block is None:
        return replace_prefix(name, _RAZOR_PREFIXES)
    part = _RAZOR_MATRIX.sub(r"matrices.\1", replace_prefix(block[3], _RAZOR_PARTS))
    layer = int(block[1])
    return f"first.{part}" if layer == 1 else f"stages.{layer - 2}.{block[2]}.{part}"


def _to_mmrazor(name: str, slots: int) -> str:
    block = _OWN_BLOCK.fullmatch(name)
    if block is None:
        return replace_prefix(name, inverted(_RAZOR_PREFIXES))
    part = replace_prefix(block[3], inverted(_RAZOR_PARTS))
    part = _OWN_MATRIX.sub(lambda m: f"conv.trans_matrix_{int(m[1]) + 2}to{m[1]}", part)
    place = "1.0" if block[1] is None else f"{int(block[1]) + 2}.{block[2]}"
    return f"{RAZOR}layer{place}.{part}"


def _places(depths: Sequence[int], slots: int) -> list[int]:
    return [0, *(1 + s * slots + p for s, depth in enumerate(depths) for p in range(depth))]


WEIGHT_NAMES = (
    WeightNames("ofa", "first_conv.", "first.", _from_ofa, _to_ofa, _places),
    WeightNames("mmrazor", RAZOR, "first.", _from_mmrazor, _to_mmrazor, _places),
)
