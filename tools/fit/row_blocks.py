"""Blocks of consecutive rows of a published table, by the part of the validation set behind them.

The parts differ in difficulty, so all rows of a block share an offset per resolution. The offsets
exceed most differences between subnets and have to be found before fitting.
"""

from __future__ import annotations

import numpy as np

from compofa.space.arrays import SubnetArrays

OFFSET_STD = 0.3
"""Prior standard deviation of offsets, points."""

INSIDE_RUN = 4.0
"""Further penalty of a change point between rows of one resolution: parts usually change together
with the resolution."""


def find_blocks(
    arrays: SubnetArrays, top1: np.ndarray, *, min_rows: int = 20, penalty: float = 20.0
) -> np.ndarray:
    """Label the blocks of rows that share offsets, by change points in the rows' order.

    The rows are segmented so that one offset per segment and resolution explains the residuals of a
    ridge regression best; each further segment costs ``penalty``.

    Args:
        arrays: Measured subnets, in order of measurement.
        top1: Percent, shape [n].
        min_rows: Fewest rows of a block.
        penalty: Log-likelihood that a further block must gain.

    Returns:
        Labels 0, 1, ... in the rows' order, int [n].
    """
    offset, labels = np.zeros(len(top1)), np.zeros(len(top1), dtype=np.int64)
    for _ in range(3):
        residual = top1 - _ridge(arrays, top1 - offset)
        labels = _segment(residual, arrays.resolutions, min_rows, penalty)
        for label in np.unique(labels):
            for r in np.unique(arrays.resolutions):
                rows = (labels == label) & (arrays.resolutions == r)
                offset[rows] = residual[rows].mean() if rows.any() else 0.0
    return labels


def _ridge(arrays: SubnetArrays, y: np.ndarray) -> np.ndarray:
    """Predict by one-hot choices, growing with resolution, and the square of the summed size."""
    hot = [
        arrays.blocks["kernel"] == k
        for k in np.unique(arrays.blocks["kernel"][arrays.blocks["kernel"] > 0])
    ]
    hot += [
        arrays.blocks["expand"] == e
        for e in np.unique(arrays.blocks["expand"][arrays.blocks["expand"] > 0])
    ]
    choices = np.concatenate(hot, axis=1).astype(np.float64)
    levels = np.unique(arrays.resolutions)
    grown = ((arrays.resolutions - levels.mean()) / max(float(np.ptp(levels)), 1.0))[:, None]
    size = (
        arrays.blocks["expand"].sum(axis=1, keepdims=True)
        / arrays.blocks["expand"].sum(axis=1).mean()
    ) ** 2
    at = 10.0 * (arrays.resolutions[:, None] == levels)
    x = np.concatenate([choices, choices * grown, size, size * grown, at], axis=1)
    return x @ np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ y)


def _segment(residual: np.ndarray, r: np.ndarray, min_rows: int, penalty: float) -> np.ndarray:
    """Cut the rows into segments by dynamic programming."""
    count, at = len(residual), r == np.unique(r)[:, None]
    variance = max(float(np.median(np.abs(np.diff(residual)))) ** 2 / 0.91, 1e-6)
    zero = np.zeros((len(at), 1))
    rows = np.concatenate([zero, np.cumsum(at, axis=1)], axis=1)
    sums = np.concatenate([zero, np.cumsum(at * residual, axis=1)], axis=1)
    ratio = OFFSET_STD**2 / variance
    best, previous = np.full(count + 1, np.inf), np.zeros(count + 1, dtype=np.int64)
    best[0] = 0.0
    inside = np.concatenate([[0.0], INSIDE_RUN * (np.diff(r) == 0), [0.0]])
    for end in range(min(min_rows, count), count + 1):
        starts = slice(0, max(1, end - min_rows + 1))
        n = rows[:, end, None] - rows[:, starts]
        total = sums[:, end, None] - sums[:, starts]
        gain = 0.5 * (total**2 / (variance * (n + 1 / ratio)) - np.log1p(n * ratio)).sum(axis=0)
        value = best[starts] - gain + penalty + inside[starts]
        previous[end] = np.argmin(value)
        best[end] = value[previous[end]]
    labels, end, label = np.zeros(count, dtype=np.int64), count, 0
    while end > 0:
        labels[previous[end] : end] = label
        end, label = int(previous[end]), label + 1
    return label - 1 - labels
