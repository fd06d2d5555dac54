"""The known data sets and their defaults: plain data, importable without torch."""

from dataclasses import dataclass
from typing import Literal

from compofa.errors import DataError

Augmentation = Literal["affine", "crop", "inception"]
"""How training images are varied; see :mod:`compofa.data.transforms`."""


@dataclass(frozen=True)
class Normalisation:
    """Per channel: ``(image - mean) / std``, images in [0, 1].

    Attributes:
        mean: Between -1000 and 1000: single precision still tells grey levels apart there.
        std: Between 1e-6 and 1e6.

    Raises:
        DataError: Not three of each, or outside their range.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        means = [abs(value) <= 1000 for value in self.mean]  # NaN is not
        stds = [1e-6 <= value <= 1e6 for value in self.std]
        if len(means) != 3 or len(stds) != 3 or not all(means + stds):
            raise DataError(
                "expected 3 means from -1000 to 1000 and 3 standard deviations from 1e-6 to 1e6, "
                f"got {self.mean} and {self.std}"
            )


IMAGENET_NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class DatasetInfo:
    """What the programs assume of a data set unless told otherwise.

    Attributes:
        name: What ``--dataset`` takes.
        description: One line.
        train_resolutions: Resolutions (pixels) that training steps are drawn from.
        eval_resolution: Resolution (pixels) of an evaluation.
        augmentation: How training images are varied.
        native_size: Side (pixels) of the stored images; None where they differ.
        pad: Pixels of ``native_size`` that a crop may move by (``crop`` only).
        flip: Whether training images are mirrored at random (``crop`` only).
        normalisation: Means and deviations of the channels.
        network: Id of the network to start with, in :data:`compofa.networks.zoo.NETWORKS`.
        needs_path: Whether a folder must be given: nothing to download.
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
}


def dataset_info(name: str) -> DatasetInfo:
    """Return the defaults of a data set.

    Raises:
        DataError: The name is unknown.
    """
    if name not in DATASETS:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}")
    return DATASETS[name]
