"""An additive Gaussian process on subnets: the accuracy predictor of one's own records.

The kernel is a weighted sum of a few fixed kernels on the choices of blocks: one linear kernel per
choice and one for presence, the mean over the stages of a Gaussian kernel
on a stage's choices, and its square, which is a function of pairs of stages. Where there are
several resolutions, each also occurs with a part that grows with resolution. Only the weights are
fitted (:mod:`nas.accuracy.fit`), so 80 records take well under a second.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.space.arrays import SubnetArrays
from nas.accuracy.base import CardPredictor
from nas.accuracy.link import Logit, Points
from nas.model_file import Shapes, check_arrays

FORMATS = (2, 3)
"""Formats of files: models of top-1 in percent, and models of its logit with ``images``."""
MAX_IMAGES = 1_000_000_000
MAX_ROWS = 4000
"""Most measurements of a model; prediction is linear in their number, conditioning cubic."""
CHUNK = 512
WIDE = 10.0
"""Prior variance of the mean and of its slope over resolution, in units of the spread of top-1."""
JITTER = 1e-8

ARRAYS: Shapes = {
    "format": ("i", ()),
    "names": ("U", ("choices",)),
    "counts": ("i", ("choices",)),
    "values": ("fi", ("values",)),
    "shape": ("i", (2,)),
    "columns": ("i", ("columns?",)),
    "features": ("f", ("rows", "columns?")),
    "resolutions": ("i", ("rows",)),
    "top1": ("f", ("rows",)),
    "log_std": ("f", ("weights",)),
}
IMAGES: Shapes = {"images": ("i", ())}


class Features:
    """Choices of blocks as numbers from -1 to 1: each choice's rank among its values, and presence.

    Args:
        values: For each choice of a block, by name, the values that occur, rising.
        shape: Blocks in all and stages.
        columns: Which columns to keep of every choice and presence, side by side.
    """

    def __init__(
        self, values: Mapping[str, np.ndarray], shape: np.ndarray, columns: np.ndarray
    ) -> None:
        self.values, self.shape, self.columns = dict(values), shape, columns
        blocks, stages = shape.tolist()
        self.kind = columns // blocks
        self.stage = columns % blocks // (blocks // stages)

    @classmethod
    def of(cls, arrays: SubnetArrays) -> Features:
        """Return the features of subnets, without those that are the same for all of them."""
        arrays = arrays.outer_as_stages()
        active = arrays.active
        values = {name: np.unique(values[active]) for name, values in arrays.blocks.items()}
        shape = np.array([active.shape[1], arrays.depths.shape[1]])
        every = cls(values, shape, np.arange((len(values) + 1) * shape[0]))
        varying = np.flatnonzero(np.ptp(every(arrays), axis=0) > 0)
        return cls(values, shape, varying)

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the features of each subnet, float64 [n, columns].

        Raises:
            SpaceError: A shape or value that did not occur.
        """
        arrays = arrays.checked(list(self.values)).outer_as_stages()
        active, parts = arrays.active, []
        if (got := (active.shape[1], arrays.depths.shape[1])) != tuple(self.shape):
            raise SpaceError(
                f"expected subnets of {self.shape[0]} blocks in {self.shape[1]} stages, "
                f"got {got[0]} in {got[1]}"
            )
        for name, known in self.values.items():
            values = arrays.blocks[name]
            if (values[~active] != 0).any():
                raise SpaceError(f"{name}: expected 0 at the blocks past the depth")
            wrong = values[active & ~np.isin(values, known)]
            if wrong.size:
                listed = ", ".join(f"{value:g}" for value in known)
                raise SpaceError(f"{name}: expected one of {listed}, got {wrong[0]:g}")
            rank = 2 * np.searchsorted(known, values) / max(1, len(known) - 1) - 1
            parts.append(np.where(active, rank, 0.0))
        return np.concatenate([*parts, 2.0 * active - 1], axis=1)[:, self.columns]

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Features:
        """Read what :meth:`to_arrays` wrote."""
        parts = np.split(arrays["values"], np.cumsum(arrays["counts"])[:-1])
        values = dict(zip(arrays["names"].tolist(), parts, strict=True))
        return cls(values, arrays["shape"], arrays["columns"])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the features as arrays of a model's file."""
        return {
            "names": np.array(list(self.values)),
            "counts": np.array([len(known) for known in self.values.values()]),
            "values": np.concatenate(list(self.values.values())).astype(np.float64),
            "shape": self.shape,
            "columns": self.columns,
        }


class Kernels:
    """The fixed kernels whose weighted sum is the kernel of the process.

    Args:
        features: What the columns of the inputs are.
        resolutions: The measured resolutions.
    """

    def __init__(self, features: Features, resolutions: np.ndarray) -> None:
        self.kinds = [np.flatnonzero(features.kind == kind) for kind in np.unique(features.kind)]
        self.stages = [np.flatnonzero(features.stage == s) for s in np.unique(features.stage)]
        levels = np.unique(resolutions).astype(np.float64)
        self.several = len(levels) > 1
        # About what accuracy is linear in: the mean of OFA w1.0 rises from 128 to 160, 192 and 224
        # pixels by 3.9, 1.9 and 0.8 points.
        self._top, rises = levels.max(), -((levels.max() / levels) ** 3.0)
        self._mean, self._spread = rises.mean(), max(float(rises.std()), 1e-9)
        linear, smooth = [-1.0] * len(self.kinds), [-1.5, -1.5] if self.stages else []
        grown = [-3.0] * (len(linear) + len(smooth) + 1) if self.several else []
        self.start = np.array([*linear, *smooth, *grown])
        """Prior mean of the logarithm of each kernel's standard deviation."""

    def rise(self, r: np.ndarray) -> np.ndarray:
        """Return a coordinate of resolutions that accuracy is about linear in, [n]."""
        return (-((self._top / np.asarray(r, dtype=np.float64)) ** 3.0) - self._mean) / self._spread

    def __call__(
        self, a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compare rows ``a`` with rows ``b``, each features [n, columns] and resolutions [n].

        Returns:
            Each kernel, [kernels, n, m], and the constant part of their sum, [n, m].
        """
        (x, r), (y, s) = a, b
        found = [x[:, kind] @ y[:, kind].T / len(kind) for kind in self.kinds]
        if self.stages:
            near = np.zeros((len(x), len(y)))
            for stage in self.stages:
                u, v = x[:, stage], y[:, stage]
                gap = (u**2).sum(axis=1)[:, None] + (v**2).sum(axis=1) - 2 * u @ v.T
                near += np.exp(np.minimum(-gap, 0) / (2 * len(stage)))
            near /= len(self.stages)
            found += [near, near**2]
        both = self.rise(r)[:, None] * self.rise(s)
        if self.several:
            same = np.asarray(r)[:, None] == np.asarray(s)
            found += [*(kernel * both for kernel in found), same.astype(np.float64)]
        return np.array(found).reshape(-1, *both.shape), WIDE * (1 + both)

    def variances(self, x: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the diagonals of what a call with the same rows twice returns."""
        found = [(x[:, kind] ** 2).mean(axis=1) for kind in self.kinds]
        found += [np.ones(len(x))] * (2 * bool(self.stages))
        both = self.rise(r) ** 2
        if self.several:
            found += [*(kernel * both for kernel in found), np.ones(len(x))]
        return np.array(found).reshape(-1, len(x)), WIDE * (1 + both)


class AdditiveGP(CardPredictor):
    """Top-1 of subnets by an additive Gaussian process, conditioned on measurements.

    Attributes:
        resolutions: The measured resolutions, rising, pixels.
        link: The scale that the process works on: the logit of top-1 where the number of images per
            measurement is known, else percent.
        scale: Spread of the measurements about the mean of their resolution, on that scale, at
            least 0.01.
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any], name: str
    ) -> None:
        _validate(arrays)
        super().__init__(arrays, card, name)
        self._features = Features.from_arrays(arrays)
        self._rows = (arrays["features"], arrays["resolutions"])
        self._kernels = Kernels(self._features, arrays["resolutions"])
        if len(arrays["log_std"]) != len(self._kernels.start) + 1:
            raise TableError(
                f"log_std: expected {len(self._kernels.start) + 1} values, got "
                f"{len(arrays['log_std'])}"
            )
        *weights, self._noise = np.exp(2 * np.clip(arrays["log_std"], -20, 20))
        self._weights = np.array(weights)
        r, top1 = arrays["resolutions"], arrays["top1"]
        self.resolutions = tuple(np.unique(r).tolist())
        self.link = Logit(int(arrays["images"])) if "images" in arrays else Points()
        values = self.link(top1)
        self.scale = spread(values, r)
        self._mean = float(values.mean())
        kernel = self._kernel(*self._rows)
        kernel[np.diag_indices(len(r))] += self._noise + JITTER
        try:
            root = np.linalg.inv(np.linalg.cholesky(kernel))
        except np.linalg.LinAlgError:
            raise TableError("log_std: expected a positive definite kernel") from None
        self._inverse_root = root
        self._alpha = root.T @ (root @ ((values - self._mean) / self.scale))

    @staticmethod
    def wrote(arrays: Mapping[str, np.ndarray]) -> bool:
        """Return whether the arrays of a file say that they are such a model."""
        return "format" in arrays and arrays["format"].shape == () and arrays["format"] in FORMATS

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return expected top-1 in percent, float64 of shape [n].

        Raises:
            SpaceError: A choice, shape or resolution outside those that were measured.
        """
        return self.link.percent(self._expected(*self._inputs(arrays)))

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation of a new measurement about :meth:`predict`, points [n]."""
        expected, spread = self._measured(arrays)
        return spread * self.link.slope(expected)

    def model_std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation (points) of a subnet's true accuracy, without noise."""
        x, r = self._inputs(arrays)
        return self._spread(x, r) * self.link.slope(self._expected(x, r))

    def interval(self, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray]:
        """Return the least and greatest top-1 of the 90 % prediction interval; see the base."""
        expected, spread = self._measured(arrays)
        ends = (expected + side * self.half_width * spread for side in (-1, 1))
        low, high = (np.clip(self.link.percent(end), 0.0, 100.0) for end in ends)
        return low, high

    def standard_errors(self, x: np.ndarray, r: np.ndarray, top1: np.ndarray) -> np.ndarray:
        """Return how far measurements are from expected, in standard deviations.

        Args:
            x: Features of the subnets, [n, columns].
            r: Their resolutions, pixels, [n].
            top1: Their measured accuracy, percent, [n].
        """
        spread = np.hypot(self._spread(x, r), np.sqrt(self._noise) * self.scale)
        return (self.link(top1) - self._expected(x, r)) / spread

    def _measured(self, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of a new measurement, on the scale of the process."""
        x, r = self._inputs(arrays)
        expected = self._expected(x, r)
        spread = np.hypot(self._spread(x, r), np.sqrt(self._noise) * self.scale)
        if self.extra_std:
            spread = np.hypot(spread, self.extra_std / self.link.slope(expected))
        return expected, spread

    def _expected(self, x: np.ndarray, r: np.ndarray) -> np.ndarray:
        out = np.empty(len(r))
        for at in _chunks(len(r)):
            out[at] = self._kernel(x[at], r[at]) @ self._alpha
        return out * self.scale + self._mean

    def _spread(self, x: np.ndarray, r: np.ndarray) -> np.ndarray:
        variance = np.empty(len(r))
        for at in _chunks(len(r)):
            kernels, constant = self._kernels.variances(x[at], r[at])
            known = self._kernel(x[at], r[at]) @ self._inverse_root.T
            variance[at] = self._weights @ kernels + constant - (known**2).sum(axis=1)
        return np.sqrt(np.maximum(variance, 0)) * self.scale

    def left_out(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predict each measurement from those of other groups, with the weights as fitted.

        Args:
            groups: Label of each measurement's group, int [n].

        Returns:
            Mean and standard deviation of each measurement, on the scale of :attr:`link`, [n].
        """
        inverse = self._inverse_root.T @ self._inverse_root
        error, variance = np.empty(len(groups)), np.empty(len(groups))
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            covariance = np.linalg.inv(inverse[np.ix_(rows, rows)])
            error[rows] = covariance @ self._alpha[rows]
            variance[rows] = np.diag(covariance)
        mean = self.link(self.arrays["top1"]) - error * self.scale
        return mean, np.sqrt(variance) * self.scale

    def _kernel(self, x: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Return the kernel between rows and the measured ones, [n, rows]."""
        kernels, constant = self._kernels((x, r), self._rows)
        return np.tensordot(self._weights, kernels, 1) + constant

    def _inputs(self, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray]:
        r = np.asarray(arrays.resolutions, dtype=np.float64)
        low, high = self.resolutions[0], self.resolutions[-1]
        wrong = r[~((r >= low) & (r <= high))]
        if wrong.size:
            raise SpaceError(
                f"expected resolutions from {low} to {high} for the accuracy model {self.name}, "
                f"got {wrong[0]:g}"
            )
        return self._features(arrays), r


def spread(values: np.ndarray, r: np.ndarray) -> float:
    """Return the spread of values about the mean of their resolution, at least 0.01."""
    rest = np.array(values, dtype=np.float64)
    for level in np.unique(r):
        rest[r == level] -= rest[r == level].mean()
    return max(float(rest.std()), 0.01)


def _chunks(count: int) -> list[slice]:
    return [slice(start, start + CHUNK) for start in range(0, count, CHUNK)]


def _validate(arrays: Mapping[str, np.ndarray]) -> None:
    """Check that ``arrays`` are a whole model of one of :data:`FORMATS`.

    Raises:
        TableError: They are not; the message names the array.
    """
    sizes = check_arrays(arrays, ARRAYS | IMAGES if "images" in arrays else ARRAYS)
    if arrays["format"] != FORMATS["images" in arrays]:
        raise TableError(f"format: expected {FORMATS['images' in arrays]}, got {arrays['format']}")
    blocks, stages = arrays["shape"].tolist()
    if not (0 < stages <= blocks <= 1000 and blocks % stages == 0):
        raise TableError(
            f"shape: expected blocks and stages that divide them, got {blocks, stages}"
        )
    if sizes["rows"] > MAX_ROWS:
        raise TableError(f"features: expected at most {MAX_ROWS} rows, got {sizes['rows']}")
    for key, low, high in (
        ("values", 0, 9999), ("columns", 0, (sizes["choices"] + 1) * blocks - 1),
        ("resolutions", 1, 9999), ("features", -1, 1), ("top1", 0, 100), ("images", 1, MAX_IMAGES),
    ):  # fmt: skip
        values = arrays.get(key, np.ones(0))
        if values.size and not (values.min() >= low and values.max() <= high):
            raise TableError(f"{key}: expected values from {low} to {high}, got others")
        if key == "columns" and (np.diff(values) <= 0).any():
            raise TableError(f"{key}: expected rising values")
    names, counts = arrays["names"].tolist(), arrays["counts"]
    if len({*names}) < len(names) or not all(name.isidentifier() for name in names):
        raise TableError(f"names: expected distinct names of choices, got {names!r:.80}")
    if counts.min() < 1 or counts.max() > sizes["values"] or counts.sum() != sizes["values"]:
        raise TableError(
            f"counts: expected a sum of {sizes['values']}, got {counts.tolist()!r:.80}"
        )
    parts = np.split(arrays["values"], np.cumsum(counts)[:-1])
    if any((np.diff(part) <= 0).any() for part in parts):
        raise TableError("values: expected rising values of each choice")
