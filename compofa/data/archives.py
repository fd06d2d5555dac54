"""Class folders within a tar file, read where they are: nothing is unpacked."""

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

from compofa.data.decoding import UnreadableImageError, decode_rgb
from compofa.data.sources import FilesSource
from compofa.errors import DataError

MAX_IMAGE_BYTES = 1 << 28
_MOST_LINKS = 40  # one after another, as Linux has it


class _Link(str):
    """Where a symbolic link leads."""


Place = tuple[int, int]
Tree = dict[str, "Tree | Place | _Link"]


class TarFolder:
    """A folder in a tar file, with as much of :class:`pathlib.Path` as class folders need.

    Args:
        archive: The tar file, not compressed.
        tree: What is in the folder, by name: of a folder a dictionary like this one, of a file its
            offset and size in bytes.
        inside: This folder's name in the archive; empty for all of it.
    """

    def __init__(self, archive: Path, tree: Tree, inside: str = "") -> None:
        self.archive, self.tree, self.inside = archive, tree, inside

    @classmethod
    def open(cls, archive: Path) -> TarFolder:
        """List what a tar file holds.

        Hard and symbolic links stand for what they lead to, within the archive.

        Raises:
            DataError: It is no tar file, compressed or damaged, ends too early or goes on after its
                end, holds images that are no plain files, or links that lead nowhere.
        """
        try:
            return cls(archive, _read_tree(archive))
        except (
            OSError, tarfile.TarError, ValueError, OverflowError, MemoryError, RecursionError
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"expected a folder, or a tar file that is not compressed: {archive} ({reason})"
            ) from error

    @property
    def folders(self) -> list[str]:
        """The names of the folders in it."""
        return [name for name, below in self.tree.items() if isinstance(below, dict)]

    @property
    def files(self) -> list[str]:
        """The names of the files in it, not deeper."""
        return [name for name, below in self.tree.items() if not isinstance(below, dict)]

    @cached_property
    def members(self) -> dict[str, Place]:
        """Offset and size of all files in it and deeper, by their names as seen from it.

        Raises:
            DataError: A link leads to a folder that it is in.
        """
        found: dict[str, Place] = {}

        def walk(tree: Tree, prefix: str, above: tuple[int, ...]) -> None:
            if id(tree) in above:
                where = f"{self}/{prefix}"
                raise DataError(f"cannot read {where}: a link leads to the same folder again")
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
        """Whether there is such a folder, with something in it."""
        return bool(self.tree)

    def is_dir(self) -> bool:
        """Whether there is such a folder, with something in it."""
        return bool(self.tree)

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
                content = file.read(min(size, MAX_IMAGE_BYTES))
        except OSError as error:
            reason = error.strerror or str(error)
            raise UnreadableImageError(self.path(index), reason) from error
        return decode_rgb(self.path(index), io.BytesIO(content))

    def subset(self, indices: NDArray[np.integer]) -> TarSource:
        """Return a source of these images only, in this order."""
        kept = (array[indices] for array in (self.paths, self.targets))
        return TarSource(self.root, *kept, self.size, self.archive, self.places[indices])


def _read_tree(archive: Path) -> Tree:
    """Read all headers of a tar file.

    Raises:
        ValueError: Something is not as it should be.
        tarfile.TarError: It is no tar file.
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
                kept = _found(root, _names(member.linkname))
                if kept is None or isinstance(kept, dict):
                    raise ValueError(f"{member.name} is a link to {member.linkname}, not in it")
            elif member.issym():
                kept = _Link(member.linkname)
            elif member.isreg() and not member.issparse():
                kept = (member.offset_data, member.size)
                if not 0 <= member.size <= size - member.offset_data:
                    raise ValueError(f"damaged: {member.name} is not all in it")
            else:
                what = "a sparse file" if member.issparse() else "no file"
                raise ValueError(f"expected files, folders and links, {member.name} is {what}")
            above = _folder(root, names[:-1])
            if isinstance(above.get(names[-1]), dict):
                raise ValueError(f"{member.name} is a folder, and something else")
            above[names[-1]] = kept  # of two with one name the later one stays, as when unpacked
            if isinstance(kept, _Link):
                links.append((names, kept))
        _check_end(tar.fileobj, tar.offset)
    links = [(names, link) for names, link in links if _found(root, names) is link]
    targets = [_target(root, names, link) for names, link in links]
    for (names, _), target in zip(links, targets, strict=True):
        _folder(root, names[:-1])[names[-1]] = target
    return root


def _check_end(file: IO[bytes], offset: int) -> None:
    """Check that a tar file ends where its last header was read: :mod:`tarfile` does not.

    Raises:
        ValueError: There is a block that is no header, no end, or something after the end.
    """
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(f"damaged or cut off: neither a header nor the end at byte {offset}")
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise ValueError(f"damaged, or several in one: it goes on after its end at {offset}")


def _names(path: str) -> tuple[str, ...]:
    """Return the parts of a member's name.

    Raises:
        ValueError: It leads out of the archive.
    """
    names = tuple(name for name in path.split("/") if name not in ("", "."))
    if ".." in names:
        raise ValueError(f"expected names inside the archive, got {path}")
    return names


def _folder(root: Tree, names: tuple[str, ...]) -> Tree:
    """Return a folder of a tree; it is made where there is none.

    Raises:
        ValueError: There is something else of that name.
    """
    for depth, name in enumerate(names, 1):
        below = root.setdefault(name, {})
        if not isinstance(below, dict):
            raise ValueError(f"{'/'.join(names[:depth])} is a folder, and something else")
        root = below
    return root


def _found(root: Tree, names: tuple[str, ...]) -> Tree | Place | _Link | None:
    below: Tree | Place | _Link | None = root
    for name in names:
        below = below.get(name) if isinstance(below, dict) else None
    return below


def _target(root: Tree, names: tuple[str, ...], link: _Link) -> Tree | Place:
    """Follow a symbolic link, and those on its way.

    Raises:
        ValueError: It leads out of the archive, to nothing, or in a circle.
    """
    above = [root]
    for name in names[:-1]:
        above.append(above[-1][name])
    ahead, followed = link.split("/")[::-1], 1
    name = "/".join(names)
    if link.startswith("/"):
        raise ValueError(f"{name} is a link to {link}, out of the archive")
    while ahead:
        step = ahead.pop()
        if step in ("", "."):
            continue
        if step == "..":
            above.pop()
            if not above:
                raise ValueError(f"{name} is a link to {link}, out of the archive")
            continue
        below = above[-1].get(step)
        if isinstance(below, _Link):
            followed += 1
            if followed > _MOST_LINKS or below.startswith("/"):
                raise ValueError(f"{name} is a link to {link}, in a circle or out of the archive")
            ahead += below.split("/")[::-1]
        elif isinstance(below, dict):
            above.append(below)
        elif below is None or any(step not in ("", ".") for step in ahead):
            raise ValueError(f"{name} is a link to {link}, not in the archive")
        else:
            return below
    return above[-1]
