"""Class folders, ``<class>/*.jpg`` or ``train/<class>/*.jpg``, on disk or in a tar file."""

import logging
import os
import re
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compofa.data.archives import TarFolder
from compofa.data.readers import RawDataset
from compofa.data.sources import FilesSource
from compofa.errors import DataError

_LOG = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
)
_IGNORED_FOLDERS = frozenset(
    ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
)
"""Folders that other programs create, in lower case."""
_MAX_DEPTH = 16
PARTS = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout"),
}
"""Names of each part, alone or combined with filler words."""

_FILLERS = (
    "set", "sets", "data", "dataset", "image", "images", "img", "imgs", "seg", "split", "folder",
)  # fmt: skip
_PART_OF = {word: part for part, words in PARTS.items() for word in words}
_PART_OF |= {word + more: part for (word, part), more in product(_PART_OF.items(), _FILLERS)}
_USUAL_NAMES = frozenset(("train", "val", "validation", "test"))
Folder = Path | TarFolder


def data_root(root: Folder) -> Folder:
    """Return the folder of the data set: ``root``, or the only folder in it, and so on.

    Archives and downloads often wrap a data set in a folder that has no images and no other folder.

    Raises:
        DataError: A folder cannot be read, or its parts are ambiguous.
    """
    below = _unwrapped(root, part=False)
    if below is not root:
        _LOG.info("%s: using the data set in %s", root, below)
    return below


def has_split(root: Folder) -> bool:
    """Return whether ``root`` is divided into folders of training and test images.

    Raises:
        DataError: There are several possible divisions.
    """
    return bool(_part_folders(root))


def has_classes(root: Path) -> bool:
    """Return whether a folder in ``root`` contains an image."""
    return any(_has_images(root / name) for name in _class_folders(root))


def read_split(root: Folder, size: int | None, evaluation_only: bool) -> RawDataset:
    """Read ``root/train``, ``root/val`` and ``root/test``, or other usual names of them.

    Without a test folder, the validation folder is the test part. The folders used are logged if
    their names are unusual or other folders are ignored.

    Args:
        root: Folder of the data set.
        size: Side to resize images to, in pixels; None to keep their sizes.
        evaluation_only: Accept a missing training folder, whose source is then empty, and parts
            that lack some of its classes.

    Raises:
        DataError: A part is missing, empty or ambiguous, or its classes differ from the others'.
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
            f"expected {root}/val or {root}/test with class folders beside {train}; to split "
            f"{train} itself, give it as the data path"
        )
    if "train" not in inside and not evaluation_only:
        if "train" in found:
            raise _no_class_folders(root / found["train"])
        raise DataError(
            f"expected {root}/train with class folders beside {root}/{inside[test_part]}"
        )
    if test_part == "validation":
        inside["test"] = inside.pop("validation")
    _log_parts(root, inside)
    parts = {
        part: (name, *read_classes(_unwrapped(root / name, part=True), size))
        for part, name in inside.items()
    }
    first, classes, _ = parts.get("train", parts["test"])
    for name, part_classes, source in parts.values():
        if evaluation_only and set(part_classes) < set(classes):
            places = [classes.index(each) for each in part_classes]
            source.targets = np.array(places, dtype=np.int64)[source.targets]
        elif part_classes != classes:
            raise _different_classes(root, {first: set(classes), name: set(part_classes)})
    test = parts["test"][2]
    train = parts["train"][2] if "train" in parts else test.subset(np.arange(0))
    validation = parts["validation"][2] if "validation" in parts else None
    return RawDataset(classes, train, test, validation)


def _log_parts(root: Folder, inside: dict[str, str]) -> None:
    """Log which folder is used for which part, unless it is obvious."""
    ignored = [name for name in _class_folders(root) if name not in inside.values()]
    if ignored or len(inside) > 2 or not _USUAL_NAMES.issuperset(inside.values()):
        order = [part for part in ("train", "validation", "test") if part in inside]
        taken = ", ".join(f"{part} images in {inside[part]}" for part in order)
        more = f"; ignored: {', '.join(ignored)}" if ignored else ""
        _LOG.info("%s: %s%s", root, taken, more)


def _part_folders(root: Folder) -> dict[str, str]:
    """Return the folder of each part, or an empty dict if the folders of ``root`` are classes.

    A single part, such as ``train`` among other folders, is a class if it contains images itself.
    """
    names = _class_folders(root)
    inside = {name for name in names if _class_folders(root / name)}
    splits = []
    for group in _group_parts(names):
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
                "remove or rename the others"
            )
        chosen[part] = usable[0]
    return chosen


def part_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the part that a folder name stands for, and the remaining words of the name.

    Letter case, punctuation and filler words are ignored: ``seg_train``, ``TrainSet`` and
    ``training-data`` are all ``("train", ())``, and ``asl_alphabet_train`` is
    ``("train", ("asl", "alphabet"))``.

    Returns:
        A key of :data:`PARTS` and the remaining words, or None for any other name.
    """
    words = re.findall(r"[^\W\d_]+|\d+", name.casefold())
    parts = [word for word in words if word in _PART_OF]
    if len(parts) != 1:
        return None
    rest = tuple(word for word in words if word not in _FILLERS and word not in _PART_OF)
    return _PART_OF[parts[0]], rest


def _group_parts(names: Iterable[str]) -> list[dict[str, list[str]]]:
    """Group folder names into possible divisions of a data set into parts.

    Names of one group have the same remaining words. A group with remaining words, such as
    ``flowers_train``, needs two parts: one alone is more likely a class.

    Returns:
        Per group, the names of each part.
    """
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        found = part_of(name)
        if found is not None:
            part, rest = found
            groups.setdefault(rest, {}).setdefault(part, []).append(name)
    return [group for rest, group in groups.items() if not rest or len(group) > 1]


def _unwrapped(folder: Folder, part: bool) -> Folder:
    """Return the folder of the classes or parts, descending through folders that only wrap another.

    Args:
        folder: Where to start.
        part: Whether it is a part already, and contains classes only (``seg_train/seg_train``).
    """
    below = folder
    for _ in range(_MAX_DEPTH):  # symbolic links may form a loop
        names = _class_folders(below)
        if len(names) > 1 or (names and not part and _part_folders(below)):
            return below
        if not names or _has_images(below):
            return folder
        below = below / names[0]
    return folder


def read_classes(folder: Folder, size: int | None) -> tuple[tuple[str, ...], FilesSource]:
    """Read a folder of class folders, with images at any depth; hidden files are ignored.

    Args:
        folder: Folder of the class folders.
        size: Side to resize images to, in pixels; None to keep their sizes.

    Returns:
        Class names in alphabetical order (numbers too: 0, 1, 10, 2), and the images ordered by
        class and path.

    Raises:
        DataError: The folder is missing or has no class folders, or a class has no images.
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
        images = image_paths(folder, folder / name)
        if not images:
            raise DataError(f"class folder {folder / name} has no images ({_suffixes()})")
        paths += images
        counts.append(len(images))
    targets: NDArray[np.int64] = np.repeat(np.arange(len(classes)), counts).astype(np.int64)
    if isinstance(folder, TarFolder):
        return classes, folder.source(paths, targets, size)
    return classes, FilesSource(folder, np.array(paths), targets, size)


def _no_class_folders(folder: Folder) -> DataError:
    what = "images outside class folders" if _has_images(folder) else "no folder"
    return DataError(f"expected one folder of images per class in {folder}, got {what}")


def _class_folders(folder: Folder) -> tuple[str, ...]:
    return tuple(name for name in _folders_in(folder) if name.casefold() not in _IGNORED_FOLDERS)


def _folders_in(folder: Folder) -> list[str]:
    """Return the sorted names of the folders in ``folder``, except hidden ones."""
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
    """Return whether ``folder`` directly contains images."""
    if isinstance(folder, TarFolder):
        return any(map(_is_image, folder.files))
    try:
        with os.scandir(folder) as entries:
            return any(_is_image(entry.name) for entry in entries)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from error


def image_paths(root: Folder, folder: Folder) -> list[bytes]:
    """Return the sorted paths, relative to ``root``, of the images at any depth in ``folder``.

    Hidden files and folders are ignored.

    Raises:
        DataError: A folder cannot be read, or a symbolic link leads into a folder again.
    """
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
            raise DataError(f"cannot read {parent}: a symbolic link leads to the same folder again")
        seen.add((status.st_dev, status.st_ino))
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = os.path.relpath(parent, root)
        paths += [os.fsencode(os.path.join(below, name)) for name in files if _is_image(name)]
    return sorted(paths)


def _different_classes(root: Folder, classes: dict[str, set[str]]) -> DataError:
    """Return the error of two parts with different classes, which it lists."""
    both = set.intersection(*classes.values())
    parts = [
        f"{len(names - both)} only in {part} ({_few(sorted(names - both))})"
        for part, names in classes.items()
        if names - both
    ]
    return DataError(
        f"expected the same classes in {' and '.join(f'{root}/{part}' for part in classes)}: "
        + "; ".join(parts)
    )


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + ", ..." * (len(names) > 5)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
