"""Weight names of other programs, turned into this library's and back.

What a program calls the weights of a family stands with the family
(:class:`compofa.networks.weight_names.WeightNames`). Only names change: values pass through as they
are, so any may stand in for tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from compofa.errors import CheckpointError
from compofa.networks.families import BACKBONES
from compofa.networks.weight_names import DOUBLED, WeightNames

Value = TypeVar("Value")

FORMATS = ("ofa", "mmrazor", "compofa")
"""Formats of weights that are recognised and written."""

_OFA_NUMBER = re.compile(r"(blocks\.)(\d{1,6})\.")
_OWN = "stem."
"""How this library's state dicts begin."""

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


def _known() -> list[WeightNames]:
    tables = BACKBONES.values()
    return list(dict.fromkeys(names for table in tables for names in table.weight_names))


def _of(state: Iterable[str]) -> WeightNames | None:
    """Return whose names a bare state dict has; ``None`` for this library's and unknown ones."""
    names = list(state)
    found = (known for known in _known() if any(name.startswith(known.mark) for name in names))
    return next(found, None)


def _marks() -> list[str]:
    return [*(known.mark for known in _known()), _OWN]


def recognise(names: Iterable[str]) -> str | None:
    """Return which of :data:`FORMATS` the names of a state dict are in, if any."""
    plain, _ = unwrap(dict.fromkeys(names))
    found = _of(plain)
    if found is not None:
        return found.program
    return "compofa" if any(name.startswith(_OWN) for name in plain) else None


def unwrap(state: Mapping[str, Value]) -> tuple[dict[str, Value], list[str]]:
    """Take off the names what data-parallel, compiled, averaged and enclosing modules put on them.

    Returns:
        The network's tensors by its own names, and the names of tensors beside it.
    """
    beside: list[str] = []
    marks = _marks()
    plain: dict[str, Value] = {}
    for name, value in state.items():
        bare = _WITHIN.sub("", name)
        if bare in plain:
            beside.append(name)
        else:
            plain[bare] = value
    state = plain
    while not any(name.startswith(mark) for name in state for mark in marks):
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


def to_ours(state: Mapping[str, Value], slots: int | None = None) -> dict[str, Value]:
    """Rename a state dict of any format that is recognised; others stay as they are.

    Args:
        state: Its tensors (or anything) by their names there.
        slots: Blocks that the supernet stores for each stage; by default as many as the published
            ones.
    """
    state = _bare(state)
    found = _of(state)
    if found is None:
        return state
    slots = found.slots if slots is None else slots
    return {found.to_own(name, slots): value for name, value in state.items()}


def from_ours(state: Mapping[str, Value], slots: int, to: str) -> dict[str, Value]:
    """Rename this library's state dict to one of :data:`FORMATS`; the reverse of :func:`to_ours`.

    Once-for-All's names are written as its supernets have them: ``mobile_inverted_conv``, elastic
    layers nested.

    Raises:
        CheckpointError: The format has no names for the network's family.
    """
    if to == "compofa":
        return dict(state)
    mine = [known for known in _known() if any(name.startswith(known.own_mark) for name in state)]
    found = next((known for known in mine if known.program == to), None)
    if found is None:
        have = " or ".join([*dict.fromkeys(known.program for known in mine), "compofa"])
        raise CheckpointError(f"{to} has no names for this network: expected {have}, got {to}")
    return {found.from_own(name, slots): value for name, value in state.items()}


def in_slots(state: Mapping[str, Value], depths: Sequence[int]) -> tuple[dict[str, Value], int]:
    """Number the blocks of a specialised network as those of a supernet.

    Once-for-All counts the blocks that a specialised network has; some files leave out the numbers
    of blocks that do nothing. In a supernet every stage has its slots.

    Args:
        state: Its tensors (or anything) by Once-for-All's names; others are left alone.
        depths: Blocks of each stage.

    Returns:
        What :func:`to_ours` takes: the state dict, and the slots of a stage.
    """
    slots, state = max(depths), _bare(state)
    found = _of(state)
    if found is None:
        return state, slots
    state = _numbered(state, found.places(depths, slots))
    if found.optional and depths[0] == 0:
        absent, following = found.optional
        state = {_renamed(name, absent, following): value for name, value in state.items()}
    return state, slots


def from_slots(state: Mapping[str, Value]) -> dict[str, Value]:
    """Turn Once-for-All's names of a supernet's slots into those of a specialised network.

    Blocks are counted, and layers stand alone: the reverse of :func:`in_slots`.
    """
    state = _numbered(state, range(len(_numbers(state))))
    state = {DOUBLED.sub(r"\1.", name): value for name, value in state.items()}
    found = _of(state)
    if found is not None and found.optional:
        absent, following = found.optional
        if not any(name.startswith(absent) for name in state):
            state = {_renamed(name, following, absent): value for name, value in state.items()}
    return state


def _renamed(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


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
