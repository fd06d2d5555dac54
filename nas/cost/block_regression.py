"""Regression of measured network latency on blocks, and the correction of their sum.

The latency of a block is a hierarchy of terms: its kernel and expand ratio with the sizes of its
feature maps, then deviations shared by fewer and fewer blocks. Sizes are those of the layout, which
explain most of what a polynomial in the resolution misses. A ridge shrinks each level towards the
one above; Huber weights limit the influence of outliers.
"""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy import sparse
from scipy.linalg import solve_triangular

from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Subnet

RIDGES = (1.0, 10.0, 100.0)
"""Candidate strengths of the ridge; the one with the least leave-one-out error is used."""

HUBER = 1.0
ROUNDS = 4
LEVELS = {"choice": 1e-3, "place": 1.0, "kernel": 3.0, "expand": 3.0, "block": 10.0}
"""Relative strength of the ridge on each level of terms."""

FIXED = (1e-3, 1e-3, 0.3)
"""The same for the layers outside the blocks: constant, square of the resolution, deviation."""


class BlockRegression:
    """Design matrix and solution of the regression for one set of choices.

    Args:
        backbone: Widths and strides of the measured networks.
        arrays: The measured networks; the model will know their choices alone.
    """

    def __init__(self, backbone: Backbone, arrays: SubnetArrays) -> None:
        ks, e = np.asarray(arrays.blocks["kernel"]), np.asarray(arrays.blocks["expand"])
        self.backbone = backbone
        self.kernels, self.expands = np.unique(ks[ks > 0]), np.unique(e[e > 0])
        self.resolutions, self.depths = np.unique(arrays.resolutions), np.unique(arrays.depths)
        self._shape = (len(backbone.stages), 2, len(self.kernels), len(self.expands),
                       len(self.resolutions))  # fmt: skip
        self._terms = self._block_terms()
        size = (self.resolutions / self.resolutions.max()) ** 2
        ones = np.ones_like(size)
        self._fixed = np.column_stack(
            [ones / np.sqrt(FIXED[0]), size / np.sqrt(FIXED[1]),
             np.eye(len(size)) / np.sqrt(FIXED[2])]
        )  # fmt: skip

    def _block_terms(self) -> sparse.csr_matrix:
        """Return the terms of every possible block, sparse [blocks, terms]."""
        layers = []
        for stage, later, kernel, expand, r in product(
            range(self._shape[0]), range(2), self.kernels, self.expands, self.resolutions
        ):
            blocks = ((int(kernel), expand.item()),) * 2
            subnet = Subnet(int(r), (blocks,) * self._shape[0])
            layer = layout(self.backbone, subnet)[2 + 2 * stage + later]
            layers.append(((stage, later), int(kernel), expand.item(), layer))
        work = np.array([_work(layer) for *_, layer in layers])
        work /= work.mean()
        largest: dict[tuple[int, int], int] = {}
        for place, *_, layer in layers:
            largest[place] = max(layer.in_size, largest.get(place, 1))
        columns: dict[tuple, int] = {}
        entries: list[tuple[int, int, float]] = []
        for row, ((place, kernel, expand, layer), m) in enumerate(zip(layers, work, strict=True)):
            size, choice = layer.in_size, (place, kernel, expand)
            area = (size / largest[place]) ** 2
            area_out = area if layer.stride == 1 else (2 * layer.out_size / largest[place]) ** 2
            terms = {
                ("choice", *choice, 0): m / area, ("choice", *choice, 1): m / area * area_out,
                ("place", place, size): m,
                ("kernel", place, kernel, size): m,
                ("expand", place, expand, size): m,
                ("block", *choice, size): m,
            }  # fmt: skip
            if layer.stride > 1:
                terms[("choice", *choice, 2)] = m
            for term, value in terms.items():
                column = columns.setdefault(term, len(columns))
                entries.append((row, column, value / np.sqrt(LEVELS[term[0]])))
        rows, cols, values = zip(*entries, strict=True)
        return sparse.csr_matrix((values, (rows, cols)), shape=(len(layers), len(columns)))

    def _design(self, arrays: SubnetArrays) -> sparse.csr_matrix:
        """Return the terms of each network, sparse [n, terms]."""
        ks, e = np.asarray(arrays.blocks["kernel"]), np.asarray(arrays.blocks["expand"])
        n, slots = ks.shape
        per_stage = slots // self._shape[0]
        rows, slot = np.nonzero(ks)
        place = np.searchsorted(self.resolutions, arrays.resolutions)
        block = np.ravel_multi_index(
            (slot // per_stage, (slot % per_stage > 0).astype(int),
             np.searchsorted(self.kernels, ks[rows, slot]),
             np.searchsorted(self.expands, e[rows, slot]), place[rows]),
            self._shape,
        )  # fmt: skip
        counts = sparse.csr_matrix(
            (np.ones(len(rows)), (rows, block)), shape=(n, self._terms.shape[0])
        )
        return sparse.hstack([counts @ self._terms, sparse.csr_matrix(self._fixed[place])]).tocsr()

    def fit(self, arrays: SubnetArrays, latency_ms: np.ndarray) -> tuple[np.ndarray, ...]:
        """Fit the terms to measured latencies, by relative error.

        Returns:
            Latency of every block, ms [stages, 2, kernels, expands, resolutions]; of the other
            layers, ms [resolutions]; and the leave-one-out prediction of each network, ms [n].
        """
        unit = latency_ms.mean()
        y = latency_ms / unit
        x = self._design(arrays)
        solutions = [_robust_ridge(x, y, strength) for strength in RIDGES]
        errors = [np.mean(np.abs(left_out - y) / y) for _, left_out in solutions]
        solution, left_out = solutions[int(np.argmin(errors))]
        terms = self._terms.shape[1]
        blocks = (self._terms @ solution[:terms]).reshape(self._shape) * unit
        return blocks, self._fixed @ solution[terms:] * unit, left_out * unit


def _robust_ridge(
    x: sparse.csr_matrix, y: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Solve a ridge of relative errors with Huber weights.

    Returns:
        The solution, and the leave-one-out prediction of each row (by its leverage, at the same
        weights).
    """
    huber = np.ones(len(y))
    for _ in range(ROUNDS):
        weight = huber / y**2
        gram = (x.T @ x.multiply(weight[:, None])).toarray()
        gram[np.diag_indices(len(gram))] += strength
        solution = np.linalg.solve(gram, x.T @ (weight * y))
        error = np.abs(y - x @ solution) / y
        huber = 1 / np.maximum(1.0, error / (HUBER * 1.4826 * np.median(error) + 1e-9))
    half = solve_triangular(np.linalg.cholesky(gram), x.T.toarray(), lower=True)
    leverage = np.minimum(np.einsum("ij,ij->j", half, half) * weight, 0.9)
    return solution, y - (y - x @ solution) / (1 - leverage)


def _work(layer: LayerSpec) -> float:
    """Return a rough measure of a block's latency: its traffic and, with less weight, its MACs.

    Squeeze-and-excitation is left out: whether a block has it depends only on its place.
    """
    convs = [conv for conv in layer.convs if not conv.name.startswith("se.")]
    traffic = sum(
        (layer.in_size if conv.stride > 1 else conv.size) ** 2 * conv.in_channels
        + conv.size**2 * conv.out_channels
        for conv in convs
    )
    pointwise = sum(conv.macs for conv in convs if conv.groups == 1)
    depthwise = sum(
        0.05 * conv.size**2 * conv.out_channels * conv.kernel**2
        for conv in convs
        if conv.groups > 1
    )  # in this order, which the bits of the shipped models depend on
    return traffic + 0.02 * pointwise + depthwise


def depth_correction(
    arrays: SubnetArrays,
    sums_ms: np.ndarray,
    latency_ms: np.ndarray,
    depths: np.ndarray,
    resolutions: np.ndarray,
    points: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Fit log(latency / sum) by depths, resolution and sum, and tabulate it.

    The table is evaluated from gradient-boosted trees of absolute error, so it holds the median
    ratio: a host or GPU that was in another state for some of the measurements does not move it.

    Args:
        arrays: Measured networks.
        sums_ms: Their sums over blocks, from fits without them, ms [n].
        latency_ms: Their latencies, ms [n].
        depths: The values of a depth.
        resolutions: The measured resolutions.
        points: Number of values of the sum in the table.

    Returns:
        The sums of the table's columns, ms [resolutions, points]; the log ratio
        [resolutions, depths ** stages, points].
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    trees = HistGradientBoostingRegressor(
        loss="absolute_error", max_iter=150, learning_rate=0.06, min_samples_leaf=15,
        early_stopping=False, random_state=0,
    )  # fmt: skip
    trees.fit(_features(np.asarray(arrays.resolutions), sums_ms, np.asarray(arrays.depths)),
              np.log(latency_ms / sums_ms))  # fmt: skip
    combinations = np.array(list(product(depths, repeat=np.asarray(arrays.depths).shape[1])))
    grid = np.empty((len(resolutions), points))
    ratio = np.empty((len(resolutions), len(combinations), points), dtype=np.float32)
    for place, r in enumerate(resolutions):
        low, high = np.quantile(sums_ms[arrays.resolutions == r], [0.005, 0.995])
        grid[place] = np.linspace(low, max(high, low * 1.01), points)
        d = np.repeat(combinations, points, axis=0)
        sums = np.tile(grid[place], len(combinations))
        predicted = trees.predict(_features(np.full(len(d), r), sums, d))
        ratio[place] = predicted.reshape(len(combinations), points).clip(-0.9, 0.9)
    return grid, ratio


def _features(r: np.ndarray, sums: np.ndarray, d: np.ndarray) -> np.ndarray:
    total = d.sum(axis=1)
    return np.column_stack([r, sums, sums / total, total, d])
