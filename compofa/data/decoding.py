"""Reading image files, and keeping count of those that cannot be read."""

import logging
import os
import stat
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from compofa.errors import DataError

_LOG = logging.getLogger(__name__)
_SHOWN = 20
_FORMATS = ("JPEG", "PNG", "GIF", "PPM", "BMP", "DIB", "TIFF", "WEBP")
"""What is decoded, whatever a file's name says. Pillow would also start Ghostscript for EPS."""


_ORIENTATIONS = dict(
    enumerate(
        (
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_270,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_90,
        ),
        start=2,
    )
)
"""What turns an image upright, by its EXIF orientation."""
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # tags of TIFF and EXIF
_WHITE_IS_ZERO = 0


class UnreadableImageError(DataError):
    """An image file that cannot be decoded.

    Attributes:
        path: The file.
        reason: What is wrong with it, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_rgb(path: str | Path, file: BinaryIO | None = None) -> Image.Image:
    """Read an image file of any mode as RGB, as a viewer shows it.

    It is turned upright as its EXIF orientation says, and laid on white where it is transparent;
    torchvision's default loader does neither. Of a file with several frames or pages it is the
    first. CMYK is converted without a colour profile.

    Grey and colour of 16 bits is scaled by 2^16, and floating-point grey from 0 to 1. What the
    largest value of other images stands for is not known, and neither is it where no value of a
    16-bit image is above 4095: it may have 12 bits, or be dark. Those are refused.

    Args:
        path: The file, or what to call it.
        file: Its content, where it is not a file by itself.

    Raises:
        UnreadableImageError: The file is missing, truncated, no image of a usual format, far too
            large (Pillow refuses more than 179 million pixels), or its range is not known.
    """
    try:
        if file is None:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
                raise ValueError("no file")
            if not status.st_size:
                raise ValueError("empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file or path, formats=_FORMATS) as image:
                if image.format != "PNG":
                    return _upright(image, _rgb(image))
                image.verify()  # the checksums of the pixels, which loading does not look at
            if file is not None:
                file.seek(0)
            with Image.open(file or path, formats=("PNG",)) as image:
                return _upright(image, _rgb(image))
    except UnidentifiedImageError as error:
        reason = f"none of {', '.join(_FORMATS)}"
        raise UnreadableImageError(str(path), reason) from error
    except Exception as error:  # decoders of broken files raise nearly anything
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = " ".join(reason.split())[:200] or type(error).__name__
        raise UnreadableImageError(str(path), reason) from error


def _rgb(image: Image.Image) -> Image.Image:
    bits = _bits(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image, bits).convert("RGB")
    if bits == 16:  # Pillow has kept the upper 8
        ranges = zip(image.getbands(), image.getextrema(), strict=True)
        if max(high for band, (_, high) in ranges if band not in "AaX") < 16:
            raise ValueError("16 bits of which at most 12 are used: expected values above 4095")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Return the bits per sample of an image that is not loaded yet, as far as they matter."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    layout = image.tile[0][3] if image.tile else ""
    return 16 if image.format == "PNG" and ";16" in str(layout) else 8


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Scale grey of more than 8 bits to 8, where Pillow would clip it.

    Args:
        image: Grey of mode I, I;16 or F.
        bits: Per sample, of TIFF and PNG.

    Raises:
        ValueError: The range of its values is not known.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not 0 <= low <= high <= 1:  # also NaN
            raise ValueError(f"floating point from {low:g} to {high:g}: expected 0 to 1")
        grey = np.rint(values * 255)
    elif image.format == "PPM":  # Pillow scales to 16 bits by the range that the file states
        grey = values >> 8
    elif bits == 12 or (bits == 16 and image.mode.startswith("I;16")) or image.format == "PNG":
        if bits == 16 and 0 < high < 1 << 12:
            raise ValueError("16 bits of which at most 12 are used: expected values above 4095")
        grey = values >> (bits - 8)
    else:
        raise ValueError(f"grey of {bits} bits from {low} to {high}: expected 8 or unsigned 16")
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8))


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """Turn ``rgb`` as the EXIF data of ``image`` say; Pillow has turned a TIFF."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return rgb  # damaged, and of no use to the image itself
    method = _ORIENTATIONS.get(orientation) if image.format != "TIFF" else None
    return rgb if method is None else rgb.transpose(method)


class BrokenImages:
    """Counts images that were skipped, names each once, and stops when there are too many.

    Args:
        total: Images in the data set (or part) that is being read.
        named: Images that need no naming; those that are named are added. For counters that may
            meet the same images.
    """

    limit = 0.01

    def __init__(self, total: int, named: set[str] | None = None) -> None:
        self.total = total
        self.paths: dict[str, None] = {}
        self.named = set() if named is None else named

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, images: Iterable[tuple[str, str]]) -> None:
        """Log each image, a path and what is wrong with it, the first time it comes.

        Raises:
            DataError: More than 1 % of the images are broken.
        """
        images = dict(images)
        self.paths.update(dict.fromkeys(images))
        new = [path for path in images if path not in self.named]
        for path in new[:_SHOWN]:
            _LOG.warning("skipping an image that cannot be read: %s: %s", path, images[path])
        if len(new) > _SHOWN:
            _LOG.warning("skipping %d more images that cannot be read", len(new) - _SHOWN)
        self.named.update(new)
        self.check()

    def count(self, paths: Iterable[str]) -> None:
        """Count images that were named elsewhere: in another process, or before a run went on.

        Raises:
            DataError: More than 1 % of the images are broken.
        """
        paths = tuple(paths)
        self.paths.update(dict.fromkeys(paths))
        self.named.update(paths)
        self.check()

    def check(self) -> None:
        """Stop where too many are broken.

        Raises:
            DataError: More than 1 % of the images are.
        """
        if len(self.paths) > self.limit * self.total:
            raise DataError(
                f"{len(self.paths)} of {self.total} images cannot be read, at most 1 % may be: "
                "they are named above"
            )
