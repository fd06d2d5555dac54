"""Figures of a search: Pareto fronts, and the distributions of accuracy of the spaces.

Matplotlib is imported when a figure is drawn, and its global state is not changed.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compofa.errors import SearchError
from compofa.io.atomic import write_atomic
from compofa.plots import draw_legend, label, literal_text
from nas.report.data import COLORS, ReportData, Series, si

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nas.report.data import FoundRow

FORMATS = (".png", ".svg")
CLOUD_LIMIT = 3000
BAND_SHARE = 0.25
"""Share of the height of the plotted points that bands may add above and below."""
LINE = 0.018
"""Height of a line of the caption, as a share of the figure's."""
BINS = 8
LEAST_IN_BIN = 20
TEXT, SOFT, GRID = "#1c2430", "#5d6878", "#e3e7ec"


def write_plot(data: ReportData, *paths: str | Path) -> None:
    """Draw ``data`` once and write it to each path as PNG or SVG, by its suffix.

    The main panel has the fronts, the random subnets and the found ones; the right panel the
    distribution of accuracy; the lower panel its quartiles within bins of cost, as compared in the
    CompOFA paper (Sahni et al., ICLR 2021, section 4).

    Raises:
        SearchError: Another suffix.
        CompofaError: A path cannot be written.
    """
    suffixes = [Path(path).suffix.lower() for path in paths]
    for path, suffix in zip(paths, suffixes, strict=True):
        if suffix not in FORMATS:
            raise SearchError(f"expected a path ending in {' or '.join(FORMATS)}, got {path}")
    with literal_text():
        figure = draw(data)
        for path, suffix in zip(paths, suffixes, strict=True):
            buffer = io.BytesIO()
            metadata = {"Date": None} if suffix == ".svg" else {"Software": None}
            figure.savefig(buffer, format=suffix[1:], dpi=160, metadata=metadata)
            write_atomic(path, lambda file, buffer=buffer: file.write(buffer.getvalue()) and None)


def draw(data: ReportData) -> Figure:
    """Draw ``data`` on a new figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 8.6), facecolor="white")
    FigureCanvasAgg(figure)
    notes = [line for note in data.notes for line in textwrap.wrap(label(note, 800), 165)]
    caption = textwrap.wrap(label(data.caption, 800), 165)
    grid = figure.add_gridspec(
        2, 2, width_ratios=(3.4, 1), height_ratios=(2.1, 1), left=0.07, right=0.975, top=0.93,
        bottom=0.085 + LINE * len(notes + caption), wspace=0.05, hspace=0.24,
    )  # fmt: skip
    fronts = figure.add_subplot(grid[0, 0])
    marginal = figure.add_subplot(grid[0, 1], sharey=fronts)
    binned = figure.add_subplot(grid[1, 0], sharex=fronts)
    for axes in (fronts, marginal, binned):
        _plain(axes)
    entries = _draw_fronts(fronts, data)
    _draw_marginal(marginal, data)
    _draw_binned(binned, data)
    figure.suptitle(label(data.title, 100), x=0.07, y=0.975, ha="left", fontsize=15, color=TEXT)
    for lines, color, y in (
        (caption, SOFT, 0.02), (notes, TEXT, 0.02 + LINE * len(caption)),
    ):  # fmt: skip
        figure.text(0.07, y, "\n".join(lines), fontsize=8.5, color=color, va="bottom")
    draw_legend(figure, entries, loc="center left", bbox_to_anchor=(0.755, 0.28), fontsize=9.5,
                frameon=False, labelcolor=TEXT, labelspacing=0.8)  # fmt: skip
    return figure


def _draw_fronts(axes: Axes, data: ReportData) -> list[tuple[Artist, str]]:
    """Draw the fronts; return the entries of their legend."""
    entries: list[tuple[Artist, str]] = []
    for place, series in enumerate(data.series):
        step = max(1, -(-len(series.costs) // CLOUD_LIMIT))
        axes.scatter(series.costs[::step], series.accuracies[::step], s=5, linewidths=0,
                     alpha=0.14 if series.no_front else 0.28, color=_color(place), rasterized=True,
                     zorder=1)  # fmt: skip
    for place, series in enumerate(data.series):
        if series.no_front:
            mark = axes.scatter([], [], s=14, color=_color(place), alpha=0.3)
            entries.append((mark, f"{series.name}: no front"))
            continue
        line = {"color": _color(place), "zorder": 4 - 0.1 * place}
        if series.front_band is not None and len(series.front_costs):
            axes.fill_between(series.front_costs, *series.front_band, step="post", linewidth=0,
                              color=_color(place), alpha=0.13, zorder=1.2)  # fmt: skip
        front = axes.step(series.front_costs, series.front_accuracies, where="post", linewidth=2,
                          **line)  # fmt: skip
        entries.append((front[0], f"{series.name}: front"))
        axes.plot(series.front_costs, series.front_accuracies, "o", markersize=3.5, **line)
    for place, series in enumerate(data.series):
        found = [row for row in data.found if row.series == series.name]
        if found:
            marks = axes.plot([row.cost for row in found], [row.accuracy for row in found], "D",
                              markersize=8, markeredgecolor="white", color=_color(place), zorder=6,
                              linestyle="none")  # fmt: skip
            entries.append((marks[0], f"{series.name}: best within budget"))
            entries += _draw_measured(axes, found, place)
    if any(not series.no_front for series in data.series):
        entries.append((axes.scatter([], [], s=14, color=SOFT, alpha=0.6), "random subnets"))
    if any(series.front_band is not None for series in data.series):
        entries.append((axes.fill_between([], [], [], color=SOFT, alpha=0.25, linewidth=0),
                        "90 % interval"))  # fmt: skip
    axes.set_ylim(*_accuracy_limits(data))
    lines = [
        axes.axvline(budget, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
        for budget in sorted({row.budget for row in data.found})
    ]
    axes.set_xlabel(label(data.cost_label, 90))
    axes.set_ylabel(label(data.accuracy_label))
    return [*entries, *((line, "budget") for line in lines[:1])]


def _draw_measured(axes: Axes, found: Sequence[FoundRow], place: int) -> list[tuple[Artist, str]]:
    """Draw measured accuracies with error bars, each tied to its prediction."""
    rows = [row for row in found if row.measured is not None]
    if not rows:
        return []
    costs, values = [row.cost for row in rows], [row.measured.value for row in rows]
    axes.vlines(costs, [row.accuracy for row in rows], values, color=_color(place), linewidth=1,
                linestyle=(0, (1, 1.5)), zorder=5)  # fmt: skip
    reach = np.abs([row.measured.ends for row in rows] - np.array(values)[:, None]).T
    marks = axes.errorbar(
        costs, values, yerr=reach, fmt="s", markersize=7,
        color=TEXT, markerfacecolor="white", markeredgewidth=1.5, elinewidth=1.3, capsize=4,
        zorder=7,
    )  # fmt: skip
    return [(marks, "measured ± standard error")]


def _accuracy_limits(data: ReportData) -> tuple[float, float]:
    """Return limits that show all points and error bars, and as much of the bands as fits."""
    points, bands = [], []
    for series in data.series:
        points += [series.accuracies, series.front_accuracies]
        bands += series.front_band or ()
    for row in data.found:
        points.append(np.array([row.accuracy, *(row.measured.ends if row.measured else ())]))
    values = np.concatenate([np.ravel(part) for part in points])
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    room = (high - low) or 1.0
    reach = np.concatenate([[low, high], *bands])
    return (
        max(float(reach.min()), low - BAND_SHARE * room) - 0.04 * room,
        min(float(reach.max()), high + BAND_SHARE * room) + 0.04 * room,
    )


def _draw_marginal(axes: Axes, data: ReportData) -> None:
    values = [series.accuracies for series in data.series if len(series.accuracies)]
    if values:
        edges = np.histogram_bin_edges(np.concatenate(values), bins=50)
    for place, series in enumerate(data.series):
        if not len(series.accuracies):
            continue
        share, _ = np.histogram(series.accuracies, bins=edges)
        share = 100 * share / len(series.accuracies)
        axes.stairs(share, edges, orientation="horizontal", fill=True, alpha=0.25,
                    color=_color(place))  # fmt: skip
        axes.stairs(share, edges, orientation="horizontal", color=_color(place), linewidth=1.3)
        _mark_median(axes, data, place)
    axes.set_xlabel("random subnets (%)")
    axes.tick_params(labelleft=False)
    axes.set_xlim(left=0)
    axes.set_title("All random subnets", loc="left", fontsize=11, color=TEXT)


def _mark_median(axes: Axes, data: ReportData, place: int) -> None:
    """Draw a series' median; its label is placed away from the other medians."""
    medians = [np.median(series.accuracies) for series in data.series if len(series.accuracies)]
    median = np.median(data.series[place].accuracies)
    above = median >= max(medians)
    between = sum(other > median for other in medians) - 1  # labels between it and the highest
    axes.axhline(median, color=_color(place), linewidth=1.4, linestyle=(0, (5, 2)))
    axes.annotate(
        f"median {median:.4g}", (0.98, median), (0, 5 if above else -5 - 15 * between), ha="right",
        va="bottom" if above else "top", xycoords=("axes fraction", "data"), fontsize=9,
        textcoords="offset points", color=_color(place), fontweight="bold",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
    )  # fmt: skip


def _draw_binned(axes: Axes, data: ReportData) -> None:
    """Draw quartile boxes within steps of cost, the series side by side."""
    costs = np.concatenate([series.costs for series in data.series])
    axes.set_title("Random subnets of similar cost: quartiles, 5 to 95 %", loc="left", fontsize=11,
                   color=TEXT)  # fmt: skip
    axes.set_xlabel(label(data.cost_label, 90))
    axes.set_ylabel(label(data.accuracy_label, 40))
    if not len(costs):
        return
    edges = np.linspace(*np.quantile(costs, (0.002, 0.998)), BINS + 1)
    width = (edges[1] - edges[0]) / (len(data.series) + 1.2)
    for place, series in enumerate(data.series):
        for low, high in pairwise(edges):
            inside = _inside(series, low, high)
            if len(inside) < LEAST_IN_BIN:
                continue
            whisker, first, median, third, top = np.quantile(inside, (0.05, 0.25, 0.5, 0.75, 0.95))
            x = (low + high) / 2 + (place - (len(data.series) - 1) / 2) * width
            color = _color(place)
            axes.plot([x, x], [whisker, top], color=color, linewidth=1.1)
            axes.bar(x, third - first, 0.82 * width, first, color=color, alpha=0.35)
            axes.plot([x - 0.41 * width, x + 0.41 * width], [median, median], color=color,
                      linewidth=2.2, solid_capstyle="butt")  # fmt: skip


def _inside(series: Series, low: float, high: float) -> np.ndarray:
    return series.accuracies[(series.costs >= low) & (series.costs < high)]


def _color(place: int) -> str:
    return COLORS[place % len(COLORS)]


def _plain(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, place: si(value))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelsize=9.5)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
