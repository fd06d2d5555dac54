"""Loading a data set into its three parts: training, validation and test."""

import http.client
import logging
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compofa.data import folders
from compofa.data.archives import TarFolder
from compofa.data.catalog import DatasetInfo, Normalisation, dataset_info
from compofa.data.identity import DataIdentity, part_order
from compofa.data.sampling import held_by_count, held_by_share, quotas
from compofa.data.sources import FilesSource, ImageSource, MemorySource
from compofa.data.torchvision_shim import import_torchvision
from compofa.errors import DataError
from compofa.seeds import rng

_LOG = logging.getLogger(__name__)

MAX_VALIDATION = 10_000
DEFAULT_ROOT = "data"  # where downloads go

_DOWNLOADS = {  # name: torchvision's class, the folder it makes, and the files to download
    "cifar10": ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST", "FashionMNIST/raw/*-ubyte.gz (4 files)"),
}
_FIXED = "test part"  # stream of the splits that no seed may change
_TEST_SHARE = 0.1  # of a folder without parts


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set in three disjoint parts.

    Attributes:
        name: Name in the catalog.
        classes: Class names; a target is an index into them.
        train: Images to train on, and to measure BN statistics on.
        validation: Held out of the training images: for choices during training.
        test: For the final figures only.
        normalisation: The data set's own means and deviations.
        held: Which of ``validation`` and ``test`` were held out of a folder, by its images' names.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSource
    validation: ImageSource
    test: ImageSource
    normalisation: Normalisation
    held: tuple[str, ...] = ()


def load_dataset(
    name: str,
    path: str | Path | None = None,
    *,
    seed: int = 0,
    validation_images: int | None = None,
    download: bool = True,
    evaluation_only: bool = False,
    known: DataIdentity | None = None,
    by_position: bool = False,
) -> DataSplits:
    """Find, check and split a data set. Image files are only listed here, and read later.

    ``cifar10``, ``cifar100`` and ``fashion-mnist`` come from torchvision's files, which are
    downloaded when they are missing, or from class folders. Those may be in ``DIR/train`` and
    ``DIR/test`` (or other names of :data:`compofa.data.parts.PARTS`, in any letter case). A
    validation folder beside them is the validation part; without a test folder it is the test part.
    Of a folder that holds the class folders directly about a tenth is the test part, which does not
    depend on ``seed``. A hash of its name, ``class/file``, assigns an image of class folders to its
    part, whatever other images there are and wherever the folder is; only, every class keeps a
    training image, and of two or more one is held out.

    Args:
        name: A name in :data:`compofa.data.catalog.DATASETS`.
        path: The folder; unused for ``digits``. Downloads go to ``data`` when it is None.
        seed: Decides which training images are held out (for ``digits`` the split is fixed).
        validation_images: Images to hold out of the training images, of each class in proportion;
            by default about a tenth of all images, at most 10,000 (of ``digits`` a fifth), and none
            where the data set comes with validation images.
        download: Whether missing files may be downloaded.
        evaluation_only: Of class folders: the training part may be missing (it and the validation
            part are then empty), the test part may lack classes of the training part, and a
            folder without parts is the test part as a whole.
        known: What a network was trained on. Class folders that hold some of these images are
            split as they were then, with ``seed``; see :meth:`DataIdentity.seen_in`.
        by_position: Split class folders as earlier versions did, by the positions of the images.

    Raises:
        DataError: The name is unknown, or the folder is missing, empty, of one class (unless
            ``evaluation_only``) or does not fit.
    """
    info = dataset_info(name)
    if name == "digits":
        if path:
            raise DataError(f"digits is part of scikit-learn: expected no data path, got {path}")
        parts, seed = _digits(), 0
    elif name in _DOWNLOADS and not _has_folders(name, path):
        parts = _download(name, Path(path or DEFAULT_ROOT), download)
    else:
        parts = _folders(info, path, evaluation_only, known, by_position)
    if len(parts.classes) < 2 and not evaluation_only:
        raise DataError(f"expected 2 or more classes in {path}, got 1: {parts.classes[0]}")
    pool = parts.pool
    if known is not None and isinstance(pool, FilesSource):
        validation_images = None
        own = parts.validation is not None and "validation" not in known.held
        if not own and known.seen_in(pool):  # of which none may have been held out
            held = known.held_in(pool, parts.classes, "validation", seed)
            return _divided(info, parts, np.flatnonzero(~held), np.flatnonzero(held))
    if parts.validation is not None and not by_position:
        if validation_images is None:
            return DataSplits(
                name, parts.classes, pool, parts.validation, parts.test, info.normalisation
            )
        _LOG.info("validating on training images, as asked: %s has validation images", path)
    spare = len(pool) - len(np.unique(pool.targets))
    n_held = validation_images
    if n_held is None:
        n_held = min(MAX_VALIDATION, max(1, parts.hold_out), spare)
        if n_held == 0 and not evaluation_only:
            raise DataError(f"expected 2 or more training images per class, got {len(pool)} in all")
    if not 0 <= n_held <= spare:
        raise DataError(
            f"expected 0 to {spare} validation images (of {len(pool)} training images, one per "
            f"class stays), got {n_held}"
        )
    if isinstance(pool, FilesSource) and not by_position:
        order = part_order(pool, "validation", seed)
        if validation_images is None:
            share = min(parts.share, MAX_VALIDATION / max(1, len(pool)))
            held = held_by_share(order, pool.targets, share)
        else:
            held = held_by_count(order, pool.targets, n_held)
        return _divided(info, parts, np.flatnonzero(~held), np.flatnonzero(held))
    halves = stratified_split(pool.targets, n_held, rng(seed, "validation"))
    return _divided(info, parts, *halves)


def in_order_of(splits: DataSplits, classes: tuple[str, ...]) -> DataSplits:
    """Return a data set whose targets are numbers in ``classes``, some of which it may lack.

    Raises:
        DataError: It has classes that are not among them.
    """
    if splits.classes == classes:
        return splits
    places = {name: place for place, name in enumerate(classes)}
    odd = [name for name in splits.classes if name not in places]
    if odd:
        lacking = next((name for name in classes if name not in splits.classes), classes[0])
        raise DataError(f"expected the network's classes, such as {lacking!r}, got {odd[0]!r}")
    index = np.array([places[name] for name in splits.classes], dtype=np.int64)
    parts = {}
    for name in ("train", "validation", "test"):
        source = getattr(splits, name)
        parts[name] = source.subset(np.arange(len(source)))
        parts[name].targets = index[source.targets]
    return replace(splits, classes=classes, **parts)


def _divided(
    info: DatasetInfo, parts: "_Parts", kept: NDArray[np.int64], held: NDArray[np.int64]
) -> DataSplits:
    train, validation = parts.pool.subset(kept), parts.pool.subset(held)
    named = ("test",) * parts.divided + ("validation",)
    return DataSplits(
        info.name, parts.classes, train, validation, parts.test, info.normalisation,
        named if isinstance(parts.pool, FilesSource) else (),
    )  # fmt: skip


def stratified_split(
    targets: NDArray[np.int64], n_held: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out images at random, from each class in proportion (largest remainders first).

    Every class keeps at least one image.

    Args:
        targets: Class numbers [n].
        n_held: At most n minus the number of classes.
        generator: Source of randomness.

    Returns:
        Sorted indices of the n - n_held images kept and of the n_held held out.
    """
    counts = np.bincount(targets)
    take = quotas(counts, n_held)
    order = generator.permutation(len(targets))
    order = order[np.argsort(targets[order], kind="stable")]
    place = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = place < np.repeat(take, counts)
    return np.sort(order[~held]), np.sort(order[held])


class _Parts(NamedTuple):
    classes: tuple[str, ...]
    pool: ImageSource  # training and validation images
    test: ImageSource
    hold_out: int  # images of the pool to validate on, unless told otherwise
    share: float = 0.1  # the same of files, each assigned by itself
    validation: ImageSource | None = None  # what the data set has of its own for that
    divided: bool = False  # whether the test images are held out of the same folder


def _digits() -> _Parts:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits needs scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)  # stored as 0...16
    images = np.repeat(images[:, None], 3, axis=1)
    source = MemorySource(images, data.target.astype(np.int64))
    kept, held = stratified_split(source.targets, math.ceil(len(source) / 5), rng(_FIXED))
    return _Parts(tuple("0123456789"), source.subset(kept), source.subset(held), len(source) // 5)


def _has_folders(name: str, path: str | Path | None) -> bool:
    """Whether ``path`` holds class folders, and not (or not yet) torchvision's files."""
    if path is None:
        return False
    root, (_, folder, archive) = Path(path), _DOWNLOADS[name]
    if root.name == folder or (root / folder).exists() or (root / archive).exists():
        return False
    if root.is_file():
        return True
    root = folders.data_root(root)
    return folders.has_split(root) or folders.has_classes(root)


def _download(name: str, root: Path, download: bool) -> _Parts:
    class_name, folder, files = _DOWNLOADS[name]
    if root.name == folder and root.is_dir():
        root = root.parent
    dataset_class = getattr(import_torchvision().datasets, class_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy, about the old pickles
            parts = [dataset_class(str(root), train=t, download=download) for t in (True, False)]
        classes = tuple(parts[0].classes)
        sources = [_source(part, len(classes)) for part in parts]
    except (
        RuntimeError, OSError, ValueError, TypeError, LookupError, AssertionError, EOFError,
        http.client.HTTPException,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        what = "could not be downloaded or read" if download else "was not found, or is damaged,"
        raise DataError(
            f"{name} {what} in {root} ({reason}): put {files} into {root}, or give a folder with "
            "train/<class>/ and test/<class>/ images as data path"
        ) from error
    return _Parts(classes, sources[0], sources[1], len(sources[0]) // 10)


def _source(part: Any, classes: int) -> MemorySource:
    """Turn torchvision's images, [n, h, w, 3] or grey [n, h, w], into a source.

    Raises:
        ValueError: They are of other shapes, or of other classes.
    """
    images, targets = np.asarray(part.data), np.asarray(part.targets)
    if not len(targets) or not 0 <= targets.min() <= targets.max() < classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}")
    if images.ndim == 3:
        return MemorySource(np.repeat(images[:, None], 3, axis=1), targets)
    return MemorySource(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), targets)


def _folders(
    info: DatasetInfo,
    path: str | Path | None,
    evaluation_only: bool,
    known: DataIdentity | None,
    by_position: bool,
) -> _Parts:
    if path is None:
        raise DataError(f"{info.name} needs a data path: a folder with train/ and val/")
    root: folders.Folder = Path(path)
    if root.is_file():
        root = TarFolder.open(root)
    root = folders.data_root(root)
    if folders.has_split(root):
        classes, pool, test, own = folders.read_split(root, info.native_size, evaluation_only)
        return _Parts(classes, pool, test, len(pool) // 10, validation=own)
    classes, source = folders.read_classes(root, info.native_size)
    if known is not None and not ("test" in known.held and known.seen_in(source)):
        known = None
    if evaluation_only and known is None:
        return _Parts(classes, source.subset(np.arange(0)), source, 0)
    n_test = max(1, len(source) // 10)
    if n_test > len(source) - len(classes):
        raise DataError(
            f"expected at least 3 images per class to split {root}, got {len(source)} images in "
            f"{len(classes)} classes"
        )
    if by_position:
        kept, held = stratified_split(source.targets, n_test, rng(_FIXED))
        return _Parts(classes, source.subset(kept), source.subset(held), len(source) // 10)
    if known is not None:
        mask = known.held_in(source, classes, "test")
    else:
        mask = held_by_share(part_order(source, "test"), source.targets, _TEST_SHARE)
    pool, test = (source.subset(np.flatnonzero(part)) for part in (~mask, mask))
    share = _TEST_SHARE / (1 - _TEST_SHARE)
    return _Parts(classes, pool, test, len(source) // 10, share, divided=True)
