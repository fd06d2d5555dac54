"""Files of fitted models: arrays as ``NAME.npz`` and a card beside them as ``NAME.json``.

The card says what the model was fitted on, how, and its held-out error. Files may be damaged or
hostile: arrays are read without pickle and in bounded memory, and checked before they are used.
"""

from __future__ import annotations

import json
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from compofa.errors import TableError
from compofa.io.atomic import write_atomic, write_text_atomic
from compofa.io.untrusted import parse_json, printable, read_text

MODELS = Path(__file__).parent / "models"
"""Folder of the models that ship."""
MAX_FILE_BYTES = 64 << 20

Shapes = Mapping[str, tuple[str, tuple[int | str, ...]]]
"""For each array its dtype kinds (NumPy's letters) and its dimensions; equal names are equal sizes,
and a size may be 0 only where the name ends in ``?``."""


def read_model(path: str | Path, expected: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the arrays of a model and its card, which is empty where there is no such file.

    Args:
        path: The ``.npz`` file.
        expected: What it should be, for errors.

    Raises:
        TableError: A file is malformed, too large or something else.
    """
    path = Path(path)
    try:
        arrays = read_npz(path, MAX_FILE_BYTES)
        card_path = path.with_suffix(".json")
        card = parse_json(read_text(card_path)) if card_path.is_file() else {}
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: expected {expected}, got: {error}") from error
    if not isinstance(card, dict):
        raise TableError(f"{card_path}: expected a JSON object, got {type(card).__name__}")
    return arrays, card


def write_model(
    path: str | Path, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]
) -> None:
    """Write the arrays to ``path`` (.npz, no pickle) and the card beside it (.json).

    Time stamps are fixed, so that equal arrays give equal bytes.
    """

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(arrays):
                entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                with archive.open(entry, "w") as part:
                    np.lib.format.write_array(part, np.asarray(arrays[name]), allow_pickle=False)

    path = Path(path)
    write_atomic(path, write)
    write_text_atomic(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")


def read_npz(path: str | Path, most: int) -> dict[str, np.ndarray]:
    """Read the arrays of a file that unpacks to at most ``most`` bytes.

    Raises:
        ValueError: The file is not such an archive, damaged or larger.
    """
    try:
        # One open file throughout: a file that replaces it meanwhile is a different one.
        with open(path, "rb") as file, warnings.catch_warnings():
            with zipfile.ZipFile(file) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > most:
                raise ValueError(f"more than {most} bytes")
            file.seek(0)
            warnings.simplefilter("ignore")  # NumPy warns of unusual headers
            with np.load(file, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
    except (
        OSError, EOFError, KeyError, TypeError, RuntimeError, MemoryError, SyntaxError,
        OverflowError, zipfile.BadZipFile, zlib.error, tokenize.TokenError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise ValueError(reason or type(error).__name__) from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy returns other members as bytes
            raise ValueError(f"{key[:80]!r}, which is not an array")
    return arrays


def check_arrays(arrays: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, int]:
    """Check that arrays are exactly those of ``shapes``, finite and of fitting sizes.

    Returns:
        The size of each named dimension.

    Raises:
        TableError: They are not; the message names the array.
    """
    missing = [key for key in shapes if key not in arrays]
    extra = [key for key in arrays if key not in shapes]
    if missing or extra:
        raise TableError(
            f"expected the arrays {', '.join(shapes)}; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(extra)[:80] or 'none'}"
        )
    sizes: dict[str, int] = {}
    for key, (kinds, dims) in shapes.items():
        value = arrays[key]
        if (
            value.dtype.kind not in kinds
            or value.ndim != len(dims)
            or (value.dtype.kind in "fc" and not np.isfinite(value).all())
        ):
            raise TableError(
                f"{key}: expected finite values of kind {kinds!r} in {len(dims)} dimensions, got "
                f"{value.dtype} of shape {value.shape}"
            )
        for dim, size in zip(dims, value.shape, strict=True):
            wanted = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
            if size != wanted or (size == 0 and not str(dim).endswith("?")):
                raise TableError(f"{key}: expected size {wanted} along {dim}, got {value.shape}")
    return sizes


def card_text(card: Mapping[str, Any], key: str, default: str) -> str:
    """Return an entry of a card as one line of text that a terminal can show."""
    return " ".join(printable(str(card.get(key, default))).split())


def measured_width(card: Mapping[str, Any]) -> float | None:
    """Return the width multiplier of the measured networks; ``None`` if it was not recorded.

    Raises:
        TableError: It is not a finite number above 0.
    """
    width = card.get("width_mult")
    if width is None:
        return None
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < math.inf:
        raise TableError(f"expected a width multiplier above 0 in the card, got {width!r:.40}")
    return float(width)


def require_near(model: str, measured: float | None, width_mult: float, most: float) -> None:
    """Check that networks are not far wider or narrower than those that a model was fitted on.

    Args:
        model: What to call it in the error.
        measured: Width multiplier that it was fitted on; ``None`` where it was not recorded.
        width_mult: Width multiplier of the networks to predict.
        most: The largest allowed ratio of the two, either way.

    Raises:
        TableError: They are.
    """
    if measured is not None and not measured / most <= width_mult <= measured * most:
        raise TableError(
            f"{model} was measured at width multiplier {measured:g}: expected one from "
            f"{measured / most:g} to {measured * most:g}, got {width_mult:g}"
        )
