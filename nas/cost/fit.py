"""Fitting of a latency model to measured networks, with SciPy and scikit-learn.

The held-out error comes from five-fold cross-validation over distinct networks, beside a ridge on
one-hot choices x (1, r, r²) in the same folds. The model itself needs neither library.
"""

from __future__ import annotations

import numpy as np

from compofa.errors import TableError
from compofa.networks.backbone import Backbone
from compofa.seeds import rng
from compofa.space.arrays import SubnetArrays
from nas.cost.block_regression import BlockRegression, depth_correction
from nas.cost.fitted import NetworkModel

FOLDS = 5
MIN_ROWS = 50
WORTH = 0.98
"""The correction is kept if it lowers the held-out error to at most this share."""


def fit_network(
    arrays: SubnetArrays,
    latency_ms: np.ndarray,
    backbone: Backbone,
    name: str = "network",
    progress: bool = False,
    quantity: str = "latency",
    unit: str = "ms",
) -> NetworkModel:
    """Fit a model to measured networks and measure its held-out error.

    Args:
        arrays: The networks.
        latency_ms: Their latencies in ms, or values of another cost in ``unit``, [n], above 0.
        backbone: Backbone of the networks.
        name: Name of the device.
        progress: Whether to show a progress bar.
        quantity: What was measured, such as ``energy``.
        unit: Unit of the values.

    Raises:
        TableError: Too few rows, values that are not positive, or networks with elastic widths,
            which the latency of a block depends on.
    """
    if backbone.names != ("kernel", "expand") or backbone.outer_count:
        raise TableError(
            f"expected networks of one width to fit, got {backbone.name}: time its layers with "
            "python -m nas measure"
        )
    latency_ms = np.asarray(latency_ms, dtype=np.float64)
    if len(latency_ms) < MIN_ROWS or len(latency_ms) != len(arrays.resolutions):
        raise TableError(f"expected at least {MIN_ROWS} measured networks, got {len(latency_ms)}")
    if not (np.isfinite(latency_ms).all() and latency_ms.min() > 0):
        raise TableError(f"expected {quantity} above 0 {unit}, got {latency_ms.min():g} {unit}")
    design = BlockRegression(backbone, arrays)
    held_out = _held_out(design, arrays, latency_ms, progress)
    corrected = held_out["corrected"]["mape"] < WORTH * held_out["sum"]["mape"]
    chosen = held_out["corrected" if corrected else "sum"]
    model = _fit(design, arrays, latency_ms, corrected)
    model.name, model.quantity, model.unit = name, quantity, unit
    model.card.update(
        name=name,
        quantity=quantity,
        unit=unit,
        backbone=backbone.name,
        width_mult=backbone.width_mult,
        rows=len(latency_ms),
        resolutions=design.resolutions.tolist(),
        corrected=bool(corrected),
        error=(
            f"held-out MAPE {chosen['mape']:.2g} %, P95 {chosen['p95']:.2g} % "
            f"(ridge {held_out['ridge']['mape']:.2g} %)"
        ),
        held_out={**chosen, "ridge": held_out["ridge"]},
        protocol=f"{FOLDS}-fold cross-validation over distinct networks",
    )
    return model


def _fit(
    design: BlockRegression, arrays: SubnetArrays, latency_ms: np.ndarray, corrected: bool
) -> NetworkModel:
    blocks, fixed, left_out = design.fit(arrays, latency_ms)
    count = len(design.resolutions)
    grid = np.zeros((count, 0))
    ratio = np.zeros((count, len(design.depths) ** len(design.backbone.stages), 0))
    if corrected:
        if left_out.min() <= 0:
            raise TableError(f"expected sums over blocks above 0, got {left_out.min():g}")
        points = 12 if count <= 8 else 6
        grid, ratio = depth_correction(
            arrays, left_out, latency_ms, design.depths, design.resolutions, points
        )
    model = {
        "kernels": design.kernels, "expands": design.expands, "depths": design.depths,
        "resolutions": design.resolutions, "block_ms": blocks.astype(np.float32),
        "fixed_ms": fixed.astype(np.float32), "grid_ms": grid.astype(np.float32),
        "log_ratio": ratio.astype(np.float16),
    }  # fmt: skip
    return NetworkModel(model, {"name": "network", "kind": NetworkModel.kind})


def network_folds(arrays: SubnetArrays) -> np.ndarray:
    """Return the fold of each row, [n]: equal for one network at several resolutions."""
    held = np.concatenate([*arrays.blocks.values(), arrays.outer], axis=1)
    _, network = np.unique(held, axis=0, return_inverse=True)
    network = network.reshape(-1)
    return rng("latency-folds").permutation(network.max() + 1)[network] % FOLDS


def _held_out(
    design: BlockRegression, arrays: SubnetArrays, latency_ms: np.ndarray, progress: bool
) -> dict[str, dict[str, float]]:
    """Return the held-out errors (percent) of the sum, of the corrected sum and of the ridge."""
    from tqdm import tqdm

    ks, e, r = arrays.blocks["kernel"], arrays.blocks["expand"], arrays.resolutions
    fold = network_folds(arrays)
    size = (r[:, None] - r.mean()) / 32
    hot = np.concatenate(
        [ks[:, :, None] == design.kernels, e[:, :, None] == design.expands], axis=2
    ).reshape(len(r), -1)
    hot = np.concatenate([hot, np.ones((len(r), 1))], axis=1)
    x = np.concatenate([hot, hot * size, hot * size**2], axis=1)
    predicted = {name: np.empty(len(r)) for name in ("sum", "corrected", "ridge")}
    for index in tqdm(range(FOLDS), desc="cross-validation", disable=not progress):
        train, test = fold != index, fold == index
        kept, left = (arrays[rows] for rows in (train, test))
        model = _fit(design, kept, latency_ms[train], corrected=True)
        predicted["sum"][test] = model.block_sums(left)
        predicted["corrected"][test] = model(left)
        gram = x[train].T @ x[train] + np.eye(x.shape[1])
        ridge = np.linalg.solve(gram, x[train].T @ latency_ms[train])
        predicted["ridge"][test] = x[test] @ ridge
    return {name: errors(values, latency_ms) for name, values in predicted.items()}


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Return the relative error of predictions, percent: ``mape``, ``median`` and ``p95``."""
    error = 100 * np.abs(predicted / measured - 1)
    figures = {"mape": error.mean(), "median": np.median(error), "p95": np.percentile(error, 95)}
    return {name: round(float(value), 3) for name, value in figures.items()}
