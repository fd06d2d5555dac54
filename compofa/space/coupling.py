"""Couplings of depth and expand ratio: what makes a space compound.

A new coupling is one table: pairs (depth, expand ratio), one a depth.
"""

from __future__ import annotations

from compofa.errors import SpaceError
from compofa.space.subnet import Number, as_number

Coupling = tuple[tuple[int, Number], ...]

COUPLINGS: dict[str, Coupling | None] = {"simple": ((2, 3), (3, 4), (4, 6)), "none": None}
"""Named couplings of depth and expand ratio; ``simple`` is CompOFA's heuristic (section 3.2) for
MobileNetV3. What it means for another backbone stands in that backbone's table."""


def parse_coupling(text: str) -> Coupling | None:
    """Read a coupling: a name of :data:`COUPLINGS`, or pairs such as ``2:3,3:4,4:6``.

    Returns:
        Pairs (depth, expand ratio), ordered by depth; ``None`` for ``none``: a free space.

    Raises:
        SpaceError: The text is neither a known name nor a list of pairs with distinct depths.
    """
    if text in COUPLINGS:
        return COUPLINGS[text]
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        coupling = tuple(sorted((int(depth), as_number(float(expand))) for depth, expand in pairs))
    except ValueError:
        raise SpaceError(
            f"unknown heuristic {text!r}: expected one of {', '.join(COUPLINGS)}, or "
            "depth:expand pairs such as 2:3,3:4,4:6"
        ) from None
    depths = [depth for depth, _ in coupling]
    if len(set(depths)) < len(depths) or min(depths) < 0 or max(depths) > 16:
        raise SpaceError(f"heuristic {text!r}: expected distinct depths between 0 and 16")
    if any(not 0 < expand <= 16 for _, expand in coupling):
        raise SpaceError(f"heuristic {text!r}: expected expand ratios above 0 and at most 16")
    return coupling
