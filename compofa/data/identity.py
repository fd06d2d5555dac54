"""What a data set is, however its folder is called: its images, and which were trained on.

An image of a class folder is known by its name within its part, ``class/file``. Neither the path
that leads to the folder, nor whether it is a folder or a tar file, is part of that name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compofa.data.archives import TarSource
from compofa.data.sampling import image_order
from compofa.data.sources import FilesSource, ImageSource, MemorySource
from compofa.errors import DataError

if TYPE_CHECKING:
    from compofa.data.datasets import DataSplits

_SAMPLED = 256  # images of a data set that are recognised again
_READ = 1 << 20  # bytes of an image that are compared
_PART = re.compile(r"[0-9a-f]{16}")
_IMAGE = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class PartIdentity:
    """One part of a data set.

    Attributes:
        images: How many there are.
        digest: 16 hexadecimal digits of the SHA-256 of names and sizes of the files, or of arrays.
    """

    images: int
    digest: str


@dataclass(frozen=True)
class DataIdentity:
    """The data set that a network was trained on.

    Attributes:
        train: Images trained on.
        validation: Images held out of them.
        test: Test images.
        held: Of the parts that were held out of a folder by its images' names, the place in its
            order (:func:`part_order`) of the last image of each class.
        trained: Up to 256 of the files trained on, here and in what the weights began with: 32
            hexadecimal digits each, of the name and of the content.
    """

    train: PartIdentity
    validation: PartIdentity
    test: PartIdentity
    held: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()

    def differences(self, now: DataIdentity) -> list[str]:
        """List the parts whose images are not those of ``now``."""
        found = []
        for name in ("train", "validation", "test"):
            then, other = getattr(self, name), getattr(now, name)
            if then.images != other.images:
                found.append(f"{then.images} {name} images then, {other.images} now")
            elif then != other:
                found.append(f"other {name} images of the same number")
        return found

    def seen_in(self, source: ImageSource) -> int:
        """Count the images of ``source`` that are known to have been trained on."""
        if not self.trained or not isinstance(source, FilesSource):
            return 0
        names = np.array([int(image[:16], 16) for image in self.trained], np.uint64)
        places = np.flatnonzero(np.isin(image_names(source), names))
        return len(self.trained & {*_described(source, places)})

    def held_in(
        self, source: FilesSource, classes: tuple[str, ...], part: str, seed: int = 0
    ) -> NDArray[np.bool_]:
        """Tell which images of ``source`` were held out then, or would have been.

        Args:
            source: Images to divide.
            classes: Names of its classes.
            part: ``test`` or ``validation``.
            seed: As in :func:`part_order`.
        """
        places = self.held.get(part, {})
        last = np.array([places.get(name, 0) for name in classes], np.uint64)[source.targets]
        known = np.array([name in places for name in classes], bool)[source.targets]
        return known & (part_order(source, part, seed) <= last)

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON data."""
        parts = (self.train, self.validation, self.test)
        return {
            "parts": [[part.images, part.digest] for part in parts],
            "held": {part: dict(places) for part, places in self.held.items()},
            "trained": sorted(self.trained),
        }

    @classmethod
    def from_json(cls, data: Any) -> DataIdentity:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: Something is missing or of another type.
        """
        if not isinstance(data, Mapping) or not data.keys() >= {"parts", "held", "trained"}:
            raise DataError("data: expected parts, held and trained")
        parts, held, trained = data["parts"], data["held"], data["trained"]
        good = _each(parts, _is_part) and len(parts) == 3 and _each(trained, _is_image)
        if not good or not isinstance(held, Mapping) or not _each([*held.values()], _is_places):
            raise DataError("data: expected three parts, places and images, got other values")
        return cls(*(PartIdentity(*part) for part in parts), dict(held), frozenset(trained))


def identify(
    splits: DataSplits, seed: int, before: Sequence[DataIdentity | None] = ()
) -> DataIdentity:
    """Return the identity of a data set that a network is about to be trained on.

    Args:
        splits: The data set.
        seed: That the validation images were held out with.
        before: What the weights that it begins with were trained on.
    """
    held: dict[str, dict[str, int]] = {}
    trained = frozenset[str]()
    if isinstance(splits.train, FilesSource):
        for part in splits.held:
            source = getattr(splits, part)
            order, held[part] = part_order(source, part, seed), {}
            for target in np.unique(source.targets).tolist():
                held[part][splits.classes[target]] = int(order[source.targets == target].max())
        names = image_names(splits.train)
        trained = frozenset(_described(splits.train, np.argsort(names)[:_SAMPLED]))
    parts = (identify_part(part) for part in (splits.train, splits.validation, splits.test))
    return DataIdentity(*parts, held, trained.union(*(other.trained for other in before if other)))


def part_order(source: FilesSource, part: str, seed: int = 0) -> NDArray[np.uint64]:
    """Return the places of images in the order that a part is taken from.

    Args:
        source: The images.
        part: ``test``, which no seed may change, or ``validation``.
        seed: Of the validation part.
    """
    purpose = (seed, "validation") if part == "validation" else ("test part",)
    return image_order(image_names(source), *purpose)


def identify_part(source: ImageSource) -> PartIdentity:
    """Return the identity of one part of a data set; asks for the size of every file."""
    digest = hashlib.sha256()
    if isinstance(source, MemorySource):
        digest.update(source.images.tobytes())
        digest.update(source.targets.tobytes())
    elif isinstance(source, FilesSource):
        rows = np.stack([image_names(source), _sizes(source)], axis=1)
        digest.update(rows[np.argsort(rows[:, 0])].astype("<u8").tobytes())
    return PartIdentity(len(source), digest.hexdigest()[:16])


def image_names(source: FilesSource) -> NDArray[np.uint64]:
    """Return 64 bits of a hash of each image's name within its part, ``class/file``."""
    digests = b"".join(
        hashlib.blake2b(bytes(path), digest_size=8).digest() for path in source.paths.tolist()
    )
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _sizes(source: FilesSource) -> NDArray[np.uint64]:
    """Return the bytes of each file; 0 for one that is gone."""
    if isinstance(source, TarSource):
        return source.places[:, 1].astype(np.uint64)
    sizes = np.zeros(len(source), np.uint64)
    for index in range(len(source)):
        try:
            sizes[index] = os.stat(source.path(index)).st_size
        except OSError:  # decoding names it
            continue
    return sizes


def _described(source: FilesSource, places: NDArray[np.integer]) -> list[str]:
    """Return 16 digits of the name and 16 of the content of some images; unreadable ones not."""
    names, found = image_names(source.subset(places)), []
    for index, name in zip(places.tolist(), names.tolist(), strict=True):
        try:
            content = _content(source, index)
        except (OSError, ValueError, OverflowError):  # decoding names it
            continue
        found.append(f"{name:016x}{hashlib.blake2b(content, digest_size=8).hexdigest()}")
    return found


def _content(source: FilesSource, index: int) -> bytes:
    """Read the beginning of a file."""
    if not isinstance(source, TarSource):
        path = Path(source.path(index))
        if not path.is_file():  # a pipe would be waited for
            return b""
        with path.open("rb") as file:
            return file.read(_READ)
    offset, size = (int(value) for value in source.places[index])
    with source.archive.open("rb") as file:
        file.seek(offset)
        return file.read(min(size, _READ))


def _each(values: Any, check: Any) -> bool:
    return isinstance(values, list | tuple) and all(check(value) for value in values)


def _is_part(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    images, digest = value
    return type(images) is int and type(digest) is str and bool(_PART.fullmatch(digest))


def _is_places(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        type(name) is str and type(place) is int and 0 <= place < 1 << 64
        for name, place in value.items()
    )


def _is_image(value: Any) -> bool:
    return type(value) is str and bool(_IMAGE.fullmatch(value))
