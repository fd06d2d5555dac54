"""Map-style PyTorch data sets as sources of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from compofa.data.sources import ImageSource, RawImage
from compofa.errors import DataError


class DatasetSource(ImageSource):
    """The images of a map-style data set, such as one of :mod:`torchvision.datasets`.

    Args:
        dataset: Returns pairs (image, class index) for indices from 0, where an image is a PIL
            image, a uint8 tensor [3, h, w] (or [1, h, w]), or a uint8 array [h, w, 3] (or [h, w]).
            Leave resizing, augmentation and normalisation to the training. It is pickled for loader
            workers that are not forked.
        targets: Class indices, [n]; by default its attribute ``targets``, or ``labels``. Without
            either, every image is loaded once to ask for its class.
        indices: Which of its images this source has, in this order; by default all.

    Raises:
        DataError: It has no length, or a target is not a class index.
    """

    size = None

    def __init__(
        self,
        dataset: Any,
        targets: Sequence[int] | NDArray[np.integer] | None = None,
        indices: NDArray[np.integer] | None = None,
    ) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"expected a map-style data set with a length, got {type(dataset).__name__}"
            )
        if targets is None:
            targets = getattr(dataset, "targets", getattr(dataset, "labels", None))
        if targets is None:
            targets = [dataset[index][1] for index in range(len(dataset))]
        found = np.asarray(targets)
        if found.shape != (len(dataset),) or found.dtype.kind not in "iu" or (found < 0).any():
            raise DataError(
                f"targets: expected {len(dataset)} class indices, got {found.dtype} of shape "
                f"{found.shape}"
            )
        self.dataset = dataset
        self.indices = np.arange(len(dataset)) if indices is None else np.asarray(indices)
        self._all = found.astype(np.int64)
        self.targets = self._all[self.indices]

    def load(self, index: int) -> RawImage:
        """Return one image.

        Raises:
            DataError: It is of another kind or shape.
        """
        return _rgb(self.dataset[int(self.indices[index])][0])

    def subset(self, indices: NDArray[np.integer]) -> DatasetSource:
        """Return a source of the images at ``indices``, in this order."""
        return DatasetSource(self.dataset, self._all, self.indices[indices])


def _rgb(image: Any) -> RawImage:
    """Return an image as PIL image in RGB, or uint8 tensor [3, h, w]."""
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        image = torch.from_numpy(np.atleast_3d(image).transpose(2, 0, 1).copy())
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        if image.shape[0] == 1:
            return image.expand(3, -1, -1)
        if image.shape[0] == 3:
            return image
    shape = f" {getattr(image, 'dtype', '')} {list(image.shape)}" if hasattr(image, "shape") else ""
    raise DataError(
        "expected a PIL image, a uint8 tensor [3, h, w] or a uint8 array [h, w, 3], got "
        f"{type(image).__name__}{shape}: leave normalisation to the training"
    )
