"""Files of a search: tables of subnets, one JSON file per found subnet, the report and figures."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import CompofaError, TableError
from compofa.io.atomic import require_writable, write_text_atomic
from compofa.space.arrays import SubnetArrays, concatenate
from nas.cost.base import Cost, macs_cost, params_cost
from nas.cost.objectives import column_names
from nas.report.html import FoundRow, ReportData, Series, write_report
from nas.search.evolution import Points
from nas.search.pipeline import Outcome, Target
from nas.tables import read_csv, write_subnets

log = logging.getLogger(__name__)


def found_columns(outcome: Outcome) -> dict[str, list[Any]]:
    """Return the columns of the results table that follow ks, e, d and r."""
    target = outcome.targets[0]
    arrays = target.space.arrays_of([found.subnet for found in outcome.found])
    top1, spent = ([getattr(f, key) for f in outcome.found] for key in ("accuracy", "cost"))
    limited = [cost for cost, _ in outcome.limits]
    values = [np.array(spent), *(cost(arrays) for cost in limited)]
    costs = dict(zip(column_names([target.cost, *limited]), values, strict=True))
    return _columns(target, top1, arrays, costs) | outcome.measured


def _columns(
    target: Target, top1: Sequence[float], arrays: SubnetArrays, costs: Mapping[str, np.ndarray]
) -> dict[str, list[Any]]:
    """Return columns of a table: accuracy, costs by column, multiply-accumulates, parameters."""
    counts = {
        "macs": macs_cost(target.backbone, target.classes),
        "params": params_cost(target.backbone, target.classes),
    }
    columns: dict[str, list[Any]] = {"top1": [round(value, 4) for value in top1]}
    columns |= {name: np.round(values, 4).tolist() for name, values in costs.items()}
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
    results, fronts, report = (
        folder / name for name in ("results.csv", "pareto.csv", "report.html")
    )
    files = [folder / _subnet_file(found.budget) for found in outcome.found]
    for path, subnet in zip(files, subnets, strict=True):
        write_text_atomic(path, json.dumps(target.space.to_config(subnet)) + "\n")
    for path in filter(Path.is_file, listed_subnets(results) - set(files)):
        path.unlink()
    form = target.space.config_format
    write_subnets(results, target.space.arrays_of(subnets), form, columns, ahead)
    _write_fronts(outcome, fronts)
    several = folder / "objectives.csv"
    if outcome.pareto_set is not None:
        _write_pareto_set(target, outcome.objectives, outcome.pareto_set, several)
    else:
        several.unlink(missing_ok=True)
    data = report_data(outcome)
    write_report(data, report)
    drawn = _write_pictures(data, folder) if pictures else []
    return [results, fronts, *filter(Path.is_file, [several]), *files, report, *drawn]


def _subnet_file(budget: float) -> str:
    return f"subnet_{budget:.12g}.json"


def listed_subnets(results: Path) -> set[Path]:
    """Return the JSON files that a results.csv lists; none if it cannot be read as one."""
    try:
        header, rows = read_csv(results)[1:]
        budgets = {float(row[header.index("constraint")]) for row in rows}
    except (TableError, ValueError):
        return set()
    return {results.with_name(_subnet_file(budget)) for budget in budgets}


def _write_pictures(data: ReportData, folder: Path) -> list[Path]:
    """Draw pareto.png and pareto.svg; return those that were written."""
    drawn = [folder / "pareto.png", folder / "pareto.svg"]
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
    cost, accuracy = target.cost, target.accuracy
    units = {"macs": 1e6, "params": 1e6}
    labels = {"macs": "MACs (M)", "params": "parameters (M)"}
    labels |= {name: name.replace("_", " ") for name in outcome.measured}
    extra = [
        {label: f"{columns[name][row] / units.get(name, 1):.2f}" for name, label in labels.items()}
        for row in range(len(outcome.found))
    ]
    is_latency = cost.unit == "ms"
    return ReportData(
        title=f"{target.name} on {cost.name}",
        cost_name=f"Latency on {cost.name}" if is_latency else cost.name,
        cost_unit=cost.unit,
        cost_error=cost.error,
        accuracy_name="Predicted top-1",
        accuracy_unit="%",
        accuracy_error=accuracy.error,
        series=tuple(
            Series.from_points(_label(t.name), t.space, front, cloud)
            for t, front, cloud in zip(outcome.targets, outcome.fronts, outcome.clouds, strict=True)
        ),
        found=tuple(
            FoundRow(
                _label(target.name),
                found.budget,
                found.cost,
                found.accuracy,
                target.space.to_config(found.subnet),
                extra[row],
            )
            for row, found in enumerate(outcome.found)
        ),
        sources=tuple(
            f"{t.name}: {t.space.size:.3g} subnets; accuracy by the model {t.accuracy.name} "
            f"({t.accuracy.error}); cost {t.cost.name} ({t.cost.error})."
            for t in outcome.targets
        ),
    )


def _label(net: str) -> str:
    """Shorten the published ids for legends."""
    return net.replace("ofa_mbv3_d234_e346_k357_", "OFA ")


def _write_fronts(outcome: Outcome, path: Path) -> None:
    names, arrays, columns = [], [], defaultdict(list)
    for target, front in zip(outcome.targets, outcome.fronts, strict=True):
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
