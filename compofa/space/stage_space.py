"""The choices of one stage of a search space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from compofa.space.choice import Choice
from compofa.space.coupling import Coupling
from compofa.space.subnet import Block, Number


@dataclass(frozen=True)
class StageSpace:
    """The choices of one stage.

    Attributes:
        depths: Allowed numbers of blocks.
        choices: What every block chooses, independently of the others.
        coupling: Pairs (depth, value of the last of ``choices``) where the two are one choice;
            ``None`` where they are free.
    """

    depths: tuple[int, ...]
    choices: tuple[Choice, ...]
    coupling: Coupling | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the choices of a block."""
        return tuple(choice.name for choice in self.choices)

    def values(self, name: str) -> tuple[Number, ...]:
        """Return the allowed values of a choice."""
        return next(choice.values for choice in self.choices if choice.name == name)

    @property
    def pairs(self) -> tuple[tuple[int, Number | None], ...]:
        """The depths, each with the value coupled with it or ``None``."""
        return self.coupling if self.coupling is not None else tuple((d, None) for d in self.depths)

    def variants(self, depth: int) -> int:
        """Return the number of distinct stages of ``depth`` blocks."""
        free = self.choices if self.coupling is None else self.choices[:-1]
        return prod(len(choice.values) for choice in free) ** depth

    @property
    def size(self) -> int:
        """Number of distinct stages."""
        return sum(self.variants(depth) for depth, _ in self.pairs)

    def faults(self, blocks: Sequence[Block], number: int) -> list[str]:
        """Return what keeps ``blocks`` from being a stage of these, one clause per fault.

        Args:
            blocks: The active blocks of the candidate.
            number: Number of the stage, for the clauses.
        """
        if len(blocks) not in self.depths:
            return [expected(f"stage {number} depth", self.depths, len(blocks))]
        coupled, faults = dict(self.coupling or ()).get(len(blocks)), []
        for position, block in enumerate(blocks, 1):
            where = f"stage {number} block {position}"
            if len(block) != len(self.choices):
                faults.append(expected(f"{where} choices", [len(self.choices)], len(block)))
                continue
            for choice, value in zip(self.choices, block, strict=True):
                if value not in choice.values:
                    faults.append(expected(f"{where} {choice.name}", choice.values, value))
                elif coupled is not None and choice is self.choices[-1] and value != coupled:
                    what = f"{where} {choice.name} (coupled with depth {len(blocks)})"
                    faults.append(expected(what, (coupled,), value))
        return faults


def expected(what: str, known: Sequence[Any], got: Any) -> str:
    """Return the clause of an error for a value that is not among ``known``."""
    return f"{what}: expected {' or '.join(map(str, known))}, got {got}"
