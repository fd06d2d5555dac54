"""The report of a search: its data, and one self-contained HTML file with an interactive plot.

The same :class:`ReportData` feeds :mod:`nas.report.figure`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import SearchError
from compofa.io.atomic import write_text_atomic
from compofa.space.search_space import SearchSpace
from nas.search.evolution import Points
from nas.search.pareto import pareto_front
from nas.search.search import Found

TEMPLATE = Path(__file__).with_name("report_template.html")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008)."""
CLOUD_LIMIT = 10_000


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
    """

    name: str
    front_costs: np.ndarray
    front_accuracies: np.ndarray
    front_configs: tuple[Mapping[str, Any], ...]
    costs: np.ndarray
    accuracies: np.ndarray

    @classmethod
    def from_points(
        cls,
        name: str,
        space: SearchSpace,
        front: Points,
        cloud: Points,
        found: Sequence[Found] = (),
    ) -> Series:
        """Build a series from a front and random subnets of ``space``; the first cost counts.

        Args:
            name: For the legend.
            space: The space of the genes.
            front: Result of :func:`nas.search.search.search_front`.
            cloud: Result of :func:`nas.search.search.sample_points`.
            found: Results of a search of the same space; what beats the front joins it.
        """
        subnets = [*front.subnets(space), *(result.subnet for result in found)]
        costs = np.append(front.costs[:, 0], [result.cost for result in found])
        accuracies = np.append(front.accuracy, [result.accuracy for result in found])
        rows = pareto_front(costs, accuracies)
        configs = tuple(space.to_config(subnets[row]) for row in rows)
        return cls(name, costs[rows], accuracies[rows], configs, cloud.costs[:, 0], cloud.accuracy)


@dataclass(frozen=True)
class FoundRow:
    """One found subnet: a row of the table and a mark in the plots.

    Attributes:
        series: Name of the series it belongs to.
        budget: Upper bound of its cost.
        cost: Its cost.
        accuracy: Its predicted accuracy.
        config: ``{"ks", "e", "d", "r"}``.
        extra: Further columns of the table, such as measured accuracy or MACs.
    """

    series: str
    budget: float
    cost: float
    accuracy: float
    config: Mapping[str, Any]
    extra: Mapping[str, str] = field(default_factory=dict)


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
        return f"{self.cost_name} ({self.cost_unit})"

    @property
    def accuracy_label(self) -> str:
        """Axis label of the accuracy."""
        return f"{self.accuracy_name} ({self.accuracy_unit})"

    @property
    def caption(self) -> str:
        """The errors of cost and accuracy, one sentence each."""
        return f"{self.cost_name}: {self.cost_error}. {self.accuracy_name}: {self.accuracy_error}."


def write_report(data: ReportData, path: str | Path) -> None:
    """Write ``data`` as one self-contained HTML file.

    Raises:
        SearchError: A number is not finite.
        CompofaError: ``path`` cannot be written.
    """
    parts = {
        "title": escape(data.title),
        "subtitle": escape(data.caption),
        "alt": escape(f"{data.accuracy_label} against {data.cost_label}"),
        "table": _table(data),
        "sources": "".join(f"<p>{escape(text)}</p>" for text in (*data.sources, data.caption)),
        "data": _embedded(data),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    write_text_atomic(path, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def _embedded(data: ReportData) -> str:
    """Return the plot's data as JSON, escaped for a script element."""
    index = {series.name: place for place, series in enumerate(data.series)}
    content = {
        "cost_name": data.cost_name,
        "cost_unit": data.cost_unit,
        "cost_label": data.cost_label,
        "accuracy_unit": data.accuracy_unit,
        "accuracy_label": data.accuracy_label,
        "series": [
            {
                "name": series.name,
                "color": COLORS[place % len(COLORS)],
                "front": [
                    [_short(cost, 9), _short(accuracy, 9), dict(config)]
                    for cost, accuracy, config in zip(
                        series.front_costs, series.front_accuracies, series.front_configs,
                        strict=True,
                    )
                ],
                "cloud": _cloud(series),
            }
            for place, series in enumerate(data.series)
        ],
        "found": [
            {
                "series": index[row.series],
                "budget": float(row.budget),
                "cost": _short(row.cost, 9),
                "accuracy": _short(row.accuracy, 9),
                "config": dict(row.config),
            }
            for row in data.found
        ],
    }  # fmt: skip
    try:
        text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise SearchError("expected finite numbers in a report, got others") from None
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _cloud(series: Series) -> list[list[float]]:
    step = max(1, -(-len(series.costs) // CLOUD_LIMIT))
    return [
        [_short(cost, 5), _short(accuracy, 6)]
        for cost, accuracy in zip(series.costs[::step], series.accuracies[::step], strict=True)
    ]


def _short(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _table(data: ReportData) -> str:
    if not data.found:
        return "<p>No budgets were given.</p>"
    extra = list(dict.fromkeys(key for row in data.found for key in row.extra))
    heads = [
        "Network", f"Budget ({data.cost_unit})", f"{data.cost_name} ({data.cost_unit})",
        data.accuracy_label, *extra,
    ]  # fmt: skip
    lines = ["<table><thead><tr>", *(f"<th>{escape(head)}</th>" for head in heads)]
    lines.append('<th class="left">Subnet</th></tr></thead><tbody>')
    for row in data.found:
        config = "\n".join(
            f"{key}: {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
            for key, value in row.config.items()
        )
        cells = [row.series, f"{row.budget:g}", f"{row.cost:.5g}", f"{row.accuracy:.5g}"]
        cells += [row.extra.get(key, "") for key in extra]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells))
        lines.append(f'<td class="config left">{escape(config)}</td></tr>')
    return "".join([*lines, "</tbody></table>"])
