"""What a search may claim: candidates measured before one wins, and fronts that are not shown.

A predictor is fitted to measurements on the validation images, so its best predictions are partly
luck. :func:`verify` measures the best predicted subnets of each budget and lets the best measured
one win.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from compofa.io.records import EvalRecord
from compofa.space.subnet import Subnet
from nas.accuracy.base import AccuracyModel
from nas.search.evolution import Points, join
from nas.search.pipeline import Outcome, Target
from nas.search.search import ENUMERATE_UP_TO, Found, enumerate_points

CANDIDATES = 3
"""Best predicted subnets per budget that are measured."""
LEAST_SPEARMAN = 0.5
"""Least rank correlation with held-out measurements of a predictor whose front is shown: below it,
fewer than two of three pairs of subnets are in the right order (Kendall's tau of one third, by
Greiner's relation)."""
LEAST_STANDARD_ERROR = 1.0
"""Points of top-1: about what the winners of neighbouring budgets of the published searches differ
by. Measurements with a greater standard error cannot order them."""

Measure = Callable[[Sequence[Subnet]], Sequence[EvalRecord]]


def standard_error(top1: float, images: int) -> float:
    """Return the binomial standard error (points) of a top-1 in percent measured on ``images``.

    Half the width of Wilson's score interval (1927) of one standard error, which is not 0 at 0 and
    100 %.
    """
    share = top1 / 100
    return 100 * math.sqrt(images * share * (1 - share) + 0.25) / (images + 1)


def small_validation(images: int, top1: float) -> str | None:
    """Return a warning if ``images`` are too few to compare subnets of about this top-1 (percent).

    They are where the standard error exceeds :data:`LEAST_STANDARD_ERROR`.
    """
    error = standard_error(top1, images)
    if error <= LEAST_STANDARD_ERROR:
        return None
    share, wanted_error = top1 / 100, LEAST_STANDARD_ERROR / 100
    wanted = max(share * (1 - share) / wanted_error**2, 0.5 / wanted_error)
    wanted = 10 * math.ceil(wanted / 10)
    return (
        f"{images:,} validation images: a measured top-1 of {top1:.1f} % is ± {error:.1f} points "
        f"(binomial standard error), so subnets that differ by less cannot be told apart; about "
        f"{wanted:,} images make it ± {LEAST_STANDARD_ERROR:g}"
    )


def weak_ranking(model: AccuracyModel) -> str | None:
    """Return why a predictor's front is not shown, if it ranks below :data:`LEAST_SPEARMAN`."""
    rank = getattr(model, "spearman", None)
    if rank is None or rank >= LEAST_SPEARMAN:
        return None
    return (
        f"no front is shown: the predictor ranks held-out subnets with a Spearman correlation of "
        f"{rank:.2f}, less than {LEAST_SPEARMAN:g}"
    )


def verify(outcome: Outcome, measure: Measure, count: int = CANDIDATES) -> Outcome:
    """Measure the best predicted subnets of each budget; the best measured one is found for it.

    Whatever was measured for one budget is a candidate of every other budget that it meets. Of
    candidates that measure the same, the one with the better prediction wins.

    Args:
        outcome: Outcome of the search.
        measure: Measures subnets on validation images, and returns their records in order.
        count: Candidates per budget; 1 measures the best predicted one, which then wins.

    Returns:
        The outcome, with columns ``validation_top1`` and ``validation_top1_se``.
    """
    target, pool = outcome.targets[0], _pool(outcome)
    rows = [_best(pool, found, count) for found in outcome.found]
    some = np.unique(np.concatenate(rows))
    candidates = pool.take(some)
    subnets = candidates.subnets(target.space)
    records = measure(subnets)
    top1 = np.array([record.top1 for record in records])
    winners, found = [], []
    for result, own in zip(outcome.found, rows, strict=True):
        open_to = own if count == 1 else some
        inside = np.isin(some, open_to) & (candidates.costs[:, 0] <= result.budget)
        order = np.lexsort((candidates.costs[:, 0], -candidates.accuracy, -top1, ~inside))
        best = int(order[0])
        winners.append(best)
        found.append(
            replace(
                result,
                subnet=subnets[best],
                accuracy=float(candidates.accuracy[best]),
                cost=float(candidates.costs[best, 0]),
            )
        )
    errors = [standard_error(records[best].top1, records[best].images) for best in winners]
    columns = {
        "validation_top1": [records[best].top1 for best in winners],
        "validation_top1_se": errors,
    }
    return replace(outcome, found=tuple(found), measured=columns | outcome.measured)


def _pool(outcome: Outcome) -> Points:
    """Return the subnets to choose from: all of the space, or where it is too large its front.

    The found subnets come first. Others do not exceed the limits of the search.
    """
    target = outcome.targets[0]
    found = _points(target, outcome.found)
    if target.space.size <= ENUMERATE_UP_TO:
        others = enumerate_points(target.space, target.accuracy, [target.cost])
    else:
        others = outcome.fronts[0]
    arrays = target.space.arrays(others.genes)
    inside = np.ones(len(others.genes), dtype=bool)
    for cost, most in outcome.limits:
        inside &= cost(arrays) <= most
    joined = join([found, others.take(np.flatnonzero(inside))])
    _, first = np.unique(joined.genes, axis=0, return_index=True)
    return joined.take(np.sort(first))


def _points(target: Target, found: Sequence[Found]) -> Points:
    genes = np.array([target.space.encode(result.subnet) for result in found], dtype=np.uint8)
    accuracy = np.array([result.accuracy for result in found])
    return Points(genes, accuracy, np.array([[result.cost] for result in found]))


def _best(pool: Points, found: Found, count: int) -> np.ndarray:
    """Return the rows of the best predicted subnets within a budget, the best first."""
    inside = np.flatnonzero(pool.costs[:, 0] <= found.budget)
    order = np.lexsort((pool.costs[inside, 0], -pool.accuracy[inside]))
    return inside[order[:count]]
