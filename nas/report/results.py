"""Files of a search: tables of subnets, one JSON file per found subnet, the report and figures."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from compofa import __version__
from compofa.errors import CompofaError
from compofa.io.atomic import require_writable, write_text_atomic
from compofa.space.arrays import SubnetArrays, concatenate
from nas.accuracy.base import interval_90
from nas.cost.base import Cost, macs_cost, params_cost
from nas.cost.objectives import column_names, cost_label
from nas.cost.units import SHOWN
from nas.report.data import ERROR, FoundRow, Measured, ReportData, Series, count, si
from nas.report.html import write_report
from nas.search.evolution import Points
from nas.search.folder import (
    FRONTS,
    OBJECTIVES,
    PICTURES,
    REPORT,
    RESULTS,
    listed_subnets,
    subnet_file,
)
from nas.search.pipeline import Outcome, Target
from nas.tables import rounded, write_subnets

log = logging.getLogger(__name__)

INTERVAL = ("top1_low", "top1_high")
"""Columns of the ends of the 90 % prediction interval of top-1, percent."""


def found_columns(outcome: Outcome) -> dict[str, list[Any]]:
    """Return the columns of the results table that follow ks, e, d and r."""
    target = outcome.targets[0]
    arrays = target.space.arrays_of([found.subnet for found in outcome.found])
    top1, spent = ([getattr(f, key) for f in outcome.found] for key in ("accuracy", "cost"))
    values = [np.array(spent), *(cost(arrays) for cost in outcome.costs[1:])]
    costs = dict(zip(column_names(outcome.costs), values, strict=True))
    columns = _columns(target, top1, arrays, costs)
    for name, ends in zip(INTERVAL, interval_90(target.accuracy, arrays), strict=True):
        columns[name] = np.round(ends, 4).tolist()
    return columns | outcome.measured


def _columns(
    target: Target, top1: Sequence[float], arrays: SubnetArrays, costs: Mapping[str, np.ndarray]
) -> dict[str, list[Any]]:
    """Return columns of a table: accuracy, costs by column, multiply-accumulates, parameters."""
    counts = {
        "macs": macs_cost(target.backbone, target.classes),
        "params": params_cost(target.backbone, target.classes),
    }
    columns: dict[str, list[Any]] = {"top1": [round(value, 4) for value in top1]}
    columns |= {name: rounded(values) for name, values in costs.items()}
    return columns | {name: count(arrays).astype(int).tolist() for name, count in counts.items()}


def write_outcome(outcome: Outcome, folder: str | Path, pictures: bool = True) -> list[Path]:
    """Write results.csv, pareto.csv, one JSON file per found subnet, report.html and figures.

    A search with several objectives also writes objectives.csv. Files of an earlier search are
    removed: objectives.csv, figures that cannot be drawn again (a warning is logged), and the JSON
    files that its results.csv lists.

    Returns:
        The files, in that order.
    """
    folder = require_writable(folder)
    target, columns = outcome.targets[0], found_columns(outcome)
    subnets = [found.subnet for found in outcome.found]
    ahead = {
        "constraint": [found.budget for found in outcome.found],
        "net": [target.name] * len(subnets),
    }
    results, fronts, report = (folder / name for name in (RESULTS, FRONTS, REPORT))
    files = [folder / subnet_file(found.budget) for found in outcome.found]
    for path, content in zip(files, _subnet_contents(outcome, columns), strict=True):
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        write_text_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
    for path in filter(Path.is_file, listed_subnets(results) - set(files)):
        path.unlink()
    form = target.space.config_format
    write_subnets(results, target.space.arrays_of(subnets), form, columns, ahead)
    _write_fronts(outcome, fronts)
    several = folder / OBJECTIVES
    if outcome.pareto_set is not None:
        _write_pareto_set(target, outcome.objectives, outcome.pareto_set, several)
    else:
        several.unlink(missing_ok=True)
    data = report_data(outcome)
    write_report(data, report)
    drawn = _write_pictures(data, folder) if pictures else []
    return [results, fronts, *filter(Path.is_file, [several]), *files, report, *drawn]


def _subnet_contents(outcome: Outcome, columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Return what is written of each found subnet: its choices, and what they were found for."""
    target = outcome.targets[0]
    named = dict(zip(column_names(outcome.costs), outcome.costs, strict=True))
    limits = [None, *(most for _, most in outcome.limits)]
    contents = []
    for row, found in enumerate(outcome.found):
        costs: dict[str, dict[str, Any]] = {
            name: {"value": columns[name][row], "unit": cost.unit, "device": cost.name,
                   "error": cost.error, "limit": found.budget if most is None else most}
            for (name, cost), most in zip(named.items(), limits, strict=True)
        }  # fmt: skip
        for name in ("macs", "params"):
            costs.setdefault(name, {"value": columns[name][row], "error": "exact"})
        contents.append(
            {
                **target.space.to_config(found.subnet),
                "net": target.name,
                **({"checkpoint": outcome.checkpoint} if outcome.checkpoint else {}),
                "device": target.cost.name,
                "budget": found.budget,
                "unit": target.cost.unit,
                "top1": {
                    "predicted": columns["top1"][row],
                    "interval_90": [round(columns[name][row], 2) for name in INTERVAL],
                    "error": target.accuracy.error,
                },
                "costs": costs,
                **{name: values[row] for name, values in outcome.measured.items()},
                "version": __version__,
                "date": date.today().isoformat(),
            }
        )
    return contents


def _write_pictures(data: ReportData, folder: Path) -> list[Path]:
    """Draw pareto.png and pareto.svg; return those that were written."""
    drawn = [folder / name for name in PICTURES]
    try:
        from nas.report.figure import write_plot

        write_plot(data, *drawn)
    except (CompofaError, ImportError, OSError, RuntimeError, ValueError) as error:
        for path in filter(Path.is_file, drawn):
            path.unlink()
        log.warning("no pictures: %s", " ".join(str(error).split()) or type(error).__name__)
        return []
    return drawn


def report_data(outcome: Outcome) -> ReportData:
    """Return the data of the figures and the report."""
    target, columns = outcome.targets[0], found_columns(outcome)
    cost = target.cost
    errors = list(dict.fromkeys(t.accuracy.error for t in outcome.targets))
    if len(errors) > 1:
        errors = [f"{_label(t.name)}: {t.accuracy.error}" for t in outcome.targets]
    named = cost_label(cost)
    against = (
        f" on {cost.name}" if " on " in named else f": top-1 against {named[0].lower()}{named[1:]}"
    )
    return ReportData(
        title=target.name + against,
        cost_name=named,
        cost_unit=cost.unit,
        cost_error=cost.error,
        accuracy_name="Predicted top-1",
        accuracy_unit="%",
        accuracy_error="; ".join(errors),
        series=tuple(
            Series.from_points(
                _label(t.name), t.space, front, cloud, accuracy=t.accuracy, no_front=t.no_front
            )
            for t, front, cloud in zip(outcome.targets, outcome.fronts, outcome.clouds, strict=True)
        ),
        found=tuple(
            FoundRow(
                _label(target.name),
                found.budget,
                found.cost,
                found.accuracy,
                target.space.to_config(found.subnet),
                _extra(outcome, columns, row),
                (columns[INTERVAL[0]][row], columns[INTERVAL[1]][row]),
                measured_value(columns, "measured_top1", row),
            )
            for row, found in enumerate(outcome.found)
        ),
        sources=tuple(
            f"{t.name}: {count(t.space.size)} subnets; accuracy by the model {t.accuracy.name} "
            f"({t.accuracy.error}); cost {t.cost.name} ({t.cost.error})."
            for t in outcome.targets
        )
        + tuple(
            f"Limit: {cost_label(limited)} at most {most:,.10g} {limited.unit} ({limited.error})."
            for limited, most in outcome.limits
        ),
        notes=tuple(
            f"{note[0].upper()}{note[1:]}."
            for note in dict.fromkeys(note for t in outcome.targets for note in t.notes)
        ),
    )


def _extra(outcome: Outcome, columns: Mapping[str, Sequence[Any]], row: int) -> dict[str, str]:
    """Return further cells of a found subnet by heading: counts, and what was measured."""
    cells = {}
    for name in outcome.measured:
        if name != "measured_top1" and not name.endswith(ERROR):
            value = measured_value(columns, name, row)
            heading = name.replace("_", " ").replace("top1", "top-1 (%)").replace(" ms", " (ms)")
            text = si(value.value, 4) if value.error is None else value.text(2)
            cells[heading.capitalize()] = text
    for name, cost in zip(column_names(outcome.costs), outcome.costs, strict=True):
        if cost is not outcome.costs[0] and name not in ("macs", "params"):
            scale, unit = SHOWN.get(cost.unit, (1.0, cost.unit))
            cells[f"{cost_label(cost)} ({unit})"] = si(columns[name][row] / scale)
    searched = column_names(outcome.costs)[0]
    counts = {"macs": "MACs", "params": "Parameters"}
    return cells | {
        heading: si(columns[name][row]) for name, heading in counts.items() if name != searched
    }


def measured_value(columns: Mapping[str, Sequence[Any]], name: str, row: int) -> Measured | None:
    """Return a measured column's value with its standard error, or ``None`` if it is not there."""
    if name not in columns:
        return None
    error = columns.get(name + ERROR)
    return Measured(columns[name][row], error[row] if error else None)


def _label(net: str) -> str:
    """Shorten the published ids for legends."""
    return net.replace("ofa_mbv3_d234_e346_k357_", "OFA ")


def _write_fronts(outcome: Outcome, path: Path) -> None:
    names, arrays, columns = [], [], defaultdict(list)
    for target, front in zip(outcome.targets, outcome.fronts, strict=True):
        if target.no_front and target is not outcome.targets[0]:
            continue
        rows = target.space.arrays(front.genes)
        names += [target.name] * len(front.accuracy)
        arrays.append(rows)
        costs = {column_names([target.cost])[0]: front.costs[:, 0]}
        for name, values in _columns(target, front.accuracy.tolist(), rows, costs).items():
            columns[name] += values
    form = outcome.targets[0].space.config_format
    write_subnets(path, concatenate(arrays), form, columns, {"net": names})


def _write_pareto_set(target: Target, costs: Sequence[Cost], points: Points, path: Path) -> None:
    arrays = target.space.arrays(points.genes)
    by_column = dict(zip(column_names(costs), points.costs.T, strict=True))
    columns = _columns(target, points.accuracy.tolist(), arrays, by_column)
    write_subnets(path, arrays, target.space.config_format, columns)
