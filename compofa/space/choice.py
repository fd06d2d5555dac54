"""Reading a subnet from numbers a person typed: one for all, one a stage or one a block."""

from __future__ import annotations

from collections.abc import Sequence

from compofa.errors import SpaceError
from compofa.space.config import columns
from compofa.space.search_space import SearchSpace, StageSpace, expected
from compofa.space.subnet import Block, Number, Subnet, numbers

Choice = Number | Sequence[Number]


def read_choice(
    space: SearchSpace,
    base: Subnet,
    *,
    ks: Choice | None = None,
    e: Choice | None = None,
    d: Choice | None = None,
    r: int | None = None,
    w: Choice | None = None,
) -> Subnet:
    """Build a subnet of ``space`` from choices; what is left out comes from ``base``.

    Args:
        space: The space it must belong to.
        base: Gives what is left out. Blocks that it lacks repeat the last one of their stage.
        ks: Kernel size: a number, one a stage or one a block slot.
        e: Expand ratio, likewise. In a compound stage it follows from the depth when left out.
        d: Depth: a number or one a stage, as the field's form counts it. In a compound stage it
            follows from a single ``e`` when left out. A last stage that always is one block
            needs none.
        r: Resolution in pixels; any positive one.
        w: Index of the width multiplier, where widths are elastic: a number or one a width.

    Raises:
        SpaceError: A value is outside the space or a list has a wrong length; all faults of the
            subnet are listed.
    """
    kernels, expands = _spread("ks", ks, space), _spread("e", e, space)
    depths = _depths(d, space)
    chosen, faults = [], []
    for index, (stage, blocks) in enumerate(zip(space.stages, base.stages, strict=True)):
        first = index * space.slots
        blocks = blocks or ((stage.kernels[0], stage.expands[0]),)
        form = space.forms[index]
        number = depths[index] if depths else form.number(len(base.stages[index]))
        depth = form.blocks(number)
        coupling = dict(stage.coupling or ())
        if not depths and expands and coupling:
            inverse = {expand: depth for depth, expand in coupling.items()}
            depth = inverse.get(expands[first], depth)
            number = form.number(depth)
        kept = depth if depth in stage.depths else 0
        if depth not in stage.depths:
            known = [form.number(blocks) for blocks in stage.depths]
            faults.append(expected(f"stage {index + 1} depth", known, number))
        row = []
        for slot in range(space.slots):
            kernel, expand = blocks[min(slot, len(blocks) - 1)]
            kernel = kernels[first + slot] if kernels and form.slots else kernel
            if expands and form.slots:
                expand = expands[first + slot]
            elif coupling:
                expand = coupling.get(depth, expand)
            row.append((kernel, expand))
        chosen.append(tuple(row[:kept]))
        faults += stage.why_not(chosen[-1], index + 1) if kept else []
        for slot in range(kept, space.slots):
            faults += _past_depth(stage, row[slot], f"stage {index + 1} block {slot + 1}")
    if r is not None and (type(r) is not int or r < 1):
        faults.append(f"resolution: expected a positive integer, got {r!r}")
    widths = _widths(w, space, base)
    faults += space.why_not_widths(widths)
    if faults:
        raise space.error(faults)
    return Subnet(base.resolution if r is None else r, tuple(chosen), widths)


def _widths(value: Choice | None, space: SearchSpace, base: Subnet) -> tuple[Number, ...]:
    if value is None:
        return base.widths
    values, count = numbers("w", value), len(space.widths)
    if len(values) == 1 and count:
        values = values * count
    if len(values) != count:
        wanted = f"1 or {count}" if count else "no"
        raise SpaceError(f"w: expected {wanted} numbers, got {len(values)}")
    return tuple(values)


def _past_depth(stage: StageSpace, block: Block, where: str) -> list[str]:
    """Values past a stage's depth have no effect, but 0 or a known choice is expected there."""
    kernel, expand = block
    return [
        expected(f"{where} {what}", choices, value)
        for what, choices, value in (
            ("kernel size", stage.kernels, kernel),
            ("expand ratio", stage.expands, expand),
        )
        if value != 0 and value not in choices
    ]


def _spread(key: str, value: Choice | None, space: SearchSpace) -> list[Number]:
    """Return a value a block slot; an empty list for ``None``."""
    if value is None:
        return []
    values, forms, slots = numbers(key, value), space.forms, space.slots
    places = columns(forms, slots).tolist()
    written = [index for index, form in enumerate(forms) if form.slots]
    if len(values) == 1:
        return values * (len(forms) * slots)
    if len(values) == len(written):
        spread = dict(zip(written, values, strict=True))
        return [spread.get(index, 0) for index in range(len(forms)) for _ in range(slots)]
    if len(values) == len(forms) * slots and not space.widths:
        return values
    if len(values) != len(places):
        raise SpaceError(
            f"{key}: expected 1, {len(written)} or {len(places)} numbers, got {len(values)}"
        )
    spread = dict(zip(places, values, strict=True))
    return [spread.get(place, 0) for place in range(len(forms) * slots)]


def _depths(value: Choice | None, space: SearchSpace) -> list[Number]:
    """Return a depth a stage; an empty list for ``None``."""
    if value is None:
        return []
    values, stages = numbers("d", value), len(space.stages)
    field = stages - space.tail
    if len(values) == 1:
        values = values * field
    if len(values) not in (field, stages):
        raise SpaceError(f"d: expected 1 or {field} numbers, got {len(values)}")
    return values + [1] * (stages - len(values))
