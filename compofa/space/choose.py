"""Subnets from numbers that a person typed: one for all, one per stage or one per block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compofa.errors import SpaceError, did_you_mean
from compofa.space.config import DEPTH, RESOLUTION, ConfigFormat, StageFormat
from compofa.space.search_space import SearchSpace
from compofa.space.stage_space import expected
from compofa.space.subnet import Number, Subnet, numbers

Values = Number | Sequence[Number] | None


def choose(space: SearchSpace, base: Subnet, values: Mapping[str, Values]) -> Subnet:
    """Build a subnet of ``space`` from values of its choices; what is left out is that of ``base``.

    Args:
        space: The space it must belong to.
        base: Gives what is left out. Blocks that it lacks repeat the last one of their stage.
        values: By key of the space's config format (or name of the choice), a number for all, or
            a list: one per stage or per block slot for a choice of the blocks, one per stage for
            the depth, one per choice for those outside the blocks. ``r`` is the resolution in
            pixels, any positive one. ``None`` is left out. In a compound stage the coupled choice
            follows from the depth where it is left out, and the depth from a single value of the
            coupled choice.

    Raises:
        SpaceError: An unknown key, a value outside the space or a list of another length; all
            faults of the subnet are listed.
    """
    form = space.config_format
    given = {form.name_of(key): (key, value) for key, value in values.items() if value is not None}
    known = {*space.names, DEPTH, *filter(None, [form.outer]), RESOLUTION}
    unknown = [key for name, (key, _) in given.items() if name not in known]
    if unknown:
        hint = did_you_mean(unknown[0], form.columns)
        raise SpaceError(f"{unknown[0]}: {hint}expected one of {', '.join(form.columns)}")
    if len(given) < sum(value is not None for value in values.values()):
        raise SpaceError(f"expected each choice once, got {', '.join(values)}")
    _, size = given.get(RESOLUTION, ("r", base.resolution))
    depth_key, depth = given.get(DEPTH, (DEPTH, None))
    chosen = {n: _spread(*given[n], space) for n in space.names if n in given}
    depths = _depths(depth_key, depth, space)
    stages, faults = [], []
    for index, (stage, blocks) in enumerate(zip(space.stages, base.stages, strict=True)):
        first, how = index * space.slots, space.stage_formats[index]
        blocks = blocks or (tuple(choice.values[0] for choice in stage.choices),)
        count = len(base.stages[index])
        number = depths[index] if depths else how.number(count) if how.depths else count
        if depths:
            count = how.blocks(number) if how.depths else int(number)
        coupling, coupled = dict(stage.coupling or ()), stage.choices[-1].name
        if not depths and coupled in chosen and coupling:
            inverse = {value: depth for depth, value in coupling.items()}
            count = inverse.get(chosen[coupled][first], count)
        kept = count if count in stage.depths else 0
        if count not in stage.depths:
            written = [how.number(depth) if how.depths else depth for depth in stage.depths]
            faults.append(expected(f"stage {index + 1} depth", written, number))
        rows = []
        for slot in range(space.slots):
            block = dict(zip(space.names, blocks[min(slot, len(blocks) - 1)], strict=True))
            if coupling and coupled not in chosen:
                block[coupled] = coupling.get(count, block[coupled])
            for name, found in chosen.items() if how.slots else ():
                block[name] = found[first + slot]
            rows.append(tuple(block.values()))
        stages.append(tuple(rows[:kept]))
        faults += stage.faults(stages[-1], index + 1) if kept else []
        for slot in range(kept, space.slots):  # without effect, but a typing error all the same
            faults += [
                expected(f"stage {index + 1} block {slot + 1} {choice.name}", choice.values, value)
                for choice, value in zip(stage.choices, rows[slot], strict=True)
                if value != 0 and value not in choice.values
            ]
    if type(size) is not int or size < 1:
        faults.append(f"resolution: expected a positive integer, got {size!r}")
    outer = _outer(*given[form.outer], space) if form.outer in given else base.outer
    faults += space.outer_faults(outer)
    if faults:
        raise space.error(faults)
    return Subnet(size, tuple(stages), outer, form)


def _outer(key: str, value: Values, space: SearchSpace) -> tuple[Number, ...]:
    found, count = numbers(key, value), len(space.outer)
    if len(found) == 1:
        found = found * count
    if len(found) != count:
        raise SpaceError(f"{key}: expected 1 or {count} numbers, got {len(found)}")
    return tuple(found)


def _spread(key: str, value: Values, space: SearchSpace) -> list[Number]:
    """Return one value per block slot, 0 in slots that the config format does not write."""
    found, slots = numbers(key, value), space.slots
    written: Sequence[StageFormat] = space.stage_formats
    stages = [index for index, how in enumerate(written) if how.slots]
    places = ConfigFormat.places(written, slots).tolist()
    every = len(written) * slots
    if len(found) == 1:
        return found * every
    if len(found) == len(stages):
        spread = dict(zip(stages, found, strict=True))
        return [spread.get(index, 0) for index in range(len(written)) for _ in range(slots)]
    if len(found) == every and not space.config_format.stages:
        return found
    if len(found) != len(places):
        raise SpaceError(
            f"{key}: expected 1, {len(stages)} or {len(places)} numbers, got {len(found)}"
        )
    spread = dict(zip(places, found, strict=True))
    return [spread.get(place, 0) for place in range(every)]


def _depths(key: str, value: Values, space: SearchSpace) -> list[Number]:
    """Return one depth per stage; an empty list for ``None``."""
    if value is None:
        return []
    found, stages = numbers(key, value), len(space.stages)
    written = sum(bool(how.depths) for how in space.stage_formats)
    if len(found) == 1:
        found = found * written
    if len(found) not in (written, stages):
        raise SpaceError(f"{key}: expected 1 or {written} numbers, got {len(found)}")
    return found + [1] * (stages - len(found))
