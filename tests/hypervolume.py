"""The hypervolume of a front: the measure by which tests compare searches."""

from __future__ import annotations

import numpy as np

from nas.search.pareto import non_dominated


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume that ``points`` dominate within ``reference``; less is better everywhere.

    Exact, by slicing along the last objective.

    Args:
        points: Shape [n, objectives], in any order; dominated points change nothing.
        reference: Shape [objectives]; points that are not below it in every objective are ignored.
    """
    points = np.asarray(points, dtype=np.float64)
    reference = np.asarray(reference, dtype=np.float64)
    inside = points[(points < reference).all(axis=1)]
    if not len(inside):
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    return _volume(inside[non_dominated(inside)], reference)


def _volume(front: np.ndarray, reference: np.ndarray) -> float:
    """Hypervolume of mutually non-dominated points of two or more objectives."""
    if front.shape[1] == 2:
        first, second = front[np.argsort(front[:, 0])].T
        ceiling = np.append(reference[1], second[:-1])
        return float(((reference[0] - first) * (ceiling - second)).sum())
    front = front[np.argsort(front[:, -1], kind="stable")]
    heights = np.diff(np.append(front[:, -1], reference[-1]))
    total = 0.0
    slab = front[:0, :-1]
    for point, height in zip(front[:, :-1], heights, strict=True):
        if not (slab <= point).all(axis=1).any():
            slab = np.concatenate([slab[~(slab >= point).all(axis=1)], point[None]])
        if height > 0:
            total += height * _volume(slab, reference[:-1])
    return total
