"""Genes: subnets as vectors of small integers, and their translation to arrays and back.

Each gene picks one of a few values. A free stage has a gene for its depth and one for each choice
of each block. A compound stage (CompOFA, Sahni et al., ICLR 2021) has one gene for its depth and
the choice coupled with it together. A choice of which only one value is left has no gene. Genes of
choices outside the blocks follow those of the stages; the last gene picks the resolution.

:class:`GeneCode` holds this as tables, so that many subnets are translated by a few gathers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from compofa.errors import SpaceError
from compofa.space.arrays import SubnetArrays
from compofa.space.choice import Choice
from compofa.space.config import DEPTH, RESOLUTION
from compofa.space.subnet import Number

if TYPE_CHECKING:
    from compofa.space.stage_space import StageSpace

Row = tuple[int, Sequence[Number]]


@dataclass(frozen=True)
class Gene:
    """One entry of a gene vector: where it applies and what it picks from.

    Attributes:
        stage: Index of the stage it shapes; -1 outside the stages.
        slot: Index of the block within the stage; ``None`` where it is the stage's as a whole.
        options: What each of its values stands for: the name of a choice and its value, or two
            such pairs where two choices are coupled.
    """

    stage: int
    slot: int | None
    options: tuple[Mapping[str, Number], ...]


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
        genes: The genes: stage by stage, then those of choices outside the blocks, the
            resolution's last.
        depths: The depth of each stage.
        blocks: For each choice of a block, by name, its value in each block slot, kept or not.
        resolution: The resolution.
        outer: The value of each choice outside the blocks.
        active: Whether each block slot is kept.
        used: Whether each gene matters: those of blocks past the depth do not.
    """

    genes: tuple[Gene, ...]
    depths: Lookup
    blocks: Mapping[str, Lookup]
    resolution: Lookup
    outer: Lookup
    active: Lookup
    used: Lookup

    @classmethod
    def of(
        cls,
        stages: Sequence[StageSpace],
        slots: int,
        resolutions: Sequence[int],
        outer: Sequence[Choice] = (),
    ) -> GeneCode:
        """Lay out the genes of a space.

        Args:
            stages: The choices of each stage, of the same names in all.
            slots: Blocks reserved for each stage, at least the largest depth.
            resolutions: Allowed input resolutions in pixels.
            outer: Choices outside the blocks.
        """
        genes: list[Gene] = []
        depths: list[Row] = []
        active: list[Row] = []
        used: list[Row] = []
        blocks: dict[str, list[Row]] = {name: [] for name in stages[0].names}
        for index, stage in enumerate(stages):
            first, coupled = len(genes), stage.choices[-1].name
            options = tuple(
                {DEPTH: depth} if value is None else {DEPTH: depth, coupled: value}
                for depth, value in stage.pairs
            )
            genes.append(Gene(index, None, options))
            depths.append((first, [option[DEPTH] for option in options]))
            for choice in reversed(stage.choices):
                name, values = choice.name, choice.values
                decided = [option[name] for option in options if name in option]
                if decided or len(values) == 1:
                    blocks[name] += [(first, decided or values * len(options))] * slots
                    continue
                deepest = 1 if stage.depths == (1,) else slots
                blocks[name] += [(len(genes) + slot, values) for slot in range(deepest)]
                blocks[name] += [(first, values[:1] * len(options))] * (slots - deepest)
                each = tuple({name: value} for value in values)
                genes += [Gene(index, slot, each) for slot in range(deepest)]
            kept = [(first, [option[DEPTH] > slot for option in options]) for slot in range(slots)]
            active += kept
            used += [
                (first, [True] * len(options)) if gene.slot is None else kept[gene.slot]
                for gene in genes[first:]
            ]
        last = len(genes) + sum(len(choice.values) > 1 for choice in outer)
        rows: list[Row] = []
        for choice in outer:
            if len(choice.values) == 1:
                rows.append((last, [*choice.values] * len(resolutions)))
                continue
            rows.append((len(genes), choice.values))
            used.append((len(genes), [True] * len(choice.values)))
            genes.append(Gene(-1, None, tuple({choice.name: value} for value in choice.values)))
        genes.append(Gene(-1, None, tuple({RESOLUTION: side} for side in resolutions)))
        used.append((last, [True] * len(resolutions)))
        return cls(
            genes=tuple(genes),
            depths=Lookup(depths),
            blocks={name: Lookup(found) for name, found in blocks.items()},
            resolution=Lookup([(last, resolutions)]),
            outer=Lookup(rows),
            active=Lookup(active),
            used=Lookup(used),
        )

    @cached_property
    def cardinalities(self) -> np.ndarray:
        """Number of options of each gene, shape [genes]."""
        return np.array([len(gene.options) for gene in self.genes])

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draw genes [n, genes], every option of a gene equally likely; not canonical."""
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
        blocks = {}
        for name, lookup in self.blocks.items():
            blocks[name] = lookup(genes)
            blocks[name] *= active
        outer = np.zeros((len(genes), 0), dtype=np.int64)
        if len(self.outer.columns):
            outer = self.outer(genes)
        return SubnetArrays(blocks, self.depths(genes), self.resolution(genes)[:, 0], outer)

    def genes_of(self, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray]:
        """Encode arrays; entries past a stage's depth are ignored.

        Returns:
            Canonical genes, shape [n, genes], and whether each row is in the space, shape [n].

        Raises:
            SpaceError: The arrays are not of these stages, slots and choices.
        """
        wanted = {name: len(lookup.columns) for name, lookup in self.blocks.items()}
        wanted |= {"depths": len(self.depths.columns), "outer": len(self.outer.columns)}
        held = {**arrays.blocks, "depths": arrays.depths, "outer": arrays.outer}
        got = {name: values.shape[-1] for name, values in held.items()}
        if got != wanted:
            raise SpaceError(f"expected subnets of {_listed(wanted)} numbers, got {_listed(got)}")
        genes = np.zeros((len(arrays), len(self.genes)), dtype=np.int64)
        # The depth's gene comes last: where it also gives a choice of the blocks, it decides.
        for lookup, values in (
            *((self.blocks[name], arrays.blocks[name]) for name in self.blocks),
            (self.depths, arrays.depths),
            (self.outer, arrays.outer),
            (self.resolution, arrays.resolutions[:, None]),
        ):
            genes[:, lookup.columns] = lookup.positions(values)
        genes = self.canonical(genes)
        again, past = self.arrays(genes), ~self.active(genes)
        inside = (again.depths == arrays.depths).all(axis=1)
        inside &= again.resolutions == arrays.resolutions
        inside &= (again.outer == arrays.outer).all(axis=1)
        for name, values in again.blocks.items():
            inside &= ((values == arrays.blocks[name]) | past).all(axis=1)
        return genes, inside


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
