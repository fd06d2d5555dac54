"""The choices of one stage of a search space, and what keeps blocks from being one of them.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compofa.space.coupling import Coupling
from compofa.space.subnet import Block, Number


@dataclass(frozen=True)
class StageSpace:
    """The choices of one stage.

    Attributes:
        depths: Allowed numbers of blocks.
        kernels: Allowed kernel sizes of every block.
        expands: Allowed expand ratios of every block.
        coupling: Pairs (depth, expand ratio) when the two are one choice; ``None`` when free.
    """

    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    expands: tuple[Number, ...]
    coupling: Coupling | None = None

    @property
    def single(self) -> bool:
        """Whether it always is one block, as the last stage of ProxylessNAS is."""
        return self.depths == (1,)

    @property
    def pairs(self) -> tuple[tuple[int, Number | None], ...]:
        """The depths, each with the expand ratio coupled with it or ``None``."""
        return self.coupling if self.coupling is not None else tuple((d, None) for d in self.depths)

    def variants(self, depth: int) -> int:
        """Return the number of distinct stages of ``depth`` blocks."""
        free = 1 if self.coupling is not None else len(self.expands)
        return (len(self.kernels) * free) ** depth

    @property
    def size(self) -> int:
        """Number of distinct stages."""
        return sum(self.variants(depth) for depth, _ in self.pairs)

    def why_not(self, blocks: Sequence[Block], number: int) -> list[str]:
        """Say what keeps ``blocks`` from being a stage of these: one clause a fault.

        Args:
            blocks: The active blocks of the candidate.
            number: How the clauses call the stage.
        """
        if len(blocks) not in self.depths:
            return [expected(f"stage {number} depth", self.depths, len(blocks))]
        coupled = dict(self.coupling or ()).get(len(blocks))
        faults = []
        for position, (kernel, expand) in enumerate(blocks, 1):
            where = f"stage {number} block {position}"
            if kernel not in self.kernels:
                faults.append(expected(f"{where} kernel size", self.kernels, kernel))
            if expand not in self.expands:
                faults.append(expected(f"{where} expand ratio", self.expands, expand))
            elif coupled is not None and expand != coupled:
                what = f"{where} expand ratio (coupled with depth {len(blocks)})"
                faults.append(expected(what, (coupled,), expand))
        return faults


def keep(values: tuple[Any, ...], wanted: Sequence[Any] | None) -> tuple[Any, ...]:
    """Return those of ``values`` that are ``wanted``; all for ``None``."""
    return tuple(value for value in values if wanted is None or value in wanted)


def expected(what: str, choices: Sequence[Any], got: Any) -> str:
    """Return the clause of an error for a value that is none of ``choices``."""
    return f"{what}: expected {' or '.join(str(choice) for choice in choices)}, got {got}"
