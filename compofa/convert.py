"""Weight names of other programs, turned into this library's.

Once-for-All and CompOFA name blocks ``blocks.i.mobile_inverted_conv`` (newer files
``blocks.i.conv``), nest elastic layers once more (``conv.conv.weight``) and call a block's parts
``inverted_bottleneck``, ``depth_conv`` and ``point_linear``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")

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
_BLOCK = re.compile(r"blocks\.(\d+)\.(?:mobile_inverted_conv|conv)\.(.+)")
_DOUBLED = re.compile(r"\b(conv|bn|linear)\.\1\.")
_MATRIX = re.compile(r"conv\.\d+to(\d+)_matrix$")


def is_ofa(names: Mapping[str, object]) -> bool:
    """Whether the names are those of an OFA or CompOFA MobileNetV3 state dict."""
    return any(name.removeprefix("module.").startswith("first_conv.") for name in names)


def from_ofa(state: Mapping[str, Value], slots: int) -> dict[str, Value]:
    """Rename an OFA or CompOFA state dict.

    Args:
        state: Its tensors (or anything) by their names there.
        slots: Blocks that the supernet stores for each stage.

    Returns:
        The same values by this library's names. A name that is not known stays as it is.
    """
    return {_from_ofa(name, slots): value for name, value in state.items()}


def _from_ofa(name: str, slots: int) -> str:
    name = _DOUBLED.sub(r"\1.", name.removeprefix("module."))
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _replace_prefix(name, _PREFIXES)
    index, part = int(block[1]), _replace_prefix(block[2], _PARTS)
    part = _MATRIX.sub(r"matrices.\1", part)
    if index == 0:
        return f"first.{part}"
    stage, position = divmod(index - 1, slots)
    return f"stages.{stage}.{position}.{part}"


def _replace_prefix(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
