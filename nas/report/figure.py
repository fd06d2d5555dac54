"""Figures of a search: Pareto fronts, and the distributions of accuracy of the spaces.

Matplotlib is imported when a figure is drawn, and its global state is not changed.
"""

from __future__ import annotations

import io
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compofa.errors import SearchError
from compofa.io.atomic import write_atomic
from compofa.plots import draw_legend, label, literal_text
from nas.report.html import COLORS, ReportData, Series

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")
CLOUD_LIMIT = 3000
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
    grid = figure.add_gridspec(
        2, 2, width_ratios=(3.4, 1), height_ratios=(2.1, 1), left=0.07, right=0.975, top=0.93,
        bottom=0.12, wspace=0.05, hspace=0.24,
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
    lines = "\n".join(textwrap.wrap(label(data.caption, 800), 165))
    figure.text(0.07, 0.02, lines, fontsize=8.5, color=SOFT, va="bottom")
    draw_legend(figure, entries, loc="center left", bbox_to_anchor=(0.755, 0.28), fontsize=9.5,
                frameon=False, labelcolor=TEXT, labelspacing=0.8)  # fmt: skip
    return figure


def _draw_fronts(axes: Axes, data: ReportData) -> list[tuple[Artist, str]]:
    """Draw the fronts; return the entries of their legend."""
    entries: list[tuple[Artist, str]] = []
    for place, series in enumerate(data.series):
        step = max(1, -(-len(series.costs) // CLOUD_LIMIT))
        axes.scatter(series.costs[::step], series.accuracies[::step], s=5, linewidths=0, alpha=0.28,
                     color=_color(place), rasterized=True, zorder=1)  # fmt: skip
    for place, series in enumerate(data.series):
        line = {"color": _color(place), "zorder": 4 - 0.1 * place}
        front = axes.step(series.front_costs, series.front_accuracies, where="post", linewidth=2,
                          **line)  # fmt: skip
        entries.append((front[0], f"{series.name}: front"))
        axes.plot(series.front_costs, series.front_accuracies, "o", markersize=3.5, **line)
        found = [row for row in data.found if row.series == series.name]
        if found:
            marks = axes.plot([row.cost for row in found], [row.accuracy for row in found], "D",
                              markersize=8, markeredgecolor="white", color=_color(place), zorder=6,
                              linestyle="none")  # fmt: skip
            entries.append((marks[0], f"{series.name}: best within budget"))
    entries.append((axes.scatter([], [], s=14, color=SOFT, alpha=0.6), "random subnets"))
    lines = [
        axes.axvline(budget, color=SOFT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
        for budget in sorted({row.budget for row in data.found})
    ]
    axes.set_xlabel(label(data.cost_label, 90))
    axes.set_ylabel(label(data.accuracy_label))
    return [*entries, *((line, "budget") for line in lines[:1])]


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
    axes.axhline(median, color=_color(place), linewidth=1.4, linestyle=(0, (5, 2)))
    axes.annotate(
        f"median {median:.4g}", (0.98, median), (0, 5 if above else -5), ha="right",
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=SOFT, labelsize=9.5)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
