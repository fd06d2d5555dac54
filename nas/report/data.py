"""The data of a report and of its figures, and how their numbers are written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from compofa.errors import SearchError
from compofa.space.search_space import SearchSpace
from nas.accuracy.base import AccuracyModel, interval_90
from nas.search.evolution import Points
from nas.search.pareto import pareto_front
from nas.search.search import Found

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008)."""
ERROR = "_se"
"""Suffix of a column that has the standard errors of another."""
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
FROM_PREFIX = 1e4
"""Least number that is written with an SI prefix."""


def si(value: float, digits: int = 3) -> str:
    """Write a number with ``digits`` significant digits, as ``1.08M`` from 10,000."""
    value = float(f"{value:.{digits}g}")
    if FROM_PREFIX <= abs(value) < 1e15:
        scale, prefix = next(pair for pair in PREFIXES if abs(value) >= pair[0])
        return f"{_plain(value / scale, digits)}{prefix}"
    return _plain(value, digits)


def _plain(value: float, digits: int) -> str:
    """Write a number with significant digits, but never with an exponent if 1 or above."""
    if 1 <= abs(value) < 1e15:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.{digits}g}"


def count(number: int) -> str:
    """Write a whole number: ``1,215``; above a billion as ``2.18·10^19``."""
    if number < 1e9:
        return f"{number:,}"
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa}·10^{int(exponent)}"


@dataclass(frozen=True)
class Measured:
    """A measured value.

    Attributes:
        value: The value, such as a top-1 in percent.
        error: Its standard error; ``None`` if it is not known.
    """

    value: float
    error: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """One standard error below and above it, within 0 to 100 %."""
        error = self.error or 0.0
        return max(0.0, self.value - error), min(100.0, self.value + error)

    def text(self, places: int) -> str:
        """Write it with so many decimal places: ``98.06 ± 0.72``."""
        error = "" if self.error is None else f" ± {self.error:.{places}f}"
        return f"{self.value:.{places}f}{error}"


@dataclass(frozen=True)
class Series:
    """Evaluated subnets of one network's space.

    Attributes:
        name: For the legend.
        front_costs: By rising cost, shape [n].
        front_accuracies: Rising with it, shape [n].
        front_configs: Each subnet as ``{"ks", "e", "d", "r"}``.
        costs: Of random subnets, shape [m].
        accuracies: Of the same, shape [m].
        front_band: Ends of the prediction intervals of the front, shape [n] each, if known.
        no_front: Why there is no front; empty if there is one.
    """

    name: str
    front_costs: np.ndarray
    front_accuracies: np.ndarray
    front_configs: tuple[Mapping[str, Any], ...]
    costs: np.ndarray
    accuracies: np.ndarray
    front_band: tuple[np.ndarray, np.ndarray] | None = None
    no_front: str = ""

    @classmethod
    def from_points(
        cls,
        name: str,
        space: SearchSpace,
        front: Points,
        cloud: Points,
        found: Sequence[Found] = (),
        accuracy: AccuracyModel | None = None,
        no_front: str = "",
    ) -> Series:
        """Build a series from a front and random subnets of ``space``; the first cost counts.

        Args:
            name: For the legend.
            space: The space of the genes.
            front: Result of :func:`nas.search.search.search_front`.
            cloud: Result of :func:`nas.search.search.sample_points`.
            found: Results of a search of the same space; what beats the front joins it.
            accuracy: Predictor, for the intervals of the front.
            no_front: Why the front is left out; empty to show it.
        """
        if no_front:
            none = np.zeros(0)
            return cls(name, none, none, (), cloud.costs[:, 0], cloud.accuracy, no_front=no_front)
        subnets = [*front.subnets(space), *(result.subnet for result in found)]
        costs = np.append(front.costs[:, 0], [result.cost for result in found])
        accuracies = np.append(front.accuracy, [result.accuracy for result in found])
        rows = pareto_front(costs, accuracies)
        chosen = [subnets[row] for row in rows]
        return cls(
            name, costs[rows], accuracies[rows], tuple(map(space.to_config, chosen)),
            cloud.costs[:, 0], cloud.accuracy,
            interval_90(accuracy, space.arrays_of(chosen)) if accuracy else None,
        )  # fmt: skip


@dataclass(frozen=True)
class FoundRow:
    """One found subnet: a row of the table and a mark in the plots.

    Attributes:
        series: Name of the series it belongs to.
        budget: Upper bound of its cost.
        cost: Its cost.
        accuracy: Its predicted accuracy.
        config: ``{"ks", "e", "d", "r"}``.
        extra: Further columns of the table, such as parameters or MACs.
        interval: Ends of the prediction interval of its accuracy, if known.
        measured: Its measured accuracy, if it was measured.
    """

    series: str
    budget: float
    cost: float
    accuracy: float
    config: Mapping[str, Any]
    extra: Mapping[str, str] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    measured: Measured | None = None


@dataclass(frozen=True)
class ReportData:
    """Everything that the pictures and the report show.

    Attributes:
        title: Heading.
        cost_name: Name of the cost that budgets limit, such as ``Latency on note10``.
        cost_unit: Its unit.
        cost_error: Its error, as text.
        accuracy_name: Name of the accuracy, such as ``Predicted ImageNet top-1``.
        accuracy_unit: Its unit.
        accuracy_error: Its error, as text.
        series: One per network, the searched one first.
        found: The found subnets.
        sources: Paragraphs on where the numbers come from.
        notes: Sentences that a reader must know to judge the numbers, such as a warning.
    """

    title: str
    cost_name: str
    cost_unit: str
    cost_error: str
    accuracy_name: str
    accuracy_unit: str
    accuracy_error: str
    series: tuple[Series, ...]
    found: tuple[FoundRow, ...]
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [series.name for series in self.series]
        if not names or len(set(names)) < len(names):
            raise SearchError(f"expected series with distinct names, got {names}")
        unknown = [row.series for row in self.found if row.series not in names]
        if unknown:
            raise SearchError(f"found subnets of unknown series {unknown[0]!r}, known: {names}")

    @property
    def cost_label(self) -> str:
        """Axis label of the cost."""
        same = self.cost_unit.casefold() in ("", self.cost_name.casefold())
        return self.cost_name if same else f"{self.cost_name} ({self.cost_unit})"

    @property
    def accuracy_label(self) -> str:
        """Axis label of the accuracy."""
        return f"{self.accuracy_name} ({self.accuracy_unit})"

    @property
    def caption(self) -> str:
        """What the marks say: the errors of cost and accuracy, intervals and error bars."""
        text = f"{self.cost_name}: {self.cost_error}. {self.accuracy_name}: {self.accuracy_error}."
        if any(series.front_band is not None for series in self.series):
            text += " Bands: 90 % prediction intervals."
        if any(row.measured is not None and row.measured.error is not None for row in self.found):
            text += " Error bars: one binomial standard error of the measured top-1."
        return text
