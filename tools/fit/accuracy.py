"""The accuracy predictors that ship, fitted on published measurements.

A Gaussian process (:mod:`tools.fit.gaussian_process`) is fitted to the measurements, its error is
measured on architectures left out, and a small network that needs NumPy alone is distilled from it
on tens of thousands of other subnets. :mod:`nas.accuracy.predictor` reads the network.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, spearmanr

from compofa.space.arrays import SubnetArrays, concatenate
from nas.accuracy.predictor import FittedPredictor
from nas.tables import read_subnets
from tools.fit.distill import distil
from tools.fit.gaussian_process import WHOLE, AccuracyGP, Measurements
from tools.fit.row_blocks import find_blocks

logger = logging.getLogger(__name__)

COMMAND = "python -m tools.fit accuracy DIR --output nas/models"
FEW_ROWS = 20
"""Fewest rows that the noise at a resolution is estimated from."""
MAX_ANCHORS = 8

_DYNAS = "accuracy/ofa_mbv3_w1.0_r224.csv.gz"
_OFA_PARTS = "accuracy/ofa_mbv3_w1.0_r128_160_192.csv.gz"
_COMPOFA = "accuracy/compofa_elastic_r128_160_192.csv.gz"
_SOURCES = {
    _DYNAS: "DyNAS-T, Apache-2.0: OFA w1.0, ImageNet validation set, r = 224",
    _OFA_PARTS: "memory-optimized-once-for-all, MIT: OFA w1.0, four parts of the validation set",
    _COMPOFA: "memory-optimized-once-for-all, MIT: CompOFA elastic kernel, eight parts of it",
}

SHIPPED: dict[str, dict[str, Any]] = {
    "ofa_mbv3_w1.0": {
        "tables": [_DYNAS, _OFA_PARTS],
        "related": [],
        "caveats": [
            "Single measurements at 128, 160 and 192 come from quarters of the validation set, "
            "offset by up to 0.5 points; predictions are for the mean of the quarters.",
        ],
    },
    "compofa": {
        "tables": [_COMPOFA],
        "related": [_DYNAS, _OFA_PARTS],
        "caveats": [
            "Nothing was measured above r = 192: figures at 224 add the gain of OFA w1.0 from "
            "192 to 224, and those between are interpolated; their uncertainty is larger.",
            "Measured on the elastic-kernel supernet; for the fixed-kernel one (kernels 3, 5, 3, "
            "3, 5 by stage), which was trained on its own, it is an estimate.",
            "Single measurements come from eighths of the validation set, offset by up to 0.6 "
            "points; predictions are for the mean of the eighths.",
        ],
    },
}
"""Name of a shipped model -> the tables that it is fitted on, those of a related network that it
also learns from (paths in the folder of published data), and its caveats."""
NAMES = tuple(SHIPPED)


def fit_distilled(
    arrays: SubnetArrays,
    top1: np.ndarray,
    *,
    blocks: np.ndarray | None = None,
    related: Sequence[Measurements] = (),
    name: str,
    card: dict[str, Any] | None = None,
    folds: int = 5,
    steps: int = 40,
    subset: int = 1000,
    samples: int = 100_000,
    seed: int = 0,
) -> FittedPredictor:
    """Fit a predictor of top-1 to measured subnets.

    Args:
        arrays: The subnets, n rows.
        top1: Measured top-1 in percent, shape [n].
        blocks: Label of each row's block (:mod:`tools.fit.row_blocks`), whose offset at each
            resolution is removed; -1 for rows on the whole validation set. Default: no blocks.
        related: Measurements of other networks with the same choices, to learn from as well.
        name: Name of the model.
        card: Source, licence and the like, kept in the model's card.
        folds: Folds of the cross-validation, which leaves out whole architectures.
        steps: Optimiser steps for the hyperparameters.
        subset: Rows used for the hyperparameters.
        samples: Synthetic subnets that the small network is distilled on.
        seed: Seed of every random choice.

    Returns:
        A model whose ``card`` holds its held-out error (``cv_mae``, ``cv_spearman``) and the
        coverage of its intervals. The same input gives the same model, bit for bit, on one machine.
    """
    data = _measurements(arrays, top1, blocks, net=0)
    whole = _joined([data, *(_as_net(other, 1 + at) for at, other in enumerate(related))])
    anchors = _anchors(np.unique(whole.arrays.resolutions))
    logger.info("fitting %s on %d rows", name, len(whole.top1))
    teacher = AccuracyGP(steps, subset, seed).fit(whole)
    held_out = cross_validate(data, whole, folds=folds, steps=steps, subset=subset, seed=seed)
    noise = _noise(held_out, data, anchors)
    student, gap = distil(teacher, data.arrays, anchors, samples=samples, seed=seed)
    student["noise"] = noise.astype(np.float32)
    full_card = {
        "name": name,
        **(card or {}),
        "rows": len(data.top1),
        "resolutions": [int(r) for r in anchors],
        "resolutions_measured": [int(r) for r in np.unique(data.arrays.resolutions)],
        **_figures(held_out, data, noise, anchors),
        "distillation_rmse": round(gap, 4),
        "block_offsets": _offsets(teacher, data),
    }
    return FittedPredictor(student, full_card, name)


def cross_validate(
    data: Measurements,
    whole: Measurements,
    *,
    folds: int,
    steps: int,
    subset: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Predict every row of ``data`` by a model that saw no row of its architecture.

    Args:
        data: The rows of the network that is predicted: the first rows of ``whole``.
        whole: All rows to learn from.
        folds: Number of folds.
        steps: As in :func:`fit_distilled`; hyperparameters are fitted anew in every fold.
        subset: As in :func:`fit_distilled`; at most 600 are used here.
        seed: Seed of the folds.

    Returns:
        Arrays of shape [n]: ``mean`` and ``std`` of the prediction without noise, and the
        estimated ``offset`` of the row's block.
    """
    code = np.concatenate([data.arrays.blocks["kernel"], data.arrays.blocks["expand"]], axis=1)
    _, architecture = np.unique(code, axis=0, return_inverse=True)
    architecture = architecture.reshape(-1)
    count = int(architecture.max()) + 1
    folds = min(folds, count)
    fold = np.random.default_rng(seed).permutation(count)[architecture] % folds
    result = {key: np.zeros(len(data.top1)) for key in ("mean", "std", "offset")}
    rest = np.arange(len(data.top1), len(whole.top1))
    for index in range(folds):
        out = np.flatnonzero(fold == index)
        seen = np.concatenate([np.flatnonzero(fold != index), rest])
        model = AccuracyGP(steps, min(subset, 600), seed).fit(whole.take(seen))
        arrays = data.take(out).arrays
        levels, place = np.unique(arrays.resolutions, return_inverse=True)
        rows = np.arange(len(out))
        result["mean"][out] = model.predict(arrays, levels)[rows, place]
        result["std"][out] = model.std(arrays, levels)[rows, place]
        result["offset"][out] = model.offsets(data.block[out], arrays.resolutions)
        logger.info("fold %d of %d done", index + 1, folds)
    return result


def reproduce(
    published: Path, output: Path, names: Sequence[str] = NAMES
) -> Iterator[FittedPredictor]:
    """Fit the shipped models again from the published tables, bit for bit, and save them.

    Args:
        published: Folder that holds ``accuracy/*.csv.gz``.
        output: Folder for ``accuracy_<name>.npz`` and its card.
        names: Which models of :data:`NAMES`.

    Raises:
        TableError: A table is missing or malformed.
    """
    for name in names:
        recipe = SHIPPED[name]
        tables = [_load_source(published, table) for table in recipe["tables"]]
        related = [_load_source(published, table) for table in recipe["related"]]
        own = _joined(tables)
        card = {
            "license": "Apache-2.0",
            "unit": "top-1 %",
            "width_mult": 1.0,
            "sources": [_SOURCES[table] for table in recipe["tables"]],
            "related_sources": [_SOURCES[table] for table in recipe["related"]],
            "command": COMMAND,
            "caveats": recipe["caveats"],
        }
        other = [_joined(related)] if related else []
        model = fit_distilled(
            own.arrays, own.top1, blocks=own.block, related=other, name=name, card=card
        )
        model.save(Path(output) / f"accuracy_{name}.npz")
        yield model


def _load_source(folder: Path, table: str) -> Measurements:
    arrays, columns = read_subnets(Path(folder) / table, ["top1"])
    top1 = columns["top1"]
    blocks = None if table == _DYNAS else find_blocks(arrays, top1)
    return _measurements(arrays, top1, blocks, net=0)


def _measurements(
    arrays: SubnetArrays, top1: np.ndarray, blocks: np.ndarray | None, net: int
) -> Measurements:
    arrays = arrays.checked(("kernel", "expand")).outer_as_stages()
    top1 = np.asarray(top1, dtype=np.float64)
    count = len(top1)
    blocks = np.full(count, WHOLE) if blocks is None else np.asarray(blocks)
    return Measurements(arrays, top1, blocks.astype(np.int64), np.full(count, net))


def _as_net(data: Measurements, net: int) -> Measurements:
    return Measurements(data.arrays, data.top1, data.block, np.full(len(data.top1), net))


def _joined(parts: Sequence[Measurements]) -> Measurements:
    """Join measurements; block labels of different parts stay apart."""
    blocks, start = [], 0
    for part in parts:
        blocks.append(np.where(part.block == WHOLE, WHOLE, part.block + start))
        start = max(start, int(blocks[-1].max()) + 1)
    return Measurements(
        concatenate([part.arrays for part in parts]),
        np.concatenate([part.top1 for part in parts]),
        np.concatenate(blocks),
        np.concatenate([part.net for part in parts]),
    )


def _anchors(resolutions: np.ndarray) -> np.ndarray:
    if len(resolutions) <= MAX_ANCHORS:
        return resolutions
    picked = np.linspace(0, len(resolutions) - 1, MAX_ANCHORS).round().astype(int)
    return resolutions[picked]


def _noise(held_out: dict[str, np.ndarray], data: Measurements, anchors: np.ndarray) -> np.ndarray:
    """Return the noise (points) at each anchor that explains the held-out errors.

    An anchor without measurements takes the noise of the nearest one that has some.
    """
    excess = (data.top1 - held_out["mean"]) ** 2 - held_out["std"] ** 2
    floor = 0.1 * float(np.std(data.top1 - held_out["mean"]))
    levels = np.unique(data.arrays.resolutions)
    few = max(FEW_ROWS, len(excess) // 20)
    pooled = [
        excess[
            np.argsort(np.abs(data.arrays.resolutions - r), kind="stable")[
                : max(few, (data.arrays.resolutions == r).sum())
            ]
        ].mean()
        for r in levels
    ]
    noise = np.sqrt(np.maximum(pooled, floor**2))
    return np.array([noise[np.argmin(np.abs(levels - r))] for r in anchors])


def _figures(
    held_out: dict[str, np.ndarray], data: Measurements, noise: np.ndarray, anchors: np.ndarray
) -> dict[str, Any]:
    """Return held-out errors; those named ``raw`` keep the offsets of blocks."""
    raw = data.top1 - held_out["mean"]
    clean = raw - held_out["offset"]
    std = np.hypot(held_out["std"], np.interp(data.arrays.resolutions, anchors, noise))

    def rank(rows: np.ndarray, measured: np.ndarray) -> float:
        return round(float(spearmanr(held_out["mean"][rows], measured[rows]).statistic), 4)

    def summary(rows: np.ndarray) -> dict[str, float]:
        return {
            "rows": int(rows.sum()),
            "mae": round(float(np.abs(clean[rows]).mean()), 4),
            "spearman": rank(rows, data.top1 - held_out["offset"]),
            "mae_raw": round(float(np.abs(raw[rows]).mean()), 4),
            "spearman_raw": rank(rows, data.top1),
            **{
                f"coverage_{level}": round(
                    float((np.abs(raw[rows]) < norm.ppf(0.5 + level / 200) * std[rows]).mean()), 3
                )
                for level in (68, 90, 95)
            },
        }

    every = summary(np.ones(len(raw), dtype=bool))
    by_resolution = {
        int(r): summary(data.arrays.resolutions == r) for r in np.unique(data.arrays.resolutions)
    }
    return {
        "cv_mae": every["mae"],
        "cv_spearman": every["spearman"],
        "cv_mae_raw": every["mae_raw"],
        "cv_spearman_raw": every["spearman_raw"],
        "held_out": {"all": every, **{str(r): value for r, value in by_resolution.items()}},
    }


def _offsets(teacher: AccuracyGP, data: Measurements) -> list[dict[str, Any]]:
    found = []
    for block in np.unique(data.block[data.block != WHOLE]):
        rows = data.block == block
        levels = np.unique(data.arrays.resolutions[rows])
        points = teacher.offsets(np.full(len(levels), block), levels)
        found.append(
            {
                "rows": int(rows.sum()),
                **{str(r): round(float(p), 2) for r, p in zip(levels, points, strict=True)},
            }
        )
    return found
