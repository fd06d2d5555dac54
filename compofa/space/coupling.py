"""Couplings: what makes a space compound.

A coupling is a table: pairs (depth, value of the choice coupled with it), one per depth.
"""

from __future__ import annotations

from compofa.errors import SpaceError, unknown_name
from compofa.space.subnet import Number, as_number

Coupling = tuple[tuple[int, Number], ...]

COUPLINGS = ("simple", "none")
"""Named couplings: ``simple`` is the family's own, for MobileNetV3 CompOFA's heuristic (section
3.2); ``none`` leaves every choice free."""


def parse_coupling(text: str) -> Coupling | str:
    """Read a coupling: a name of :data:`COUPLINGS`, or pairs such as ``2:3,3:4,4:6``.

    Returns:
        The name, or pairs (depth, value) ordered by depth.

    Raises:
        SpaceError: The text is neither a known name nor a list of pairs with distinct depths.
    """
    if text in COUPLINGS:
        return text
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        coupling = tuple(sorted((int(depth), as_number(float(expand))) for depth, expand in pairs))
    except ValueError:
        pairs_too = "or depth:expand pairs such as 2:3,3:4,4:6"
        expected = f"expected one of {', '.join(COUPLINGS)}, {pairs_too}"
        raise SpaceError(unknown_name("heuristic", text, COUPLINGS, expected)) from None
    depths = [depth for depth, _ in coupling]
    if len(set(depths)) < len(depths) or min(depths) < 0 or max(depths) > 16:
        raise SpaceError(f"heuristic {text!r}: expected distinct depths between 0 and 16")
    if any(not 0 < expand <= 16 for _, expand in coupling):
        raise SpaceError(f"heuristic {text!r}: expected expand ratios above 0 and at most 16")
    return coupling
