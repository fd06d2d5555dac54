"""The registered data sets and their defaults. Importable without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from compofa.data.readers import RawDataset, read_digits, read_torchvision
from compofa.errors import DataError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

    from compofa.data.sources import RawImage

Augmentation = Literal["affine", "crop", "inception"]
"""Augmentation of training images; see :func:`compofa.data.transforms.train_images`."""

Reader = Callable[[Path | None, bool], RawDataset | None]
"""Reads a data set; see :attr:`DatasetInfo.reader`."""

ImageTransform = Callable[["RawImage", int], "Tensor"]
"""Maps an image and a resolution r to an image [3, r, r], uint8 or float32 in [0, 1]."""


@dataclass(frozen=True)
class Normalisation:
    """Normalisation per channel, ``(image - mean) / std``, of images in [0, 1].

    Attributes:
        mean: Means in [-1000, 1000], where float32 still resolves grey levels.
        std: Standard deviations in [1e-6, 1e6].

    Raises:
        DataError: There are not three values each, or one is out of range.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        means = [abs(value) <= 1000 for value in self.mean]  # False for NaN
        stds = [1e-6 <= value <= 1e6 for value in self.std]
        if len(means) != 3 or len(stds) != 3 or not all(means + stds):
            raise DataError(
                "expected 3 means from -1000 to 1000 and 3 standard deviations from 1e-6 to 1e6, "
                f"got {self.mean} and {self.std}"
            )


IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class DatasetInfo:
    """A data set: how it is read, and the defaults of training and evaluation on it.

    Attributes:
        name: Value of ``--dataset``.
        description: One line.
        train_resolutions: Resolutions sampled in training, in pixels.
        eval_resolution: Resolution of evaluation, in pixels.
        augmentation: Augmentation of training images. ``affine`` and ``crop`` need images of one
            size; ``inception`` takes any.
        native_size: Side of the stored images, in pixels; None if sizes differ.
        pad: Padding of ``crop``, in pixels of ``native_size``.
        flip: Whether ``crop`` flips images horizontally at random.
        normalisation: Means and standard deviations per channel.
        network: Default network, a key of :data:`compofa.networks.zoo.NETWORKS`.
        needs_path: Whether ``--data-path`` is required, since nothing can be downloaded.
        reader: Called as ``reader(path, download)`` with the data path, or None, and whether
            missing files may be downloaded. Returns the :class:`~compofa.data.readers.RawDataset`,
            or None to read class folders at ``path``. Without a reader, class folders are read.
            Must be importable (not a lambda) if loader workers are started with ``spawn``.
        train_transform: Transform of a training image, in place of ``augmentation``. It takes its
            randomness from torch's generator, which is seeded for each image: the same in every
            loader worker and in resumed runs. Importable, as the reader.
        eval_transform: Transform of an image to evaluate, in place of that of ``augmentation``.

    Raises:
        DataError: A resolution is below 1, or the augmentation is unknown or needs ``native_size``.
    """

    name: str
    description: str
    train_resolutions: tuple[int, ...]
    eval_resolution: int
    augmentation: Augmentation
    native_size: int | None = None
    pad: int = 0
    flip: bool = False
    normalisation: Normalisation = IMAGENET_NORMALISATION
    network: str = "compofa"
    needs_path: bool = False
    reader: Reader | None = field(default=None, compare=False)
    train_transform: ImageTransform | None = field(default=None, compare=False)
    eval_transform: ImageTransform | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if min(self.train_resolutions, default=0) < 1 or self.eval_resolution < 1:
            raise DataError(
                f"{self.name}: expected resolutions of 1 pixel or more, got "
                f"{self.train_resolutions} and {self.eval_resolution}"
            )
        if self.augmentation not in get_args(Augmentation):
            raise DataError(
                f"{self.name}: expected an augmentation of {', '.join(get_args(Augmentation))}, "
                f"got {self.augmentation!r}"
            )
        if self.augmentation != "inception" and self.native_size is None:
            raise DataError(f"{self.name}: expected a native_size for {self.augmentation}")


DATASETS: dict[str, DatasetInfo] = {
    info.name: info
    for info in (
        DatasetInfo(
            name="digits",
            description="scikit-learn's 1,797 handwritten digits, 8 px; nothing to download",
            train_resolutions=(8, 12, 16),
            eval_resolution=16,
            augmentation="affine",
            network="compofa-small",
            native_size=8,
            normalisation=Normalisation((0.305,) * 3, (0.376,) * 3),
            reader=read_digits,
        ),
        DatasetInfo(
            name="cifar10",
            description="CIFAR-10, 60,000 photographs, 32 px; downloaded, or class folders",
            train_resolutions=(24, 28, 32),
            eval_resolution=32,
            augmentation="crop",
            network="compofa-small",
            native_size=32,
            pad=4,
            flip=True,
            normalisation=Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
            reader=partial(
                read_torchvision, "cifar10", "CIFAR10", "cifar-10-batches-py",
                "cifar-10-python.tar.gz",
            ),
        ),
        DatasetInfo(
            name="cifar100",
            description="CIFAR-100, 60,000 photographs, 32 px; downloaded, or class folders",
            train_resolutions=(24, 28, 32),
            eval_resolution=32,
            augmentation="crop",
            network="compofa-small",
            native_size=32,
            pad=4,
            flip=True,
            normalisation=Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
            reader=partial(
                read_torchvision, "cifar100", "CIFAR100", "cifar-100-python",
                "cifar-100-python.tar.gz",
            ),
        ),
        DatasetInfo(
            name="fashion-mnist",
            description="Fashion-MNIST, 70,000 grey images, 28 px; downloaded, or class folders",
            train_resolutions=(20, 24, 28),
            eval_resolution=28,
            augmentation="crop",
            network="compofa-small",
            native_size=28,
            pad=2,
            flip=True,
            normalisation=Normalisation((0.2860,) * 3, (0.3530,) * 3),
            reader=partial(
                read_torchvision, "fashion-mnist", "FashionMNIST", "FashionMNIST",
                "FashionMNIST/raw/*-ubyte.gz (4 files)",
            ),
        ),
        DatasetInfo(
            name="imagenet",
            description="ImageNet-1k in class folders: DIR/train and DIR/val",
            train_resolutions=tuple(range(128, 225, 4)),
            eval_resolution=224,
            augmentation="inception",
            needs_path=True,
        ),
        DatasetInfo(
            name="imagefolder",
            description="your own images in class folders: DIR/train and DIR/val, or one folder",
            train_resolutions=tuple(range(128, 225, 4)),
            eval_resolution=224,
            augmentation="inception",
            needs_path=True,
        ),
    )
}  # fmt: skip
"""All registered data sets by name; :func:`register_dataset` adds one."""


def register_dataset(info: DatasetInfo) -> DatasetInfo:
    """Register a data set for :func:`dataset_info`, ``load_dataset`` and ``--dataset``.

    Class folders need only the row, other formats a ``reader``. Network and resolutions are those
    of the row; batch size, epochs and learning rate follow from the number of images. To use it in
    a command, register it and call the command's ``main``:
    ``compofa.cli.train.main(["--dataset", "shapes", …])``.

    Args:
        info: The data set.

    Returns:
        ``info``.

    Raises:
        DataError: A data set of this name is registered already.

    Example::

        def read_npz(path, download):
            with np.load(path) as file:
                train = MemorySource(file["train_images"], file["train_labels"])
                test = MemorySource(file["test_images"], file["test_labels"])
            return RawDataset(("circle", "square"), train, test)

        register_dataset(
            DatasetInfo(
                name="shapes", description="circles and squares, 16 px", needs_path=True,
                train_resolutions=(12, 16), eval_resolution=16, augmentation="crop",
                native_size=16, pad=2, network="compofa-small", reader=read_npz,
            )
        )
    """
    if info.name in DATASETS:
        raise DataError(f"expected the name of a new data set, got {info.name!r}")
    DATASETS[info.name] = info
    return info


def dataset_info(name: str) -> DatasetInfo:
    """Return a registered data set.

    Raises:
        DataError: The name is unknown.
    """
    if name not in DATASETS:
        raise DataError(
            f"{unknown_name('data set', name, DATASETS)}, or one of your own, registered with "
            "register_dataset before"
        )
    return DATASETS[name]
