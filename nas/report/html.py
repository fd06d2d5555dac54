"""The report of a search: one self-contained HTML file with an interactive plot.

The same :class:`~nas.report.data.ReportData` feeds :mod:`nas.report.figure`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import escape
from pathlib import Path

from compofa.errors import SearchError
from compofa.io.atomic import write_text_atomic
from nas.report.data import COLORS, FoundRow, ReportData, Series, si

TEMPLATE = Path(__file__).with_name("report_template.html")
CLOUD_LIMIT = 10_000
SUBNET = "Subnet"


def write_report(data: ReportData, path: str | Path) -> None:
    """Write ``data`` as one self-contained HTML file.

    Its content security policy allows the template's own style and script, by their hashes, and
    nothing else.

    Raises:
        SearchError: A number is not finite.
        CompofaError: ``path`` cannot be written.
    """
    template = TEMPLATE.read_text(encoding="utf-8")
    parts = {
        "title": escape(data.title),
        "subtitle": escape(data.caption),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in data.notes),
        "alt": escape(f"{data.accuracy_label} against {data.cost_label}"),
        "table": _table(data),
        "sources": "".join(f"<p>{escape(text)}</p>" for text in data.sources),
        "data": _embedded(data),
        "style_hash": _hash(template, "style"),
        "script_hash": _hash(template, "script"),
    }
    write_text_atomic(path, re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template))


def _hash(template: str, tag: str) -> str:
    """Return the source expression of the element ``tag`` for the content security policy."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
                "band": _band(series),
                "no_front": series.no_front,
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
                "interval": row.interval and [_short(end, 6) for end in row.interval],
                "measured": row.measured and [
                    _short(row.measured.value, 6), _short(row.measured.error or 0.0, 6)
                ],
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


def _band(series: Series) -> list[list[float]]:
    """Return the ends of the interval of each subnet of the front; empty if they are not known."""
    if series.front_band is None:
        return []
    ends = zip(*series.front_band, strict=True)
    return [[_short(low, 6), _short(high, 6)] for low, high in ends]


def _short(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _table(data: ReportData) -> str:
    """Return the table of found subnets.

    On narrow screens each cell stands on a line of its own, behind its heading. The roles are
    written out because cells that are shown as blocks lose theirs.
    """
    if not data.found:
        return "<p>No budgets were given.</p>"
    rows = [_cells(data, row) for row in data.found]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    head = "".join(f'<th role="columnheader" scope="col">{escape(name)}</th>' for name in heads)
    lines = ['<table role="table"><thead role="rowgroup"><tr role="row">', head]
    lines.append('</tr></thead><tbody role="rowgroup">')
    for row in rows:
        lines.append('<tr role="row">')
        for name in heads:
            kind = ' class="config"' if name == SUBNET else ""
            lines.append(
                f'<td role="cell" data-head="{escape(name)}"{kind}>'
                f"<span>{escape(row.get(name, ''))}</span></td>"
            )
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])


def _cells(data: ReportData, row: FoundRow) -> dict[str, str]:
    """Return the cells of a found subnet by heading."""
    cells = {
        "Network": row.series,
        f"Budget ({data.cost_unit})": si(row.budget, 6),
        data.cost_label: si(row.cost, 5),
        data.accuracy_label: f"{row.accuracy:.2f}",
    }
    if row.interval is not None:
        cells[f"90 % interval ({data.accuracy_unit})"] = "{:.2f} to {:.2f}".format(*row.interval)
    if row.measured is not None:
        cells[f"Measured top-1 ({data.accuracy_unit})"] = row.measured.text(2)
    cells |= {name: text for name, text in row.extra.items() if name not in cells}
    config = "\n".join(
        f"{key}: {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}"
        for key, value in row.config.items()
    )
    return cells | {SUBNET: config}
