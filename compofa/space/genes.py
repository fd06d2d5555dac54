"""Genes: subnets as vectors of small integers, and their translation to arrays and back.

Each gene picks one of a few choices. A free stage has a gene for its depth and one for each
block's expand ratio and kernel size. A compound stage (CompOFA, Sahni et al., ICLR 2021) has one
gene for depth and expand ratio together. A choice of which only one is left has no gene. Genes of
elastic widths follow those of the stages; the last gene picks the resolution.

:class:`GeneCode` holds this as tables, so that many subnets are translated by a few gathers.
This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from compofa.errors import SpaceError
from compofa.space.subnet import Number, SubnetArrays

if TYPE_CHECKING:
    from compofa.space.stages import StageSpace

Row = tuple[int, Sequence[Number]]


@dataclass(frozen=True)
class Gene:
    """One choice of a space: where it applies and the values it picks from.

    Attributes:
        stage: Index of the stage it shapes; -1 for a width and for the resolution.
        slot: Index of the block within the stage; ``None`` when it is the stage's as a whole.
        choices: Each a mapping from ``d``, ``e``, ``ks``, ``r`` or a width (``w0``, ``w1``, …)
            to a value.
    """

    stage: int
    slot: int | None
    choices: tuple[Mapping[str, Number], ...]


class Lookup:
    """Quantities of a subnet, each given by one of its genes.

    Args:
        rows: For each quantity the column of its gene and its value for each of the choices.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        width = max((len(values) for _, values in rows), default=0)
        self.columns = np.array([column for column, _ in rows], dtype=np.int64)
        # A row that is too short repeats its first value.
        table = [[*v, *v[:1] * (width - len(v))] for _, v in rows]
        self.table = np.array(table, dtype=None if table else np.int64)
        self._offsets = np.arange(len(rows)) * width

    def __call__(self, genes: np.ndarray) -> np.ndarray:
        """Return the quantities [n, rows] that genes [n, genes] stand for."""
        index = genes.take(self.columns, axis=1)
        index += self._offsets
        return self.table.take(index)

    def positions(self, values: np.ndarray) -> np.ndarray:
        """Return the gene for each of ``values`` [n, rows]; any for a value no choice gives."""
        positions = np.zeros(values.shape, dtype=np.int64)
        later = np.ones(values.shape, dtype=bool)
        for column in self.table.T[:-1]:
            later &= values != column
            positions += later
        return positions


@dataclass(frozen=True, eq=False)
class GeneCode:
    """The genes of a space and what they stand for.

    Attributes:
        genes: The genes, stage by stage, then the widths, the resolution last.
        depths: The depth of each stage.
        kernels: The kernel size of each block slot, kept or not.
        expands: The expand ratio of each block slot, kept or not.
        resolution: The resolution.
        widths: The index of each elastic width.
        active: Whether each block slot is kept.
        used: Whether each gene matters: those of blocks past the depth do not.
    """

    genes: tuple[Gene, ...]
    depths: Lookup
    kernels: Lookup
    expands: Lookup
    resolution: Lookup
    widths: Lookup
    active: Lookup
    used: Lookup

    @classmethod
    def of(
        cls,
        stages: Sequence[StageSpace],
        slots: int,
        resolutions: Sequence[int],
        widths: Sequence[Sequence[int]] = (),
    ) -> GeneCode:
        """Lay out the genes of a space.

        Args:
            stages: The choices of each stage.
            slots: Blocks reserved for each stage, at least the largest depth.
            resolutions: Allowed input resolutions in pixels.
            widths: Allowed indices of each elastic width.
        """
        genes: list[Gene] = []
        rows: dict[str, list[Row]] = {key: [] for key in ("d", "ks", "e", "active", "used", "w")}
        for index, stage in enumerate(stages):
            first = len(genes)
            pairs = tuple({"d": d} if e is None else {"d": d, "e": e} for d, e in stage.pairs)
            genes.append(Gene(index, None, pairs))
            rows["d"].append((first, [pair["d"] for pair in pairs]))
            for key, choices in (("e", stage.expands), ("ks", stage.kernels)):
                coupled = [pair[key] for pair in pairs if key in pair]
                if coupled or len(choices) == 1:
                    rows[key] += [(first, coupled or choices * len(pairs))] * slots
                    continue
                deepest = 1 if stage.single else slots
                rows[key] += [(len(genes) + slot, choices) for slot in range(deepest)]
                rows[key] += [(first, choices[:1] * len(pairs))] * (slots - deepest)
                each = tuple({key: choice} for choice in choices)
                genes += [Gene(index, slot, each) for slot in range(deepest)]
            kept = [(first, [pair["d"] > slot for pair in pairs]) for slot in range(slots)]
            rows["active"] += kept
            rows["used"] += [
                (first, [True] * len(pairs)) if gene.slot is None else kept[gene.slot]
                for gene in genes[first:]
            ]
        elastic = [index for index, indices in enumerate(widths) if len(indices) > 1]
        last = len(genes) + len(elastic)
        for index, indices in enumerate(widths):
            if index not in elastic:
                rows["w"].append((last, [*indices] * len(resolutions)))
                continue
            rows["w"].append((len(genes), indices))
            rows["used"].append((len(genes), [True] * len(indices)))
            genes.append(Gene(-1, None, tuple({f"w{index}": choice} for choice in indices)))
        genes.append(Gene(-1, None, tuple({"r": r} for r in resolutions)))
        rows["used"].append((last, [True] * len(resolutions)))
        return cls(
            genes=tuple(genes),
            depths=Lookup(rows["d"]),
            kernels=Lookup(rows["ks"]),
            expands=Lookup(rows["e"]),
            resolution=Lookup([(last, resolutions)]),
            widths=Lookup(rows["w"]),
            active=Lookup(rows["active"]),
            used=Lookup(rows["used"]),
        )

    @cached_property
    def cardinalities(self) -> np.ndarray:
        """Number of choices of each gene, shape [genes]."""
        return np.array([len(gene.choices) for gene in self.genes])

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw genes [n, genes], every choice of a gene equally likely; not canonical."""
        counts = self.cardinalities
        genes = np.empty((n, len(counts)), dtype=np.int64)
        for count in np.unique(counts):
            columns = np.flatnonzero(counts == count)
            genes[:, columns] = rng.integers(0, count, (n, len(columns)), dtype=np.uint16)
        return genes

    def canonical(self, genes: np.ndarray) -> np.ndarray:
        """Return genes [n, genes] with those of blocks past the depth set to 0."""
        return genes * self.used(genes)

    def arrays(self, genes: np.ndarray) -> SubnetArrays:
        """Decode genes [n, genes]."""
        active = self.active(genes)
        kernels, expands = self.kernels(genes), self.expands(genes)
        kernels *= active
        expands *= active
        depths = self.depths(genes)
        widths = self.widths(genes) if len(self.widths.columns) else None
        return SubnetArrays(kernels, expands, depths, self.resolution(genes)[:, 0], widths)

    def genes_of(self, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray]:
        """Encode arrays; entries past a stage's depth are ignored.

        Returns:
            Canonical genes, shape [n, genes], and whether each row is in the space, shape [n].

        Raises:
            SpaceError: The arrays are not of this many stages and blocks.
        """
        stages, blocks = len(self.depths.columns), len(self.kernels.columns)
        if arrays.d.shape[1:] != (stages,) or any(
            values.shape[1:] != (blocks,) for values in (arrays.ks, arrays.e)
        ):
            raise SpaceError(
                f"expected {stages} depths and {blocks} blocks a subnet, got shapes "
                f"{arrays.d.shape} of d, {arrays.ks.shape} of ks, {arrays.e.shape} of e"
            )
        if arrays.w.shape[1:] != self.widths.columns.shape:
            raise SpaceError(
                f"expected {len(self.widths.columns)} widths a subnet, got {arrays.w.shape} of w"
            )
        genes = np.zeros((len(arrays.r), len(self.genes)), dtype=np.int64)
        # The depth's gene comes last: where it also gives kernels or expand ratios, it decides.
        for lookup, values in (
            (self.kernels, arrays.ks),
            (self.expands, arrays.e),
            (self.depths, arrays.d),
            (self.widths, arrays.w),
            (self.resolution, arrays.r[:, None]),
        ):
            genes[:, lookup.columns] = lookup.positions(values)
        genes = self.canonical(genes)
        again = self.arrays(genes)
        past = again.ks == 0
        inside = (again.d == arrays.d).all(axis=1) & (again.r == arrays.r)
        inside &= (again.w == arrays.w).all(axis=1)
        inside &= ((again.ks == arrays.ks) | past).all(axis=1)
        inside &= ((again.e == arrays.e) | past).all(axis=1)
        return genes, inside
