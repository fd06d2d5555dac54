"""Weight names of other programs, turned into this library's and back.

Once-for-All and CompOFA name blocks ``blocks.i.mobile_inverted_conv`` (newer files
``blocks.i.conv``), nest elastic layers once more (``conv.conv.weight``) and call a block's parts
``inverted_bottleneck``, ``depth_conv`` and ``point_linear``. MMRazor names blocks ``layer{n}.{j}``
under ``architecture.backbone`` and the parts ``expand_conv``, ``depthwise_conv``, ``linear_conv``.
Once-for-All's ResNet50D has ``input_stem`` and ``blocks.i.conv1``, ``conv2``, ``conv3`` and
``downsample``; MMRazor has none.

Only names change: values pass through as they are, so any may stand in for tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TypeVar

from compofa.errors import CheckpointError
from compofa.space.config import WIDE

Value = TypeVar("Value")
Table = tuple[tuple[str, str], ...]

FORMATS = ("ofa", "mmrazor", "compofa")
"""Formats of weights that are recognised and written."""

_OFA_PREFIXES = (
    ("first_conv.", "stem."),
    ("final_expand_layer.", "final_expand."),
    ("feature_mix_layer.", "mix."),
    ("classifier.linear.", "classifier."),
)
_OFA_PARTS = (
    ("depth_conv.se.fc.", "se."),
    ("inverted_bottleneck.", "expand."),
    ("depth_conv.", "depthwise."),
    ("point_linear.", "project."),
)
_OFA_BLOCK = re.compile(r"blocks\.(\d+)\.(?:mobile_inverted_conv|conv)\.(.+)")
_OFA_NUMBER = re.compile(r"(blocks\.)(\d{1,6})\.")
_DOUBLED = re.compile(r"\b(conv|bn|linear)\.\1\.")
_OFA_MATRIX = re.compile(r"conv\.\d+to(\d+)_matrix$")

_BODY, _HEAD = "architecture.backbone.", "architecture.head.fc."
_RAZOR_PREFIXES = (
    (f"{_BODY}first_conv.", "stem."),
    (f"{_BODY}last_conv.final_expand_layer.", "final_expand."),
    (f"{_BODY}last_conv.feature_mix_layer.", "mix."),
    (_HEAD, "classifier."),
)
_RAZOR_PARTS = (
    ("se.conv1.conv.", "se.reduce."),
    ("se.conv2.conv.", "se.expand."),
    ("expand_conv.", "expand."),
    ("depthwise_conv.", "depthwise."),
    ("linear_conv.", "project."),
)
_RAZOR_BLOCK = re.compile(rf"{re.escape(_BODY)}layer(\d+)\.(\d+)\.(.+)")
_RAZOR_MATRIX = re.compile(r"conv\.trans_matrix_\d+to(\d+)$")

_RESNET_MARK = "stem_out."
_RESNET_PREFIXES = (
    ("input_stem.0.", "stem."),
    ("input_stem.1.conv.", "stages.0.0."),
    ("input_stem.2.", "stem_out."),
    ("classifier.linear.", "classifier."),
)
_RESNET_BLOCK = re.compile(r"blocks\.(\d+)\.((?:conv[123]|downsample)\..+)")
_RESNET_PLACES = [
    f"stages.{stage}.{position}."
    for stage, form in enumerate(WIDE)
    for position in range(form.slots)
]
_SHORT_STEM = re.compile(r"^input_stem\.1\.")
_SINGLE = re.compile(r"\b(conv|bn|linear)\.(?=[^.]+$)")

_BLOCK = re.compile(r"(?:first|stages\.(\d+)\.(\d+))\.(.+)")
_MATRIX = re.compile(r"matrices\.(\d+)$")


_MARKS = {"first_conv.": "ofa", "input_stem.": "ofa", _BODY: "mmrazor", "stem.": "compofa"}

_WRAPPERS = (
    "module.",
    "model.",
    "net.",
    "network.",
    "student.",
    "ema.",
    "ema_model.",
    "model_ema.",
)
"""What comes before the names of a network within another module, those of averages last."""
_WITHIN = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch's own wrappers put into names, wherever they were called."""


def recognise(names: Iterable[str]) -> str | None:
    """Return which of :data:`FORMATS` the names of a state dict are in, if any."""
    plain, _ = unwrap(dict.fromkeys(names))
    found = (f for mark, f in _MARKS.items() if any(name.startswith(mark) for name in plain))
    return next(found, None)


def unwrap(state: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """Take off the names what data-parallel, compiled, averaged and enclosing modules put on them.

    Returns:
        The network's tensors by its own names, and the names of tensors beside it.
    """
    beside: list[str] = []
    plain: dict[str, Value] = {}
    for name, value in state.items():
        bare = _WITHIN.sub("", name)
        if bare in plain:
            beside.append(name)
        else:
            plain[bare] = value
    state = plain
    while not any(name.startswith(mark) for name in state for mark in _MARKS):
        used = (mark for mark in _WRAPPERS if any(name.startswith(mark) for name in state))
        if (wrapper := next(used, None)) is None:
            break
        beside += [name for name in state if not name.startswith(wrapper)]
        state = {n[len(wrapper) :]: v for n, v in state.items() if n.startswith(wrapper)}
    return state, beside


def _bare(state: Mapping[str, Value]) -> dict[str, Value]:
    """Take off wrappers, if every tensor is in them."""
    bare, _ = unwrap(state)
    return bare if len(bare) == len(state) else dict(state)


def to_ours(state: Mapping[str, Value], slots: int) -> dict[str, Value]:
    """Rename a state dict of any format that is recognised; others stay as they are.

    Args:
        state: Its tensors (or anything) by their names there.
        slots: Blocks that the supernet stores for each stage.
    """
    readers = {"ofa": from_ofa, "mmrazor": from_mmrazor}
    state = _bare(state)
    reader = readers.get(recognise(state) or "")
    return reader(state, slots) if reader else state


def in_slots(state: Mapping[str, Value], depths: Sequence[int]) -> tuple[dict[str, Value], int]:
    """Number the blocks of a specialised network as those of a supernet.

    Once-for-All counts the blocks that a specialised network has; some files leave out the numbers
    of blocks that do nothing. In a supernet every stage has its slots. ResNet50D's stem likewise
    counts what is there.

    Args:
        state: Its tensors (or anything) by Once-for-All's names; others are left alone.
        depths: Blocks of each stage; ResNet50D's first is the stem.

    Returns:
        What :func:`to_ours` takes: the state dict, and the slots of a stage.
    """
    slots, state = max(depths), _bare(state)
    resnet = any(name.startswith("input_stem.") for name in state)
    if resnet:
        firsts = accumulate([form.slots for form in WIDE[:-1]], initial=0)
        pairs = [*zip(firsts, depths, strict=False)][1:]
        places = [first + place for first, depth in pairs for place in range(depth)]
    else:
        places = [0, *(1 + s * slots + p for s, depth in enumerate(depths) for p in range(depth))]
    state = _numbered(state, places)
    if resnet and depths[0] == 0:
        state = {_SHORT_STEM.sub("input_stem.2.", name): v for name, v in state.items()}
    return state, slots


def from_slots(state: Mapping[str, Value]) -> dict[str, Value]:
    """Turn Once-for-All's names of a supernet's slots into those of a specialised network.

    Blocks are counted, and layers stand alone: the reverse of :func:`in_slots`.
    """
    state = _numbered(state, range(len(_numbers(state))))
    state = {_DOUBLED.sub(r"\1.", name): value for name, value in state.items()}
    if not any(name.startswith("input_stem.1.") for name in state):
        state = {re.sub(r"^input_stem\.2\.", "input_stem.1.", n): v for n, v in state.items()}
    return state


def _numbers(state: Mapping[str, Value]) -> list[int]:
    return sorted({int(m[2]) for m in map(_OFA_NUMBER.match, state) if m})


def _numbered(state: Mapping[str, Value], places: Sequence[int]) -> dict[str, Value]:
    """Give the blocks of ``state`` other numbers, in their order; none if there are not as many."""
    found = _numbers(state)
    if len(found) != len(places):
        return dict(state)
    order = dict(zip(found, places, strict=True))
    return {
        _OFA_NUMBER.sub(lambda m: f"{m[1]}{order[int(m[2])]}.", name): value
        for name, value in state.items()
    }


def from_ours(state: Mapping[str, Value], slots: int, to: str) -> dict[str, Value]:
    """Rename this library's state dict to one of :data:`FORMATS`; the reverse of :func:`to_ours`.

    Once-for-All's names are written as its supernets have them: ``mobile_inverted_conv``, elastic
    layers nested.

    Raises:
        CheckpointError: MMRazor is asked for a ResNet50D, which it does not have.
    """
    if to == "compofa":
        return dict(state)
    if any(name.startswith(_RESNET_MARK) for name in state):
        if to == "mmrazor":
            raise CheckpointError("MMRazor has no ResNet50D: expected ofa or compofa, got mmrazor")
        return {_resnet_to_ofa(name): value for name, value in state.items()}
    rename = {"ofa": _to_ofa, "mmrazor": _to_mmrazor}[to]
    return {rename(name, slots): value for name, value in state.items()}


def from_ofa(state: Mapping[str, Value], slots: int) -> dict[str, Value]:
    """Rename an OFA or CompOFA state dict.

    Args:
        state: Its tensors (or anything) by their names there.
        slots: Blocks that the supernet stores for each stage.

    Returns:
        The same values by this library's names. A name that is not known stays as it is.
    """
    if any(name.startswith("input_stem.") for name in state):
        return {_resnet_from_ofa(name): value for name, value in state.items()}
    return {_from_ofa(name, slots): value for name, value in state.items()}


def from_mmrazor(state: Mapping[str, Value], slots: int = 0) -> dict[str, Value]:
    """Rename an MMRazor state dict, as :func:`from_ofa` does; ``slots`` is not needed here."""
    return {_from_mmrazor(name): value for name, value in state.items()}


def _resnet_from_ofa(name: str) -> str:
    name = _replace_prefix(name, _RESNET_PREFIXES[:3])
    name = _replace_prefix(_DOUBLED.sub(r"\1.", name), _RESNET_PREFIXES[3:])
    block = _RESNET_BLOCK.fullmatch(name)
    if block is None or int(block[1]) >= len(_RESNET_PLACES):
        return name
    return _RESNET_PLACES[int(block[1])] + block[2]


def _resnet_to_ofa(name: str) -> str:
    name = _replace_prefix(name, _reversed(_RESNET_PREFIXES))
    name = _SINGLE.sub(r"\1.\1.", name)
    for index, place in enumerate(_RESNET_PLACES):
        if name.startswith(place):
            return f"blocks.{index}.{name[len(place) :]}"
    return name


def _from_ofa(name: str, slots: int) -> str:
    name = _DOUBLED.sub(r"\1.", name)
    block = _OFA_BLOCK.fullmatch(name)
    if block is None:
        return _replace_prefix(name, _OFA_PREFIXES)
    index, part = int(block[1]), _replace_prefix(block[2], _OFA_PARTS)
    part = _OFA_MATRIX.sub(r"matrices.\1", part)
    if index == 0:
        return f"first.{part}"
    stage, position = divmod(index - 1, slots)
    return f"stages.{stage}.{position}.{part}"


def _to_ofa(name: str, slots: int) -> str:
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _replace_prefix(name, _reversed(_OFA_PREFIXES))
    part = _replace_prefix(block[3], _reversed(_OFA_PARTS))
    if block[1] is None:
        return f"blocks.0.mobile_inverted_conv.{part}"
    part = re.sub(r"^(\w+)\.(conv|bn)\.", r"\1.\2.\2.", part)
    part = _MATRIX.sub(lambda m: f"conv.{int(m[1]) + 2}to{m[1]}_matrix", part)
    index = 1 + int(block[1]) * slots + int(block[2])
    return f"blocks.{index}.mobile_inverted_conv.{part}"


def _from_mmrazor(name: str) -> str:
    block = _RAZOR_BLOCK.fullmatch(name)
    if block is None:
        return _replace_prefix(name, _RAZOR_PREFIXES)
    part = _RAZOR_MATRIX.sub(r"matrices.\1", _replace_prefix(block[3], _RAZOR_PARTS))
    layer = int(block[1])
    return f"first.{part}" if layer == 1 else f"stages.{layer - 2}.{block[2]}.{part}"


def _to_mmrazor(name: str, slots: int) -> str:
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _replace_prefix(name, _reversed(_RAZOR_PREFIXES))
    part = _replace_prefix(block[3], _reversed(_RAZOR_PARTS))
    part = _MATRIX.sub(lambda m: f"conv.trans_matrix_{int(m[1]) + 2}to{m[1]}", part)
    place = "1.0" if block[1] is None else f"{int(block[1]) + 2}.{block[2]}"
    return f"{_BODY}layer{place}.{part}"


def _reversed(table: Table) -> Table:
    return tuple((new, old) for old, new in table)


def _replace_prefix(name: str, table: Table) -> str:
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
