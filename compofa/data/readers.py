"""Readers of data sets that are not class folders. Importable without torch."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compofa.data.sampling import stratified_split
from compofa.errors import DataError
from compofa.seeds import rng

if TYPE_CHECKING:
    from compofa.data.sources import ImageSource, MemorySource

DEFAULT_ROOT = Path("data")
"""Where data sets are downloaded to if no path is given."""

FIXED_SPLIT = "test part"
"""Stream of random numbers of the splits that do not depend on the seed of a run."""


@dataclass(frozen=True, eq=False)
class RawDataset:
    """A data set as stored, before validation images are held out of the training images.

    Attributes:
        classes: Class names; a target is an index into them.
        train: Training images.
        test: Test images.
        validation: Validation images; None to hold them out of ``train``.
        n_validation: Default number of images to hold out; None for a tenth of ``train``.
        seeded: Whether the seed of a run decides which images are held out.
    """

    classes: tuple[str, ...]
    train: ImageSource
    test: ImageSource
    validation: ImageSource | None = None
    n_validation: int | None = None
    seeded: bool = True


def read_digits(path: Path | None, download: bool) -> RawDataset:
    """Read scikit-learn's digits; a fifth are test images.

    Raises:
        DataError: A path is given, or scikit-learn is not installed.
    """
    from compofa.data.sources import MemorySource

    if path:
        raise DataError(f"digits is part of scikit-learn: expected no data path, got {path}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits needs scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)  # stored as 0...16
    images = np.repeat(images[:, None], 3, axis=1)
    source = MemorySource(images, data.target.astype(np.int64))
    fifth = math.ceil(len(source) / 5)
    kept, held_out = stratified_split(source.targets, fifth, rng(FIXED_SPLIT))
    return RawDataset(
        tuple("0123456789"),
        source.subset(kept),
        source.subset(held_out),
        n_validation=len(source) // 5,
        seeded=False,
    )


def read_torchvision(
    name: str, class_name: str, folder: str, archive: str, path: Path | None, download: bool
) -> RawDataset | None:
    """Read a data set of :mod:`torchvision.datasets`, downloading it if it is missing.

    Args:
        name: Name of the data set, for messages.
        class_name: Its class in :mod:`torchvision.datasets`.
        folder: The folder that torchvision makes for it.
        archive: The files that torchvision downloads.
        path: Where ``folder`` is or shall be, or ``folder`` itself; None for ``DEFAULT_ROOT``.
        download: Whether missing files may be downloaded.

    Returns:
        The data set, or None if ``path`` holds class folders instead of torchvision's files.

    Raises:
        DataError: The files are missing or damaged, or cannot be downloaded.
    """
    from compofa.data.torchvision_shim import import_torchvision

    root = path or DEFAULT_ROOT
    stored = root.name == folder or (root / folder).exists() or (root / archive).exists()
    if path and not stored and _holds_class_folders(path):
        return None
    if root.name == folder and root.is_dir():
        root = root.parent
    import http.client  # here, for it loads ssl, and commands import this module for --help

    dataset_class = getattr(import_torchvision().datasets, class_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns about the old pickles
            parts = [dataset_class(str(root), train=t, download=download) for t in (True, False)]
        classes = tuple(parts[0].classes)
        train, test = (_memory_source(part, len(classes)) for part in parts)
    except (
        RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError, EOFError,
        http.client.HTTPException,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        what = "cannot be downloaded or read" if download else "is missing or damaged"
        raise DataError(
            f"{name} {what} in {root} ({reason}): put {archive} into {root}, or give a folder with "
            "train/<class>/ and test/<class>/ images as data path"
        ) from error
    return RawDataset(classes, train, test)


def _holds_class_folders(path: Path) -> bool:
    from compofa.data import folders

    if path.is_file():
        return True
    root = folders.data_root(path)
    return folders.has_split(root) or folders.has_classes(root)


def _memory_source(part: Any, classes: int) -> MemorySource:
    """Return the images of a torchvision data set, [n, h, w, 3] or grey [n, h, w].

    Raises:
        ValueError: A label is out of range, or images have another shape.
    """
    from compofa.data.sources import MemorySource

    images, targets = np.asarray(part.data), np.asarray(part.targets)
    if not len(targets) or not 0 <= targets.min() <= targets.max() < classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}")
    if images.ndim == 3:
        return MemorySource(np.repeat(images[:, None], 3, axis=1), targets)
    return MemorySource(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), targets)
