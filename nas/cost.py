"""Costs of many subnets at once: a sum over layers, read from a table of blocks.

What a block costs depends on its stage, on whether it is the first of its stage, on its kernel,
expand ratio and the resolution, and on nothing else. So any figure that is a sum over layers
(multiply-accumulates, parameters, latency by lookup) is one gather and one sum over a table with
an entry for each of those choices. :class:`BlockTable` does the gather; :class:`LayerSumCost` fills
it from a function of :class:`~compofa.layout.LayerSpec`, an entry when a choice first comes up.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Protocol

import numpy as np

from compofa.backbones import Backbone
from compofa.errors import SpaceError
from compofa.layout import LayerSpec, layout
from compofa.subnet import Subnet, SubnetArrays, as_number

CHUNK = 2048
"""Rows handled at a time: what they need stays in the processor's cache."""

LIMITS = {"kernel size": 31, "expand ratio": 32, "resolution": 2048}
"""The largest value that each choice may have."""

FINENESS = 20
"""Expand ratios are told apart to 1 / FINENESS."""

LayerFunction = Callable[[LayerSpec], float]


class Cost(Protocol):
    """What a search asks of a cost.

    Attributes:
        name: Of the device or count.
        unit: Of what a call returns: ``ms``, ``MACs`` or ``parameters``.
        error: How wrong it is, in words; ``exact`` for counts.
    """

    name: str
    unit: str
    error: str

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet, float64 of shape [n]."""


class BlockTable:
    """Sums a number a block over the blocks of many subnets.

    Args:
        stages: Stages of the subnets.
        entry: Number of one block: (stage, is it the stage's first, kernel, expand ratio,
            resolution). Called once for each choice that comes up.
        fixed: Number of everything outside the blocks, at a resolution.
    """

    def __init__(
        self,
        stages: int,
        entry: Callable[[int, bool, int, float, int], float],
        fixed: Callable[[int], float],
    ) -> None:
        self._stages, self._entry, self._fixed = stages, entry, fixed
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
        kernels = self._kernels.of(ks, "kernel size")
        expands = self._expands.of(e, "expand ratio")
        places = self._resolutions.of(r, "resolution")
        total = self._sums(kernels, expands, places)
        unknown = np.flatnonzero(np.isnan(total))
        while len(unknown):  # most choices are among the first rows, so a few rounds are enough
            rows = unknown[:CHUNK]
            self._fill(kernels[rows], expands[rows], places[rows])
            total[unknown] = self._sums(kernels[unknown], expands[unknown], places[unknown])
            unknown = unknown[np.isnan(total[unknown])]
        return total

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

    def _sums(self, kernels: np.ndarray, expands: np.ndarray, places: np.ndarray) -> np.ndarray:
        n, slots = kernels.shape
        self._grow(slots)
        count, _, width_k, width_e = self._table.shape
        flat = self._table.reshape(-1)
        inside = np.arange(slots, dtype=np.int32) * (width_k * width_e)
        bases = np.arange(count, dtype=np.int32) * (slots * width_k * width_e)
        total = self._constant[places]
        for start in range(0, n, CHUNK):
            rows = slice(start, start + CHUNK)
            index = kernels[rows] * np.int32(width_e)
            index += expands[rows]
            index += inside
            index += bases[places[rows], None]
            total[rows] += flat.take(index).sum(axis=1)
        return total

    def _grow(self, slots: int) -> None:
        """Make room for new choices: NaN where a block is not known yet."""
        for r in self._resolutions.values[len(self._constant) :]:
            self._constant = np.append(self._constant, self._fixed(int(r)))
        shape = (len(self._resolutions), slots, len(self._kernels), len(self._expands))
        if self._table.shape == shape:
            return
        table = np.full(shape, np.nan)
        table[:, :, 0, 0] = 0.0
        if self._table.shape[1] == slots:
            table[tuple(slice(size) for size in self._table.shape)] = self._table
        self._table = table

    def _fill(self, kernels: np.ndarray, expands: np.ndarray, places: np.ndarray) -> None:
        """Ask for every block of these subnets that is not known."""
        slots = kernels.shape[1]
        shape = self._table.shape
        key = np.ravel_multi_index(
            (places[:, None], np.arange(slots)[None], kernels, expands), shape
        )
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
            choice = (
                int(slot) // depth,
                slot % depth == 0,
                int(self._kernels.values[kernel]),
                as_number(self._expands.values[expand]),
                int(self._resolutions.values[at]),
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


class LayerSumCost:
    """The sum over a subnet's layers of a function of the layer; a :class:`Cost`.

    Args:
        backbone: Widths and strides.
        classes: Outputs of the classifier.
        layer_cost: The summand. It may raise where it cannot say; it is only asked for layers
            that a subnet has.
        name: Of the device or count.
        unit: Of the sum.
        error: How wrong it is, in words.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        layer_cost: LayerFunction,
        name: str,
        unit: str,
        error: str = "exact",
    ) -> None:
        self.backbone, self.classes = backbone, classes
        self.name, self.unit, self.error = name, unit, error
        self.layer_cost = layer_cost
        self._specs: dict[tuple[int, float, int], tuple[LayerSpec, ...]] = {}
        self._table = BlockTable(len(backbone.stages), self._block, self._fixed)

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet, float64 of shape [n].

        Raises:
            SpaceError: Shapes or values that no subnet has.
        """
        return self._table.sums(arrays)

    def _layers(self, kernel: int, expand: float, resolution: int) -> tuple[LayerSpec, ...]:
        """Return the layers of a subnet with two equal blocks in each stage."""
        key = (kernel, expand, resolution)
        if key not in self._specs:
            blocks = ((kernel, expand),) * 2
            subnet = Subnet(resolution, (blocks,) * len(self.backbone.stages))
            self._specs[key] = layout(self.backbone, subnet, self.classes)
        return self._specs[key]

    def _block(self, stage: int, first: bool, kernel: int, expand: float, resolution: int) -> float:
        layers = self._layers(kernel, expand, resolution)
        name = f"stages.{stage}.{0 if first else 1}"
        layer = next(layer for layer in layers if layer.name == name)
        return self.cost_of(layer, resolution)

    def _fixed(self, resolution: int) -> float:
        layers = self._layers(3, 3, resolution)
        fixed = [layer for layer in layers if not layer.name.startswith("stages.")]
        return sum(self.cost_of(layer, resolution) for layer in fixed)

    def cost_of(self, layer: LayerSpec, resolution: int) -> float:
        """Return the cost of one layer of a network that takes images of ``resolution``."""
        return self.layer_cost(layer)


def macs_cost(backbone: Backbone, classes: int = 1000) -> LayerSumCost:
    """Return the cost that counts multiply-accumulates of one image."""
    return LayerSumCost(backbone, classes, attrgetter("macs"), "flops", "MACs")


def params_cost(backbone: Backbone, classes: int = 1000) -> LayerSumCost:
    """Return the cost that counts learned parameters."""
    return LayerSumCost(backbone, classes, attrgetter("params"), "params", "parameters")
