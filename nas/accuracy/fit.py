"""Fitting of an accuracy predictor to one's own records, with SciPy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.linalg import cho_solve
from scipy.optimize import minimize
from scipy.stats import norm, spearmanr

from compofa.errors import DataError
from compofa.seeds import rng
from compofa.space.arrays import SubnetArrays
from nas.accuracy.additive import FORMATS, JITTER, MAX_ROWS, AdditiveGP, Features, Kernels, spread
from nas.accuracy.base import NORMAL_90
from nas.accuracy.link import Logit, Points

log = logging.getLogger(__name__)

MIN_ROWS = 20
FOLDS = 5
SUBSET = 500
"""Most rows that the weights are fitted on; the model is conditioned on all of them."""
NOISE, WIDTH = -2.0, 1.5
"""Prior mean of the logarithm of the noise, and the prior's width of all such logarithms."""


def fit_accuracy(
    arrays: SubnetArrays,
    top1: np.ndarray,
    *,
    name: str = "custom",
    card: Mapping[str, Any] | None = None,
    seed: int = 0,
    images: int | None = None,
) -> AdditiveGP:
    """Fit a predictor of top-1 to measured subnets.

    On 80 and 300 subnets of OFA w1.0 at 224 pixels, with the accuracies that DyNAS-T measured, the
    mean absolute error on the others is 0.126 and 0.063 points (mean of five draws).

    Args:
        arrays: The subnets, n rows: 20 or more, a few hundred are plenty for a small space. Of more
            than 4000 as many are drawn.
        top1: Measured top-1 in percent, shape [n].
        name: Name of the model.
        card: Source, licence and the like, kept in the model's card.
        seed: Seed of the rows drawn.
        images: Number of images that each accuracy was measured on. With it the logit of top-1 is
            modelled, so that no prediction reaches 0 or 100 %.

    Returns:
        A model whose ``card["held_out"]`` has its error and the coverage of its intervals on
        architectures left out. The same input gives the same model.

    Raises:
        DataError: Too few rows, shapes that do not fit, or values that are not percent.
    """
    arrays, top1 = _checked(arrays, top1)
    if images is not None and images < 1:
        raise DataError(f"images: expected at least 1 per measurement, got {images}")
    if len(top1) > MAX_ROWS:
        log.warning("%d of %d measurements are used", MAX_ROWS, len(top1))
        rows = np.sort(rng(seed, "measurements").permutation(len(top1))[:MAX_ROWS])
        arrays, top1 = arrays[rows], top1[rows]
    features, r = Features.of(arrays), arrays.resolutions.astype(np.int64)
    parts = {"format": np.array(FORMATS[images is not None]), **features.to_arrays()}
    if images is not None:
        parts["images"] = np.array(images)
    x, every = features(arrays), np.arange(len(top1))

    def conditioned(rows: np.ndarray) -> AdditiveGP:
        """Fit on some of the rows."""
        own = {**parts, "features": x[rows], "resolutions": r[rows], "top1": top1[rows]}
        kernels, values = Kernels(features, r[rows]), link(top1[rows])
        own["log_std"] = _log_std(kernels, x[rows], r[rows], values, seed)
        return AdditiveGP(own, {"name": name, **(card or {}), "rows": len(rows)}, name)

    link = Points() if images is None else Logit(images)
    model, groups = conditioned(every), _architectures(arrays)
    model.card["resolutions"] = np.unique(r).tolist()
    model.card["held_out"] = held_out(model, groups)
    if groups.max() == 0:  # one architecture: nothing to leave out
        return model
    fold = rng(seed, "folds").permutation(groups.max() + 1)[groups] % FOLDS
    errors = np.zeros(len(top1))
    for rows in (np.flatnonzero(fold == number) for number in np.unique(fold)):
        part = conditioned(np.setdiff1d(every, rows))
        errors[rows] = part.standard_errors(x[rows], r[rows], top1[rows])
    model.card["half_width_90"] = round(half_width(errors), 4)
    return model


def half_width(errors: np.ndarray, level: float = 0.9) -> float:
    """Return how many standard deviations a prediction interval has to reach to each side.

    The conformal quantile of errors on measurements that their models were not fitted on (Vovk,
    Gammerman and Shafer, Algorithmic Learning in a Random World, 2005). On 40, 80 and 300 of the
    measured subnets of OFA and CompOFA, the 90 % interval has 89 to 96, 89 to 92 and 89 to 91 % of
    the others; that of a normal distribution 81 to 92, 86 to 92 and 90 to 92 %.

    Args:
        errors: Errors divided by the standard deviations that their models state, [n].
        level: Share of new measurements that the interval is to have.
    """
    place = min(int(np.ceil((len(errors) + 1) * level)), len(errors))
    reach = float(np.sort(np.abs(errors))[place - 1])
    return reach if reach > 0 else NORMAL_90


def _checked(arrays: SubnetArrays, top1: np.ndarray) -> tuple[SubnetArrays, np.ndarray]:
    arrays, top1 = arrays.checked(list(arrays.blocks)), np.asarray(top1, dtype=np.float64)
    if top1.ndim != 1 or len(arrays) != len(top1):
        raise DataError(
            f"expected as many subnets as measurements, got {len(arrays)} and {top1.shape}"
        )
    if len(top1) < MIN_ROWS:
        raise DataError(f"expected at least {MIN_ROWS} measured subnets, got {len(top1)}")
    if not (np.isfinite(top1).all() and top1.min() >= 0 and top1.max() <= 100):
        raise DataError("expected top-1 in percent, 0 to 100, got values outside or not finite")
    return arrays, top1


def _log_std(
    kernels: Kernels, x: np.ndarray, r: np.ndarray, values: np.ndarray, seed: int
) -> np.ndarray:
    """Maximise the posterior of the kernels' weights and the noise on some of the rows."""
    some = rng(seed, "likelihood").permutation(len(values))[:SUBSET]
    target = ((values - values.mean()) / spread(values, r))[some]
    each, constant = kernels((x[some], r[some]), (x[some], r[some]))
    eye = np.eye(len(some))
    flat = np.concatenate([each, eye[None]]).reshape(-1, eye.size)
    start = np.append(kernels.start, NOISE)

    def loss(log_std: np.ndarray) -> tuple[float, np.ndarray]:
        power, prior = np.exp(2 * log_std), (log_std - start) / WIDTH
        kernel = (power @ flat).reshape(eye.shape) + constant + JITTER * eye
        root = np.linalg.cholesky(kernel)
        inverse = cho_solve((root, True), eye)
        alpha = inverse @ target
        value = 0.5 * target @ alpha + np.log(np.diag(root)).sum() + 0.5 * prior @ prior
        slope = power * (flat @ (inverse - np.outer(alpha, alpha)).ravel())
        return value, slope + prior / WIDTH

    bounds = [(-10.0, 5.0)] * len(start)
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x


def _architectures(arrays: SubnetArrays) -> np.ndarray:
    """Return a number for each row that those of the same architecture share, int [n]."""
    numbers = np.concatenate([*arrays.blocks.values(), arrays.outer], axis=1)
    return np.unique(numbers, axis=0, return_inverse=True)[1].reshape(-1)


def held_out(model: AdditiveGP, groups: np.ndarray) -> dict[str, dict[str, float | None]]:
    """Return the errors on measurements whose architecture was left out: all, and by resolution.

    Returns:
        For ``all`` and each resolution ``mae`` (points), ``spearman`` (``None`` where all are
        equal) and the share of measurements in the central 68, 90 and 95 % intervals.
    """
    mean, std = model.left_out(groups)
    top1, r = model.arrays["top1"], model.arrays["resolutions"]
    points = np.abs(top1 - model.link.percent(mean))
    errors = np.abs(model.link(top1) - mean) / std

    def figures(rows: np.ndarray) -> dict[str, float | None]:
        equal = not (np.ptp(mean[rows]) and np.ptp(top1[rows]))
        rank = None if equal else float(spearmanr(mean[rows], top1[rows]).statistic)
        inside = {
            f"coverage_{level}": round(
                float((errors[rows] < norm.ppf(0.5 + level / 200)).mean()), 3
            )
            for level in (68, 90, 95)
        }
        return {
            "rows": int(rows.sum()),
            "mae": round(float(points[rows].mean()), 4),
            "spearman": None if rank is None else round(rank, 4),
            **inside,
        }

    every = {"all": figures(np.ones(len(r), dtype=bool))}
    return every | {str(level): figures(r == level) for level in np.unique(r).tolist()}
