"""The field's form of a subnet: which numbers ``ks``, ``e``, ``d`` and ``w`` hold.

Networks of one width are written with a number a block slot in ``ks`` and ``e`` and a depth a
stage in ``d``; see :meth:`compofa.space.subnet.Subnet.to_config`. The one published family with
elastic widths is Once-for-All's ResNet50D: no ``ks`` (its kernels are fixed), 18 expand ratios,
five depths that count the blocks beyond the least of each stage, and six indices of width
multipliers. :data:`WIDE` is that form.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compofa.errors import SpaceError

KERNEL = 3
"""Kernel size of every block of a subnet that is written without ``ks``."""
WIDTHS = 6
"""Numbers in ``w``: the stem's middle and output widths, then those of the four stages."""


@dataclass(frozen=True)
class StageForm:
    """How one stage is written.

    Attributes:
        depths: Pairs (number in ``d``, blocks).
        slots: Numbers in ``e``, and in ``ks`` where there is one.
    """

    depths: tuple[tuple[int, int], ...]
    slots: int

    def blocks(self, number: int) -> int:
        """Return how many blocks ``number`` in ``d`` stands for; -1 where it is none of them."""
        return dict(self.depths).get(number, -1)

    def number(self, blocks: int) -> int:
        """Return what ``d`` holds for so many blocks."""
        return {count: number for number, count in self.depths}[blocks]


def _stage(least: int) -> StageForm:
    return StageForm(tuple((more, least + more) for more in range(3)), least + 2)


WIDE = (StageForm(((0, 0), (2, 1)), 0), *map(_stage, (2, 2, 4, 2)))
"""Stages of a subnet with widths. The first is the stem, whose one residual convolution depth 0
leaves out; it has no expand ratio."""


def plain(stages: int, slots: int, tail: int) -> tuple[StageForm, ...]:
    """Return the form of subnets without widths: ``tail`` last stages always are one block."""
    every = StageForm(tuple((depth, depth) for depth in range(1, slots + 1)), slots)
    return (every,) * (stages - tail) + (StageForm(((1, 1),), 1),) * tail


def columns(forms: Sequence[StageForm], slots: int) -> np.ndarray:
    """Return which of ``slots`` blocks a stage, stage by stage, the form has numbers for."""
    return np.concatenate(
        [np.arange(form.slots) + index * slots for index, form in enumerate(forms)]
    )


def wide_config(resolution: int, stages: Sequence[Any], widths: Sequence[int]) -> dict[str, Any]:
    """Return ``{"d", "e", "w", "r"}``, 0 for expand ratios of blocks past the depth."""
    expands = [
        [expand for _, expand in stage] + [0] * (form.slots - len(stage))
        for form, stage in zip(WIDE, stages, strict=True)
        if form.slots
    ]
    return {
        "d": [form.number(len(stage)) for form, stage in zip(WIDE, stages, strict=True)],
        "e": [expand for stage in expands for expand in stage],
        "w": list(widths),
        "r": resolution,
    }


def wide_stages(values: Mapping[str, Sequence[Any]]) -> tuple[Any, ...]:
    """Return the stages that lists of numbers ``d``, ``e`` and ``w`` stand for.

    Raises:
        SpaceError: A list has a wrong length, or ``d`` a number that stands for no depth.
    """
    lengths = {"d": len(WIDE), "e": sum(form.slots for form in WIDE), "w": WIDTHS}
    for key, wanted in lengths.items():
        if len(values[key]) != wanted:
            raise SpaceError(f"{key}: expected {wanted} numbers, got {len(values[key])}")
    stages, first = [], 0
    for index, (form, number) in enumerate(zip(WIDE, values["d"], strict=True)):
        blocks = form.blocks(number)
        if blocks < 0:
            known = " or ".join(str(known) for known, _ in form.depths)
            raise SpaceError(f"d: expected {known} as number {index + 1}, got {number}")
        expands = values["e"][first : first + blocks] if form.slots else [1] * blocks
        stages.append(tuple((KERNEL, expand) for expand in expands))
        first += form.slots
    return tuple(stages)
