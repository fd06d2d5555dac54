"""What every accuracy predictor answers, and what those with a card share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from compofa.space.arrays import SubnetArrays
from nas.model_file import measured_width, require_near, write_model

NEAR = 1.25
"""The largest ratio of a network's width to the measured one that a predictor answers for."""
OTHER_WIDTH_STD = 1.5
"""Standard deviation (points) added at such another width: the predictor ranks, but absolute values
are not calibrated. MobileNetV3-Large at widths 0.75, 1.0 and 1.25 has a top-1 of 73.3, 75.2 and
76.6 % (Howard et al., ICCV 2019): 1.5 points within :data:`NEAR`, and more below."""


NORMAL_90 = 1.645
"""Half the width of the central 90 % of a normal distribution, in standard deviations."""


class AccuracyModel(Protocol):
    """An accuracy predictor, as a search sees it.

    Attributes:
        name: Name of the network or file.
        unit: Unit of :meth:`predict`.
        error: Held-out error, for tables and plots.
    """

    name: str
    unit: str
    error: str

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the expected accuracy of each subnet, float64 of shape [n]."""

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation of a measurement about :meth:`predict`, shape [n]."""


def interval_90(model: AccuracyModel, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and greatest top-1 (percent) of each subnet's 90 % prediction interval.

    It is the model's own where it has an ``interval``, such as one calibrated on held-out
    measurements; else that of a normal distribution with its standard deviation.

    Returns:
        Two arrays [n] within 0 to 100: a new measurement is between them with a probability of
        90 %.
    """
    own = getattr(model, "interval", None)
    if own is not None:
        return own(arrays)
    mean, reach = model.predict(arrays), NORMAL_90 * model.std(arrays)
    return np.clip(mean - reach, 0, 100), np.clip(mean + reach, 0, 100)


class CardPredictor:
    """A predictor of top-1 in percent, stored as arrays and a card.

    Attributes:
        arrays: Its parameters, by name.
        card: Source, licence, command and held-out error, as written beside the arrays.
        name: Name of the model.
        width_mult: Width multiplier of the measured networks; ``None`` if it was not recorded.
        extra_std: Standard deviation (points) added for networks of another width.
    """

    unit = "top-1 %"

    def __init__(
        self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any], name: str
    ) -> None:
        self.arrays, self.card, self.name = dict(arrays), dict(card), name
        self.width_mult = measured_width(card)
        self.extra_std = 0.0

    @property
    def error(self) -> str:
        """Held-out error from the card: its range over the measured resolutions."""
        try:
            groups = [g for r, g in self.card["held_out"].items() if r != "all"]
            mae, rho = [g["mae"] for g in groups], [g["spearman"] for g in groups]
            rho = [value for value in rho if value is not None]  # null where all were equal
            ranks = f"Spearman {_span(rho)}" if rho else "no ranks"
            text = f"held-out MAE {_span(mae)} points, {ranks} by resolution"
        except (AttributeError, KeyError, TypeError, ValueError):
            text = "error not recorded"
        if self.extra_std:
            text += (
                f"; measured at another width: absolute values are not calibrated "
                f"(± {self.extra_std:g} points)"
            )
        return text

    @property
    def spearman(self) -> float | None:
        """Rank correlation on all held-out measurements, from the card; ``None`` if not there."""
        try:
            value = float(self.card["held_out"]["all"]["spearman"])
        except (KeyError, TypeError, ValueError):
            return None
        return value if math.isfinite(value) else None

    @property
    def half_width(self) -> float:
        """Half the width of the 90 % prediction interval, in standard deviations.

        From the card where it was calibrated on held-out measurements, else the normal one.
        """
        value = self.card.get("half_width_90")
        usable = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 100
        return float(value) if usable else NORMAL_90

    def serve(self, width_mult: float) -> None:
        """Answer for networks of this width multiplier from now on.

        Raises:
            TableError: It is farther than :data:`NEAR` from the measured one.
        """
        require_near(f"the accuracy model {self.name}", self.width_mult, width_mult, NEAR)
        self.extra_std = OTHER_WIDTH_STD if width_mult != (self.width_mult or width_mult) else 0.0

    def save(self, path: str | Path) -> None:
        """Write the arrays to ``path`` (.npz, no pickle) and the card beside it (.json)."""
        write_model(path, self.arrays, self.card)


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"
