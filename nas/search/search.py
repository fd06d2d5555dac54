"""Searching a space: the best subnets for budgets, and Pareto sets of several objectives.

Spaces of up to a million subnets are enumerated, so the answer is the optimum. Larger ones are
searched by an evolution on genes (:mod:`nas.search.evolution`): several independent restarts, each
serving all budgets at once from one pool.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compofa.errors import SearchError
from compofa.seeds import rng as seeded
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.accuracy.base import AccuracyModel
from nas.cost.base import Cost
from nas.search import operators
from nas.search.evolution import (
    Evolution,
    Points,
    Problem,
    best_within,
    evolve_budgets,
    evolve_front,
    extreme,
)
from nas.search.pareto import non_dominated, pareto_front

log = logging.getLogger(__name__)

ENUMERATE_UP_TO = 1_000_000
FRONT_BUDGETS = 32
FRONT_EVOLUTION = Evolution(population=20, children=200, generations=50, restarts=1)


@dataclass(frozen=True)
class Found:
    """The best subnet for one budget.

    Attributes:
        budget: Upper bound of its cost.
        subnet: The subnet.
        accuracy: Predicted accuracy, in the predictor's unit.
        cost: Its cost, at most ``budget``.
        evaluated: Number of subnets that the whole search evaluated, all budgets together.
        exact: Whether every subnet of the space was compared.
        slack: Whether every subnet of the space meets the budget: it is not binding.
    """

    budget: float
    subnet: Subnet
    accuracy: float
    cost: float
    evaluated: int
    exact: bool
    slack: bool


def search(
    space: SearchSpace,
    accuracy: AccuracyModel,
    cost: Cost,
    budgets: Sequence[float],
    *,
    seed: int = 0,
    evolution: Evolution | None = None,
    enumerate_up_to: int = ENUMERATE_UP_TO,
) -> list[Found]:
    """Find the most accurate subnet for each budget.

    Args:
        space: The space to search.
        accuracy: Predictor whose value is maximised.
        cost: Cost that the budgets limit.
        budgets: In the unit of ``cost``.
        seed: Random seed; not used where the space is enumerated.
        evolution: Effort of the evolution where the space is not enumerated.
        enumerate_up_to: Largest space to enumerate.

    Returns:
        One result per budget, in the given order. A budget that no subnet meets is left out with a
        warning that names the least cost and the subnet that has it.

    Raises:
        SearchError: There is no budget, one is not a number, or no subnet meets any of them.
    """
    limits = np.unique(_budgets(budgets))
    if space.size <= enumerate_up_to:
        points = enumerate_points(space, accuracy, [cost])
        evaluated = len(points.genes)
        least, most = points.costs[:, 0].argmin(), points.costs[:, 0].max()
        limits = within_reach(space, cost, limits, points.genes[least], points.costs[least, 0])
    else:
        cheapest, least = extreme(space, cost)
        limits = within_reach(space, cost, limits, cheapest, least)
        most = extreme(space, cost, greatest=True)[1]
        problem = Problem(space, accuracy, [cost])
        points = evolve_budgets(
            seeded("search", seed), problem, limits, cheapest, evolution or Evolution()
        )
        evaluated = problem.evaluated
    front = points.take(pareto_front(points.costs[:, 0], points.accuracy))
    results = []
    for budget in (float(budget) for budget in budgets if budget >= limits[0]):
        best = best_within(front, budget)
        results.append(
            Found(
                budget=budget,
                subnet=space.decode(front.genes[best]),
                accuracy=float(front.accuracy[best]),
                cost=float(front.costs[best, 0]),
                evaluated=evaluated,
                exact=space.size <= enumerate_up_to,
                slack=bool(budget >= most),
            )
        )
    return results


def search_front(
    space: SearchSpace,
    accuracy: AccuracyModel,
    cost: Cost,
    *,
    seed: int = 0,
    evolution: Evolution = FRONT_EVOLUTION,
    enumerate_up_to: int = ENUMERATE_UP_TO,
) -> Points:
    """Find the whole front of accuracy against one cost.

    Exact where the space is enumerated; elsewhere :data:`FRONT_BUDGETS` budgets from the least
    cost to the greatest are searched at once. See :func:`search` for the arguments.

    Returns:
        The front by rising cost, and so by rising accuracy.
    """
    problem = Problem(space, accuracy, [cost])
    if space.size <= enumerate_up_to:
        points = enumerate_points(space, accuracy, [cost])
        return points.take(pareto_front(points.costs[:, 0], points.accuracy))
    (cheapest, least), (_, most) = extreme(space, cost), extreme(space, cost, greatest=True)
    budgets = least + (most - least) * np.linspace(0, 1, FRONT_BUDGETS) ** 2
    return evolve_budgets(seeded("front", seed), problem, budgets, cheapest, evolution)


def pareto_search(
    space: SearchSpace,
    accuracy: AccuracyModel,
    costs: Sequence[Cost],
    *,
    seed: int = 0,
    population: int = 300,
    generations: int = 100,
    enumerate_up_to: int = ENUMERATE_UP_TO,
) -> Points:
    """Find the Pareto set of accuracy and several costs.

    It is exact where the space is enumerated. Elsewhere it is that of all subnets evaluated by
    NSGA-II (Deb et al., 2002).

    Args:
        space: The space to search.
        accuracy: Predictor whose value is maximised.
        costs: Costs to minimise, such as latency, MACs and energy. For a single one
            :func:`search_front` comes closer.
        seed: Random seed; not used where the space is enumerated.
        population: Number of survivors and of children per generation.
        generations: Number of generations after the first population.
        enumerate_up_to: Largest space to enumerate.

    Returns:
        The front by rising first cost.

    Raises:
        SearchError: There is no cost.
    """
    if not costs:
        raise SearchError("expected at least one cost to search with, got none")
    if space.size <= enumerate_up_to:
        points = enumerate_points(space, accuracy, costs)
    else:
        ends = [extreme(space, cost, greatest)[0] for cost in costs for greatest in (False, True)]
        points = evolve_front(
            seeded("pareto", seed), Problem(space, accuracy, costs), np.array(ends),
            population, generations,
        )  # fmt: skip
    front = points.take(non_dominated(points.objectives))
    return front.take(np.lexsort((front.accuracy, front.costs[:, 0])))


def cheapest(space: SearchSpace, cost: Cost) -> tuple[np.ndarray, float]:
    """Return the genes of the cheapest subnet, and its cost; exact where a space is enumerated."""
    if space.size > ENUMERATE_UP_TO:
        return extreme(space, cost)
    genes = space.enumerate_genes().astype(np.uint8)
    costs = cost(space.arrays(genes))
    least = int(costs.argmin())
    return genes[least], float(costs[least])


def enumerate_points(space: SearchSpace, accuracy: AccuracyModel, costs: Sequence[Cost]) -> Points:
    """Evaluate every subnet of a space, in the order of ``space.enumerate_genes``.

    Raises:
        SpaceError: The space is too large to enumerate.
    """
    return Problem(space, accuracy, costs).evaluate(space.enumerate_genes().astype(np.uint8))


def sample_points(
    space: SearchSpace, accuracy: AccuracyModel, costs: Sequence[Cost], n: int, *, seed: int = 0
) -> Points:
    """Evaluate ``n`` subnets drawn as in supernet training: each gene uniformly."""
    genes = operators.sample(seeded("points", space.name, seed), space, n)
    return Problem(space, accuracy, costs).evaluate(genes)


def _budgets(budgets: Sequence[float]) -> np.ndarray:
    values = np.asarray(budgets, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise SearchError("expected at least one budget, got none")
    if not np.isfinite(values).all():
        wrong = values[~np.isfinite(values)][0]
        raise SearchError(f"expected finite numbers as budgets, got {wrong}")
    return values


def within_reach(
    space: SearchSpace, cost: Cost, budgets: np.ndarray, cheapest: np.ndarray, least: float
) -> np.ndarray:
    """Return the budgets that can be met, and warn of the others.

    Args:
        space: The space.
        cost: Cost that the budgets limit.
        budgets: In the unit of ``cost``, shape [n].
        cheapest: Genes of the subnet of the least cost.
        least: That cost.

    Raises:
        SearchError: None can be met.
    """
    missed = budgets[budgets < least]
    if len(missed):
        config = json.dumps(space.to_config(space.decode(cheapest)), separators=(",", ":"))
        message = (
            f"no subnet of {space.name} meets {', '.join(f'{value:g}' for value in missed)} "
            f"{cost.unit} on {cost.name}: expected at least {_above(least)} {cost.unit}, "
            f"the cost of {config}"
        )
        if len(missed) == len(budgets):
            raise SearchError(message)
        log.warning("%s", message)
    return budgets[budgets >= least]


def _above(value: float) -> str:
    """Write a value with six digits, rounded up, so that it is a budget that can be met."""
    digits = max(0, 6 - len(str(int(abs(value)))))
    return f"{np.ceil(value * 10**digits) / 10**digits:.{digits}f}"
