"""Subnets: one network of a space as frozen data, and many of them as arrays.

A :class:`Subnet` is a resolution and, for each stage, the blocks it keeps; where widths are elastic
too, also those. It reads and writes the form that the field's programs use,
``{"ks": [...], "e": [...], "d": [...], "r": 224}`` (with ``w`` and without ``ks`` for ResNet50D).

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from compofa.errors import SpaceError
from compofa.space.config import WIDE, columns, wide_config, wide_stages

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
        widths: Which of the backbone's width multipliers each elastic width has; empty where no
            width is elastic.
    """

    resolution: int
    stages: tuple[tuple[Block, ...], ...]
    widths: tuple[int, ...] = ()

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of active blocks of each stage."""
        return tuple(len(stage) for stage in self.stages)

    def __str__(self) -> str:
        """One short line: depths, expand ratios and kernels (or widths), stage by stage."""
        if self.widths:
            config = self.to_config()
            d, w = ("-".join(map(str, config[key])) for key in ("d", "w"))
            e = "-".join(_runs([e for _, e in stage]) for stage in self.stages[1:])
            return f"d {d}  e {e}  w {w}  r {self.resolution}"
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

        A subnet with widths has the form of :data:`compofa.space.config.WIDE`, whatever the
        arguments.

        Args:
            slots: Blocks written for each stage that can vary; more where a stage has more.
            single: How many of the last stages always are one block: each is written as that
                block, without a depth.
        """
        if self.widths:
            return wide_config(self.resolution, self.stages, self.widths)
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
                With ``w`` it is the form of :data:`compofa.space.config.WIDE`.
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
        keys = ("d", "e", "w") if "w" in config else ("ks", "e", "d")
        missing = [key for key in keys if key not in config]
        if missing:
            raise SpaceError(
                f"expected a subnet with keys {', '.join(keys)} (and r), "
                f"missing {', '.join(missing)}"
            )
        size = numbers("r", config.get("r", resolution))
        if len(size) != 1:
            raise SpaceError(f"r: expected one resolution, got {len(size)}")
        values = {key: numbers(key, config[key]) for key in keys}
        _require_whole({**values, "r": size}, ("ks", "d", "w", "r"))
        if "w" in config:
            return cls(size[0], wide_stages(values), tuple(values["w"]))
        kernels, expands, depths = values.values()
        slots, single = divmod(len(kernels), len(depths)) if depths else (0, 0)
        if not slots or len(kernels) != len(expands) or single > 1:
            raise SpaceError(
                f"expected ks and e with the same number of blocks for each of the "
                f"{len(depths)} stages in d, got {len(kernels)} and {len(expands)}"
            )
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


class _Arrays(NamedTuple):
    ks: np.ndarray
    e: np.ndarray
    d: np.ndarray
    r: np.ndarray
    w: np.ndarray


class SubnetArrays(_Arrays):
    """Many subnets as integer or float arrays, the form that costs and predictors take.

    Attributes:
        ks: Kernel sizes, shape [n, blocks]; 0 past a stage's depth.
        e: Expand ratios, shape [n, blocks]; 0 past a stage's depth.
        d: Depths, in blocks, shape [n, stages].
        r: Resolutions in pixels, shape [n].
        w: Indices of width multipliers, shape [n, widths]; by default of no widths, [n, 0].
    """

    __slots__ = ()

    def __new__(
        cls,
        ks: np.ndarray,
        e: np.ndarray,
        d: np.ndarray,
        r: np.ndarray,
        w: np.ndarray | None = None,
    ) -> SubnetArrays:
        """Take the arrays as they are."""
        none = np.zeros((*np.shape(r), 0), dtype=np.int64)
        return super().__new__(cls, ks, e, d, r, none if w is None else w)

    def in_form(self, slots: int) -> dict[str, np.ndarray]:
        """Return the arrays that tables hold, by their names in the field's form.

        Args:
            slots: Blocks of a stage in ``ks`` and ``e``.
        """
        if not self.w.shape[1]:
            return {"ks": self.ks, "e": self.e, "d": self.d, "r": self.r}
        numbers = [
            np.array([form.number(blocks) for blocks in column.tolist()], dtype=np.int64)
            for form, column in zip(WIDE, self.d.T, strict=True)
        ]
        e = self.e[:, columns(WIDE, slots)]
        return {"e": e, "d": np.stack(numbers, axis=1), "w": self.w, "r": self.r}

    def folded(self) -> SubnetArrays:
        """Return the same subnets with each width written as a stage of one block.

        Its kernel is 1 and its expand ratio the index plus 1. What learns from blocks, such as
        accuracy predictors, learns from widths like this; without widths nothing changes.
        """
        n, widths = self.w.shape
        if not widths:
            return self
        slots = self.ks.shape[1] // self.d.shape[1]
        more = np.zeros((2, n, widths * slots), dtype=self.e.dtype)
        more[:, :, ::slots] = np.ones_like(self.w), self.w + 1
        ks = np.concatenate([self.ks, more[0].astype(self.ks.dtype)], axis=1)
        e = np.concatenate([self.e, more[1]], axis=1)
        d = np.concatenate([self.d, np.ones_like(self.w)], axis=1)
        return SubnetArrays(ks, e, d, self.r)


def arrays_of(subnets: Sequence[Subnet], slots: int) -> SubnetArrays:
    """Write subnets of the same stages as arrays with ``slots`` blocks a stage."""
    blocks = [
        [block for stage in subnet.stages for block in (*stage, *((0, 0),) * (slots - len(stage)))]
        for subnet in subnets
    ]
    return SubnetArrays(
        np.array([[kernel for kernel, _ in row] for row in blocks]),
        np.array([[expand for _, expand in row] for row in blocks]),
        np.array([subnet.depths for subnet in subnets]),
        np.array([subnet.resolution for subnet in subnets]),
        np.array([subnet.widths for subnet in subnets], dtype=np.int64),
    )


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


def _require_whole(values: Mapping[str, Sequence[Number]], keys: Sequence[str]) -> None:
    for key in keys:
        broken = [value for value in values.get(key, ()) if value != int(value)]
        if broken:
            raise SpaceError(f"{key}: expected whole numbers, got {broken[0]}")


def _runs(values: Sequence[Number]) -> str:
    """Write one value for all where they agree, otherwise all of them."""
    return ",".join(map(str, values if len(set(values)) > 1 else values[:1]))
