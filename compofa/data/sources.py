"""Where images come from: arrays in memory, or files."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from compofa.data.decoding import UnreadableImageError, decode_rgb

RawImage = Image.Image | torch.Tensor
"""An RGB image: PIL, or uint8 [3, h, w]."""


class ImageSource(ABC):
    """Images with their classes, random access, picklable.

    Attributes:
        targets: int64 [n], class numbers.
        size: Side (pixels) of every image; None where they differ.
    """

    targets: NDArray[np.int64]
    size: int | None

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> RawImage:
        """Return one image.

        Raises:
            UnreadableImageError: The file is broken.
        """

    @abstractmethod
    def subset(self, indices: NDArray[np.integer]) -> "ImageSource":
        """Return a source of these images only, in this order."""

    def load_all(
        self, indices: NDArray[np.integer]
    ) -> tuple[list[RawImage] | torch.Tensor, list[int], tuple[tuple[str, str], ...]]:
        """Return many images, leaving out the broken ones.

        Returns:
            The images that could be read (uint8 [m, 3, size, size] when they have one size, else a
            list), their positions in ``indices``, and of the others the paths and what is wrong.
        """
        images, kept, broken = [], [], []
        for position, index in enumerate(indices):
            try:
                images.append(self.load(int(index)))
                kept.append(position)
            except UnreadableImageError as error:
                broken.append((error.path, error.reason))
        if self.size is not None:
            empty = torch.zeros(0, 3, self.size, self.size, dtype=torch.uint8)
            return (torch.stack(images) if images else empty), kept, tuple(broken)
        return images, kept, tuple(broken)


class MemorySource(ImageSource):
    """Images held in memory.

    Args:
        images: uint8 [n, 3, size, size].
        targets: int64 [n].
    """

    def __init__(self, images: NDArray[np.uint8], targets: NDArray[np.int64]) -> None:
        n, channels, height, width = images.shape
        if images.dtype != np.uint8 or channels != 3 or height != width or n != len(targets):
            raise ValueError(
                f"expected uint8 [{len(targets)}, 3, size, size], got {images.dtype} {images.shape}"
            )
        self.images, self.targets, self.size = images, targets.astype(np.int64), height

    def load(self, index: int) -> torch.Tensor:
        """Return one image, uint8 [3, size, size]."""
        return torch.from_numpy(self.images[index].copy())

    def load_all(
        self, indices: NDArray[np.integer]
    ) -> tuple[torch.Tensor, list[int], tuple[tuple[str, str], ...]]:
        """Return many images at once; none is ever broken."""
        return torch.from_numpy(self.images[indices]), list(range(len(indices))), ()

    def subset(self, indices: NDArray[np.integer]) -> "MemorySource":
        """Return a source of these images only, in this order."""
        return MemorySource(self.images[indices], self.targets[indices])


class FilesSource(ImageSource):
    """Images in files.

    Args:
        root: Folder that the paths start from.
        paths: bytes [n], encoded paths below ``root``: one compact array, for forked workers to
            share a million of them.
        targets: int64 [n].
        size: Resize every image to this side and keep it in memory once decoded (3 size² bytes an
            image; each worker keeps its own). For small images only.
    """

    def __init__(
        self,
        root: str | Path,
        paths: NDArray[np.bytes_],
        targets: NDArray[np.int64],
        size: int | None = None,
    ) -> None:
        self.root, self.paths, self.targets, self.size = str(root), paths, targets, size
        self._images: NDArray[np.uint8] | None = None
        self._decoded = np.zeros(len(paths), dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None, "_decoded": np.zeros(len(self), dtype=bool)}

    def path(self, index: int) -> str:
        """Return the full path of an image."""
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))

    def decode(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            UnreadableImageError: The file is broken.
        """
        return decode_rgb(self.path(index))

    def load(self, index: int) -> RawImage:
        """Return one image: uint8 [3, size, size], or PIL where no size is given."""
        if self.size is None:
            return self.decode(index)
        if self._images is None:
            self._images = np.empty((len(self), 3, self.size, self.size), dtype=np.uint8)
        if not self._decoded[index]:
            image = self.decode(index)
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            self._images[index] = np.asarray(image).transpose(2, 0, 1)
            self._decoded[index] = True
        return torch.from_numpy(self._images[index].copy())

    def subset(self, indices: NDArray[np.integer]) -> "FilesSource":
        """Return a source of these images only, in this order."""
        return FilesSource(self.root, self.paths[indices], self.targets[indices], self.size)
