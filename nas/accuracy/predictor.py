"""Accuracy predictors: top-1 of many subnets at once, in NumPy alone.

There are three kinds (:class:`~nas.accuracy.base.AccuracyModel`): the models that ship, fitted to
published measurements; models that ``fit-accuracy`` writes for a user's own records; and the
published Once-for-All predictor. :func:`load_accuracy_model` opens all of them.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.io.untrusted import printable
from compofa.networks.zoo import NETWORKS
from compofa.space.arrays import SubnetArrays
from nas.accuracy.additive import AdditiveGP
from nas.accuracy.base import CardPredictor
from nas.accuracy.codes import CHUNK, ChoiceCodes
from nas.accuracy.ofa_predictor import PublishedPredictor, read_published
from nas.model_file import MODELS, check_arrays, read_model

FORMAT = 1

NAMES = {
    "ofa_mbv3_w1.0": "ofa_mbv3_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.0": "ofa_mbv3_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.2": "ofa_mbv3_w1.0",
    "compofa": "compofa",
    "compofa-elastic": "compofa",
}
"""Shipped model by name of the network."""


class FittedPredictor(CardPredictor):
    """A small network from choices to top-1 at each anchor resolution, with its uncertainty.

    The form of the models that ship (made by ``python -m tools.fit``), and of those that
    ``fit-accuracy`` wrote up to version 0.1. Between two anchors the accuracy is interpolated
    linearly, as the published programs do.

    Attributes:
        resolutions: The anchors, int [A].
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any], name: str
    ) -> None:
        _validate(arrays)
        super().__init__(arrays, card, name)
        self.resolutions = self.arrays["resolutions"]
        slots = len(self.arrays["input_weight"])
        values = {"kernel": self.arrays["kernels"], "expand": self.arrays["expands"]}
        self._codes = ChoiceCodes(values, slots)
        joined = np.concatenate([self.arrays["input_weight"], self.arrays["skip_weight"]], axis=2)
        self._tables = self._codes.tables(joined)
        self._spread_tables: list[np.ndarray] | None = None

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return expected top-1 in percent, float64 of shape [n].

        Raises:
            SpaceError: A choice, shape or resolution outside what the model was fitted on.
        """
        arrays = arrays.outer_as_stages()
        rows, (low, share) = self._codes.rows(arrays), self._place(arrays.resolutions)
        a = self.arrays
        width, anchors = a["hidden_weight"].shape[0], len(self.resolutions)
        count = len(low)
        out = np.empty((count, anchors), dtype=np.float32)
        total = np.empty((min(CHUNK, count), width + anchors), dtype=np.float32)
        part = np.empty_like(total)
        for start in range(0, count, CHUNK):
            at = slice(start, min(start + CHUNK, count))
            size = at.stop - at.start
            now = _sum_rows(self._tables, rows, at, total[:size], part[:size])
            hidden = now[:, :width]
            hidden += a["input_bias"]
            np.maximum(hidden, 0, out=hidden)
            hidden *= hidden
            second = hidden @ a["hidden_weight"]
            second += a["hidden_bias"]
            np.maximum(second, 0, out=second)
            np.matmul(second, a["output_weight"], out=out[at])
            out[at] += now[:, width:]
        return _interpolate(out, low, share, a["output_bias"])

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation of one new measurement about :meth:`predict`, points.

        It holds everything that separates a row of the source from the prediction: how far the
        subnet is from those measured, the noise of a measurement and, where the source was
        measured in parts of the validation set, their offsets.
        """
        low, share = self._place(arrays.resolutions)
        noise = _interpolate(
            np.zeros((len(low), len(self.resolutions))), low, share, self.arrays["noise"]
        )
        return np.hypot(np.hypot(self.model_std(arrays), noise), self.extra_std)

    def model_std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation (points) of a subnet's true accuracy, without noise."""
        arrays = arrays.outer_as_stages()
        rows, (low, share) = self._codes.rows(arrays), self._place(arrays.resolutions)
        if self._spread_tables is None:
            self._spread_tables = self._codes.tables(self.arrays["spread_weight"])
        total = np.empty((len(low), len(self.resolutions)), dtype=np.float32)
        log_std = _sum_rows(
            self._spread_tables, rows, slice(0, len(low)), total, np.empty_like(total)
        )
        bound = self.arrays["spread_bound"]
        spread = np.exp(np.clip(log_std + self.arrays["spread_bias"], bound[0], bound[1]))
        return _interpolate(spread, low, share, np.zeros(len(self.resolutions)))

    def _place(self, resolutions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the anchor below each resolution and the share of the one above."""
        r, anchors = np.asarray(resolutions, dtype=np.float64), self.resolutions
        if r.size and not (r.min() >= anchors[0] and r.max() <= anchors[-1]):
            wrong = r[~((r >= anchors[0]) & (r <= anchors[-1]))][0]
            raise SpaceError(
                f"expected resolutions from {anchors[0]} to {anchors[-1]} for the accuracy model "
                f"{self.name}, got {wrong:g}"
            )
        if len(anchors) == 1:
            return np.zeros(len(r), dtype=np.intp), np.zeros(len(r))
        low = np.searchsorted(anchors[1:-1], r, side="right")
        return low, (r - anchors[low]) / (anchors[low + 1] - anchors[low])


def load_accuracy_model(
    name_or_path: str | Path, width_mult: float | None = None
) -> FittedPredictor | PublishedPredictor:
    """Open a shipped model by its network's name, or a model's file.

    Args:
        name_or_path: A name of :data:`NAMES`, an ``.npz`` that ``fit-accuracy`` wrote, or the
            published predictor's ``.pth`` (reading that one imports torch).
        width_mult: Width multiplier of the networks to predict; by default that of the named
            network, or the measured one.

    Raises:
        TableError: No such name or file, a file that is something else, or networks far wider or
            narrower than those that were measured.
    """
    text = str(name_or_path)
    if width_mult is None and text in NETWORKS:
        width_mult = NETWORKS[text].width_mult
    model = _load(text)
    if width_mult is not None:
        model.serve(width_mult)
    return model


def _load(text: str) -> FittedPredictor | PublishedPredictor:
    path = Path(text)
    if text in NAMES:
        return _read_npz(MODELS / f"accuracy_{NAMES[text]}.npz", text)
    if text in NETWORKS and not path.is_file():
        raise TableError(
            f"no accuracy predictor of {text} ships, only of {', '.join(NAMES)}: expected a "
            "trained checkpoint to search instead of the name, or a predictor fitted to records "
            "of one (python -m nas collect, then fit-accuracy)"
        )
    if not path.is_file():
        raise TableError(
            f"expected an accuracy predictor's file (.npz, .pth) or one of "
            f"{', '.join(NAMES)}, got {text}"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            is_npz = any(entry.endswith(".npy") for entry in archive.namelist())
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):  # the reader says what is wrong
        is_npz = path.suffix == ".npz"
    return _read_npz(path, printable(path.stem)) if is_npz else read_published(path)


def _read_npz(path: Path, name: str) -> CardPredictor:
    arrays, card = read_model(path, "an accuracy model written by fit-accuracy")
    kind = AdditiveGP if AdditiveGP.wrote(arrays) else FittedPredictor
    try:
        return kind(arrays, card, name)
    except TableError as error:
        raise TableError(f"{path}: expected an accuracy model, got: {error}") from error


def _validate(arrays: Mapping[str, np.ndarray]) -> None:
    """Check that ``arrays`` are a whole model of :data:`FORMAT`.

    Raises:
        TableError: They are not; the message names the array.
    """
    sizes = check_arrays(arrays, ARRAYS)
    if arrays["format"] != FORMAT:
        raise TableError(f"format: expected {FORMAT}, got {arrays['format']}")
    choices = sizes["kernels"] + sizes["expands"]
    if sizes["choices"] != choices:
        raise TableError(f"input_weight: expected {choices} choices, got {sizes['choices']}")
    for key, most, fineness in (("kernels", 49, 1), ("expands", 49, 20), ("resolutions", 9999, 1)):
        steps = np.rint(arrays[key] * fineness)
        if (
            steps[0] <= 0
            or arrays[key][-1] > most
            or (np.diff(steps) <= 0).any()
            or len(steps) > 64
        ):
            raise TableError(
                f"{key}: expected at most 64 increasing values in (0, {most}], got {arrays[key]}"
            )


ARRAYS: dict[str, tuple[str, tuple[int | str, ...]]] = {
    "format": ("i", ()),
    "kernels": ("i", ("kernels",)),
    "expands": ("f", ("expands",)),
    "resolutions": ("i", ("anchors",)),
    "input_weight": ("f", ("slots", "choices", "width")),
    "input_bias": ("f", ("width",)),
    "hidden_weight": ("f", ("width", "second")),
    "hidden_bias": ("f", ("second",)),
    "output_weight": ("f", ("second", "anchors")),
    "output_bias": ("f", ("anchors",)),
    "skip_weight": ("f", ("slots", "choices", "anchors")),
    "spread_weight": ("f", ("slots", "choices", "anchors")),
    "spread_bias": ("f", ("anchors",)),
    "spread_bound": ("f", (2, "anchors")),
    "noise": ("f", ("anchors",)),
}
"""The arrays of a model; see :data:`nas.model_file.Shapes`."""


def _sum_rows(
    tables: list[np.ndarray],
    rows: list[np.ndarray],
    at: slice,
    total: np.ndarray,
    part: np.ndarray,
) -> np.ndarray:
    np.take(tables[0], rows[0][at], axis=0, out=total, mode="clip")
    for table, row in zip(tables[1:], rows[1:], strict=True):
        np.take(table, row[at], axis=0, out=part, mode="clip")
        total += part
    return total


def _interpolate(
    values: np.ndarray, low: np.ndarray, share: np.ndarray, bias: np.ndarray
) -> np.ndarray:
    """Interpolate ``values + bias`` [n, A] between anchor ``low`` and the next, float64 [n]."""
    index = np.arange(len(low))
    below = values[index, low] + bias[low].astype(np.float64)
    if values.shape[1] == 1:
        return below
    above = values[index, low + 1] + bias[low + 1].astype(np.float64)
    return below + share * (above - below)
