"""Fronts and hypervolume against brute force."""

from itertools import product

import numpy as np
import pytest
from hypervolume import hypervolume

from nas.search.pareto import non_dominated, pareto_front


def brute_front(points):
    kept = []
    for i, point in enumerate(points):
        dominated = ((points <= point).all(1) & (points < point).any(1)).any()
        repeated = (points[:i] == point).all(1).any()
        if not dominated and not repeated:
            kept.append(i)
    return kept


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [3, 6, 1000])
def test_non_dominated_equals_brute_force(objectives, levels):
    rng = np.random.default_rng([objectives, levels])
    points = rng.integers(0, levels, size=(150, objectives)).astype(float)
    assert non_dominated(points).tolist() == brute_front(points)


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_pareto_front_equals_brute_force_and_rises(levels):
    rng = np.random.default_rng(levels)
    costs, accuracies = rng.integers(0, levels, size=(2, 200)).astype(float)
    rows = pareto_front(costs, accuracies)
    assert sorted(rows) == brute_front(np.stack([costs, -accuracies], axis=1))
    assert (np.diff(costs[rows]) > 0).all()
    assert (np.diff(accuracies[rows]) > 0).all()


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_counts_the_dominated_cells_of_a_grid(objectives):
    rng = np.random.default_rng(objectives)
    side = 6
    points = rng.integers(0, side + 2, size=(12, objectives))  # Some lie outside the reference.
    cells = np.array(list(product(range(side), repeat=objectives)))
    expected = sum((points <= cell).all(1).any() for cell in cells)
    assert hypervolume(points, np.full(objectives, side)) == pytest.approx(expected)


def test_hypervolume_agrees_with_sampling_in_four_objectives():
    rng = np.random.default_rng(4)
    points = rng.random((60, 4)) ** 0.5
    darts = rng.random((200_000, 4))
    hit = np.zeros(len(darts), dtype=bool)
    for point in points:
        hit |= (darts >= point).all(1)
    volume = hypervolume(points, np.ones(4))
    assert volume == pytest.approx(hit.mean(), abs=5 * np.sqrt(0.25 / len(darts)))


def test_hypervolume_ignores_dominated_points_and_order():
    rng = np.random.default_rng(0)
    points = rng.random((80, 3))
    front = points[non_dominated(points)]
    volume = hypervolume(points, np.ones(3))
    assert volume == pytest.approx(hypervolume(front[::-1], np.ones(3)))
    assert volume < hypervolume(np.vstack([front, front.min(0)]), np.ones(3))


def test_nothing_in_nothing_out():
    empty = np.zeros((0, 3))
    assert len(non_dominated(empty)) == 0
    assert len(pareto_front(np.zeros(0), np.zeros(0))) == 0
    assert hypervolume(empty, np.ones(3)) == 0
    assert hypervolume(np.full((2, 3), 2.0), np.ones(3)) == 0
