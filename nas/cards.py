"""Cards of fitted models: the JSON beside the arrays that says what they were measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from compofa.errors import TableError
from compofa.io.untrusted import printable


def card_text(card: Mapping[str, Any], key: str, default: str) -> str:
    """Return an entry of a card as text for messages, tables and pictures, of one line."""
    return " ".join(printable(str(card.get(key, default))).split())


def measured_width(card: Mapping[str, Any]) -> float | None:
    """Return the width multiplier of the networks that were measured; ``None`` if not recorded.

    Raises:
        TableError: It is not a finite number above 0.
    """
    width = card.get("width_mult")
    if width is None:
        return None
    if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < math.inf:
        raise TableError(f"expected a width multiplier above 0 in the card, got {width!r:.40}")
    return float(width)


def require_near(model: str, measured: float | None, width_mult: float, most: float) -> None:
    """Check that networks are not far wider or narrower than those that a model was fitted on.

    Args:
        model: What to call it in the error.
        measured: Width multiplier that it was fitted on; ``None`` where nobody recorded it.
        width_mult: That of the networks asked about.
        most: The largest ratio of the two, either way.

    Raises:
        TableError: They are.
    """
    if measured is not None and not measured / most <= width_mult <= measured * most:
        raise TableError(
            f"{model} was measured at width multiplier {measured:g}: expected one from "
            f"{measured / most:g} to {measured * most:g}, got {width_mult:g}"
        )
