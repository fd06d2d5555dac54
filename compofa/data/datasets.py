"""Loading a data set and splitting it into training, validation and test images."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compofa.data import folders
from compofa.data.archives import TarFolder
from compofa.data.catalog import DatasetInfo, Normalisation, dataset_info
from compofa.data.identity import DataIdentity, part_order
from compofa.data.readers import FIXED_SPLIT, RawDataset
from compofa.data.sampling import hold_out_by_count, hold_out_by_share, stratified_split
from compofa.data.sources import FilesSource, ImageSource
from compofa.errors import DataError
from compofa.seeds import rng

_LOG = logging.getLogger(__name__)

MAX_VALIDATION = 10_000
"""Default upper limit of the number of validation images."""
_TEST_SHARE = 0.1  # of the images of a folder that is not divided into parts


@dataclass(frozen=True, eq=False)
class DataSplits:
    """A data set in three disjoint parts.

    Attributes:
        name: Name of the data set, a key of :data:`compofa.data.catalog.DATASETS`.
        classes: Class names; a target is an index into them.
        train: Images for training and BN calibration.
        validation: Images for model selection, held out of the training images.
        test: Images for final results.
        normalisation: Means and standard deviations of the data set.
        held: Which of ``validation`` and ``test`` were held out of a folder by image name.
    """

    name: str
    classes: tuple[str, ...]
    train: ImageSource
    validation: ImageSource
    test: ImageSource
    normalisation: Normalisation
    held: tuple[str, ...] = ()

    def with_classes(self, classes: tuple[str, ...], index: NDArray[np.int64]) -> "DataSplits":
        """Return the same images with other classes.

        Args:
            classes: Names of the new classes.
            index: New target for each of the present ones, int64 [classes].
        """
        parts = {}
        for name in ("train", "validation", "test"):
            source = getattr(self, name)
            parts[name] = source.subset(np.arange(len(source)))
            parts[name].targets = index[source.targets]
        return replace(self, classes=classes, **parts)


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
    """Find, check and split a data set. Image files are listed here and decoded later.

    ``cifar10``, ``cifar100`` and ``fashion-mnist`` are read from torchvision's files, which are
    downloaded if missing, or from class folders: ``DIR/train/<class>`` and ``DIR/test/<class>``, or
    other names of :data:`compofa.data.folders.PARTS` in any letter case. A validation folder beside
    them is the validation part; without a test folder it is the test part. If ``DIR`` holds class
    folders directly, about a tenth of the images is the test part, independent of ``seed``. An
    image of class folders is assigned to a part by a hash of its name, ``class/file``, regardless
    of other images and of the location of the folder, except in very small classes: see
    :func:`compofa.data.sampling.hold_out_by_share`.

    Args:
        name: A key of :data:`compofa.data.catalog.DATASETS`.
        path: Folder or tar file of the data set, or where to download it (default ``data``). Not
            used for ``digits``.
        seed: Decides which training images are held out (for ``digits`` the split is fixed).
        validation_images: Images to hold out of the training images, stratified by class; by
            default none if the data set has validation images, else about a tenth of all images (of
            ``digits`` a fifth), at most 10,000.
        download: Whether missing files may be downloaded.
        evaluation_only: For class folders: accept a missing training part (it and the validation
            part are then empty) and a test part without some of the training classes, and take a
            folder that is not divided into parts as the test part.
        known: Identity of the data set that a network was trained on. If class folders contain
            some of its images, they are split in the same way, with ``seed``; see
            :meth:`DataIdentity.seen_in`.
        by_position: Split class folders by the positions of images, as earlier versions did.

    Raises:
        DataError: The name is unknown, or the folder is missing, empty, has a single class (unless
            ``evaluation_only``), or does not have the expected layout.
    """
    info = dataset_info(name)
    path = Path(path) if path else None
    raw = info.reader(path, download) if info.reader else None
    share, held = 0.1, ()
    if raw is None:
        raw, share, held = _class_folders(info, path, evaluation_only, known, by_position)
    if len(raw.classes) < 2 and not evaluation_only:
        raise DataError(f"expected 2 or more classes in {path}, got 1: {raw.classes[0]}")

    def splits(train: ImageSource, validation: ImageSource, held: tuple[str, ...]) -> DataSplits:
        return DataSplits(name, raw.classes, train, validation, raw.test, info.normalisation, held)

    def split(mask: NDArray[np.bool_]) -> DataSplits:
        parts = (pool.subset(np.flatnonzero(part)) for part in (~mask, mask))
        return splits(*parts, (*held, "validation") if isinstance(pool, FilesSource) else ())

    pool = raw.train
    if known is not None and isinstance(pool, FilesSource):
        validation_images = None
        own = raw.validation is not None and "validation" not in known.held
        if not own and known.seen_in(pool):  # the mask may be empty
            return split(known.held_out_mask(pool, raw.classes, "validation", seed))
    if raw.validation is not None and not by_position:
        if validation_images is None:
            return splits(pool, raw.validation, ())
        _LOG.info("%s: ignoring its validation images in favour of held-out training images", path)
    spare = len(pool) - len(np.unique(pool.targets))
    n_held = validation_images
    if n_held is None:
        usual = len(pool) // 10 if raw.n_validation is None else raw.n_validation
        n_held = min(MAX_VALIDATION, max(1, usual), spare)
        if n_held == 0 and not evaluation_only:
            raise DataError(f"expected 2 or more training images per class, got {len(pool)} in all")
    if not 0 <= n_held <= spare:
        raise DataError(
            f"expected 0 to {spare} validation images (of {len(pool)} training images, each class "
            f"keeps one), got {n_held}"
        )
    if isinstance(pool, FilesSource) and not by_position:
        order = part_order(pool, "validation", seed)
        if validation_images is None:
            share = min(share, MAX_VALIDATION / max(1, len(pool)))
            return split(hold_out_by_share(order, pool.targets, share))
        return split(hold_out_by_count(order, pool.targets, n_held))
    _, held_out = stratified_split(
        pool.targets, n_held, rng(seed if raw.seeded else 0, "validation")
    )
    return split(np.isin(np.arange(len(pool)), held_out))


def match_classes(splits: DataSplits, classes: tuple[str, ...]) -> DataSplits:
    """Return a data set whose targets are indices into ``classes``, some of which it may lack.

    Raises:
        DataError: The data set has a class that is not in ``classes``.
    """
    if splits.classes == classes:
        return splits
    places = {name: place for place, name in enumerate(classes)}
    unknown = [name for name in splits.classes if name not in places]
    if unknown:
        lacking = next((name for name in classes if name not in splits.classes), classes[0])
        raise DataError(f"expected the network's classes, such as {lacking!r}, got {unknown[0]!r}")
    return splits.with_classes(classes, np.array([places[name] for name in splits.classes]))


def _class_folders(
    info: DatasetInfo,
    path: Path | None,
    evaluation_only: bool,
    known: DataIdentity | None,
    by_position: bool,
) -> tuple[RawDataset, float, tuple[str, ...]]:
    """Read class folders.

    Returns:
        The data set, the share of the training images to hold out by name, and the parts that were
        held out by name already.
    """
    if path is None:
        raise DataError(f"{info.name} needs a data path: a folder with train/ and val/")
    root: folders.Folder = TarFolder.open(path) if path.is_file() else path
    root = folders.data_root(root)
    if folders.has_split(root):
        return folders.read_split(root, info.native_size, evaluation_only), 0.1, ()
    classes, source = folders.read_classes(root, info.native_size)
    if known is not None and not ("test" in known.held and known.seen_in(source)):
        known = None
    if evaluation_only and known is None:
        empty = source.subset(np.arange(0))
        return RawDataset(classes, empty, source, n_validation=0), 0.1, ()
    n_test = max(1, len(source) // 10)
    if n_test > len(source) - len(classes):
        raise DataError(
            f"expected at least 3 images per class to split {root}, got {len(source)} images in "
            f"{len(classes)} classes"
        )
    held = ()
    if by_position:
        _, places = stratified_split(source.targets, n_test, rng(FIXED_SPLIT))
        mask = np.isin(np.arange(len(source)), places)
    else:
        held = ("test",)
        if known is not None:
            mask = known.held_out_mask(source, classes, "test")
        else:
            mask = hold_out_by_share(part_order(source, "test"), source.targets, _TEST_SHARE)
    pool, test = (source.subset(np.flatnonzero(part)) for part in (~mask, mask))
    raw = RawDataset(classes, pool, test, n_validation=len(source) // 10)
    return raw, _TEST_SHARE / (1 - _TEST_SHARE), held
