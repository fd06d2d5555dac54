"""Decoding image files, and counting those that cannot be decoded."""

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
_MAX_LOGGED = 20  # unreadable images logged per call
_FORMATS = ("JPEG", "PNG", "GIF", "PPM", "BMP", "DIB", "TIFF", "WEBP")
"""Formats to decode, regardless of a file's suffix. Pillow would also run Ghostscript for EPS."""

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
"""Transposition that undoes each EXIF orientation."""
_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # TIFF and EXIF tags
_WHITE_IS_ZERO = 0
_AMBIGUOUS_RANGE = "ambiguous range: 16 bits, expected values above 4095 (12 bits)"


class UnreadableImageError(DataError):
    """An image file that cannot be decoded.

    Attributes:
        path: The file.
        reason: Why it cannot be decoded, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_rgb(path: str | Path, file: BinaryIO | None = None) -> Image.Image:
    """Decode an image file of any mode to RGB, as an image viewer shows it.

    The EXIF orientation is applied, and transparent images are composited on white; torchvision's
    default loader does neither. Of several frames or pages, the first is decoded. CMYK is converted
    without a colour profile.

    16-bit images are scaled from [0, 65535], and floating-point grey images from [0, 1]. Images
    whose range is unknown are refused: other types, and 16-bit images without a value above 4095,
    which may be 12-bit images or dark ones.

    Args:
        path: The file, or its name for messages if ``file`` is given.
        file: Content of the file, open for reading.

    Returns:
        An RGB image.

    Raises:
        UnreadableImageError: The file is missing, truncated, not in a supported format, larger than
            Pillow's limit of 179 million pixels, or of unknown range.
    """
    try:
        if file is None:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
                raise ValueError("not a regular file")
            if not status.st_size:
                raise ValueError("empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file or path, formats=_FORMATS) as image:
                if image.format != "PNG":
                    return _upright(image, _rgb(image))
                image.verify()  # checks the CRCs of pixel data, which loading does not
            if file is not None:
                file.seek(0)
            with Image.open(file or path, formats=("PNG",)) as image:
                return _upright(image, _rgb(image))
    except UnidentifiedImageError as error:
        reason = f"not one of {', '.join(_FORMATS)}"
        raise UnreadableImageError(str(path), reason) from error
    except Exception as error:  # decoders raise almost any type for a damaged file
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        reason = " ".join(reason.split())[:200] or type(error).__name__
        raise UnreadableImageError(str(path), reason) from error


def dimensions(path: str | Path, file: BinaryIO | None = None) -> tuple[int, int]:
    """Return width and height that an image file's header states, without decoding it.

    Args:
        path: The file, or its name for messages if ``file`` is given.
        file: Content of the file, open for reading.

    Raises:
        UnreadableImageError: The file cannot be read or has no header of a supported format.
    """
    try:
        if file is None and not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block
            raise ValueError("not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file or path, formats=_FORMATS) as image:
                return image.size
    except Exception as error:  # decoders raise almost any type for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UnreadableImageError(str(path), reason) from error


def _rgb(image: Image.Image) -> Image.Image:
    bits = _bits(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        return _eight_bits(image, bits).convert("RGB")
    if bits == 16:  # Pillow kept the upper 8 bits
        ranges = zip(image.getbands(), image.getextrema(), strict=True)
        if max(high for band, (_, high) in ranges if band not in "AaX") < 16:
            raise ValueError(_AMBIGUOUS_RANGE)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Return the bits per sample of a TIFF or PNG before it is loaded, and 8 for other formats."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
    layout = image.tile[0][3] if image.tile else ""
    return 16 if image.format == "PNG" and ";16" in str(layout) else 8


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Scale a grey image to 8 bits, which Pillow would clip.

    Args:
        image: A grey image of mode I, I;16 or F.
        bits: Bits per sample of a TIFF or PNG.

    Raises:
        ValueError: The range of its values is unknown.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not 0 <= low <= high <= 1:  # or NaN
            raise ValueError(f"expected floating-point values from 0 to 1, got {low:g} to {high:g}")
        grey = np.rint(values * 255)
    elif image.format == "PPM":  # Pillow scaled it to 16 bits by the range stated in the file
        grey = values >> 8
    elif bits == 12 or (bits == 16 and image.mode.startswith("I;16")) or image.format == "PNG":
        if bits == 16 and 0 < high < 1 << 12:
            raise ValueError(_AMBIGUOUS_RANGE)
        grey = values >> (bits - 8)
    else:
        raise ValueError(f"expected 8 or unsigned 16 bits, got {bits} bits from {low} to {high}")
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    return Image.fromarray(grey.astype(np.uint8))


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of ``image`` to ``rgb``; Pillow applies it to TIFF itself."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
        return rgb  # damaged EXIF data; the pixels are intact
    method = _ORIENTATIONS.get(orientation) if image.format != "TIFF" else None
    return rgb if method is None else rgb.transpose(method)


class BrokenImages:
    """Counts skipped images, logs each once, and raises an error if there are too many.

    Args:
        total: Images in the data set (or part) that is being read.
        named: Paths of images that were logged already; updated in place, to share it between
            counters.
    """

    limit = 0.01
    """Largest fraction of images that may be unreadable."""

    def __init__(self, total: int, named: set[str] | None = None) -> None:
        self.total = total
        self.paths: dict[str, None] = {}
        self.named = set() if named is None else named

    def __len__(self) -> int:
        return len(self.paths)

    def add(self, images: Iterable[tuple[str, str]]) -> None:
        """Count images, given as (path, reason), and log each of them the first time.

        Raises:
            DataError: More than 1 % of the images are unreadable.
        """
        images = dict(images)
        self.paths.update(dict.fromkeys(images))
        new = [path for path in images if path not in self.named]
        for path in new[:_MAX_LOGGED]:
            _LOG.warning("skipping unreadable image: %s: %s", path, images[path])
        if len(new) > _MAX_LOGGED:
            _LOG.warning("skipping %d more unreadable images", len(new) - _MAX_LOGGED)
        self.named.update(new)
        self.check()

    def count(self, paths: Iterable[str]) -> None:
        """Count images that were logged by another rank, or before a run was resumed.

        Raises:
            DataError: More than 1 % of the images are unreadable.
        """
        paths = tuple(paths)
        self.paths.update(dict.fromkeys(paths))
        self.named.update(paths)
        self.check()

    def check(self) -> None:
        """Check that few images are unreadable.

        Raises:
            DataError: More than 1 % of the images are unreadable.
        """
        if len(self.paths) > self.limit * self.total:
            raise DataError(
                f"{len(self.paths)} of {self.total} images cannot be read, expected at most 1 %: "
                "see the warnings above"
            )
