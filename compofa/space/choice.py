"""A choice: one thing that differs between the subnets of a space."""

from __future__ import annotations

from dataclasses import dataclass

from compofa.space.subnet import Number


@dataclass(frozen=True)
class Choice:
    """What can be chosen, and from which values.

    Attributes:
        name: What it is called in errors, config files and keyword arguments, such as ``kernel``.
        values: What it may be, each once.
    """

    name: str
    values: tuple[Number, ...]
