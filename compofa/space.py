"""Search spaces as frozen data, written in genes.

A :class:`SearchSpace` is a set of :class:`~compofa.subnet.Subnet`. Everything that walks a space
(sampling, enumeration, mutation, features) speaks to its *genes*: a vector of small integers,
each picking one of a few choices. A free space has a gene for every choice; a compound space
(CompOFA, Sahni et al., ICLR 2021) has one gene for the depth and the width of a stage together.
Nothing outside :attr:`SearchSpace.genes` knows the difference.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import prod
from typing import Any, Literal

import numpy as np

from compofa.coupling import Coupling
from compofa.errors import SpaceError
from compofa.subnet import SLOTS, Number, Subnet, SubnetArrays, as_number

ENUMERATION_LIMIT = 5_000_000


@dataclass(frozen=True)
class StageSpace:
    """The choices of one stage.

    Attributes:
        depths: Allowed numbers of blocks.
        kernels: Allowed kernel sizes of every block.
        expands: Allowed expand ratios of every block.
        coupling: Pairs (depth, expand ratio) when the two are one choice; ``None`` when free.
    """

    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    expands: tuple[Number, ...]
    coupling: Coupling | None = None

    @property
    def size(self) -> int:
        """Number of distinct stages."""
        if self.coupling is not None:
            return sum(len(self.kernels) ** depth for depth, _ in self.coupling)
        return sum((len(self.kernels) * len(self.expands)) ** depth for depth in self.depths)


@dataclass(frozen=True)
class Gene:
    """One choice of a space: where it applies and the values it picks from.

    Attributes:
        stage: Index of the stage it shapes; -1 for the resolution.
        slot: Index of the block within the stage; ``None`` when it is the stage's as a whole.
        choices: Each a mapping from ``d``, ``e``, ``ks`` or ``r`` to a value.
    """

    stage: int
    slot: int | None
    choices: tuple[Mapping[str, Number], ...]


@dataclass(frozen=True)
class SearchSpace:
    """A set of subnets, and the one place that samples, counts, codes and restricts them.

    Attributes:
        name: For messages and file names.
        stages: The choices of each stage.
        slots: Blocks reserved for each stage in arrays and genes, at least the largest depth.
        resolutions: Allowed input resolutions in pixels. ``size`` counts them, so a space of
            one resolution counts architectures, as the papers do.
    """

    name: str
    stages: tuple[StageSpace, ...]
    slots: int = SLOTS
    resolutions: tuple[int, ...] = (224,)

    def __post_init__(self) -> None:
        for label, values in self._choices():
            if not values:
                raise SpaceError(f"space {self.name}: no {label} left to choose from")

    def _choices(self) -> Iterator[tuple[str, Sequence[Any]]]:
        yield "resolution", self.resolutions
        yield "stage", self.stages
        for index, stage in enumerate(self.stages, 1):
            yield (
                f"depth in stage {index}",
                stage.depths if stage.coupling is None else (stage.coupling),
            )
            yield f"kernel size in stage {index}", stage.kernels
            yield f"expand ratio in stage {index}", stage.expands

    @property
    def size(self) -> int:
        """Exact number of distinct subnets."""
        return prod(stage.size for stage in self.stages) * len(self.resolutions)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        """The genes, stage by stage, the resolution last."""
        genes: list[Gene] = []
        for index, stage in enumerate(self.stages):
            blocks = range(self.slots)
            if stage.coupling is not None:
                pairs = tuple({"d": depth, "e": expand} for depth, expand in stage.coupling)
                genes.append(Gene(index, None, pairs))
            else:
                genes.append(Gene(index, None, tuple({"d": depth} for depth in stage.depths)))
                expands = tuple({"e": expand} for expand in stage.expands)
                genes.extend(Gene(index, slot, expands) for slot in blocks if len(expands) > 1)
            kernels = tuple({"ks": kernel} for kernel in stage.kernels)
            genes.extend(Gene(index, slot, kernels) for slot in blocks if len(kernels) > 1)
        genes.append(Gene(-1, None, tuple({"r": r} for r in self.resolutions)))
        return tuple(genes)

    @cached_property
    def cardinalities(self) -> np.ndarray:
        """Number of choices of each gene, shape [genes]."""
        return np.array([len(gene.choices) for gene in self.genes])

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
        genes = rng.integers(0, self.cardinalities, size=(n, len(self.genes)))
        if by == "subnets":
            for column, gene in enumerate(self.genes):
                if "d" in gene.choices[0]:
                    stage = self.stages[gene.stage]
                    block = len(stage.kernels)
                    block *= len(stage.expands) if stage.coupling is None else 1
                    weights = np.array([float(block) ** choice["d"] for choice in gene.choices])
                    genes[:, column] = rng.choice(len(weights), size=n, p=weights / weights.sum())
        return self.canonical(genes)

    def sample(self, rng: np.random.Generator, by: Literal["genes", "subnets"] = "genes") -> Subnet:
        """Draw one subnet; see :meth:`sample_genes`."""
        return self.decode(self.sample_genes(rng, 1, by)[0])

    def canonical(self, genes: np.ndarray) -> np.ndarray:
        """Return genes [n, genes] with those of blocks past the depth set to 0."""
        genes = np.array(genes, copy=True)
        depths = self._depths(genes)
        for column, gene in enumerate(self.genes):
            if gene.slot is not None:
                genes[depths[:, gene.stage] <= gene.slot, column] = 0
        return genes

    def arrays(self, genes: np.ndarray) -> SubnetArrays:
        """Decode genes [n, genes] to arrays, all at once."""
        genes = np.asarray(genes)
        n, blocks = len(genes), self.slots * len(self.stages)
        integral = all(float(e).is_integer() for stage in self.stages for e in stage.expands)
        kernels = np.zeros((n, blocks), dtype=np.int64)
        expands = np.zeros((n, blocks), dtype=np.int64 if integral else np.float64)
        depths = self._depths(genes)
        resolutions = np.zeros(n, dtype=np.int64)
        for index, stage in enumerate(self.stages):
            columns = slice(index * self.slots, (index + 1) * self.slots)
            kernels[:, columns] = stage.kernels[0]
            expands[:, columns] = stage.expands[0]
        for column, gene in enumerate(self.genes):
            picked = genes[:, column]
            for variable in gene.choices[0]:
                values = np.array([choice[variable] for choice in gene.choices])[picked]
                if variable == "r":
                    resolutions[:] = values
                elif variable != "d":
                    target = kernels if variable == "ks" else expands
                    target[:, self._columns(gene)] = values[:, None]
        active = np.tile(np.arange(self.slots), len(self.stages)) < np.repeat(
            depths, self.slots, axis=1
        )
        return SubnetArrays(kernels * active, expands * active, depths, resolutions)

    def genes_of(self, arrays: SubnetArrays) -> np.ndarray:
        """Encode arrays to canonical genes, shape [n, genes]; the inverse of :meth:`arrays`.

        Entries past a stage's depth are ignored.

        Raises:
            SpaceError: A row is outside the space; the message names the first such row.
        """
        values = {"d": arrays.d, "e": arrays.e, "ks": arrays.ks, "r": arrays.r}
        genes = np.zeros((len(arrays.r), len(self.genes)), dtype=np.int64)
        outside = self._outside_fixed(arrays)
        for column, gene in enumerate(self.genes):
            matches = np.ones((len(arrays.r), len(gene.choices)), dtype=bool)
            for position, choice in enumerate(gene.choices):
                for variable, value in choice.items():
                    matches[:, position] &= self._holds(gene, variable, value, values)
            genes[:, column] = matches.argmax(axis=1)
            outside |= ~matches.any(axis=1)
        if outside.any():
            raise SpaceError(f"row {int(outside.argmax())} is not in space {self.name}")
        return self.canonical(genes)

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

    def arrays_of(self, subnets: Sequence[Subnet]) -> SubnetArrays:
        """Write subnets (of any space with this one's stages) as arrays."""
        configs = [subnet.to_config(self.slots) for subnet in subnets]
        return SubnetArrays(
            *(np.array([config[key] for config in configs]) for key in ("ks", "e", "d", "r"))
        )

    def subnets_of(self, arrays: SubnetArrays) -> Iterator[Subnet]:
        """Read arrays back as subnets, one a row."""
        starts = range(0, arrays.ks.shape[1], self.slots)
        for kernels, expands, depths, resolution in zip(
            arrays.ks.tolist(),
            arrays.e.tolist(),
            arrays.d.tolist(),
            arrays.r.tolist(),
            strict=True,
        ):
            stages = tuple(
                tuple(
                    (kernels[block], as_number(expands[block]))
                    for block in range(start, start + depth)
                )
                for start, depth in zip(starts, depths, strict=True)
            )
            yield Subnet(resolution, stages)

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
            faults.append(_expected("resolution", self.resolutions, subnet.resolution))
        if len(subnet.stages) != len(self.stages):
            return [*faults, f"expected {len(self.stages)} stages, got {len(subnet.stages)}"]
        for index, (stage, blocks) in enumerate(zip(self.stages, subnet.stages, strict=True), 1):
            if len(blocks) not in stage.depths:
                faults.append(_expected(f"stage {index} depth", stage.depths, len(blocks)))
                continue
            coupled = dict(stage.coupling or ()).get(len(blocks))
            for position, (kernel, expand) in enumerate(blocks, 1):
                where = f"stage {index} block {position}"
                if kernel not in stage.kernels:
                    faults.append(_expected(f"{where} kernel size", stage.kernels, kernel))
                if expand not in stage.expands:
                    faults.append(_expected(f"{where} expand ratio", stage.expands, expand))
                elif coupled is not None and expand != coupled:
                    what = f"{where} expand ratio (coupled with depth {len(blocks)})"
                    faults.append(_expected(what, (coupled,), expand))
        return faults

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
            more = f"; and {len(faults) - 4} more" if len(faults) > 4 else ""
            raise SpaceError(f"not in space {self.name}: " + "; ".join(faults[:4]) + more)

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
        return Subnet(pick(self.resolutions), tuple(stages))

    def restrict(
        self,
        *,
        depths: Sequence[int] | None = None,
        kernels: Sequence[int] | None = None,
        expands: Sequence[Number] | None = None,
        resolutions: Sequence[int] | None = None,
        name: str | None = None,
    ) -> SearchSpace:
        """Return the part of this space with the given choices; the genes' layout may shrink.

        Resolutions are set, not intersected: a network runs at any resolution.

        Raises:
            SpaceError: Nothing would be left to choose from.
        """
        stages = []
        for stage in self.stages:
            pairs = stage.coupling
            if pairs is not None:
                pairs = tuple(
                    (d, e)
                    for d, e in pairs
                    if (depths is None or d in depths) and (expands is None or e in expands)
                )
            stages.append(
                StageSpace(
                    _keep(stage.depths, depths if pairs is None else [d for d, _ in pairs]),
                    _keep(stage.kernels, kernels),
                    _keep(stage.expands, expands if pairs is None else [e for _, e in pairs]),
                    pairs,
                )
            )
        return replace(
            self,
            name=name or self.name,
            stages=tuple(stages),
            resolutions=tuple(resolutions) if resolutions is not None else self.resolutions,
        )

    def free(self, name: str | None = None) -> SearchSpace:
        """Return the same choices without their coupling."""
        stages = tuple(replace(stage, coupling=None) for stage in self.stages)
        return replace(self, name=name or f"{self.name}-free", stages=stages)

    def _depths(self, genes: np.ndarray) -> np.ndarray:
        depths = np.zeros((len(genes), len(self.stages)), dtype=np.int64)
        for column, gene in enumerate(self.genes):
            if "d" in gene.choices[0]:
                values = np.array([choice["d"] for choice in gene.choices])
                depths[:, gene.stage] = values[genes[:, column]]
        return depths

    def _columns(self, gene: Gene) -> slice:
        first = gene.stage * self.slots
        if gene.slot is None:
            return slice(first, first + self.slots)
        return slice(first + gene.slot, first + gene.slot + 1)

    def _holds(
        self, gene: Gene, variable: str, value: Number, arrays: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        if variable == "r":
            return arrays["r"] == value
        if variable == "d":
            return arrays["d"][:, gene.stage] == value
        columns = self._columns(gene)
        slots = np.arange(self.slots)[columns.start % self.slots :][: columns.stop - columns.start]
        past = slots >= arrays["d"][:, [gene.stage]]
        return ((arrays[variable][:, columns] == value) | past).all(axis=1)

    def _outside_fixed(self, arrays: SubnetArrays) -> np.ndarray:
        """Rows that break a choice of which only one is left, and which so has no gene."""
        outside = np.zeros(len(arrays.r), dtype=bool)
        if (
            arrays.d.shape[1:] != (len(self.stages),)
            or arrays.ks.shape != arrays.e.shape
            or (arrays.ks.shape[1:] != (len(self.stages) * self.slots,))
        ):
            raise SpaceError(
                f"expected {len(self.stages)} depths and {len(self.stages) * self.slots} blocks "
                f"a subnet, got {arrays.d.shape[1:]} and {arrays.ks.shape[1:]}"
            )
        values = {"e": arrays.e, "ks": arrays.ks, "d": arrays.d, "r": arrays.r}
        for index, stage in enumerate(self.stages):
            whole = Gene(index, None, ())
            if len(stage.kernels) == 1:
                outside |= ~self._holds(whole, "ks", stage.kernels[0], values)
            if len(stage.expands) == 1:
                outside |= ~self._holds(whole, "e", stage.expands[0], values)
        return outside


def _keep(values: tuple[Any, ...], wanted: Sequence[Any] | None) -> tuple[Any, ...]:
    return tuple(value for value in values if wanted is None or value in wanted)


def _expected(what: str, choices: Sequence[Any], got: Any) -> str:
    return f"{what}: expected {' or '.join(str(choice) for choice in choices)}, got {got}"
