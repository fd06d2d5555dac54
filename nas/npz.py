"""Reading ``.npz`` files that may be broken or made to do harm: arrays of plain data, no pickle."""

from __future__ import annotations

import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np


def read_npz(path: str | Path, most: int) -> dict[str, np.ndarray]:
    """Read the arrays of a file that unpacks to at most ``most`` bytes.

    Raises:
        ValueError: It is no such file, damaged or larger.
    """
    try:
        # One open file throughout: another that takes its name meanwhile is another file.
        with open(path, "rb") as file, warnings.catch_warnings():
            with zipfile.ZipFile(file) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > most:
                raise ValueError(f"more than {most} bytes")
            file.seek(0)
            warnings.simplefilter("ignore")  # NumPy, about odd headers
            with np.load(file, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
    except (
        OSError, EOFError, KeyError, TypeError, RuntimeError, MemoryError, SyntaxError,
        OverflowError, zipfile.BadZipFile, zlib.error, tokenize.TokenError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise ValueError(reason or type(error).__name__) from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):  # NumPy gives other members as bytes
            raise ValueError(f"{key[:80]!r}, which is no array")
    return arrays
