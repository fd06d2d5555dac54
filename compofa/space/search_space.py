"""Search spaces as frozen data, written in genes.

A :class:`SearchSpace` is a set of :class:`~compofa.space.subnet.Subnet`. Everything that walks a
space (sampling, enumeration, mutation, features) speaks to its *genes*: a vector of small integers,
each picking one of a few values. A free space has a gene for every choice; a compound space
(CompOFA, Sahni et al., ICLR 2021) has one gene for the depth of a stage and the choice coupled with
it. Nothing outside :attr:`SearchSpace.genes` knows the difference.

A space knows its choices by name, not what they mean: that is known to the network family alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np

from compofa.errors import SpaceError, did_you_mean
from compofa.space.arrays import SubnetArrays, arrays_of
from compofa.space.choice import Choice
from compofa.space.config import DEPTH, RESOLUTION, ConfigFormat, StageFormat
from compofa.space.definition import definition_faults
from compofa.space.genes import Gene, GeneCode
from compofa.space.stage_space import StageSpace, expected
from compofa.space.subnet import Number, Subnet, as_number

ENUMERATION_LIMIT = 5_000_000


@dataclass(frozen=True)
class SearchSpace:
    """A set of subnets, and the one place that samples, counts, encodes and restricts them.

    Attributes:
        name: For messages and file names.
        stages: The choices of each stage, of the same names in all.
        slots: Blocks reserved for each stage in arrays and genes, at least the largest depth.
        resolutions: Allowed input resolutions in pixels. ``size`` counts them, so a space of
            one resolution counts architectures, as the papers do.
        outer: Choices outside the blocks, of one name, such as output widths. Two values that give
            the same layer count as two, as in the published space.
        format: How its subnets are written; by default under the names of their choices.
    """

    name: str
    stages: tuple[StageSpace, ...]
    slots: int
    resolutions: tuple[int, ...] = (224,)
    outer: tuple[Choice, ...] = ()
    format: ConfigFormat | None = None

    def __post_init__(self) -> None:
        fault = next(definition_faults(self), None)
        if fault is not None:
            raise SpaceError(f"space {self.name}: {fault}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the choices of a block, in the order of a block's numbers."""
        return self.stages[0].names

    @cached_property
    def config_format(self) -> ConfigFormat:
        """How its subnets are written."""
        outer = self.outer[0].name if self.outer else ""
        return self.format or ConfigFormat(self.names, outer, slots=self.slots)

    @cached_property
    def stage_formats(self) -> tuple[StageFormat, ...]:
        """How each stage is written."""
        return self.config_format.stage_formats(len(self.stages), self.slots)

    @property
    def size(self) -> int:
        """Exact number of distinct subnets."""
        free = prod(len(choice.values) for choice in self.outer) * len(self.resolutions)
        return prod(stage.size for stage in self.stages) * free

    @cached_property
    def code(self) -> GeneCode:
        """What the genes of this space stand for."""
        return GeneCode.of(self.stages, self.slots, self.resolutions, self.outer)

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The genes: stage by stage, then choices outside the blocks, the resolution last."""
        return self.code.genes

    @property
    def cardinalities(self) -> np.ndarray:
        """Number of options of each gene, shape [genes]."""
        return self.code.cardinalities

    def sample_genes(
        self, rng: np.random.Generator, n: int, by: Literal["genes", "subnets"] = "genes"
    ) -> np.ndarray:
        """Draw ``n`` subnets independently.

        Args:
            rng: Source of all randomness.
            n: Number of draws.
            by: ``genes`` makes every option of every gene equally likely, as the published
                programs do: each depth of a stage is drawn equally often, though deep stages
                have more variants. ``subnets`` makes every distinct subnet equally likely.

        Returns:
            Canonical genes, shape [n, genes].
        """
        genes = self.code.draw(rng, n)
        if by == "subnets":
            for column, stage in zip(self.code.depths.columns, self.stages, strict=True):
                weights = np.array([float(stage.variants(depth)) for depth, _ in stage.pairs])
                genes[:, column] = rng.choice(len(weights), size=n, p=weights / weights.sum())
        return self.canonical(genes)

    def sample(self, rng: np.random.Generator, by: Literal["genes", "subnets"] = "genes") -> Subnet:
        """Draw one subnet; see :meth:`sample_genes`."""
        return self.decode(self.sample_genes(rng, 1, by)[0])

    def canonical(self, genes: np.ndarray) -> np.ndarray:
        """Return genes [n, genes] with those of blocks past the depth set to 0."""
        return self.code.canonical(np.asarray(genes, dtype=np.int64))

    def arrays(self, genes: np.ndarray) -> SubnetArrays:
        """Decode genes [n, genes] to arrays, all at once.

        Raises:
            SpaceError: A gene is below 0 or not below its number of options.
        """
        genes = np.asarray(genes, dtype=np.int64)
        if genes.ndim != 2 or genes.shape[1] != len(self.genes):
            raise SpaceError(f"expected {len(self.genes)} genes per subnet, got {genes.shape}")
        if genes.size and not ((genes >= 0) & (genes < self.cardinalities)).all():
            raise SpaceError(
                f"space {self.name}: expected genes from 0 up to their number of options, got "
                f"{genes.min()} to {genes.max()}"
            )
        return self.code.arrays(genes)

    def genes_of(self, arrays: SubnetArrays) -> np.ndarray:
        """Encode arrays to canonical genes, shape [n, genes]; the inverse of :meth:`arrays`.

        Entries past a stage's depth are ignored.

        Raises:
            SpaceError: A row is outside the space; the message names the first such row.
        """
        genes, inside = self.code.genes_of(arrays)
        if not inside.all():
            raise SpaceError(f"row {int(inside.argmin())} is not in space {self.name}")
        return genes

    def encode(self, subnet: Subnet) -> np.ndarray:
        """Return the canonical genes of ``subnet``, shape [genes].

        Raises:
            SpaceError: It is not in this space; the message says why.
        """
        self.require(subnet)
        return self.genes_of(self.arrays_of([subnet]))[0]

    def decode(self, genes: np.ndarray) -> Subnet:
        """Return the subnet that ``genes``, shape [genes], stand for."""
        return next(self.subnets_of(self.arrays(np.asarray(genes)[None])))

    def to_config(self, subnet: Subnet) -> dict[str, Any]:
        """Return a subnet as JSON data, in the family's config format."""
        return self.config_format.write(subnet, self.slots)

    def from_config(self, config: Mapping[str, Any], resolution: int = 224) -> Subnet:
        """Read what :meth:`to_config` wrote; it need not be in the space.

        Args:
            config: Lists of numbers by key, and ``r``.
            resolution: Used where ``config`` has no ``r``.

        Raises:
            SpaceError: A key is missing, a value is not a number of its kind or the lengths do
                not fit together.
        """
        return self.config_format.read(config, resolution)

    def arrays_of(self, subnets: Sequence[Subnet]) -> SubnetArrays:
        """Write subnets (of any space with this one's stages and choices) as arrays."""
        return arrays_of(subnets, self.names, self.slots)

    def subnets_of(self, arrays: SubnetArrays) -> Iterator[Subnet]:
        """Read arrays back as subnets, one per row."""
        form = self.config_format
        starts = range(0, len(self.stages) * self.slots, self.slots)
        columns = [[list(map(as_number, row)) for row in arrays.blocks[name].tolist()]
                   for name in self.names]  # fmt: skip
        for resolution, depths, outer, *blocks in zip(
            arrays.resolutions.tolist(), arrays.depths.tolist(), arrays.outer.tolist(), *columns,
            strict=True,
        ):  # fmt: skip
            rows = list(zip(*blocks, strict=True))
            stages = tuple(
                tuple(rows[start : start + depth])
                for start, depth in zip(starts, depths, strict=True)
            )
            yield Subnet(resolution, stages, tuple(outer), form)

    def enumerate_genes(self) -> np.ndarray:
        """Return the canonical genes of every subnet, shape [size, genes], in a fixed order.

        Raises:
            SpaceError: There are more than :data:`ENUMERATION_LIMIT`.
        """
        if self.size > ENUMERATION_LIMIT:
            raise SpaceError(
                f"space {self.name} has {self.size:.3g} subnets: expected at most "
                f"{ENUMERATION_LIMIT} to enumerate; sample it instead"
            )
        parts = []
        for stage in [*range(len(self.stages)), -1]:
            columns = [column for column, gene in enumerate(self.genes) if gene.stage == stage]
            rows = np.zeros((prod(self.cardinalities[columns].tolist()), len(self.genes)), int)
            rows[:, columns] = list(product(*(range(self.cardinalities[c]) for c in columns)))
            parts.append(np.unique(self.canonical(rows)[:, columns], axis=0))
        index = np.unravel_index(np.arange(self.size), [len(part) for part in parts])
        return np.concatenate([part[rows] for part, rows in zip(parts, index, strict=True)], axis=1)

    def enumerate(self) -> Iterator[Subnet]:
        """Yield every subnet once, in the order of :meth:`enumerate_genes`."""
        return self.subnets_of(self.arrays(self.enumerate_genes()))

    def faults(self, subnet: Subnet, resolution: bool = True) -> list[str]:
        """Return what keeps ``subnet`` out of this space, one clause per fault; none if it is in.

        Args:
            subnet: The candidate.
            resolution: Whether its resolution counts.
        """
        faults = []
        if resolution and subnet.resolution not in self.resolutions:
            faults.append(expected(RESOLUTION, self.resolutions, subnet.resolution))
        if len(subnet.stages) != len(self.stages):
            return [*faults, expected("stages", [len(self.stages)], len(subnet.stages))]
        if len(subnet.outer) != len(self.outer):
            what = f"{self.config_format.outer or 'outer'} choices"
            return [*faults, expected(what, [len(self.outer)], len(subnet.outer))]
        for index, (stage, blocks) in enumerate(zip(self.stages, subnet.stages, strict=True), 1):
            faults += stage.faults(blocks, index)
        return faults + self.outer_faults(subnet.outer)

    def outer_faults(self, values: Sequence[Number]) -> list[str]:
        """Return one clause per fault of ``values`` as those outside the blocks."""
        return [
            expected(f"{choice.name} {place}", choice.values, value)
            for place, (choice, value) in enumerate(zip(self.outer, values, strict=True), 1)
            if value not in choice.values
        ]

    def contains(self, subnet: Subnet) -> bool:
        """Whether ``subnet`` is in this space, its resolution included."""
        return not self.faults(subnet)

    def require(self, subnet: Subnet, resolution: bool = True) -> None:
        """Check that ``subnet`` is in this space.

        Raises:
            SpaceError: It is not; the message lists every fault.
        """
        faults = self.faults(subnet, resolution)
        if faults:
            raise self.error(faults)

    def error(self, faults: Sequence[str]) -> SpaceError:
        """Return an error listing ``faults``, each once with the places it occurs in."""
        places: dict[str, list[str]] = {}
        for fault in faults:
            place, _, what = fault.partition(": ")
            places.setdefault(what, []).append(place)
        clauses = []
        for what, where in places.items():
            more = f" and {len(where) - 4} more" if len(where) > 4 else ""
            clauses.append(f"{', '.join(where[:4])}{more}: {what}")
        return SpaceError(f"not in space {self.name}: " + "; ".join(clauses))

    @cached_property
    def smallest(self) -> Subnet:
        """The subnet with the least value of every choice."""
        return self._extreme(min)

    @cached_property
    def largest(self) -> Subnet:
        """The subnet with the greatest value of every choice."""
        return self._extreme(max)

    def _extreme(self, pick: Any) -> Subnet:
        stages = []
        for stage in self.stages:
            block = [pick(choice.values) for choice in stage.choices]
            depth, block[-1] = pick(stage.coupling or ((pick(stage.depths), block[-1]),))
            stages.append((tuple(block),) * depth)
        outer = tuple(pick(choice.values) for choice in self.outer)
        return Subnet(pick(self.resolutions), tuple(stages), outer, self.config_format)

    def restrict(
        self,
        *,
        resolutions: Sequence[int] | None = None,
        name: str | None = None,
        **wanted: Sequence[Number] | None,
    ) -> SearchSpace:
        """Return the part of this space with the given values; the genes' layout may shrink.

        Args:
            resolutions: Input resolutions in pixels. They are set, not intersected: a network runs
                at any resolution.
            name: Of the new space.
            wanted: Values to keep, by name of the choice. A ``depth`` is counted as the config
                format writes it: in ResNet50D, blocks beyond the least of a stage. A stage that
                always is one block keeps it whatever the depths, and a stage whose choices are not
                written keeps them.

        Raises:
            SpaceError: A name that no choice has, or nothing would be left to choose from.
        """
        outer = self.config_format.outer
        known = [*self.names, DEPTH, *filter(None, [outer])]
        unknown = [key for key in wanted if key not in known]
        if unknown:
            hint = did_you_mean(unknown[0], known)
            raise SpaceError(f"{unknown[0]}: {hint}expected a choice of {', '.join(known)}")
        stages = []
        for stage, how in zip(self.stages, self.stage_formats, strict=True):
            depths = wanted.get(DEPTH)
            if depths is not None:
                depths = None if stage.depths == (1,) else [how.blocks(depth) for depth in depths]
            kept = {key: values if how.slots else None for key, values in wanted.items()}
            pairs, coupled = stage.coupling, stage.names[-1]
            if pairs is not None:
                values = kept.get(coupled)
                pairs = tuple(
                    (depth, value)
                    for depth, value in pairs
                    if (depths is None or depth in depths) and (values is None or value in values)
                )
                depths = [depth for depth, _ in pairs]
                kept[coupled] = [value for _, value in pairs]
            choices = tuple(_keep(choice, kept.get(choice.name)) for choice in stage.choices)
            stages.append(StageSpace(_kept(stage.depths, depths), choices, pairs))
        return replace(
            self,
            name=name or self.name,
            stages=tuple(stages),
            resolutions=self.resolutions if resolutions is None else tuple(resolutions),
            outer=tuple(_keep(choice, wanted.get(outer)) for choice in self.outer),
        )

    def free(self, name: str | None = None) -> SearchSpace:
        """Return the same choices without their coupling."""
        stages = tuple(replace(stage, coupling=None) for stage in self.stages)
        return replace(self, name=name or f"{self.name}-free", stages=stages)


def _keep(choice: Choice, wanted: Sequence[Number] | None) -> Choice:
    return Choice(choice.name, _kept(choice.values, wanted))


def _kept(values: tuple[Any, ...], wanted: Sequence[Any] | None) -> tuple[Any, ...]:
    return tuple(value for value in values if wanted is None or value in wanted)
