"""What a data set holds, as far as the defaults of training depend on it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compofa.data.datasets import DataSplits
from compofa.data.decoding import UnreadableImageError
from compofa.data.sources import ImageSource
from compofa.errors import DataError
from compofa.seeds import rng

SAMPLE = 256
"""Images whose sizes are read, at most; of files, from their headers."""


@dataclass(frozen=True)
class Survey:
    """Counts and sizes of a data set's images.

    Attributes:
        train: Number of training images.
        validation: Number of validation images.
        classes: Class names.
        fewest: Training images of the smallest class.
        most: Training images of the largest class.
        side: Typical shorter side in pixels: the median of the sample.
        sides: 10th and 90th percentile of the shorter side in the sample, in pixels.
        files: Whether images are decoded from files each time, not kept in memory.
    """

    train: int
    validation: int
    classes: tuple[str, ...]
    fewest: int
    most: int
    side: int
    sides: tuple[int, int]
    files: bool

    @property
    def imbalance(self) -> float:
        """Images of the largest class per image of the smallest."""
        return self.most / max(1, self.fewest)


def survey(splits: DataSplits) -> Survey:
    """Survey a data set; the same images give the same result.

    Args:
        splits: The data set.

    Raises:
        DataError: None of the sampled images can be read.
    """
    counts = np.bincount(splits.train.targets, minlength=len(splits.classes))
    sides = _shorter_sides(splits.train)
    low, side, high = (int(value) for value in np.percentile(sides, (10, 50, 90)))
    files = splits.train.size is None
    return Survey(
        len(splits.train), len(splits.validation), splits.classes, int(counts.min()),
        int(counts.max()), side, (low, high), files,
    )  # fmt: skip


def _shorter_sides(source: ImageSource) -> list[int]:
    """Return the shorter sides of at most :data:`SAMPLE` images."""
    if source.size is not None:
        return [source.size]
    count = min(SAMPLE, len(source))
    sides, broken = [], []
    for index in rng(0, "survey").choice(len(source), count, replace=False):
        try:
            sides.append(min(source.dimensions(int(index))))
        except UnreadableImageError as error:
            broken.append(error)
    if not sides:
        raise DataError(
            f"expected readable images, got none among {count} of {len(source)} training images: "
            f"{broken[0]}"
        )
    return sides
