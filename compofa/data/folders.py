"""Class folders: ``<class>/*.jpg``, alone or in ``train`` and ``val``, on a disk or in a tar."""

import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compofa.data.archives import TarFolder
from compofa.data.sources import FilesSource
from compofa.errors import DataError

_LOG = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
)
TEST_FOLDERS = ("val", "validation", "test")
Folder = Path | TarFolder


def has_split(root: Folder) -> bool:
    """Whether ``root`` has ``train`` or a test folder, with folders in it."""
    return any(_class_folders(root / name) for name in ("train", *TEST_FOLDERS))


def has_classes(root: Path) -> bool:
    """Whether a folder in ``root`` has an image in it."""
    return any(
        _is_image(entry) for name in _class_folders(root) for entry in os.listdir(root / name)
    )


def read_split(
    root: Folder, size: int | None, evaluation_only: bool
) -> tuple[tuple[str, ...], FilesSource, FilesSource]:
    """Read ``root/train`` and ``root/val`` (or ``validation``, ``test``).

    Args:
        root: The data set.
        size: Side to resize images to; None keeps them as they are.
        evaluation_only: Accept a missing ``train``: that source is then empty. Accept a test part
            that lacks some of its classes.

    Returns:
        Classes in alphabetical order, training and test images.

    Raises:
        DataError: A part is missing or empty, or the parts have different classes.
    """
    found = [name for name in TEST_FOLDERS if _class_folders(root / name)]
    if not found:
        raise DataError(f"expected {root}/val (or validation, test) beside {root}/train")
    if len(found) > 1:
        _LOG.warning("%s has %s: the test part is %s", root, " and ".join(found), found[0])
    classes, test = read_classes(root / found[0], size)
    if not _class_folders(root / "train"):
        if not evaluation_only:
            raise DataError(f"expected {root}/train with class folders beside {root}/{found[0]}")
        return classes, test.subset(np.arange(0)), test
    train_classes, train = read_classes(root / "train", size)
    if evaluation_only and set(classes) < set(train_classes):
        places = [train_classes.index(name) for name in classes]
        test.targets = np.array(places, dtype=np.int64)[test.targets]
    elif train_classes != classes:
        _compare(root, found[0], set(train_classes), set(classes))
    return train_classes, train, test


def read_classes(folder: Folder, size: int | None) -> tuple[tuple[str, ...], FilesSource]:
    """Read one folder of class folders; images may lie deeper, hidden files are left out.

    Returns:
        Classes in alphabetical order, and the images ordered by class and path.

    Raises:
        DataError: No folder, no class folder, or a class without images.
    """
    classes = _class_folders(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"expected a folder with one folder of images per class: {folder} {what}")
    if not classes:
        raise DataError(f"expected one folder of images per class in {folder}, found no folder")
    paths: list[bytes] = []
    counts = []
    for name in classes:
        images = _image_paths(folder, folder / name)
        if not images:
            raise DataError(f"class folder {folder / name} has no images ({_suffixes()})")
        paths += images
        counts.append(len(images))
    targets: NDArray[np.int64] = np.repeat(np.arange(len(classes)), counts).astype(np.int64)
    if isinstance(folder, TarFolder):
        return classes, folder.source(paths, targets, size)
    return classes, FilesSource(folder, np.array(paths), targets, size)


def _class_folders(folder: Folder) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    if isinstance(folder, TarFolder):
        return tuple(sorted(name for name in folder.folders if not name.startswith(".")))
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error
    return tuple(sorted(names))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _image_paths(root: Folder, folder: Folder) -> list[bytes]:
    if isinstance(folder, TarFolder):
        inside = folder.inside.removeprefix(root.inside)
        parts = ((name, name.split("/")) for name in folder.members)
        return sorted(
            os.fsencode(inside + name)
            for name, (*above, last) in parts
            if _is_image(last) and not any(part.startswith(".") for part in above)
        )

    def fail(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    paths = []
    seen = set()
    for parent, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:
            raise DataError(f"cannot read {parent}: a link leads to the same folder again")
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(parent, root)
        paths += [os.fsencode(os.path.join(below, name)) for name in files if _is_image(name)]
    return sorted(paths)


def _compare(root: Folder, test_name: str, train: set[str], test: set[str]) -> None:
    only_train, only_test = sorted(train - test), sorted(test - train)
    parts = [
        f"{len(names)} only in {part} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for part, names in (("train", only_train), (test_name, only_test))
        if names
    ]
    raise DataError(
        f"expected the same classes in {root}/train and {root}/{test_name}: {'; '.join(parts)}"
    )


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
