"""Reading image files, and keeping count of those that cannot be read."""

import logging
import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from compofa.errors import DataError

_LOG = logging.getLogger(__name__)
_SHOWN = 20
_FORMATS = ("JPEG", "PNG", "GIF", "PPM", "BMP", "DIB", "TIFF", "WEBP")
"""What is decoded, whatever a file's name says. Pillow would also start Ghostscript for EPS."""


class UnreadableImageError(DataError):
    """An image file that cannot be decoded; its one argument is the path."""


def decode_rgb(path: str | Path, file: BinaryIO | None = None) -> Image.Image:
    """Read an image file of any mode (grey, palette, alpha, CMYK, 16 bit) as RGB.

    Transparency is dropped and the EXIF orientation is not applied, as in torchvision.

    Args:
        path: The file, or what to call it.
        file: Its content, where it is not a file by itself.

    Raises:
        UnreadableImageError: The file is missing, truncated, no image of a usual format, or far
            too large (Pillow refuses more than 179 million pixels).
    """
    try:
        if file is None and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise OSError(f"{path} is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file or path, formats=_FORMATS) as image:
                if image.mode.startswith("I"):
                    image = _eight_bits(image)
                return image.convert("RGB")
    except Exception as error:  # decoders of broken files raise nearly anything
        raise UnreadableImageError(str(path)) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits, where Pillow would clip it to white."""
    values = np.asarray(image).astype(np.int64)
    if image.mode.startswith("I;16") or values.max() > 255:
        values >>= 8
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


class BrokenImages:
    """Counts images that were skipped, and stops when there are too many.

    Args:
        total: Images in the data set (or part) that is being read.
    """

    limit = 0.01

    def __init__(self, total: int) -> None:
        self.total = total
        self.paths: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, paths: Iterable[str]) -> None:
        """Log each path the first time it comes.

        Raises:
            DataError: More than 1 % of the images are broken.
        """
        for path in paths:
            if path not in self.paths:
                self.paths[path] = None
                _LOG.warning("skipping an image that cannot be read: %s", path)
        if len(self.paths) > self.limit * self.total:
            shown = ", ".join(list(self.paths)[:_SHOWN])
            more = len(self.paths) - _SHOWN
            raise DataError(
                f"{len(self.paths)} of {self.total} images cannot be read (at most 1 % may be "
                f"broken): {shown}" + (f" and {more} more" if more > 0 else "")
            )
