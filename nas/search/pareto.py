"""Exact Pareto fronts."""

from __future__ import annotations

import numpy as np


def pareto_front(costs: np.ndarray, accuracies: np.ndarray) -> np.ndarray:
    """Return the Pareto front of a cost, which is minimised, and accuracy, which is maximised.

    Args:
        costs: Shape [n].
        accuracies: Shape [n].

    Returns:
        Row indices by rising cost, and so by rising accuracy; the first of equal points.
    """
    costs, accuracies = np.asarray(costs), np.asarray(accuracies)
    order = np.lexsort((-accuracies, costs))
    ranked = accuracies[order]
    before = np.maximum.accumulate(ranked)[:-1]
    better = np.ones(len(order), dtype=bool)
    better[1:] = ranked[1:] > before
    return order[better]


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Return the points that no other point dominates; all objectives are minimised.

    A point dominates another if it is larger in no objective and smaller in at least one.

    Args:
        points: Shape [n, objectives].

    Returns:
        Increasing row indices; the first of equal points.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.shape[1] == 2:
        return np.sort(pareto_front(points[:, 0], -points[:, 1]))
    rows = np.lexsort(points.T[::-1])  # a point comes after all that dominate it
    left = np.ascontiguousarray(points[rows])
    kept = []
    while len(rows):
        kept.append(rows[0])
        beaten = np.ones(len(rows), dtype=bool)
        for column in range(left.shape[1]):
            beaten &= left[:, column] >= left[0, column]
        rows, left = rows[~beaten], left[~beaten]
    return np.sort(np.array(kept, dtype=np.intp))
