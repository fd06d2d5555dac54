"""Subnets: one network of a space as frozen data, and many of them as arrays.

A :class:`Subnet` is a resolution and, for each stage, the blocks it keeps. It reads and writes
the form that the field's programs use, ``{"ks": [...], "e": [...], "d": [...], "r": 224}``.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from compofa.errors import SpaceError

Number = int | float
Block = tuple[int, Number]

SLOTS = 4
"""Blocks that ``ks`` and ``e`` reserve for each stage in the field's form."""


@dataclass(frozen=True)
class Subnet:
    """One network of a space; equal networks compare and hash equal.

    Attributes:
        resolution: Side of the square input, in pixels.
        stages: For each stage its active blocks, each (kernel size, expand ratio). The depth of
            a stage is the number of its blocks.
    """

    resolution: int
    stages: tuple[tuple[Block, ...], ...]

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of active blocks of each stage."""
        return tuple(len(stage) for stage in self.stages)

    def __str__(self) -> str:
        """One short line: depths, expand ratios and kernels, stage by stage."""
        columns = [
            "-".join(_runs([block[part] for block in stage]) for stage in self.stages)
            for part in (1, 0)
        ]
        depths = "-".join(map(str, self.depths))
        return f"d {depths}  e {columns[0]}  k {columns[1]}  r {self.resolution}"

    def at(self, resolution: int) -> Subnet:
        """Return the same architecture at another input resolution."""
        return replace(self, resolution=resolution)

    def to_config(self, slots: int = SLOTS, single: int = 0) -> dict[str, Any]:
        """Return the field's ``{"ks", "e", "d", "r"}`` form, 0 for blocks past the depth.

        Args:
            slots: Blocks written for each stage that can vary; more where a stage has more.
            single: How many of the last stages always are one block: each is written as that
                block, without a depth.
        """
        varying = len(self.stages) - single
        slots = max(slots, *self.depths[:varying])
        padded = [list(stage) + [(0, 0)] * (slots - len(stage)) for stage in self.stages[:varying]]
        padded += self.stages[varying:]
        return {
            "ks": [kernel for stage in padded for kernel, _ in stage],
            "e": [expand for stage in padded for _, expand in stage],
            "d": list(self.depths[:varying]),
            "r": self.resolution,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], resolution: int = 224) -> Subnet:
        """Read the field's ``{"ks", "e", "d", "r"}`` form.

        Args:
            config: ``ks`` and ``e`` a number a block slot (values past a stage's depth are
                ignored), ``d`` a depth a stage, ``r`` an integer or a one-element list. One
                slot more than ``d`` has stages for is a last stage that always is one block.
            resolution: Used where ``config`` has no ``r``.

        Raises:
            SpaceError: A key is missing, a value is not a number of its kind or the lengths do
                not fit together.
        """
        if not isinstance(config, Mapping):
            raise SpaceError(
                f"expected a subnet such as {{'ks': [...], 'e': [...], 'd': [...], 'r': 224}}, "
                f"got {type(config).__name__}"
            )
        missing = [key for key in ("ks", "e", "d") if key not in config]
        if missing:
            raise SpaceError(
                f"expected a subnet with keys ks, e, d (and r), missing {', '.join(missing)}"
            )
        kernels, expands, depths = (numbers(key, config[key]) for key in ("ks", "e", "d"))
        slots, single = divmod(len(kernels), len(depths)) if depths else (0, 0)
        if not slots or len(kernels) != len(expands) or single > 1:
            raise SpaceError(
                f"expected ks and e with the same number of blocks for each of the "
                f"{len(depths)} stages in d, got {len(kernels)} and {len(expands)}"
            )
        size = numbers("r", config.get("r", resolution))
        if len(size) != 1:
            raise SpaceError(f"r: expected one resolution, got {len(size)}")
        for key, values in (("ks", kernels), ("d", depths), ("r", size)):
            broken = [value for value in values if value != int(value)]
            if broken:
                raise SpaceError(f"{key}: expected whole numbers, got {broken[0]}")
        stages = []
        for index, depth in enumerate(depths):
            if not 0 < depth <= slots:
                raise SpaceError(
                    f"stage {index + 1}: expected a depth from 1 to {slots}, got {depth}"
                )
            blocks = slice(index * slots, index * slots + depth)
            stages.append(tuple(zip(kernels[blocks], expands[blocks], strict=True)))
        if single:
            stages.append(((kernels[-1], expands[-1]),))
        return cls(size[0], tuple(stages))


class SubnetArrays(NamedTuple):
    """Many subnets as integer or float arrays, the form that costs and predictors take.

    Attributes:
        ks: Kernel sizes, shape [n, blocks]; 0 past a stage's depth.
        e: Expand ratios, shape [n, blocks]; 0 past a stage's depth.
        d: Depths, shape [n, stages].
        r: Resolutions in pixels, shape [n].
    """

    ks: np.ndarray
    e: np.ndarray
    d: np.ndarray
    r: np.ndarray


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


def _runs(values: Sequence[Number]) -> str:
    """Write one value for all where they agree, otherwise all of them."""
    return ",".join(map(str, values if len(set(values)) > 1 else values[:1]))
