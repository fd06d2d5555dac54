"""What makes a set of choices a search space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from compofa.space.config import DEPTH, RESOLUTION
from compofa.space.stage_space import expected
from compofa.space.subnet import Number

if TYPE_CHECKING:
    from compofa.space.search_space import SearchSpace

RESERVED = (DEPTH, RESOLUTION, "resolutions", "r", "name")
"""What no choice of a family can be called: keys of a config and arguments of ``restrict``."""


def definition_faults(space: SearchSpace) -> Iterator[str]:
    """Yield what is wrong with the definition of a space, the fundamental faults first."""
    if not space.stages:
        yield "no stage left to choose from"
        return
    names, form = space.names, space.config_format
    if not names or {stage.names for stage in space.stages} != {names} or form.names != names:
        found = [form.names, *(stage.names for stage in space.stages)]
        listed = sorted({"/".join(names) or "none" for names in found})
        yield f"expected stages of the same choices as the config format, got {', '.join(listed)}"
        return
    taken = [*names, form.outer, *RESERVED]
    repeated = [name for name in taken[: len(names) + 1] if taken.count(name) > 1]
    if repeated:
        yield (
            f"expected names of choices that differ from each other and from "
            f"{', '.join(RESERVED)}, got {repeated[0]}"
        )
        return
    shape, got = (len(form.stages), form.count), (len(space.stages), len(space.outer))
    if form.stages and shape != got:
        yield (
            f"expected {shape[0]} stages and {shape[1]} choices outside them, got {got[0]} and "
            f"{got[1]}"
        )
        return
    for label, values in _values(space):
        if not values:
            yield f"no {label} left to choose from"
        if len(set(values)) < len(values):
            yield f"expected each {label} once, got {values}"
    if any(0 in stage.choices[-1].values for stage in space.stages):
        yield f"{names[-1]}: expected no 0, which stands for no block"
    deepest = max(depth for stage in space.stages for depth, _ in stage.pairs)
    if deepest > space.slots:
        yield f"expected depths up to its {space.slots} slots, got {deepest}"
    for index, (stage, how) in enumerate(zip(space.stages, space.stage_formats, strict=True), 1):
        known = [blocks for _, blocks in how.depths] or [1]
        for choice, value in zip(stage.choices, form.unwritten, strict=False):
            written = how.slots and choice.name in dict(form.keys).values()
            if not written and choice.values != (value,):
                where = f"{choice.name} in stage {index}, which the config format leaves out"
                yield expected(where, [value], list(choice.values))
        for depth, _ in stage.pairs:
            if depth not in known:
                yield expected(f"depth in stage {index}", known, depth)


def _values(space: SearchSpace) -> Iterator[tuple[str, tuple[Number, ...]]]:
    yield RESOLUTION, space.resolutions
    for index, stage in enumerate(space.stages, 1):
        yield f"depth in stage {index}", tuple(depth for depth, _ in stage.pairs)
        for choice in stage.choices:
            yield f"{choice.name} in stage {index}", choice.values
    for index, choice in enumerate(space.outer, 1):
        yield f"{choice.name} {index}", choice.values
