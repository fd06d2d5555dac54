"""Class folders: ``<class>/*.jpg``, alone or in ``train`` and ``val``, on a disk or in a tar."""

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compofa.data.archives import TarFolder
from compofa.data.parts import group_parts
from compofa.data.sources import FilesSource
from compofa.errors import DataError

_LOG = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
)
_NO_CLASSES = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
)
"""Folders that programs leave behind, in lower case."""
_DEEPEST = 16
_USUAL_NAMES = frozenset(("train", "val", "validation", "test"))
Folder = Path | TarFolder


class Split(NamedTuple):
    """Images of a data set that comes in parts.

    Attributes:
        classes: In alphabetical order; a target is an index into them.
        train: Training images; none where that part is missing.
        test: Images for the final figures.
        validation: Images for choices during training; None where there is no such folder beside
            the test images.
    """

    classes: tuple[str, ...]
    train: FilesSource
    test: FilesSource
    validation: FilesSource | None


def data_root(root: Folder) -> Folder:
    """Return the folder of the data set: ``root``, or one in it where ``root`` only wraps that.

    A folder wraps another where it holds nothing else: no images, and no second folder. Archives
    and downloads often do.

    Raises:
        DataError: A folder cannot be read, or its parts are ambiguous.
    """
    below = _unwrapped(root, part=False)
    if below is not root:
        _LOG.info("%s: the data set is in %s", root, below)
    return below


def has_split(root: Folder) -> bool:
    """Whether ``root`` is divided into folders of training and test images.

    Raises:
        DataError: It is in more than one way.
    """
    return bool(_part_folders(root))


def has_classes(root: Path) -> bool:
    """Whether a folder in ``root`` has an image in it."""
    return any(_has_images(root / name) for name in _class_folders(root))


def read_split(root: Folder, size: int | None, evaluation_only: bool) -> Split:
    """Read ``root/train``, ``root/val`` and ``root/test``, by whatever usual name they go.

    The images of a test folder are the test part; where there is none, those of the validation
    folder are. Which folder was taken for what is logged, unless only the usual names are there.

    Args:
        root: The data set.
        size: Side to resize images to; None keeps them as they are.
        evaluation_only: Accept a missing ``train``: that source is then empty.

    Raises:
        DataError: A part is missing, empty, there twice, or of other classes than the test part.
    """
    found = _part_folders(root)
    inside = {part: name for part, name in found.items() if _class_folders(root / name)}
    test_part = "test" if "test" in inside else "validation"
    if test_part not in inside:
        flat = found.get("test") or found.get("validation")
        if flat is not None:
            raise _no_class_folders(root / flat)
        train = root / inside["train"]
        raise DataError(
            f"expected {root}/val or {root}/test with class folders beside {train}; to split the "
            f"images of {train}, give that as the data path"
        )
    if "train" not in inside and not evaluation_only:
        if "train" in found:
            raise _no_class_folders(root / found["train"])
        raise DataError(
            f"expected {root}/train with class folders beside {root}/{inside[test_part]}"
        )
    if test_part == "validation":
        inside["test"] = inside.pop("validation")
    _say(root, inside)
    parts = {
        part: (name, *read_classes(_unwrapped(root / name, part=True), size))
        for part, name in inside.items()
    }
    name, classes, test = parts["test"]
    for other, other_classes, _ in parts.values():
        if other_classes != classes:
            _compare(root, {other: set(other_classes), name: set(classes)})
    train = parts["train"][2] if "train" in parts else test.subset(np.arange(0))
    return Split(classes, train, test, parts["validation"][2] if "validation" in parts else None)


def _say(root: Folder, inside: dict[str, str]) -> None:
    """Log what is taken for what, where that is not plain."""
    ignored = [name for name in _class_folders(root) if name not in inside.values()]
    if ignored or len(inside) > 2 or not _USUAL_NAMES.issuperset(inside.values()):
        order = [part for part in ("train", "validation", "test") if part in inside]
        taken = ", ".join(f"{part} images in {inside[part]}" for part in order)
        more = f"; ignored: {', '.join(ignored)}" if ignored else ""
        _LOG.info("%s: %s%s", root, taken, more)


def _part_folders(root: Folder) -> dict[str, str]:
    """Return the folder of each part; empty where the folders of ``root`` are classes.

    One part alone, ``train`` among other folders say, is a class if it has images in it.
    """
    names = _class_folders(root)
    inside = {name for name in names if _class_folders(root / name)}
    splits = []
    for group in group_parts(names):
        first = next(iter(group.values()))
        if len(group) > 1 or any(n in inside and not _has_images(root / n) for n in first):
            splits.append(group)
    if len(splits) > 1:
        found = sorted(name for group in splits for part in group.values() for name in part)
        raise DataError(f"expected one train and one test folder in {root}, got {_few(found)}")
    chosen = {}
    for part, candidates in splits[0].items() if splits else ():
        usable = [name for name in candidates if name in inside] or candidates
        if len(usable) > 1:
            raise DataError(
                f"expected one folder of {part} images in {root}, got {' and '.join(usable)}: "
                "remove or rename all but one"
            )
        chosen[part] = usable[0]
    return chosen


def _unwrapped(folder: Folder, part: bool) -> Folder:
    """Return where the classes, or parts, are in ``folder``.

    Args:
        folder: Where to begin.
        part: Whether it is one part, so that no parts are in it (``seg_train/seg_train``).
    """
    below = folder
    for _ in range(_DEEPEST):  # links may lead in a circle
        names = _class_folders(below)
        if len(names) > 1 or (names and not part and _part_folders(below)):
            return below
        if not names or _has_images(below):
            return folder
        below = below / names[0]
    return folder


def read_classes(folder: Folder, size: int | None) -> tuple[tuple[str, ...], FilesSource]:
    """Read one folder of class folders; images may lie deeper, hidden files are left out.

    Returns:
        Classes in alphabetical order, and the images ordered by class and path. Numbers are
        ordered as text too: 0, 1, 10, 2.

    Raises:
        DataError: No folder, no class folder, or a class without images.
    """
    classes = _class_folders(folder)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"expected a folder with one folder of images per class: {folder} {what}")
    if not classes:
        raise _no_class_folders(folder)
    ignored = [name for name in _folders_in(folder) if name not in classes]
    if ignored:
        _LOG.info("%s: ignored: %s", folder, ", ".join(ignored))
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


def _no_class_folders(folder: Folder) -> DataError:
    what = "images in no class folder" if _has_images(folder) else "no folder"
    return DataError(f"expected one folder of images per class in {folder}, found {what}")


def _class_folders(folder: Folder) -> tuple[str, ...]:
    return tuple(name for name in _folders_in(folder) if name.casefold() not in _NO_CLASSES)


def _folders_in(folder: Folder) -> list[str]:
    """Return the names of the folders in ``folder`` that are not hidden, sorted."""
    if not folder.is_dir():
        return []
    if isinstance(folder, TarFolder):
        return sorted(name for name in folder.folders if not name.startswith("."))
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _has_images(folder: Folder) -> bool:
    """Whether there are images in ``folder`` itself, not only deeper."""
    if isinstance(folder, TarFolder):
        return any(map(_is_image, folder.files))
    try:
        with os.scandir(folder) as entries:
            return any(_is_image(entry.name) for entry in entries)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


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


def _compare(root: Folder, classes: dict[str, set[str]]) -> None:
    """Say which classes are in one of two parts only.

    Raises:
        DataError: Always.
    """
    both = set.intersection(*classes.values())
    parts = [
        f"{len(names - both)} only in {part} ({_few(sorted(names - both))})"
        for part, names in classes.items()
        if names - both
    ]
    raise DataError(
        f"expected the same classes in {' and '.join(f'{root}/{part}' for part in classes)}: "
        + "; ".join(parts)
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
