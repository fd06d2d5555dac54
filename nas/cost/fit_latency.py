"""Fitting of a latency model to measured networks of any family.

Two forms are fitted where both can be, and the one with the smaller held-out error is returned: a
weighted sum of counts (:class:`~nas.cost.counted.CountModel`), for any family and from few
measurements, and a table of blocks (:class:`~nas.cost.fitted.NetworkModel`), which is sharper where
the measurements are many or steady.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.networks.backbone import Backbone
from compofa.networks.layout import layout
from compofa.space.arrays import SubnetArrays
from nas.cost.counted import CONSTANT, CountModel, layer_counts
from nas.cost.fit import FOLDS, MIN_ROWS, errors, fit_network, network_folds
from nas.cost.fitted import NetworkModel
from nas.cost.models import LatencyModel

log = logging.getLogger(__name__)

GAIN = 0.3
"""Percentage points of held-out error for which the table of blocks is taken: the sum of counts
also predicts resolutions between the measured ones."""

RIDGE = 1e-4
"""Strength of the ridge on each count's share of the mean latency."""

ROUNDS = 4
"""Rounds of Huber weights, which limit the influence of outliers."""


def fit_latency(
    arrays: SubnetArrays,
    latency_ms: np.ndarray,
    backbone: Backbone,
    classes: int = 1000,
    name: str = "network",
    card: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> LatencyModel:
    """Fit a model to measured networks and measure its held-out error.

    Args:
        arrays: The networks.
        latency_ms: Their latencies in ms, or another measured cost in its unit, [n], above 0.
        backbone: Backbone of the networks.
        classes: Outputs of their classifier.
        name: Name of the device.
        card: What else to record in the model's card, such as the source.
        progress: Whether to show a progress bar.

    Raises:
        TableError: Too few rows, values that are not positive, or networks of another backbone.
    """
    import sklearn.ensemble  # noqa: F401 - its threads are limited only once they are loaded
    from threadpoolctl import threadpool_limits

    latency_ms = np.asarray(latency_ms, dtype=np.float64)
    if len(latency_ms) < MIN_ROWS or len(latency_ms) != len(arrays):
        raise TableError(f"expected at least {MIN_ROWS} measured networks, got {len(latency_ms)}")
    if not (np.isfinite(latency_ms).all() and latency_ms.min() > 0):
        raise TableError(f"expected measurements above 0, got {latency_ms.min():g}")
    # Matrices and trees are small: threads that wait for each other took 20 times as long.
    with threadpool_limits(1):
        model: LatencyModel = fit_counts(arrays, latency_ms, backbone, classes, name, progress)
        blocks = backbone.names == ("kernel", "expand") and not backbone.outer_count
        if blocks:
            try:
                table = fit_network(arrays, latency_ms, backbone, name, progress)
            except TableError as error:  # noisy measurements
                log.info("no table of blocks: %s", error)
            else:
                if held_out_mape(table) < held_out_mape(model) - GAIN:
                    model = table
    model.card |= dict(card or {})
    return model


def held_out_mape(model: LatencyModel | NetworkModel) -> float:
    """Return the held-out error of a fitted model, mean, percent."""
    return float(model.card["held_out"]["mape"])


def count_table(
    arrays: SubnetArrays, backbone: Backbone, classes: int = 1000, progress: bool = False
) -> tuple[list[str], np.ndarray]:
    """Return the names of the counts of networks, and the counts, float64 [n, counts].

    Raises:
        TableError: The networks are not of ``backbone``.
    """
    from tqdm import tqdm

    rows = []
    try:
        space = backbone.free_space(sorted({int(r) for r in arrays.resolutions}))
        subnets = list(space.subnets_of(arrays))
        for subnet in tqdm(subnets, desc="layers", disable=not progress):
            row: defaultdict[str, float] = defaultdict(float, {CONSTANT: 1.0})
            for layer in layout(backbone, subnet, classes):
                for name, value in layer_counts(layer).items():
                    row[name] += value
            rows.append(row)
    except SpaceError as error:
        raise TableError(f"expected networks of {backbone.name}, got others: {error}") from error
    names = sorted({name for row in rows for name in row})
    return names, np.array([[row.get(name, 0.0) for name in names] for row in rows])


def fit_weights(counts: np.ndarray, latency_ms: np.ndarray) -> np.ndarray:
    """Fit weights of at least 0 to measured latencies, by relative error.

    Args:
        counts: [n, counts].
        latency_ms: [n].

    Returns:
        The weights, [counts].
    """
    from scipy.optimize import nnls

    shares = counts / latency_ms[:, None]
    scale = shares.mean(axis=0)
    shares = shares / scale
    n, width = shares.shape
    ridge = np.sqrt(RIDGE * n / width) * np.eye(width)
    weight = np.ones(n)
    for _ in range(ROUNDS):
        solved, _ = nnls(
            np.vstack([shares * weight[:, None], ridge]), np.append(weight, np.zeros(width))
        )
        error = np.abs(1 - shares @ solved)
        weight = 1 / np.sqrt(np.maximum(1.0, error / (1.4826 * np.median(error) + 1e-9)))
    return solved / scale


def fit_counts(
    arrays: SubnetArrays,
    latency_ms: np.ndarray,
    backbone: Backbone,
    classes: int = 1000,
    name: str = "network",
    progress: bool = False,
) -> CountModel:
    """Fit a weighted sum of counts; arguments as for :func:`fit_latency`."""
    names, counts = count_table(arrays, backbone, classes, progress)
    fold = network_folds(arrays)
    predicted = np.empty_like(latency_ms)
    for index in range(FOLDS):
        train, test = fold != index, fold == index
        seen = counts[train].any(axis=0)  # what a fold lacks gets no weight
        weights = fit_weights(counts[train][:, seen], latency_ms[train])
        predicted[test] = counts[test][:, seen] @ weights
    held_out = errors(predicted, latency_ms)
    return CountModel(
        {
            "count_names": np.array(names),
            "weights": fit_weights(counts, latency_ms),
            "resolutions": np.unique(arrays.resolutions),
        },
        {
            "name": name,
            "kind": CountModel.kind,
            "backbone": backbone.name,
            "width_mult": backbone.width_mult,
            "rows": len(latency_ms),
            "resolutions": np.unique(arrays.resolutions).tolist(),
            "error": f"held-out MAPE {held_out['mape']:.2g} %, P95 {held_out['p95']:.2g} % "
            f"({len(latency_ms)} measured networks)",
            "held_out": held_out,
            "protocol": f"{FOLDS}-fold cross-validation over distinct networks",
        },
    )
