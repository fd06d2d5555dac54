"""Class folders inside a tar file, read in place without unpacking."""

from __future__ import annotations

import io
import os
import tarfile
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compofa.data.decoding import UnreadableImageError, decode_rgb, dimensions
from compofa.data.sources import FilesSource
from compofa.errors import DataError

MAX_IMAGE_BYTES = 1 << 28
"""Limit of the bytes read per image."""
_MAX_LINKS = 40  # symbolic links followed in one path, as in Linux


class _Link(str):
    """Target path of a symbolic link."""


Place = tuple[int, int]
"""Offset and size of a file in the archive, in bytes."""
Tree = dict[str, "Tree | Place | _Link"]
"""Content of a folder by name."""


class TarFolder:
    """A folder in a tar file, with the subset of :class:`pathlib.Path` that class folders need.

    Args:
        archive: The uncompressed tar file.
        tree: Content of the folder by name: a nested dict per folder, (offset, size) per file.
        inside: Path of the folder in the archive; empty for its root.
    """

    def __init__(self, archive: Path, tree: Tree, inside: str = "") -> None:
        self.archive, self.tree, self.inside = archive, tree, inside

    @classmethod
    def open(cls, archive: Path) -> TarFolder:
        """Index the members of a tar file. Hard and symbolic links are resolved.

        Raises:
            DataError: The file is not a tar file, or is compressed, damaged, truncated or
                concatenated; or it contains sparse or special files, links out of the archive, or
                broken links.
        """
        try:
            return cls(archive, _read_tree(archive))
        except (
            OSError, tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"expected a folder or an uncompressed tar file: {archive} ({reason})"
            ) from error

    @property
    def folders(self) -> list[str]:
        """Names of the folders directly in this folder."""
        return [name for name, below in self.tree.items() if isinstance(below, dict)]

    @property
    def files(self) -> list[str]:
        """Names of the files directly in this folder."""
        return [name for name, below in self.tree.items() if not isinstance(below, dict)]

    @cached_property
    def members(self) -> dict[str, Place]:
        """All files below this folder, by path relative to it.

        Raises:
            DataError: A symbolic link leads to a folder that contains it.
        """
        found: dict[str, Place] = {}

        def walk(tree: Tree, prefix: str, above: tuple[int, ...]) -> None:
            if id(tree) in above:
                where = f"{self}/{prefix}"
                raise DataError(
                    f"cannot read {where}: a symbolic link leads to the same folder again"
                )
            for name, below in tree.items():
                if isinstance(below, dict):
                    walk(below, f"{prefix}{name}/", (*above, id(tree)))
                else:
                    found[prefix + name] = below

        walk(self.tree, "", ())
        return found

    def __truediv__(self, name: str) -> TarFolder:
        below = self.tree.get(name)
        tree = below if isinstance(below, dict) else {}
        return TarFolder(self.archive, tree, f"{self.inside}{name}/")

    def __str__(self) -> str:
        return f"{self.archive}/{self.inside}".rstrip("/")

    def exists(self) -> bool:
        """Return whether the folder exists and is not empty."""
        return bool(self.tree)

    def is_dir(self) -> bool:
        """Return whether the folder exists and is not empty."""
        return bool(self.tree)

    def source(self, paths: list[bytes], targets: NDArray[np.int64], size: int | None) -> TarSource:
        """Return the images at ``paths``; see :class:`compofa.data.sources.FilesSource`."""
        places = np.array([self.members[os.fsdecode(path)] for path in paths])
        return TarSource(str(self), np.array(paths), targets, size, self.archive, places)


class TarSource(FilesSource):
    """Images in a tar file.

    Args:
        root: Prefix of paths in messages.
        paths: Encoded paths, bytes [n].
        targets: Class indices, int64 [n].
        size: See :class:`compofa.data.sources.FilesSource`.
        archive: The tar file.
        places: Offset and size of each image in the archive, in bytes, int64 [n, 2].
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
        """Decode one image.

        Raises:
            UnreadableImageError: It cannot be decoded.
        """
        return decode_rgb(self.path(index), self._content(index))

    def dimensions(self, index: int) -> tuple[int, int]:
        """Return width and height of one image, from its header.

        Raises:
            UnreadableImageError: It cannot be read.
        """
        return dimensions(self.path(index), self._content(index))

    def _content(self, index: int) -> io.BytesIO:
        try:
            return io.BytesIO(self.read(index, MAX_IMAGE_BYTES))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreadableImageError(self.path(index), reason) from error

    def read(self, index: int, limit: int) -> bytes:
        """Return at most ``limit`` bytes of an image file.

        Raises:
            OSError: The archive cannot be read.
        """
        offset, size = (int(value) for value in self.places[index])
        with self.archive.open("rb") as file:
            file.seek(offset)
            return file.read(min(size, limit))

    def subset(self, indices: NDArray[np.integer]) -> TarSource:
        """Return a source of the images at ``indices``, in this order."""
        kept = (array[indices] for array in (self.paths, self.targets))
        return TarSource(self.root, *kept, self.size, self.archive, self.places[indices])


def _read_tree(archive: Path) -> Tree:
    """Read all headers of a tar file.

    Raises:
        ValueError: A member is damaged or not supported.
        tarfile.TarError: It is not a tar file.
    """
    root: Tree = {}
    links: list[tuple[tuple[str, ...], _Link]] = []
    with tarfile.open(archive, "r:") as tar:
        size = os.fstat(tar.fileobj.fileno()).st_size
        for member in tar:
            names = _names(member.name)
            if not names or member.isdir():
                _folder(root, names)
                continue
            if member.islnk():
                kept = _lookup(root, _names(member.linkname))
                if kept is None or isinstance(kept, dict):
                    raise ValueError(
                        f"{member.name} links to {member.linkname}, not in the archive"
                    )
            elif member.issym():
                kept = _Link(member.linkname)
            elif member.isreg() and not member.issparse():
                kept = (member.offset_data, member.size)
                if not 0 <= member.size <= size - member.offset_data:
                    raise ValueError(f"truncated: {member.name}")
            else:
                what = "sparse" if member.issparse() else "a special file"
                raise ValueError(f"expected files, folders and links, but {member.name} is {what}")
            above = _folder(root, names[:-1])
            if isinstance(above.get(names[-1]), dict):
                raise ValueError(f"{member.name} is both a folder and a file")
            above[names[-1]] = kept  # the last of equal names wins, as when unpacking
            if isinstance(kept, _Link):
                links.append((names, kept))
        _check_end(tar.fileobj, tar.offset)
    links = [(names, link) for names, link in links if _lookup(root, names) is link]
    targets = [_target(root, names, link) for names, link in links]
    for (names, _), target in zip(links, targets, strict=True):
        _folder(root, names[:-1])[names[-1]] = target
    return root


def _check_end(file: IO[bytes], offset: int) -> None:
    """Check that a tar file ends after its last member, which :mod:`tarfile` does not.

    Raises:
        ValueError: The end-of-archive marker is missing, or data follow it.
    """
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"damaged or truncated: expected a header or the end at byte {offset}")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError(f"damaged or concatenated: data after the end at byte {offset}")


def _names(path: str) -> tuple[str, ...]:
    """Split the path of a member.

    Raises:
        ValueError: The path contains ``..``.
    """
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    if ".." in names:
        raise ValueError(f"expected paths inside the archive, got {path}")
    return names


def _folder(root: Tree, names: tuple[str, ...]) -> Tree:
    """Return a folder of a tree, creating it if needed.

    Raises:
        ValueError: A file has that path.
    """
    for depth, name in enumerate(names, 1):
        below = root.setdefault(name, {})
        if not isinstance(below, dict):
            raise ValueError(f"{'/'.join(names[:depth])} is both a folder and a file")
        root = below
    return root


def _lookup(root: Tree, names: tuple[str, ...]) -> Tree | Place | _Link | None:
    """Return the member at a path, without following links, or None."""
    below: Tree | Place | _Link | None = root
    for name in names:
        below = below.get(name) if isinstance(below, dict) else None
    return below


def _target(root: Tree, names: tuple[str, ...], link: _Link) -> Tree | Place:
    """Resolve a symbolic link, including links in its target path.

    Raises:
        ValueError: The link leads out of the archive, is broken, or is part of a loop.
    """
    above = [root]
    for name in names[:-1]:
        above.append(above[-1][name])
    ahead, followed = link.split("/")[::-1], 1
    name = "/".join(names)
    if link.startswith("/"):
        raise ValueError(f"{name} links to {link}, outside the archive")
    while ahead:
        step = ahead.pop()
        if step in ("", "."):
            continue
        if step == "..":
            above.pop()
            if not above:
                raise ValueError(f"{name} links to {link}, outside the archive")
            continue
        below = above[-1].get(step)
        if isinstance(below, _Link):
            followed += 1
            if followed > _MAX_LINKS or below.startswith("/"):
                raise ValueError(f"{name} links to {link}, in a loop or outside the archive")
            ahead += below.split("/")[::-1]
        elif isinstance(below, dict):
            above.append(below)
        elif below is None or any(step not in ("", ".") for step in ahead):
            raise ValueError(f"{name} links to {link}, not in the archive")
        else:
            return below
    return above[-1]
