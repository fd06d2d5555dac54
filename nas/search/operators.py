"""Operators of an evolutionary search on gene matrices, each small, vectorised and pure.

A population is a matrix of canonical genes, uint8 of shape [n, genes]: one row per subnet, one
column per choice of its :class:`~compofa.space.search_space.SearchSpace`. The only source of
randomness is the generator passed in.
"""

from __future__ import annotations

import numpy as np

from compofa.space.search_space import SearchSpace
from nas.search.pareto import non_dominated

_MIX = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)


def sample(rng: np.random.Generator, space: SearchSpace, n: int) -> np.ndarray:
    """Draw ``n`` rows of canonical genes, each gene uniformly."""
    genes = rng.integers(0, 1 << 16, size=(n, len(space.cardinalities)), dtype=np.uint16)
    return canonicalise(space, _scaled(genes, space.cardinalities))


def mutate(
    rng: np.random.Generator, genes: np.ndarray, cardinalities: np.ndarray, rate: float
) -> np.ndarray:
    """Redraw each gene with probability ``rate``; a redrawn gene may keep its value.

    Args:
        rng: Random generator.
        genes: Shape [n, genes].
        cardinalities: Number of choices of each gene, at most 256.
        rate: Probability in [0, 1].

    Returns:
        New genes of the same shape, not canonical.
    """
    redrawn = rng.integers(0, 1 << 16, size=genes.shape, dtype=np.uint16) < round(rate * (1 << 16))
    genes = genes.copy()
    row, column = np.nonzero(redrawn)
    draws = rng.integers(0, 1 << 16, size=len(row), dtype=np.uint16)
    genes[row, column] = _scaled(draws, cardinalities[column])
    return genes


def crossover(rng: np.random.Generator, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Take each gene from either parent with equal probability (uniform crossover).

    Args:
        rng: Random generator.
        first: First parents, shape [n, genes].
        second: Second parents, same shape.

    Returns:
        Children, shape [n, genes], not canonical.
    """
    coins = rng.integers(0, 256, size=first.shape, dtype=np.uint8)
    swap = (coins < 128).view(np.uint8) * np.uint8(255)
    return first ^ ((first ^ second) & swap)  # faster than np.where on bytes


def canonicalise(space: SearchSpace, genes: np.ndarray) -> np.ndarray:
    """Set the genes of blocks past the depth to 0, so that equal subnets are equal rows."""
    return space.canonical(genes).astype(np.uint8, copy=False)


def blend(
    rng: np.random.Generator, genes: np.ndarray, towards: np.ndarray, share: float | np.ndarray
) -> np.ndarray:
    """Replace each gene by that of ``towards`` with probability ``share``.

    With the cheapest subnet as ``towards`` this repairs rows that exceed a budget.

    Args:
        rng: Random generator.
        genes: Shape [n, genes].
        towards: Shape [genes] or [n, genes].
        share: Probability in [0, 1], one for all rows or of shape [n, 1].

    Returns:
        New genes, shape [n, genes], not canonical.
    """
    return np.where(rng.random(genes.shape, dtype=np.float32) < share, towards, genes)


def keys(genes: np.ndarray) -> np.ndarray:
    """Hash canonical rows to 64 bits, shape [n]; equal rows have equal keys.

    Two distinct rows among n share a key with probability about n²/2⁶⁵ (for a million rows
    3·10⁻⁸); a search then skips one candidate.
    """
    rows, columns = genes.shape
    words = -(-columns // 8)
    padded = np.zeros((rows, words * 8), dtype=np.uint8)
    padded[:, :columns] = genes
    hashed = np.full(rows, columns, dtype=np.uint64)
    for word in padded.view(np.uint64).T:
        hashed = (hashed ^ word) * _MIX
        hashed ^= hashed >> _SHIFT
    return hashed


def deduplicate(hashed: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Return the first row of each key that is not in ``seen``.

    Args:
        hashed: Keys of the candidates, shape [n].
        seen: Keys evaluated before, sorted.

    Returns:
        Increasing row indices.
    """
    unique, rows = np.unique(hashed, return_index=True)
    if len(seen):
        place = np.minimum(np.searchsorted(seen, unique), len(seen) - 1)
        rows = rows[seen[place] != unique]
    return np.sort(rows)


def remember(seen: np.ndarray, hashed: np.ndarray) -> np.ndarray:
    """Merge new keys into the sorted keys ``seen``; none of them may be in it."""
    new = np.sort(hashed)
    return np.insert(seen, np.searchsorted(seen, new), new)


def select(ranked: np.ndarray, allowed: np.ndarray, count: int) -> np.ndarray:
    """Return the first ``count`` of the ``ranked`` rows that are allowed.

    Args:
        ranked: Row indices, best first.
        allowed: Mask of the rows that may be selected, shape [rows].
        count: Largest number of rows to return.
    """
    return ranked[allowed[ranked]][:count]


def pick(rng: np.random.Generator, parents: list[np.ndarray], count: int) -> np.ndarray:
    """Draw ``count`` rows from each set of parents, with replacement.

    Args:
        rng: Random generator.
        parents: Row indices of each set, none empty.
        count: Number of draws per set.

    Returns:
        Row indices, shape [sets, count].
    """
    sizes = np.array([len(rows) for rows in parents])
    starts = np.cumsum(sizes) - sizes
    draws = (rng.random((len(parents), count)) * sizes[:, None]).astype(np.intp)
    return np.concatenate(parents)[starts[:, None] + draws]


def crowded(points: np.ndarray, count: int) -> np.ndarray:
    """Select ``count`` rows by non-dominated sorting and crowding distance.

    This is the survival of NSGA-II (Deb et al., 2002): whole fronts while they fit, then the rows
    of the next front with the largest crowding distance.

    Args:
        points: Shape [n, objectives], all minimised, no two rows equal.
        count: Number of rows to keep.
    """
    left, kept = np.arange(len(points)), []
    while len(left) and count > 0:
        front = non_dominated(points[left])
        rows = left[front]
        if len(rows) > count:
            rows = rows[np.argsort(-_crowding(points[rows]), kind="stable")[:count]]
        kept.append(rows)
        count -= len(rows)
        left = np.delete(left, front)
    return np.concatenate(kept) if kept else left


def _crowding(points: np.ndarray) -> np.ndarray:
    """Return the crowding distance: gaps between a point's neighbours, summed over objectives."""
    distance = np.zeros(len(points))
    for values in points.T:
        order = np.argsort(values, kind="stable")
        width = max(values[order[-1]] - values[order[0]], np.finfo(float).tiny)
        distance[order[1:-1]] += (values[order[2:]] - values[order[:-2]]) / width
        distance[order[[0, -1]]] = np.inf
    return distance


def neighbours(genes: np.ndarray, cardinalities: np.ndarray) -> np.ndarray:
    """Return every row that differs from ``genes``, shape [genes], in one gene.

    Returns:
        Shape [sum of (cardinalities - 1), genes], not canonical.
    """
    columns = np.repeat(np.arange(len(genes)), cardinalities - 1)
    steps = np.concatenate([np.arange(1, count) for count in cardinalities])
    rows = np.tile(genes, (len(columns), 1))
    rows[np.arange(len(columns)), columns] = (genes[columns] + steps) % cardinalities[columns]
    return rows


def _scaled(draws: np.ndarray, cardinalities: np.ndarray) -> np.ndarray:
    """Map 16-bit draws to 0 ... cardinality - 1; probabilities differ by less than 0.4 %."""
    return ((draws.astype(np.uint32) * cardinalities.astype(np.uint32)) >> 16).astype(np.uint8)
