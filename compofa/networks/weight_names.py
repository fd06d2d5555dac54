"""How other programs name the weights of a family: what a family tells the readers and writers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Table = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class WeightNames:
    """The names that a program gives the weights of a family.

    Attributes:
        program: Key of :data:`compofa.io.formats.names.FORMATS`.
        mark: The beginning of a name by which its state dicts are recognised.
        own_mark: The beginning of a name by which this library's state dicts of the family are
            recognised.
        to_own: Turns a name into this library's, given the blocks that a supernet stores per stage.
            An unknown name stays as it is.
        from_own: The inverse of ``to_own``.
        places: Given the depths of a specialised network and the blocks per stage, returns the
            numbers that its blocks have in a supernet.
        optional: What is left out of a specialised network where the first depth is 0: pairs (name
            that is then missing, name that takes its number).
        slots: Blocks per stage of the published supernets.
    """

    program: str
    mark: str
    own_mark: str
    to_own: Callable[[str, int], str]
    from_own: Callable[[str, int], str]
    places: Callable[[Sequence[int], int], list[int]]
    optional: tuple[str, str] | None = None
    slots: int = 4


def replace_prefix(name: str, table: Table) -> str:
    """Return ``name`` with the first beginning of ``table`` that it has replaced."""
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def inverted(table: Table) -> Table:
    """Return ``table`` with the two names of each pair exchanged."""
    return tuple((new, old) for old, new in table)


DOUBLED = re.compile(r"\b(conv|bn|linear)\.\1\.")
"""How Once-for-All's elastic layers nest their names."""
