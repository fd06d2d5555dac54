"""Search spaces as frozen data, written in genes.

A :class:`SearchSpace` is a set of :class:`~compofa.space.subnet.Subnet`. Everything that walks a
space (sampling, enumeration, mutation, features) speaks to its *genes*: a vector of small integers,
each picking one of a few choices. A free space has a gene for every choice; a compound space
(CompOFA, Sahni et al., ICLR 2021) has one gene for the depth and the width of a stage together.
Nothing outside :attr:`SearchSpace.genes` knows the difference.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np

from compofa.errors import SpaceError
from compofa.space.config import WIDE, WIDTHS, StageForm, plain
from compofa.space.genes import Gene, GeneCode
from compofa.space.stages import StageSpace, expected, keep
from compofa.space.subnet import SLOTS, Number, Subnet, SubnetArrays, arrays_of, as_number

ENUMERATION_LIMIT = 5_000_000


@dataclass(frozen=True)
class SearchSpace:
    """A set of subnets, and the one place that samples, counts, codes and restricts them.

    Attributes:
        name: For messages and file names.
        stages: The choices of each stage.
        slots: Blocks reserved for each stage in arrays and genes, at least the largest depth.
        resolutions: Allowed input resolutions in pixels. ``size`` counts them, so a space of
            one resolution counts architectures, as the papers do.
        widths: Allowed indices of width multipliers for each elastic width; empty where none is.
            A space with widths has the stages of :data:`compofa.space.config.WIDE`. Two indices
            whose channels round to the same number count as two, as in the published space.
    """

    name: str
    stages: tuple[StageSpace, ...]
    slots: int = SLOTS
    resolutions: tuple[int, ...] = (224,)
    widths: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.stages:
            raise SpaceError(f"space {self.name}: no stage left to choose from")
        if self.widths and (len(self.widths), len(self.stages)) != (WIDTHS, len(WIDE)):
            raise SpaceError(
                f"space {self.name}: expected {WIDTHS} widths with {len(WIDE)} stages, "
                f"got {len(self.widths)} with {len(self.stages)}"
            )
        for label, values in self._choices():
            if not values:
                raise SpaceError(f"space {self.name}: no {label} left to choose from")
            if len(set(values)) < len(values):
                raise SpaceError(f"space {self.name}: expected each {label} once, got {values}")
        deepest = max(depth for stage in self.stages for depth, _ in stage.pairs)
        if deepest > self.slots:
            raise SpaceError(
                f"space {self.name}: expected depths up to its {self.slots} slots, got {deepest}"
            )
        for index, (stage, form) in enumerate(zip(self.stages, self.forms, strict=True), 1):
            known = [blocks for _, blocks in form.depths]
            wrong = [depth for depth, _ in stage.pairs if depth not in known]
            if wrong:
                fault = expected(f"depth in stage {index}", known, wrong[0])
                raise SpaceError(f"space {self.name}: {fault}")
        if self.widths and min(map(min, self.widths)) < 0:
            raise SpaceError(f"space {self.name}: expected widths from 0, got {self.widths}")

    def _choices(self) -> Iterator[tuple[str, tuple[Number, ...]]]:
        yield "resolution", self.resolutions
        for index, stage in enumerate(self.stages, 1):
            yield f"depth in stage {index}", tuple(depth for depth, _ in stage.pairs)
            yield f"kernel size in stage {index}", stage.kernels
            yield f"expand ratio in stage {index}", stage.expands
        for index, indices in enumerate(self.widths, 1):
            yield f"width {index}", indices

    @property
    def size(self) -> int:
        """Exact number of distinct subnets."""
        free = prod(map(len, self.widths)) * len(self.resolutions)
        return prod(stage.size for stage in self.stages) * free

    @property
    def forms(self) -> tuple[StageForm, ...]:
        """How the field writes each stage."""
        return WIDE if self.widths else plain(len(self.stages), self.slots, self.tail)

    @property
    def tail(self) -> int:
        """How many last stages the field's form writes as one block without a depth: 0 or 1."""
        return int(self.stages[-1].single and self.slots > 1 and len(self.stages) > 2)

    @cached_property
    def code(self) -> GeneCode:
        """What the genes of this space stand for."""
        return GeneCode.of(self.stages, self.slots, self.resolutions, self.widths)

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The genes, stage by stage, then the widths, the resolution last."""
        return self.code.genes

    @property
    def cardinalities(self) -> np.ndarray:
        """Number of choices of each gene, shape [genes]."""
        return self.code.cardinalities

    def sample_genes(
        self, rng: np.random.Generator, n: int, by: Literal["genes", "subnets"] = "genes"
    ) -> np.ndarray:
        """Draw ``n`` subnets independently.

        Args:
            rng: Source of all randomness.
            n: Number of draws.
            by: ``genes`` makes every choice of every gene equally likely, as the published
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
            SpaceError: A gene is below 0 or not below its number of choices.
        """
        genes = np.asarray(genes, dtype=np.int64)
        if genes.ndim != 2 or genes.shape[1] != len(self.genes):
            raise SpaceError(f"expected {len(self.genes)} genes a subnet, got {genes.shape}")
        if genes.size and not ((genes >= 0) & (genes < self.cardinalities)).all():
            raise SpaceError(
                f"space {self.name}: expected genes from 0 up to their number of choices, got "
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
        """Write a subnet in the field's form; see :meth:`Subnet.to_config`."""
        return subnet.to_config(self.slots, self.tail)

    def arrays_of(self, subnets: Sequence[Subnet]) -> SubnetArrays:
        """Write subnets (of any space with this one's stages) as arrays."""
        return arrays_of(subnets, self.slots)

    def subnets_of(self, arrays: SubnetArrays) -> Iterator[Subnet]:
        """Read arrays back as subnets, one a row."""
        starts = range(0, arrays.ks.shape[1], self.slots)
        for kernels, expands, depths, resolution, widths in zip(
            *(values.tolist() for values in arrays), strict=True
        ):
            stages = tuple(
                tuple(
                    (kernels[block], as_number(expands[block]))
                    for block in range(start, start + depth)
                )
                for start, depth in zip(starts, depths, strict=True)
            )
            yield Subnet(resolution, stages, tuple(widths))

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

    def why_not(self, subnet: Subnet, resolution: bool = True) -> list[str]:
        """Say what keeps ``subnet`` out of this space: one clause a fault, none if it is in.

        Args:
            subnet: The candidate.
            resolution: Whether its resolution counts.
        """
        faults = []
        if resolution and subnet.resolution not in self.resolutions:
            faults.append(expected("resolution", self.resolutions, subnet.resolution))
        if len(subnet.stages) != len(self.stages):
            return [*faults, expected("stages", [len(self.stages)], len(subnet.stages))]
        if len(subnet.widths) != len(self.widths):
            return [*faults, expected("widths", [len(self.widths)], len(subnet.widths))]
        for index, (stage, blocks) in enumerate(zip(self.stages, subnet.stages, strict=True), 1):
            faults += stage.why_not(blocks, index)
        return faults + self.why_not_widths(subnet.widths)

    def why_not_widths(self, widths: Sequence[int]) -> list[str]:
        """Say what keeps ``widths`` from being those of a subnet: one clause a fault."""
        return [
            expected(f"width {place}", known, index)
            for place, (known, index) in enumerate(zip(self.widths, widths, strict=True), 1)
            if index not in known
        ]

    def contains(self, subnet: Subnet) -> bool:
        """Whether ``subnet`` is in this space, its resolution included."""
        return not self.why_not(subnet)

    def require(self, subnet: Subnet, resolution: bool = True) -> None:
        """Check that ``subnet`` is in this space.

        Raises:
            SpaceError: It is not; the message lists every fault.
        """
        faults = self.why_not(subnet, resolution)
        if faults:
            raise self.error(faults)

    def error(self, faults: Sequence[str]) -> SpaceError:
        """Return the error that tells of ``faults``, the same fault in many places once."""
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
        """The subnet with the least depth, expand ratio, kernel size and resolution."""
        return self._extreme(min)

    @cached_property
    def largest(self) -> Subnet:
        """The subnet with the greatest depth, expand ratio, kernel size and resolution."""
        return self._extreme(max)

    def _extreme(self, pick: Any) -> Subnet:
        stages = []
        for stage in self.stages:
            depth, expand = pick(stage.coupling or ((pick(stage.depths), pick(stage.expands)),))
            stages.append(((pick(stage.kernels), expand),) * depth)
        return Subnet(pick(self.resolutions), tuple(stages), tuple(map(pick, self.widths)))

    def restrict(
        self,
        *,
        depths: Sequence[int] | None = None,
        kernels: Sequence[int] | None = None,
        expands: Sequence[Number] | None = None,
        resolutions: Sequence[int] | None = None,
        widths: Sequence[int] | None = None,
        name: str | None = None,
    ) -> SearchSpace:
        """Return the part of this space with the given choices; the genes' layout may shrink.

        Depths are those that the field writes in ``d``: with elastic widths, blocks beyond the
        least of a stage. Resolutions are set, not intersected: a network runs at any resolution.
        A stage that always is one block keeps it whatever the depths.

        Raises:
            SpaceError: Nothing would be left to choose from.
        """
        stages = []
        for stage, form in zip(self.stages, self.forms, strict=True):
            pairs, ratios = stage.coupling, expands if form.slots else None
            kept = None
            if depths is not None and not stage.single:
                kept = [form.blocks(depth) for depth in depths]
            if pairs is not None:
                pairs = tuple(
                    (d, e)
                    for d, e in pairs
                    if (kept is None or d in kept) and (ratios is None or e in ratios)
                )
            stages.append(
                StageSpace(
                    keep(stage.depths, kept if pairs is None else [d for d, _ in pairs]),
                    keep(stage.kernels, kernels),
                    keep(stage.expands, ratios if pairs is None else [e for _, e in pairs]),
                    pairs,
                )
            )
        return replace(
            self,
            name=name or self.name,
            stages=tuple(stages),
            resolutions=tuple(resolutions) if resolutions is not None else self.resolutions,
            widths=tuple(keep(indices, widths) for indices in self.widths),
        )

    def free(self, name: str | None = None) -> SearchSpace:
        """Return the same choices without their coupling."""
        stages = tuple(replace(stage, coupling=None) for stage in self.stages)
        return replace(self, name=name or f"{self.name}-free", stages=stages)
