"""Class folders within a tar file, read where they are: nothing is unpacked."""

from __future__ import annotations

import io
import os
import tarfile
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compofa.data.decoding import UnreadableImageError, decode_rgb
from compofa.data.sources import FilesSource
from compofa.errors import DataError

MAX_IMAGE_BYTES = 1 << 28


class TarFolder:
    """A folder in a tar file, with as much of :class:`pathlib.Path` as class folders need.

    Args:
        archive: The tar file, not compressed.
        members: Where the files in this folder and below are: (offset, size) in bytes, by their
            names as seen from it.
        inside: This folder's name in the archive; empty for all of it.
    """

    def __init__(
        self, archive: Path, members: dict[str, tuple[int, int]], inside: str = ""
    ) -> None:
        self.archive, self.members, self.inside = archive, members, inside

    @classmethod
    def open(cls, archive: Path) -> TarFolder:
        """List what a tar file holds.

        Raises:
            DataError: It is no tar file, compressed or damaged.
        """
        try:
            with tarfile.open(archive, "r:") as tar:
                members = {
                    member.name.removeprefix("./"): (member.offset_data, member.size)
                    for member in tar
                    if member.isreg()
                }
        except (
            OSError, tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:120]
            raise DataError(
                f"expected a folder, or a tar file that is not compressed: {archive} ({reason})"
            ) from error
        return cls(archive, members)

    @cached_property
    def folders(self) -> dict[str, dict[str, tuple[int, int]]]:
        """The folders in it: their files, as ``members``."""
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for name, place in self.members.items():
            folder, slash, rest = name.partition("/")
            if slash:
                found.setdefault(folder, {})[rest] = place
        return found

    @property
    def files(self) -> list[str]:
        """The names of the files in it, not deeper."""
        return [name for name in self.members if "/" not in name]

    def __truediv__(self, name: str) -> TarFolder:
        return TarFolder(self.archive, self.folders.get(name, {}), f"{self.inside}{name}/")

    def __str__(self) -> str:
        return f"{self.archive}/{self.inside}".rstrip("/")

    def exists(self) -> bool:
        """Whether there is such a folder, with files in it."""
        return bool(self.members)

    def is_dir(self) -> bool:
        """Whether there is such a folder, with files in it."""
        return bool(self.members)

    def source(self, paths: list[bytes], targets: NDArray[np.int64], size: int | None) -> TarSource:
        """Return images in this folder; see :class:`compofa.data.sources.FilesSource`."""
        places = np.array([self.members[os.fsdecode(path)] for path in paths])
        return TarSource(str(self), np.array(paths), targets, size, self.archive, places)


class TarSource(FilesSource):
    """Images in a tar file.

    Args:
        root: What to put before names in messages.
        paths: bytes [n], names of the images.
        targets: int64 [n].
        size: See :class:`compofa.data.sources.FilesSource`.
        archive: The tar file.
        places: int64 [n, 2], offset and size of each image in it, in bytes.
    """

    def __init__(
        self,
        root: str,
        paths: NDArray[np.bytes_],
        targets: NDArray[np.int64],
        size: int | None,
        archive: Path,
        places: NDArray[np.int64],
    ) -> None:
        super().__init__(root, paths, targets, size)
        self.archive, self.places = archive, places

    def decode(self, index: int) -> Image.Image:
        """Decode one image."""
        offset, size = (int(value) for value in self.places[index])
        try:
            with self.archive.open("rb") as file:
                file.seek(offset)
                content = file.read(max(0, min(size, MAX_IMAGE_BYTES)))
        except (OSError, ValueError, OverflowError) as error:  # no place in any file
            raise UnreadableImageError(self.path(index)) from error
        return decode_rgb(self.path(index), io.BytesIO(content))

    def subset(self, indices: NDArray[np.integer]) -> TarSource:
        """Return a source of these images only, in this order."""
        kept = (array[indices] for array in (self.paths, self.targets))
        return TarSource(self.root, *kept, self.size, self.archive, self.places[indices])
