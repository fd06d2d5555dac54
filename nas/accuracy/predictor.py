"""Accuracy predictors: top-1 of many subnets at once, in NumPy alone.

Three kinds answer the same questions (:class:`AccuracyModel`): the models that ship, fitted on
published measurements; models that ``fit-accuracy`` made from one's own records; and the file of
the published Once-for-All predictor. :func:`load_accuracy_model` opens all of them.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.io.atomic import write_atomic, write_text_atomic
from compofa.io.untrusted import parse_json, printable, read_text
from compofa.networks.zoo import NETWORKS
from compofa.space.arrays import SubnetArrays
from nas.accuracy.published import PublishedPredictor, read_published
from nas.cards import measured_width, require_near
from nas.npz import read_npz
from nas.search.choices import CHUNK, ChoiceCodes

MODELS = Path(__file__).parent.parent / "models"
FORMAT = 1
MAX_FILE_BYTES = 64 << 20

NAMES = {
    "ofa_mbv3_w1.0": "ofa_mbv3_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.0": "ofa_mbv3_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.2": "ofa_mbv3_w1.0",
    "compofa": "compofa",
    "compofa-elastic": "compofa",
}
"""Name of a network -> the shipped model that serves it."""

NEAR = 1.25
"""The largest ratio of a network's width to the measured one that a model answers for."""
OTHER_WIDTH_STD = 1.5
"""Standard deviation (points) added at such another width: the model ranks, but absolute values are
not calibrated. MobileNetV3-Large at widths 0.75, 1.0 and 1.25 has a top-1 of 73.3, 75.2 and 76.6 %
(Howard et al., ICCV 2019), which is 1.5 points within :data:`NEAR`, and falls ever faster below."""


class AccuracyModel(Protocol):
    """What a search asks of a predictor.

    Attributes:
        name: Of the network or file.
        unit: What :meth:`predict` returns.
        error: How wrong it is, in words.
    """

    name: str
    unit: str
    error: str

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the expected accuracy of each subnet, float64 of shape [n]."""

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation of a measurement about :meth:`predict`, shape [n]."""


class FittedPredictor:
    """A small network from choices to top-1 at each anchor resolution, with its uncertainty.

    Made by :mod:`nas.accuracy.fit`. Between two anchors the accuracy is interpolated linearly, as
    the published programs do.

    Attributes:
        resolutions: The anchors, int [A].
        card: Source, licence, command and held-out figures, as written beside the arrays.
        width_mult: Width multiplier of the measured networks; ``None`` where it is not recorded.
        extra_std: Standard deviation (points) added for networks of another width.
    """

    unit = "top-1 %"

    def __init__(self, arrays: dict[str, np.ndarray], card: dict[str, Any], name: str) -> None:
        self.arrays = _validated(arrays)
        self.card = card
        self.name = name
        self.width_mult = measured_width(card)
        self.resolutions = self.arrays["resolutions"]
        self.extra_std = 0.0
        slots = len(self.arrays["input_weight"])
        self._codes = ChoiceCodes(self.arrays["kernels"], self.arrays["expands"], slots)
        joined = np.concatenate([self.arrays["input_weight"], self.arrays["skip_weight"]], axis=2)
        self._tables = self._codes.tables(joined)
        self._spread_tables: list[np.ndarray] | None = None

    @property
    def error(self) -> str:
        """Held-out error in words, from the card: the range over measured resolutions."""
        try:
            groups = [g for r, g in self.card["held_out"].items() if r != "all"]
            mae, rho = [g["mae"] for g in groups], [g["spearman"] for g in groups]
            rho = [value for value in rho if value is not None]  # null where all were equal
            ranks = f"Spearman {_span(rho)}" if rho else "no ranks"
            text = f"held-out MAE {_span(mae)} points, {ranks} by resolution"
        except (AttributeError, KeyError, TypeError, ValueError):
            text = "error not recorded"
        if self.extra_std:
            text += f", measured on another width: ranks, level uncertain by {self.extra_std:g}"
        return text

    def serve(self, width_mult: float) -> None:
        """Answer for networks of this width multiplier from now on.

        Raises:
            TableError: It is farther than :data:`NEAR` from what was measured.
        """
        require_near(f"the accuracy model {self.name}", self.width_mult, width_mult, NEAR)
        self.extra_std = OTHER_WIDTH_STD if width_mult != (self.width_mult or width_mult) else 0.0

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return expected top-1 in percent, float64 of shape [n].

        Raises:
            SpaceError: A choice, shape or resolution outside what the model was fitted on.
        """
        arrays = arrays.folded()
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
        arrays = arrays.folded()
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

    def save(self, path: str | Path) -> None:
        """Write the arrays to ``path`` (.npz, no pickle) and the card beside it (.json)."""
        path = Path(path)
        write_atomic(path, lambda file: np.savez_compressed(file, **self.arrays))
        write_text_atomic(path.with_suffix(".json"), json.dumps(self.card, indent=2) + "\n")

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


def _read_npz(path: Path, name: str) -> FittedPredictor:
    try:
        arrays = read_npz(path, MAX_FILE_BYTES)
    except ValueError as error:
        raise TableError(
            f"{path}: expected an accuracy model written by fit-accuracy, got: {error}"
        ) from error
    card: dict[str, Any] = {}
    card_path = path.with_suffix(".json")
    if card_path.is_file():
        try:
            card = parse_json(read_text(card_path))
        except (OSError, ValueError) as error:
            raise TableError(f"{card_path}: expected a JSON card, got: {error}") from error
        if not isinstance(card, dict):
            raise TableError(f"{card_path}: expected a JSON object, got {type(card).__name__}")
    try:
        return FittedPredictor(arrays, card, name)
    except TableError as error:
        raise TableError(f"{path}: {error}") from error


def _validated(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return ``arrays`` when they are a whole model; the message names what is wrong."""
    if "format" not in arrays or arrays["format"].shape != () or arrays["format"] != FORMAT:
        raise TableError(
            f"expected an accuracy model of format {FORMAT}, got arrays "
            f"{', '.join(sorted(arrays)[:8]) or 'none'}"
        )
    missing = [key for key in ARRAYS if key not in arrays]
    extra = [key for key in arrays if key not in ARRAYS]
    if missing or extra:
        raise TableError(
            f"expected the arrays of an accuracy model, missing {', '.join(missing) or 'none'}, "
            f"unknown {', '.join(extra) or 'none'}"
        )
    sizes: dict[str, int] = {}
    for key, (kind, dims) in ARRAYS.items():
        value = arrays[key]
        if value.dtype.kind != kind or value.ndim != len(dims) or not np.isfinite(value).all():
            raise TableError(
                f"{key}: expected finite values of kind {kind!r} in {len(dims)} dimensions, got "
                f"{value.dtype} of shape {value.shape}"
            )
        for dim, size in zip(dims, value.shape, strict=True):
            wanted = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != wanted or size == 0:
                raise TableError(f"{key}: expected size {wanted} along {dim}, got {value.shape}")
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
    return arrays


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
"""A model's arrays: dtype kind and dimensions (equal names are equal sizes)."""


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


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
