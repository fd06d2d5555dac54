"""Sums over the blocks of many subnets: one gather and one sum over a table of choices.

What a block costs depends on its stage, on whether it is the first of its stage, on its kernel,
expand ratio and the resolution, where widths are elastic on those of its input and output, and on
nothing else. :class:`BlockTable` has an entry for each of those choices, made when one first comes
up.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from compofa.errors import SpaceError
from compofa.networks.backbones import Backbone
from compofa.space.subnet import SubnetArrays, as_number

CHUNK = 2048
"""Rows handled at a time: what they need stays in the processor's cache."""

LIMITS = {"kernel size": 31, "expand ratio": 32, "resolution": 2048}
"""The largest value that each choice may have."""

FINENESS = 20
"""Expand ratios are told apart to 1 / FINENESS."""


@dataclass(frozen=True)
class Widths:
    """Which of a subnet's elastic widths matter where.

    Attributes:
        multipliers: Number of width multipliers that each has a choice of.
        total: Number of elastic widths.
        pairs: For each stage the widths that its first block's input and its blocks' output have.
        outside: The widths that layers outside the blocks have.
    """

    multipliers: int
    total: int
    pairs: tuple[tuple[int, int], ...]
    outside: tuple[int, ...]

    @classmethod
    def of(cls, backbone: Backbone) -> Widths | None:
        """Return those of a backbone; ``None`` where no width is elastic."""
        if not backbone.widths:
            return None
        last, pairs, outside = None, [], set()
        for row in backbone.stem:
            last = row.choice
            outside.add(last)
        for stage in backbone.stages:
            for row in stage.before:
                last = last if row.choice is None else row.choice
                outside.add(last)
            pairs.append((last, stage.choice))
            last = stage.choice
        return cls(
            len(backbone.widths), backbone.choices, tuple(pairs), tuple(sorted({*outside, last}))
        )

    def blocks(self, w: np.ndarray, slots: int) -> np.ndarray:
        """Return a number for input and output width of each of ``slots`` blocks, [n, slots]."""
        depth = slots // len(self.pairs)
        ins = [pair[slot > 0] for pair in self.pairs for slot in range(depth)]
        outs = [pair[1] for pair in self.pairs for _ in range(depth)]
        return w[:, ins] * self.multipliers + w[:, outs]

    def of_block(self, stage: int, number: int) -> tuple[int, ...]:
        """Return widths that give a block of ``stage`` the input and output of ``number``."""
        widths, (first, last) = [0] * self.total, self.pairs[stage]
        widths[first], widths[last] = divmod(number, self.multipliers)
        return tuple(widths)

    def around(self, w: np.ndarray) -> np.ndarray:
        """Return a number for the widths outside the blocks, [n]."""
        shape = (self.multipliers,) * len(self.outside)
        return np.ravel_multi_index(tuple(w[:, list(self.outside)].T), shape)

    def of_around(self, number: int) -> tuple[int, ...]:
        """Return widths that have ``number`` outside the blocks."""
        widths = [0] * self.total
        places = np.unravel_index(number, (self.multipliers,) * len(self.outside))
        for place, index in zip(self.outside, places, strict=True):
            widths[place] = int(index)
        return tuple(widths)


class BlockTable:
    """Sums a number a block over the blocks of many subnets.

    Args:
        stages: Stages of the subnets.
        entry: Number of one block: (stage, is it the stage's first, kernel, expand ratio,
            resolution, widths of the subnet where they are elastic). Called once for each choice
            that comes up.
        fixed: Number of everything outside the blocks, at a resolution (and widths).
        widths: Where elastic widths matter; ``None`` where there are none.
    """

    def __init__(
        self,
        stages: int,
        entry: Callable[..., float],
        fixed: Callable[..., float],
        widths: Widths | None = None,
    ) -> None:
        self._stages, self._entry, self._fixed, self._widths = stages, entry, fixed, widths
        self._inside = widths.multipliers**2 if widths else 1
        self._outside = widths.multipliers ** len(widths.outside) if widths else 1
        self._kernels, self._expands, self._resolutions = _Codes(), _Codes(FINENESS), _Codes()
        self._kernels.add([0])
        self._expands.add([0])
        self._table = np.zeros((0, 0, 1, 1))
        self._constant = np.zeros(0)

    def sums(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the sum of each subnet, float64 of shape [n].

        Raises:
            SpaceError: Shapes or values that no subnet has.
        """
        ks, e, r = self._checked(arrays)
        outside = self._resolutions.of(r, "resolution")
        places = outside[:, None]
        if self._widths is not None:
            w = self._checked_widths(arrays.w, len(r))
            places = places * self._inside + self._widths.blocks(w, ks.shape[1])
            outside = outside * self._outside + self._widths.around(w)
        code = (
            self._kernels.of(ks, "kernel size"),
            self._expands.of(e, "expand ratio"),
            places,
            outside,
        )
        total = self._sums(*code)
        unknown = np.flatnonzero(np.isnan(total))
        while len(unknown):  # most choices are among the first rows, so a few rounds are enough
            rows = unknown[:CHUNK]
            self._fill(*(values[rows] for values in code))
            total[unknown] = self._sums(*(values[unknown] for values in code))
            unknown = unknown[np.isnan(total[unknown])]
        return total

    def _checked_widths(self, w: np.ndarray, n: int) -> np.ndarray:
        widths = np.asarray(w)
        if widths.shape != (n, self._widths.total):
            raise SpaceError(f"expected w of shape [n, {self._widths.total}], got {widths.shape}")
        known = np.isin(widths, range(self._widths.multipliers))
        if not known.all():
            raise SpaceError(
                f"expected widths from 0 to {self._widths.multipliers - 1}, got {widths[~known][0]}"
            )
        return widths.astype(np.int32)

    def _checked(self, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ks, e, r = np.asarray(arrays.ks), np.asarray(arrays.e), np.asarray(arrays.r)
        if ks.ndim != 2 or ks.shape != e.shape or r.shape != ks.shape[:1]:
            raise SpaceError(
                f"expected ks and e of shape [n, blocks] and r of shape [n], "
                f"got {ks.shape}, {e.shape} and {r.shape}"
            )
        if ks.shape[1] % self._stages or ks.shape[1] == 0:
            raise SpaceError(
                f"expected a number of blocks divisible by the {self._stages} stages of the "
                f"backbone, got {ks.shape[1]}"
            )
        return ks, e, r

    def _sums(
        self, kernels: np.ndarray, expands: np.ndarray, places: np.ndarray, outside: np.ndarray
    ) -> np.ndarray:
        n, slots = kernels.shape
        self._grow(slots)
        count, _, width_k, width_e = self._table.shape
        flat = self._table.reshape(-1)
        inside = np.arange(slots, dtype=np.int32) * (width_k * width_e)
        bases = np.arange(count, dtype=np.int32) * (slots * width_k * width_e)
        total = self._constant[outside]
        for start in range(0, n, CHUNK):
            rows = slice(start, start + CHUNK)
            index = kernels[rows] * np.int32(width_e)
            index += expands[rows]
            index += inside
            index += bases[places[rows]]
            total[rows] += flat.take(index).sum(axis=1)
        return total

    def _grow(self, slots: int) -> None:
        """Make room for new choices: NaN where a block is not known yet."""
        more = len(self._resolutions) * self._outside - len(self._constant)
        self._constant = np.append(self._constant, np.full(more, np.nan))
        count = len(self._resolutions) * self._inside
        shape = (count, slots, len(self._kernels), len(self._expands))
        if self._table.shape == shape:
            return
        table = np.full(shape, np.nan)
        table[:, :, 0, 0] = 0.0
        if self._table.shape[1] == slots:
            table[tuple(slice(size) for size in self._table.shape)] = self._table
        self._table = table

    def _fill(
        self, kernels: np.ndarray, expands: np.ndarray, places: np.ndarray, outside: np.ndarray
    ) -> None:
        """Ask for all of these subnets that is not known."""
        for place in np.unique(outside[np.isnan(self._constant[outside])]).tolist():
            at, number = divmod(place, self._outside)
            widths = (self._widths.of_around(number),) if self._widths else ()
            self._constant[place] = self._fixed(int(self._resolutions.values[at]), *widths)
        slots = kernels.shape[1]
        shape = self._table.shape
        key = np.ravel_multi_index((places, np.arange(slots)[None], kernels, expands), shape)
        flat = self._table.reshape(-1)
        wanted = np.zeros(flat.size, dtype=bool)
        wanted[key] = True
        depth = slots // self._stages
        known: dict[tuple, float] = {}
        for place in np.flatnonzero(wanted & np.isnan(flat)):
            at, slot, kernel, expand = np.unravel_index(place, shape)
            if kernel == 0 or expand == 0:
                raise SpaceError(
                    "expected ks and e to be 0 at the same blocks (those past the depth)"
                )
            at, number = divmod(int(at), self._inside)
            stage = int(slot) // depth
            choice = (
                stage,
                slot % depth == 0,
                int(self._kernels.values[kernel]),
                as_number(self._expands.values[expand]),
                int(self._resolutions.values[at]),
                *((self._widths.of_block(stage, number),) if self._widths else ()),
            )
            if choice not in known:
                known[choice] = float(self._entry(*choice))
            flat[place] = known[choice]


class _Codes:
    """Numbers the distinct values of a choice in the order they first come up."""

    def __init__(self, fineness: int = 1) -> None:
        self.values: list[float] = []
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

    def of(self, values: np.ndarray, what: str) -> np.ndarray:
        """Return the number of each of ``values``; new ones get theirs.

        Raises:
            SpaceError: A value is negative, not finite, too large or not a whole number where
                whole numbers are expected.
        """
        if values.size == 0:
            return np.zeros(values.shape, dtype=np.int32)
        limit = LIMITS[what]
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= limit):  # NaN fails too
            wrong = values[~((values >= 0) & (values <= limit))].ravel()[0]
            raise SpaceError(f"expected a {what} from 1 to {limit}, got {wrong}")
        if values.dtype.kind in "iu":
            step, index = self._fineness, values
        else:
            scaled = values * self._fineness
            step, index = 1, np.rint(scaled).astype(np.intp)
            if np.abs(scaled - index).max() > 1e-6:
                wrong = values[np.abs(scaled - index) > 1e-6].ravel()[0]
                raise SpaceError(
                    f"expected a {what} in steps of {1 / self._fineness:g}, got {wrong}"
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
