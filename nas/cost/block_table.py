"""Sums over the blocks of many subnets: one gather and one sum over a table of choices.

What a block costs depends on its stage, on whether it is the first of its stage, on its choices,
on the resolution, on those choices outside the blocks that change its shapes, and on nothing else.
:class:`BlockTable` has an entry for each of those combinations, made when one first comes up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compofa.errors import SpaceError
from compofa.networks.backbone import Backbone
from compofa.networks.layout import layout
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Block, Number, as_number

CHUNK = 2048
"""Rows handled at a time: what they need stays in the processor's cache."""

LIMIT, MAX_RESOLUTION = 32, 2048
"""The largest value of a choice where a family has none larger, and of the resolution."""

FINENESS = 20
"""Values that are not whole are told apart to 1 / FINENESS."""


@dataclass(frozen=True)
class Dependence:
    """Which of a subnet's outer choices change the shapes of which layers.

    Attributes:
        values: Number of values of each outer choice.
        blocks: For each stage the outer choices that matter to its first block, and to the others.
        outside: Those that matter outside the blocks.
    """

    values: tuple[int, ...]
    blocks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    outside: tuple[int, ...]

    @classmethod
    def of(cls, backbone: Backbone) -> Dependence:
        """Return that of a backbone, found by changing one outer choice after the other."""
        space = backbone.free_space()
        changed: dict[str, set[int]] = {}
        base = space.largest
        before = {layer.name: layer for layer in layout(backbone, base)}
        for place, choice in enumerate(space.outer):
            for value in choice.values:
                outer = (*base.outer[:place], value, *base.outer[place + 1 :])
                for layer in layout(backbone, replace(base, outer=outer)):
                    if layer != before[layer.name]:
                        changed.setdefault(layer.name, set()).add(place)
        outside = set().union(
            *(places for name, places in changed.items() if not name.startswith("stages."))
        )
        blocks = tuple(
            tuple(tuple(sorted(changed.get(f"stages.{stage}.{i}", ()))) for i in range(2))
            for stage in range(len(backbone.stages))
        )
        counts = tuple(len(choice.values) for choice in space.outer)
        return cls(counts, blocks, tuple(sorted(outside)))

    def weights(self, depth: int) -> np.ndarray:
        """Return [outer choices, slots + 1]: ``outer @ weights`` numbers what matters to each slot.

        The last column is for the layers outside the blocks.
        """
        slots = [pair[slot > 0] for pair in self.blocks for slot in range(depth)]
        weights = np.zeros((len(self.values), len(slots) + 1), dtype=np.int32)
        for column, places in enumerate([*slots, self.outside]):
            radix = 1
            for place in places:
                weights[place, column] = radix
                radix *= self.values[place]
        return weights

    def count(self, places: Sequence[int]) -> int:
        """Return how many combinations of values ``places`` have."""
        return int(np.prod([self.values[place] for place in places], dtype=np.int64))

    def outer(self, places: Sequence[int], number: int) -> tuple[int, ...]:
        """Return outer choices that have ``number`` at ``places``, 0 elsewhere."""
        outer = [0] * len(self.values)
        for place in places:
            number, outer[place] = divmod(number, self.values[place])
        return tuple(outer)


class BlockTable:
    """Sums one number per block over the blocks of many subnets.

    Args:
        stages: Stages of the subnets.
        names: Names of the choices of a block.
        entry: Returns the number of one block: (stage, is it the stage's first, its choices,
            resolution, outer choices of the subnet). Called once for each combination that comes
            up.
        fixed: Returns the number of everything outside the blocks: (resolution, outer choices).
        depends: Which outer choices matter where; by default there are none.
        optional: Those of ``names`` that may be 0 in a block that is there.
        whole: Those of ``names`` whose values are whole numbers.
        limit: The largest value of a choice.
        combine: ``np.add``; or ``np.maximum`` for the greatest of numbers of at least 0.
    """

    def __init__(
        self,
        stages: int,
        names: Sequence[str],
        entry: Callable[[int, bool, Block, int, tuple[int, ...]], float],
        fixed: Callable[[int, tuple[int, ...]], float],
        depends: Dependence | None = None,
        optional: Collection[str] = (),
        whole: Collection[str] = (),
        limit: Number = LIMIT,
        combine: np.ufunc = np.add,
    ) -> None:
        self._names, self._stages, self._optional = tuple(names), stages, optional
        self._entry, self._fixed, self._limit = entry, fixed, limit
        self._combine = combine
        depends = self._depends = depends or Dependence((), (((), ()),) * stages, ())
        self._inside = max(depends.count(places) for pair in depends.blocks for places in pair)
        self._outside = depends.count(depends.outside)
        self._codes = [_Codes(1 if name in whole else FINENESS) for name in self._names]
        for codes in self._codes:
            codes.add([0])
        self._resolutions = _Codes()
        self._table = np.zeros((0,) * (2 + len(self._names)))
        self._constant = np.zeros(0)

    def sums(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the sum (or the greatest number) of each subnet, float64 of shape [n].

        Raises:
            SpaceError: Shapes or values that no subnet has.
        """
        arrays = arrays.checked(self._names)
        if arrays.depths.shape[1] != self._stages:
            raise SpaceError(
                f"expected subnets of the {self._stages} stages of the backbone, got "
                f"{arrays.depths.shape[1]}"
            )
        outside = self._resolutions.of(arrays.resolutions, "resolution", MAX_RESOLUTION)
        places = outside[:, None]
        if self._depends.values:
            numbered = self._checked_outer(arrays) @ self._depends.weights(arrays.slots)
            places = places * self._inside + numbered[:, :-1]
            outside = outside * self._outside + numbered[:, -1]
        code = (
            places,
            outside,
            *(
                codes.of(arrays.blocks[name], name, self._limit)
                for codes, name in zip(self._codes, self._names, strict=True)
            ),
        )
        total = self._sums(*code)
        unknown = np.flatnonzero(np.isnan(total))
        while len(unknown):  # most combinations are among the first rows: a few rounds are enough
            rows = unknown[:CHUNK]
            self._fill(*(values[rows] for values in code))
            total[unknown] = self._sums(*(values[unknown] for values in code))
            unknown = unknown[np.isnan(total[unknown])]
        return total

    def _checked_outer(self, arrays: SubnetArrays) -> np.ndarray:
        outer, values = arrays.outer, np.array(self._depends.values)
        if outer.shape[1] != len(values):
            raise SpaceError(
                f"expected {len(values)} choices outside the blocks, got {outer.shape[1]}"
            )
        wrong = ~((outer >= 0) & (outer < values) & (outer == np.rint(outer)))
        if wrong.any():
            raise SpaceError(
                f"expected choices outside the blocks from 0 to {values.max() - 1}, "
                f"got {outer[wrong][0]}"
            )
        return outer.astype(np.int32)

    def _sums(self, places: np.ndarray, outside: np.ndarray, *codes: np.ndarray) -> np.ndarray:
        n, slots = codes[0].shape
        self._grow(slots)
        count, _, *widths = self._table.shape
        flat, size = self._table.reshape(-1), int(np.prod(widths))
        inside = np.arange(slots, dtype=np.int32) * size
        strides = [np.int32(np.prod(widths[place + 1 :])) for place in range(len(widths))]
        bases = np.arange(count, dtype=np.int32) * (slots * size)
        total = self._constant[outside]
        for start in range(0, n, CHUNK):
            rows = slice(start, start + CHUNK)
            index = codes[0][rows] * strides[0]
            for code, stride in zip(codes[1:], strides[1:], strict=True):
                index += code[rows] if stride == 1 else code[rows] * stride
            index += inside
            index += bases[places[rows]]
            blocks = self._combine.reduce(flat.take(index), axis=1)
            total[rows] = self._combine(total[rows], blocks)
        return total

    def _grow(self, slots: int) -> None:
        """Make room for new combinations: NaN where a block is not known yet."""
        more = len(self._resolutions) * self._outside - len(self._constant)
        self._constant = np.append(self._constant, np.full(more, np.nan))
        count = len(self._resolutions) * self._inside
        shape = (count, slots, *(len(codes) for codes in self._codes))
        if self._table.shape == shape:
            return
        table = np.full(shape, np.nan)
        table[(slice(None), slice(None), *(0,) * len(self._codes))] = 0.0
        if self._table.shape[1] == slots:
            table[tuple(slice(size) for size in self._table.shape)] = self._table
        self._table = table

    def _fill(self, places: np.ndarray, outside: np.ndarray, *codes: np.ndarray) -> None:
        """Ask for all of these subnets that is not known."""
        depends = self._depends
        for place in np.unique(outside[np.isnan(self._constant[outside])]).tolist():
            at, number = divmod(place, self._outside)
            resolution = int(self._resolutions.values[at])
            self._constant[place] = self._fixed(resolution, depends.outer(depends.outside, number))
        slots, shape = codes[0].shape[1], self._table.shape
        key = np.ravel_multi_index((places, np.arange(slots)[None], *codes), shape)
        flat = self._table.reshape(-1)
        wanted = np.zeros(flat.size, dtype=bool)
        wanted[key] = True
        depth = slots // self._stages
        known: dict[tuple, float] = {}
        for place in np.flatnonzero(wanted & np.isnan(flat)):
            at, slot, *chosen = np.unravel_index(place, shape)
            at, number = divmod(int(at), self._inside)
            stage, first = int(slot) // depth, slot % depth == 0
            block = tuple(
                as_number(codes.values[code])
                for codes, code in zip(self._codes, chosen, strict=True)
            )
            wrong = [
                name
                for name, value in zip(self._names, block, strict=True)
                if value == 0 and name not in self._optional
            ]
            if wrong:
                raise SpaceError(
                    f"{wrong[0]}: expected 0 at the blocks past the depth alone, where every "
                    "choice is 0"
                )
            outer = depends.outer(depends.blocks[stage][not first], number)
            combination = (stage, first, block, int(self._resolutions.values[at]), outer)
            if combination not in known:
                known[combination] = float(self._entry(*combination))
            flat[place] = known[combination]


class _Codes:
    """Numbers the distinct values of a choice in the order they first come up."""

    def __init__(self, fineness: int = 1) -> None:
        self.values: list[Number] = []
        self._fineness = fineness
        self._lookup = np.full(1, -1, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.values)

    def add(self, values: list[float]) -> None:
        """Give each new value the next number."""
        top = max(round(value * self._fineness) for value in values) + 1
        if top > len(self._lookup):
            more = np.full(top - len(self._lookup), -1, dtype=np.int32)
            self._lookup = np.concatenate([self._lookup, more])
        for value in values:
            if self._lookup[round(value * self._fineness)] < 0:
                self._lookup[round(value * self._fineness)] = len(self.values)
                self.values.append(value)

    def of(self, values: np.ndarray, what: str, limit: Number) -> np.ndarray:
        """Return the number of each of ``values``; new ones get theirs.

        Raises:
            SpaceError: A value is negative, not finite, above ``limit`` or not a multiple of
                1 / fineness.
        """
        if values.size == 0:
            return np.zeros(values.shape, dtype=np.int32)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= limit):  # NaN fails too
            wrong = values[~((values >= 0) & (values <= limit))].ravel()[0]
            raise SpaceError(f"{what}: expected 0 to {limit}, got {wrong}")
        if values.dtype.kind in "iu":
            step, index = self._fineness, values
        else:
            scaled = values * self._fineness
            step, index = 1, np.rint(scaled).astype(np.intp)
            if np.abs(scaled - index).max() > 1e-6:
                wrong = values[np.abs(scaled - index) > 1e-6].ravel()[0]
                raise SpaceError(
                    f"{what}: expected multiples of {1 / self._fineness:g}, got {wrong}"
                )
        top = int(index.max()) * step
        if top < len(self._lookup):
            codes = self._lookup[::step].take(index)
            if codes.min() >= 0:
                return codes
        seen = np.zeros(int(index.max()) + 1, dtype=bool)
        seen[index] = True
        self.add([int(i) * step / self._fineness for i in np.flatnonzero(seen)])
        return self._lookup[::step].take(index)
