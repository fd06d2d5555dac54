"""Evolution on genes: for many budgets at once, and for a front of several objectives.

It composes the operators of :mod:`nas.search.operators`; the functions to call are in
:mod:`nas.search.search`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compofa.errors import SearchError
from compofa.seeds import rng as seeded
from compofa.space.arrays import SubnetArrays
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.accuracy.base import AccuracyModel
from nas.cost.base import Cost
from nas.search import operators
from nas.search.pareto import pareto_front

CHUNK = 1 << 16
MARGIN = 0.03
"""Fraction by which parents may exceed a budget: the path between two subnets just below it often
passes through subnets just above."""
UNCROSSED = 0.2
"""Fraction of children that are mutations of one parent, without crossover."""
REPAIRS = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
"""Fractions of genes replaced by those of the cheapest subnet, in order, while a row exceeds its
budget."""
CLIMBS = 500
"""Largest number of steps of a climb; each changes one gene."""


class Points(NamedTuple):
    """Evaluated subnets.

    Attributes:
        genes: Canonical genes, uint8 of shape [n, genes].
        accuracy: Shape [n], in the predictor's unit.
        costs: Shape [n, costs], in each cost's unit.
    """

    genes: np.ndarray
    accuracy: np.ndarray
    costs: np.ndarray

    def take(self, rows: np.ndarray) -> Points:
        """Return some rows, in their order."""
        return Points(*(field[rows] for field in self))

    @property
    def objectives(self) -> np.ndarray:
        """Negated accuracy and the costs, all minimised, shape [n, 1 + costs]."""
        return np.column_stack([-self.accuracy, self.costs])

    def subnets(self, space: SearchSpace) -> list[Subnet]:
        """Decode every row."""
        return list(space.subnets_of(space.arrays(self.genes)))


@dataclass(frozen=True)
class Evolution:
    """How much effort an evolution for budgets makes.

    Attributes:
        population: Parents kept for each budget in each restart.
        children: Candidates made for each budget, restart and generation.
        generations: Rounds of children after the first population.
        restarts: Independent evolutions; the best of all counts.
    """

    population: int = 30
    children: int = 250
    generations: int = 50
    restarts: int = 6

    def __post_init__(self) -> None:
        for field, least in (("population", 1), ("children", 1), ("generations", 0)):
            if getattr(self, field) < least:
                raise SearchError(f"{field}: expected at least {least}, got {getattr(self, field)}")
        if not 1 <= self.restarts <= 256:
            raise SearchError(f"restarts: expected 1 to 256, got {self.restarts}")


def extreme(space: SearchSpace, cost: Cost, greatest: bool = False) -> tuple[np.ndarray, float]:
    """Find the cheapest (or the most expensive) subnet.

    Exact for costs that are sums over blocks and rise with their choices, as counts do: the
    search starts at the space's smallest (largest) subnet and at the best of a few hundred
    others, and changes one gene at a time until no change helps.

    Returns:
        Its canonical genes, shape [genes], and its cost.
    """
    problem, sign = Problem(space, None, [cost]), -1.0 if greatest else 1.0
    start = space.encode(space.largest if greatest else space.smallest).astype(np.uint8)
    others = operators.sample(seeded("extreme", space.name), space, 256)
    others = others[[int((sign * problem.costs_of(others)[:, 0]).argmin())]]
    found = [
        _climb(space, genes, lambda rows: sign * problem.costs_of(rows)[:, 0])
        for genes in (start, others[0])
    ]
    genes, value = min(found, key=lambda pair: pair[1])
    return genes, sign * value


class Problem:
    """Evaluates genes by a predictor and costs, and checks the values they return."""

    def __init__(
        self, space: SearchSpace, accuracy: AccuracyModel | None, costs: Sequence[Cost]
    ) -> None:
        if space.cardinalities.max() > 256:
            raise SearchError(f"space {space.name}: expected at most 256 choices per gene")
        self.space, self.accuracy, self.costs = space, accuracy, costs
        self.evaluated = 0

    def costs_of(self, genes: np.ndarray) -> np.ndarray:
        """Return the costs of each row, shape [n, costs]."""
        return self._costs(self.space.arrays(genes))

    def evaluate(self, genes: np.ndarray) -> Points:
        """Evaluate every row, in chunks."""
        starts = range(0, len(genes), CHUNK)
        return join([self.within(genes[start : start + CHUNK])[1] for start in starts])

    def within(
        self, genes: np.ndarray, limits: np.ndarray | float = np.inf
    ) -> tuple[np.ndarray, Points]:
        """Evaluate the rows whose first cost is at most their limit; return those rows too."""
        arrays = self.space.arrays(genes)
        costs = self._costs(arrays)
        rows = np.flatnonzero(costs[:, 0] <= limits)
        if len(rows) < len(genes):
            arrays = arrays[rows]
        accuracy = self.accuracy.predict(arrays) if len(rows) else np.zeros(0)
        self.evaluated += len(rows)
        require_finite(f"the accuracy model {self.accuracy.name}", accuracy)
        return rows, Points(genes[rows], accuracy, costs[rows])

    def _costs(self, arrays: SubnetArrays) -> np.ndarray:
        columns = [cost(arrays) for cost in self.costs]
        for cost, column in zip(self.costs, columns, strict=True):
            require_finite(f"the cost {cost.name}", column, 0)
        return np.stack(columns, axis=1)


def evolve_budgets(
    rng: np.random.Generator,
    problem: Problem,
    budgets: np.ndarray,
    cheapest: np.ndarray,
    settings: Evolution,
) -> Points:
    """Evolve all budgets in all restarts at once.

    Each restart has its own pool, in which a candidate made for one budget serves all budgets that
    it meets.

    Args:
        rng: Random generator.
        problem: The problem; budgets limit its first cost.
        budgets: Budgets that ``cheapest`` meets, shape [budgets].
        cheapest: Genes of the cheapest subnet, which repair others, shape [genes].
        settings: Effort.

    Returns:
        The front of all evaluated subnets, by rising cost; it has the best one for each budget.
    """
    space, share = problem.space, len(budgets) * settings.children
    own = np.tile(np.repeat(budgets, settings.children), settings.restarts)
    made_in = np.repeat(np.arange(settings.restarts, dtype=np.uint8), share)
    genes = _first_population(rng, problem, cheapest, own)
    seen = np.zeros(0, dtype=np.uint64)
    points, pool, front = None, made_in[:0], None
    for generation in range(settings.generations + 1):
        hashed = operators.keys(np.column_stack([genes, made_in]))
        fresh = operators.deduplicate(hashed, seen)
        fits, new = problem.within(genes[fresh], own[fresh] * (1 + MARGIN))
        fresh = fresh[fits]
        seen = operators.remember(seen, hashed[fresh])
        points = new if points is None else join([points, new])
        pool = np.concatenate([pool, made_in[fresh]])
        front = _front(new if front is None else join([front, new]))
        if generation < settings.generations:
            parents = _parents(points, pool, budgets, settings)
            genes = _children(rng, space, points.genes, parents, settings.children)
            rows = np.unique(np.concatenate(parents))
            points, pool = points.take(rows), pool[rows]
    return _front(join([front, _polish(problem, front, budgets)]))


def _front(points: Points) -> Points:
    return points.take(pareto_front(points.costs[:, 0], points.accuracy))


def _first_population(
    rng: np.random.Generator, problem: Problem, cheapest: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """Sample a row per limit; replace ever more of its genes by the cheapest until it fits."""
    genes = operators.sample(rng, problem.space, len(limits))
    over = np.arange(len(limits))
    for share in REPAIRS:
        over = over[problem.costs_of(genes[over])[:, 0] > limits[over]]
        if not len(over):
            break
        blended = operators.blend(rng, genes[over], cheapest, share)
        genes[over] = operators.canonicalise(problem.space, blended)
    return genes


def _parents(
    points: Points, pool: np.ndarray, budgets: np.ndarray, settings: Evolution
) -> list[np.ndarray]:
    """Select the best rows of each restart and budget, within the budget and within its margin."""
    ranked = np.lexsort((-points.accuracy, pool))
    ends = np.searchsorted(pool[ranked], np.arange(settings.restarts + 1))
    cost, parents = points.costs[:, 0], []
    for restart in range(settings.restarts):
        rows = ranked[ends[restart] : ends[restart + 1]]
        for budget in budgets:
            within = operators.select(rows, cost <= budget, settings.population)
            near = operators.select(rows, cost <= budget * (1 + MARGIN), settings.population)
            parents.append(np.concatenate([within, near]))
    return parents


def _children(
    rng: np.random.Generator,
    space: SearchSpace,
    genes: np.ndarray,
    parents: list[np.ndarray],
    count: int,
) -> np.ndarray:
    """Return ``count`` canonical children per set of parents, set after set."""
    first = operators.pick(rng, parents, count)
    second = operators.pick(rng, parents, count)
    alone = round(UNCROSSED * count)
    second[:, :alone] = first[:, :alone]
    crossed = operators.crossover(rng, genes[first.ravel()], genes[second.ravel()])
    mutated = operators.mutate(rng, crossed, space.cardinalities, 1 / genes.shape[1])
    return operators.canonicalise(space, mutated)


def _polish(problem: Problem, front: Points, budgets: np.ndarray) -> Points:
    """Climb from the best subnet of each budget; return all subnets evaluated on the way."""
    evaluated = [front.take(np.arange(0))]
    for budget in budgets:

        def score(genes: np.ndarray, budget: float = budget) -> np.ndarray:
            rows, tried = problem.within(genes, budget)
            evaluated.append(tried)
            scores = np.full(len(genes), np.inf)
            scores[rows] = -tried.accuracy
            return scores

        _climb(problem.space, front.genes[best_within(front, budget)], score)
    return join(evaluated)


def best_within(front: Points, budget: float) -> int:
    """Return the most accurate row within ``budget`` of a front by rising cost.

    That is the first row if none is within: the last digits of a cost may depend on the number of
    rows evaluated at once, so that the cheapest subnet exceeds a budget equal to its own cost.
    """
    return max(0, int(np.searchsorted(front.costs[:, 0], budget, side="right")) - 1)


def evolve_front(
    rng: np.random.Generator,
    problem: Problem,
    ends: np.ndarray,
    population: int,
    generations: int,
) -> Points:
    """Evolve a front of all objectives by NSGA-II (Deb et al., 2002).

    Args:
        rng: Random generator.
        problem: The problem.
        ends: Genes of extreme subnets, towards which the first population is blended, [n, genes].
        population: Number of survivors and of children per generation.
        generations: Number of generations after the first population.

    Returns:
        All evaluated subnets.
    """
    space = problem.space
    sampled = operators.sample(rng, space, population)
    towards = ends[rng.integers(0, len(ends), size=population)]
    blended = operators.blend(rng, sampled, towards, rng.random((population, 1)))
    genes = operators.canonicalise(space, np.concatenate([ends, sampled, blended]))
    seen = np.zeros(0, dtype=np.uint64)
    evaluated, alive = [], None
    for generation in range(generations + 1):
        hashed = operators.keys(genes)
        fresh = operators.deduplicate(hashed, seen)
        points = problem.evaluate(genes[fresh])
        seen = operators.remember(seen, hashed[fresh])
        evaluated.append(points)
        alive = points if alive is None else join([alive, points])
        if generation < generations:
            alive = alive.take(operators.crowded(alive.objectives, population))
            genes = _children(rng, space, alive.genes, [np.arange(len(alive.genes))], population)
    return join(evaluated)


def _climb(
    space: SearchSpace, genes: np.ndarray, score: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, float]:
    """Change one gene at a time, the one that lowers ``score`` most, until none lowers it."""
    best = float(score(genes[None])[0])
    for _ in range(CLIMBS):
        rows = operators.neighbours(genes, space.cardinalities)
        rows = operators.canonicalise(space, rows)
        scores = score(rows)
        if not len(scores) or scores.min() >= best:
            break
        genes, best = rows[scores.argmin()], float(scores.min())
    return genes, best


def join(parts: Sequence[Points]) -> Points:
    """Concatenate points."""
    return Points(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def require_finite(what: str, values: np.ndarray, least: float = -np.inf) -> None:
    """Check the values that a model returned.

    Raises:
        SearchError: Values are NaN, infinite or below ``least``.
    """
    wrong = values[~(np.isfinite(values) & (values >= least))]
    if len(wrong):
        bound = "" if least == -np.inf else f", each at least {least:g}"
        raise SearchError(
            f"expected finite numbers from {what}{bound}, got {wrong[0]:g} for {len(wrong)} of "
            f"{len(values)} subnets"
        )
