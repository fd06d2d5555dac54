"""Subnets: one network of a space as frozen data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compofa.errors import SpaceError

if TYPE_CHECKING:
    from compofa.space.config import ConfigFormat

Number = int | float
Block = tuple[Number, ...]


@dataclass(frozen=True)
class Subnet:
    """One network of a space; equal networks compare and hash equal.

    Attributes:
        resolution: Side of the square input, in pixels.
        stages: For each stage its active blocks. A block is a tuple of numbers, one per choice of a
            block, in the order of :attr:`SearchSpace.names`. The depth of a stage is the number of
            its blocks.
        outer: Values of the choices outside the blocks, in the order of
            :attr:`SearchSpace.outer`.
        format: How it is written and shown; subnets of a space have the space's.
    """

    resolution: int
    stages: tuple[tuple[Block, ...], ...]
    outer: tuple[Number, ...] = ()
    format: ConfigFormat | None = field(default=None, compare=False, repr=False)

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of active blocks of each stage."""
        return tuple(len(stage) for stage in self.stages)

    def __str__(self) -> str:
        """One short line: depths, the choices stage by stage, resolution."""
        return self.format.describe(self) if self.format else repr(self)

    def at(self, resolution: int) -> Subnet:
        """Return the same architecture at another input resolution."""
        return replace(self, resolution=resolution)

    def to_config(self) -> dict[str, Any]:
        """Return the subnet as JSON data, in the config format of its family.

        Raises:
            SpaceError: It has none, for it was not made by a space or read from a file.
        """
        if self.format is None:
            raise SpaceError(f"expected a subnet with a config format, got {self!r}")
        return self.format.write(self)


def as_number(value: Number) -> Number:
    """Return whole numbers as ``int``, others as ``float``."""
    return int(value) if float(value).is_integer() else float(value)


def numbers(key: str, value: Any) -> list[Number]:
    """Read one number or a sequence of them, each finite and below a billion in size.

    Raises:
        SpaceError: ``value`` holds something else; the message names ``key``.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for item in values:
        number = isinstance(item, int | float | np.integer | np.floating)
        if isinstance(item, bool) or not number or not -1e9 < item < 1e9:
            shown = " ".join(repr(item)[:60].split())
            raise SpaceError(f"{key}: expected finite numbers, got {shown}")
    return [as_number(item) for item in values]
