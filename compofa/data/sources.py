"""Sources of images: arrays in memory, or files."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from compofa.data.decoding import UnreadableImageError, decode_rgb, dimensions

RawImage = Image.Image | torch.Tensor
"""An RGB image: a PIL image, or a uint8 tensor [3, h, w]."""


class ImageSource(ABC):
    """Labelled images with random access. Picklable, for loader workers.

    Attributes:
        targets: Class indices, int64 [n].
        size: Side of all images, in pixels; None if sizes differ.
    """

    targets: NDArray[np.int64]
    size: int | None

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> RawImage:
        """Return one image.

        Raises:
            UnreadableImageError: The file cannot be decoded.
        """

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return width and height of one image, in pixels.

        Raises:
            UnreadableImageError: The file cannot be decoded.
        """
        image = self.load(index)
        if isinstance(image, Image.Image):
            return image.size
        return image.shape[-1], image.shape[-2]

    @abstractmethod
    def subset(self, indices: NDArray[np.integer]) -> "ImageSource":
        """Return a source of the images at ``indices``, in this order."""

    def load_all(
        self, indices: NDArray[np.integer]
    ) -> tuple[list[RawImage] | torch.Tensor, list[int], tuple[tuple[str, str], ...]]:
        """Return several images, skipping unreadable ones.

        Args:
            indices: Indices of the images, [n].

        Returns:
            The readable images (uint8 [m, 3, size, size] if they have one size, else a list of m),
            their m positions in ``indices``, and (path, reason) of each unreadable image.
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
    """Images in memory.

    Args:
        images: uint8 [n, 3, size, size].
        targets: Class indices, int64 [n].

    Raises:
        ValueError: The shapes or the type are others.
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
        """Return several images at once; all are readable."""
        return torch.from_numpy(self.images[indices]), list(range(len(indices))), ()

    def subset(self, indices: NDArray[np.integer]) -> "MemorySource":
        """Return a source of the images at ``indices``, in this order."""
        return MemorySource(self.images[indices], self.targets[indices])


class FilesSource(ImageSource):
    """Images in files.

    Args:
        root: Folder that ``paths`` are relative to.
        paths: Encoded paths, bytes [n]: one compact array, which forked loader workers share.
        targets: Class indices, int64 [n].
        size: Resize images to this side, in pixels, and cache them in memory (3 size² bytes per
            image and loader worker). For small images only.
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
            UnreadableImageError: The file cannot be decoded.
        """
        return decode_rgb(self.path(index))

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return width and height of one image, from its header.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        return dimensions(self.path(index))

    def load(self, index: int) -> RawImage:
        """Return one image: uint8 [3, size, size], or a PIL image if no size was given."""
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
        """Return a source of the images at ``indices``, in this order."""
        return FilesSource(self.root, self.paths[indices], self.targets[indices], self.size)
