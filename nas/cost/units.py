"""Units of costs: amounts as they are typed, and the quantity that a column's name states."""

from __future__ import annotations

import re
from dataclasses import dataclass

from compofa.errors import ConfigError

_FAMILIES: tuple[dict[str, float], ...] = (
    {"us": 1e-3, "ms": 1.0, "s": 1e3},
    {"uJ": 1e-3, "mJ": 1.0, "J": 1e3},
    {"mW": 1e-3, "W": 1.0},
    {
        "bytes": 1.0, "B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9,
        "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3,
    },
)  # fmt: skip
"""Units that are multiples of each other, relative to one of them."""
_PREFIXES = {"k": 1e3, "M": 1e6, "G": 1e9}
SHOWN = {"bytes": (1e6, "MB"), "MACs": (1e6, "M"), "parameters": (1e6, "M")}
"""Units that reports divide by a number, and how they write them then."""
TIMES = tuple(_FAMILIES[0])
"""Units of time: a cost in one of them is a latency."""

_AMOUNT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(\w*)")
_UNITS = {unit.lower(): unit for family in _FAMILIES for unit in family if unit != "B"}


@dataclass(frozen=True)
class Amount:
    """A number as it was typed, with a unit or a prefix, such as ``20``, ``20ms`` or ``5M``.

    Attributes:
        value: The number.
        suffix: What follows it; empty for the unit of the cost it is compared with.
    """

    value: float
    suffix: str = ""

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read an amount.

        Raises:
            ConfigError: ``text`` does not start with a number, or has more than one word after it.
        """
        match = _AMOUNT.fullmatch(text.strip().replace("µ", "u"))
        if match is None:
            raise ConfigError(f"expected a number such as 20, 5M, 2MB or 20ms, got {text!r}")
        return cls(float(match[1]), match[2])

    def to(self, unit: str) -> float:
        """Return the number in ``unit``, the unit of a cost.

        Without a suffix it is in that unit already. Otherwise the suffix is a unit of the same
        quantity (``ms``, ``mJ``, ``MB`` and so on; ``MiB`` is 1,048,576 bytes) or, for bytes and
        for counts, a prefix (``k``, ``M``, ``G``: powers of 1,000), with or without the unit's
        name.

        Raises:
            ConfigError: The suffix is none of these.
        """
        factors = {unit: 1.0, **_factors(unit)}
        if self.suffix and self.suffix not in factors:
            raise ConfigError(
                f"expected a number in {unit}, or with one of {', '.join(factors)}, "
                f"got {self.value:g}{self.suffix}"
            )
        return self.value * factors[self.suffix] if self.suffix else self.value


def _factors(unit: str) -> dict[str, float]:
    """Return the suffixes of amounts of a unit, each with what it multiplies by."""
    family = next((family for family in _FAMILIES if unit in family), {})
    found = {name: factor / family[unit] for name, factor in family.items()}
    if not family or unit == "bytes":
        found |= _PREFIXES
    if not family:
        found |= {f"{prefix}{unit}": factor for prefix, factor in _PREFIXES.items()}
    return found


def quantity_in(unit: str, name: str) -> str:
    """Return what a cost in ``unit`` measures: latency in a unit of time, otherwise ``name``."""
    return "latency" if unit in TIMES else name


def column_quantity(column: str) -> tuple[str, str]:
    """Return the quantity and the unit of a column of measurements, from its name.

    ``energy_mj`` holds energy in mJ. A name that does not end in a unit, such as a device's, is
    that of a column of latencies in ms.
    """
    *words, last = column.split("_")
    unit = _UNITS.get(last.lower())
    if unit is None:
        return "latency", "ms"
    return "_".join(words) or quantity_in(unit, unit), unit
