"""Identity of a data set, independent of its path, to detect training images among test images.

An image of class folders is identified by its name within its part, ``class/file``. The path of the
folder, and whether it is a folder or a tar file, do not matter.
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
from compofa.data.torch_datasets import DatasetSource
from compofa.errors import DataError

if TYPE_CHECKING:
    from compofa.data.datasets import DataSplits

_SAMPLED = 256  # training images recorded per data set
_READ = 1 << 20  # bytes hashed per image
_PART = re.compile(r"[0-9a-f]{16}")
_IMAGE = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class PartIdentity:
    """Identity of one part of a data set.

    Attributes:
        images: Number of images.
        digest: First 16 hexadecimal digits of the SHA-256 of file names and sizes, or of arrays.
    """

    images: int
    digest: str


@dataclass(frozen=True)
class DataIdentity:
    """Identity of the data set that a network was trained on.

    Attributes:
        train: Training images.
        validation: Validation images.
        test: Test images.
        held: For each part that was held out of a folder by image name, the largest sort key
            (:func:`part_order`) per class.
        trained: Up to 256 training files of this run, and those of its initial weights: hashes of
            name and content, 16 hexadecimal digits each.
    """

    train: PartIdentity
    validation: PartIdentity
    test: PartIdentity
    held: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()

    def differences(self, now: DataIdentity) -> list[str]:
        """Return a description of each part whose images differ from those of ``now``."""
        found = []
        for name in ("train", "validation", "test"):
            then, other = getattr(self, name), getattr(now, name)
            if then.images != other.images:
                found.append(f"{then.images} {name} images before, {other.images} now")
            elif then != other:
                found.append(f"as many but other {name} images")
        return found

    def seen_in(self, source: ImageSource) -> int:
        """Return how many images of ``source`` are among the recorded training images."""
        if not self.trained or not isinstance(source, FilesSource):
            return 0
        names = np.array([int(image[:16], 16) for image in self.trained], np.uint64)
        places = np.flatnonzero(np.isin(image_names(source), names))
        return len(self.trained & {*_image_hashes(source, places)})

    def held_out_mask(
        self, source: FilesSource, classes: tuple[str, ...], part: str, seed: int = 0
    ) -> NDArray[np.bool_]:
        """Return which images of ``source`` were held out in training, or would have been.

        Args:
            source: Images to split.
            classes: Names of their classes.
            part: ``test`` or ``validation``.
            seed: As for :func:`part_order`.

        Returns:
            Mask of the images held out, bool [n].
        """
        keys = self.held.get(part, {})
        last = np.array([keys.get(name, 0) for name in classes], np.uint64)[source.targets]
        known = np.array([name in keys for name in classes], bool)[source.targets]
        return known & (part_order(source, part, seed) <= last)

    def to_json(self) -> dict[str, Any]:
        """Return the identity as JSON-compatible data."""
        parts = (self.train, self.validation, self.test)
        return {
            "parts": [[part.images, part.digest] for part in parts],
            "held": {part: dict(keys) for part, keys in self.held.items()},
            "trained": sorted(self.trained),
        }

    @classmethod
    def from_json(cls, data: Any) -> DataIdentity:
        """Return the identity from the output of :meth:`to_json`.

        Raises:
            DataError: A key is missing, or a value has another type.
        """
        if not isinstance(data, Mapping) or not data.keys() >= {"parts", "held", "trained"}:
            raise DataError("data: expected parts, held and trained")
        parts, held, trained = data["parts"], data["held"], data["trained"]
        valid = _each(parts, _is_part) and len(parts) == 3 and _each(trained, _is_image)
        if not valid or not isinstance(held, Mapping) or not _each([*held.values()], _are_keys):
            raise DataError("data: expected 3 parts, keys per class and image hashes")
        return cls(*(PartIdentity(*part) for part in parts), dict(held), frozenset(trained))


def identify(
    splits: DataSplits, seed: int, before: Sequence[DataIdentity | None] = ()
) -> DataIdentity:
    """Return the identity of the data set of a training run.

    Args:
        splits: The data set.
        seed: Seed that the validation images were held out with.
        before: Identities of the data sets that the initial weights were trained on.
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
        trained = frozenset(_image_hashes(splits.train, np.argsort(names)[:_SAMPLED]))
    parts = (identify_part(part) for part in (splits.train, splits.validation, splits.test))
    return DataIdentity(*parts, held, trained.union(*(other.trained for other in before if other)))


def part_order(source: FilesSource, part: str, seed: int = 0) -> NDArray[np.uint64]:
    """Return the sort keys of images by which a part is held out.

    Args:
        source: The images.
        part: ``test``, which does not depend on the seed, or ``validation``.
        seed: Seed of the validation part.

    Returns:
        uint64 [n].
    """
    purpose = (seed, "validation") if part == "validation" else ("test part",)
    return image_order(image_names(source), *purpose)


def identify_part(source: ImageSource) -> PartIdentity:
    """Return the identity of one part of a data set. Reads the size of every file."""
    digest = hashlib.sha256()
    if isinstance(source, MemorySource):
        digest.update(source.images.tobytes())
        digest.update(source.targets.tobytes())
    elif isinstance(source, FilesSource):
        rows = np.stack([image_names(source), _sizes(source)], axis=1)
        digest.update(rows[np.argsort(rows[:, 0])].astype("<u8").tobytes())
    elif isinstance(source, DatasetSource):  # reading its images may take long
        digest.update(source.targets.tobytes())
    return PartIdentity(len(source), digest.hexdigest()[:16])


def image_names(source: FilesSource) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each image's name within its part, ``class/file``, uint64 [n]."""
    digests = b"".join(
        hashlib.blake2b(bytes(path), digest_size=8).digest() for path in source.paths.tolist()
    )
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def _sizes(source: FilesSource) -> NDArray[np.uint64]:
    """Return the size of each file in bytes, uint64 [n]; 0 for a missing file."""
    if isinstance(source, TarSource):
        return source.places[:, 1].astype(np.uint64)
    sizes = np.zeros(len(source), np.uint64)
    for index in range(len(source)):
        try:
            sizes[index] = os.stat(source.path(index)).st_size
        except OSError:  # reported when it is decoded
            continue
    return sizes


def _image_hashes(source: FilesSource, places: NDArray[np.integer]) -> list[str]:
    """Return hashes of name and content of images, 32 hexadecimal digits; skips unreadable ones."""
    names, found = image_names(source.subset(places)), []
    for index, name in zip(places.tolist(), names.tolist(), strict=True):
        try:
            content = _content(source, index)
        except (OSError, ValueError, OverflowError):  # reported when it is decoded
            continue
        found.append(f"{name:016x}{hashlib.blake2b(content, digest_size=8).hexdigest()}")
    return found


def _content(source: FilesSource, index: int) -> bytes:
    """Return the first bytes of an image file."""
    if isinstance(source, TarSource):
        return source.read(index, _READ)
    path = Path(source.path(index))
    if not path.is_file():  # reading a pipe would block
        return b""
    with path.open("rb") as file:
        return file.read(_READ)


def _each(values: Any, check: Any) -> bool:
    return isinstance(values, list | tuple) and all(check(value) for value in values)


def _is_part(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    images, digest = value
    return type(images) is int and type(digest) is str and bool(_PART.fullmatch(digest))


def _are_keys(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        type(name) is str and type(key) is int and 0 <= key < 1 << 64 for name, key in value.items()
    )


def _is_image(value: Any) -> bool:
    return type(value) is str and bool(_IMAGE.fullmatch(value))
