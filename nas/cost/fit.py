"""Fitting of latency models, and how the models that ship were made.

:func:`reproduce` makes every ``models/latency_*`` file from the published tables; :func:`fit_file`
does the same for one's own measurements (a CSV with ks, e, d, r and a latency in ms). Held-out
errors come from five-fold cross-validation over distinct networks, beside a ridge on one-hot
choices x (1, r, r^2) in the same folds.

Fitting needs SciPy and scikit-learn; the models it makes need neither.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from compofa.errors import TableError
from compofa.networks.backbone import Backbone
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.seeds import rng
from compofa.space.arrays import SubnetArrays
from nas.cost.fit_layers import fit_note10
from nas.cost.fit_networks import BlockRegression, depth_correction
from nas.cost.fitted import MODELS, FittedModel, NetworkModel
from nas.tables import read_subnets

_LOG = logging.getLogger(__name__)

FOLDS = 5
MIN_ROWS = 50
WORTH = 0.98
"""The correction is kept when it lowers the held-out error at least to this share."""

COMMAND = "python -m nas fit-latency --shipped DIR --output nas/models"
NAS_PE = "NAS_PerformanceEstimation, Apache-2.0"
NOTE10 = "CompOFA, Apache-2.0: Samsung Note10 lookup tables of the OFA w1.2 network"
HELP = "HELP (Lee et al., NeurIPS 2021), MIT"
_STATES = (
    "The machine was in two states while it was measured (27 % of the rows are about 3 % faster); "
    "the model gives the more frequent one."
)
_BUSY = "Small networks wait for the host here; single measurements scatter by tens of percent."

SHIPPED: dict[str, tuple[str, str, str, str]] = {
    "rtx2080ti": ("latency/rtx2080ti_gpu_ofa.csv.gz", "latency_ms", NAS_PE, _STATES),
    "p40": ("latency/p40_gpu_ofa.csv.gz", "latency_ms", NAS_PE, ""),
    **{
        f"{name}-b{batch}": (
            "latency/help_gpus_ofa.csv.gz", f"{column}_{batch}_ms", HELP,
            _BUSY if batch < 64 or column == "2080ti" else "",
        )
        for name, column in (("v100", "v100"), ("titan_rtx", "titan_rtx"),
                             ("titan_xp", "titan_xp"), ("rtx2080ti", "2080ti"))
        for batch in (1, 32, 64)
    },
}  # fmt: skip
"""Name of a shipped network model -> table, column, source and what to know about it."""


def fit_network(
    arrays: SubnetArrays, latency_ms: np.ndarray, backbone: Backbone, name: str = "network"
) -> NetworkModel:
    """Fit a model to measured networks and measure its held-out error.

    Args:
        arrays: The networks.
        latency_ms: Their latencies, [n], above 0.
        backbone: What they were measured on.
        name: Of the device.

    Raises:
        TableError: Too few rows, latencies that are not positive numbers, or networks with elastic
            widths, which a block's latency depends on.
    """
    if backbone.widths:
        raise TableError(
            f"expected networks of one width to fit, got {backbone.name}: time its layers with "
            "python -m nas measure"
        )
    latency_ms = np.asarray(latency_ms, dtype=np.float64)
    if len(latency_ms) < MIN_ROWS or len(latency_ms) != len(arrays.resolutions):
        raise TableError(f"expected at least {MIN_ROWS} measured networks, got {len(latency_ms)}")
    if not (np.isfinite(latency_ms).all() and latency_ms.min() > 0):
        raise TableError("expected latencies above 0 ms, got others")
    design = BlockRegression(backbone, arrays)
    held_out = _held_out(design, arrays, latency_ms)
    corrected = held_out["corrected"]["mape"] < WORTH * held_out["sum"]["mape"]
    chosen = held_out["corrected" if corrected else "sum"]
    model = _fit(design, arrays, latency_ms, corrected)
    model.name = name
    model.card.update(
        name=name,
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


def _held_out(
    design: BlockRegression, arrays: SubnetArrays, latency_ms: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return the held-out errors (percent) of the sum, the corrected sum and the ridge."""
    ks, e, r = (
        np.asarray(array)
        for array in (arrays.blocks["kernel"], arrays.blocks["expand"], arrays.resolutions)
    )
    _, network = np.unique(np.concatenate([ks, e], axis=1), axis=0, return_inverse=True)
    network = network.reshape(-1)
    order = rng("latency-folds").permutation(network.max() + 1)
    fold = order[network] % FOLDS
    size = (r[:, None] - r.mean()) / 32
    hot = np.concatenate(
        [ks[:, :, None] == design.kernels, e[:, :, None] == design.expands], axis=2
    ).reshape(len(r), -1)
    hot = np.concatenate([hot, np.ones((len(r), 1))], axis=1)
    x = np.concatenate([hot, hot * size, hot * size**2], axis=1)
    predicted = {name: np.empty(len(r)) for name in ("sum", "corrected", "ridge")}
    for index in range(FOLDS):
        train, test = fold != index, fold == index
        kept, left = (arrays[rows] for rows in (train, test))
        model = _fit(design, kept, latency_ms[train], corrected=True)
        predicted["sum"][test] = model.block_sums(left)
        predicted["corrected"][test] = model(left)
        gram = x[train].T @ x[train] + np.eye(x.shape[1])
        ridge = np.linalg.solve(gram, x[train].T @ latency_ms[train])
        predicted["ridge"][test] = x[test] @ ridge
    return {name: _errors(values, latency_ms) for name, values in predicted.items()}


def _errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    error = 100 * np.abs(predicted / measured - 1)
    figures = {"mape": error.mean(), "median": np.median(error), "p95": np.percentile(error, 95)}
    return {name: round(float(value), 3) for name, value in figures.items()}


def fit_file(
    path: str | Path,
    out: str | Path,
    backbone: Backbone = MOBILENET_V3,
    column: str = "latency_ms",
) -> NetworkModel:
    """Fit a model to one's own measurements and save it.

    Args:
        path: CSV (or .csv.gz) with the columns ks, e, d, r and ``column``.
        out: The model's file (.npz); its card goes beside it (.json).
        backbone: What was measured.
        column: Name of the column with the latency in ms.
    """
    arrays, latency_ms = read_measured(path, column)
    model = fit_network(arrays, latency_ms, backbone, Path(out).stem)
    model.card["sources"] = [Path(path).name]
    model.save(out)
    return model


def reproduce(
    reference_data: str | Path, out: str | Path = MODELS, names: list[str] | None = None
) -> list[Path]:
    """Make the models that ship from the published tables.

    Args:
        reference_data: Folder that holds ``latency`` and ``specialized``.
        out: Folder for the files.
        names: Only these models; all by default.

    Returns:
        The files of the models.
    """
    data, out = Path(reference_data), Path(out)
    paths = []
    for name in ("note10", *SHIPPED):
        if names is not None and name not in names:
            continue
        with threadpool_limits(1):  # sums in one order: the same bits every time
            model = _make_shipped(data, name)
        paths.append(out / f"latency_{name}.npz")
        model.save(paths[-1])
        _LOG.info("%s: %s", name, model.error)
    return paths


def _make_shipped(data: Path, name: str) -> FittedModel:
    model: FittedModel
    note = ""
    if name == "note10":
        networks, _ = read_measured(data / "latency/note10_lut_sum_ofa.csv.gz")
        model = fit_note10(data / "latency/note10_lut", networks, data / "specialized")
        table, source = "latency/note10_lut", NOTE10
    else:
        table, column, source, note = SHIPPED[name]
        model = fit_network(*read_measured(data / table, column), MOBILENET_V3, name)
    model.card.update(
        license="Apache-2.0", unit="ms", sources=[source], table=table, command=COMMAND
    )
    if note:
        model.card["caveat"] = note
    return model


def read_measured(path: str | Path, column: str = "latency_ms") -> tuple[SubnetArrays, np.ndarray]:
    """Read measured networks: a (gzipped) CSV with the columns ks, e, d, r and a latency in ms.

    Raises:
        TableError: The file is missing, lacks a column or a row is malformed; names the line.
    """
    arrays, columns = read_subnets(path, (column,))
    return arrays, columns[column]
