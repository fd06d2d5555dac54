"""Pictures of an evaluation: the confusion matrix, and the top-1 accuracy per class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compofa.details.outcomes import Outcomes
from compofa.details.tables import ClassFigures
from compofa.io.atomic import write_atomic
from compofa.plots import label, literal_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MATRIX_CLASSES = 50
"""Largest number of classes whose confusion matrix is drawn; of more, the most confused pairs."""
BARS = 30
"""Most confused pairs drawn, and classes of the lowest accuracy where there are many."""
_NUMBERED = 15  # classes of a matrix whose cells show their numbers
_BLUE, _RED = "#0b6e99", "#d1495b"


def plot_confusion(path: str | Path, outcomes: Outcomes, classes: Sequence[str]) -> None:
    """Draw the confusion matrix, or with many classes the most confused pairs, as PNG.

    Raises:
        CompofaError: The file cannot be written.
    """
    count = len(classes)
    if count > MATRIX_CLASSES:
        pairs = outcomes.confused_pairs(count)[:BARS]
        height = _height(len(pairs))
        _save(path, (9, height), lambda axes: _draw_pairs(axes, pairs, outcomes, classes))
        return
    side = max(3.2, 0.24 * count) + 0.09 * max(len(label(name, 24)) for name in classes)
    _save(path, (side + 1, side), lambda axes: _draw_matrix(axes, outcomes, classes))


def plot_per_class(path: str | Path, figures: Sequence[ClassFigures], top1: float) -> None:
    """Draw the top-1 accuracy of every class, or of the lowest where there are many, as PNG.

    Args:
        path: File to write.
        figures: Figures per class; classes without images are left out.
        top1: Top-1 accuracy of all images in percent.

    Raises:
        CompofaError: The file cannot be written.
    """
    known = sorted((each for each in figures if each.top1 is not None), key=lambda f: f.top1)
    shown = known if len(known) <= MATRIX_CLASSES else known[:BARS]
    title = "Top-1 accuracy per class"
    if len(shown) < len(known):
        title = f"The {len(shown)} of {len(known)} classes with the lowest top-1 accuracy"
    _save(path, (9, _height(len(shown))), lambda axes: _draw_bars(axes, shown, title, top1))


def _height(bars: int) -> float:
    return 1.3 + 0.24 * max(3, bars)


def _save(path: str | Path, size: tuple[float, float], draw: Callable[[Axes], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with literal_text():
        figure = Figure(figsize=size, dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.add_subplot())
        write_atomic(path, lambda file: figure.savefig(file, format="png"))


def _draw_matrix(axes: Axes, outcomes: Outcomes, classes: Sequence[str]) -> None:
    matrix = outcomes.confusion(len(classes))
    totals = matrix.sum(axis=1, keepdims=True)
    shares = 100 * matrix / np.maximum(totals, 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    names = [label(name, 24) for name in classes]
    places = range(len(names))
    size = 9 if len(names) <= _NUMBERED else 7
    upright = max(map(len, names)) <= 3
    axes.set_xticks(places, names, rotation=0 if upright else 90, fontsize=size)
    axes.set_yticks(places, names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"Confusion matrix of {len(outcomes)} images", loc="left", fontsize=11)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dfe3e8", linewidth=0.5)
    axes.tick_params(which="minor", length=0)
    if len(names) <= _NUMBERED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            axes.text(
                column, row, str(matrix[row, column]), ha="center", va="center", fontsize=8,
                color="white" if shares[row, column] > 55 else "#1c2430",
            )  # fmt: skip
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("share of the true class (%)")


def _draw_pairs(
    axes: Axes, pairs: Sequence[tuple[int, int, int]], outcomes: Outcomes, classes: Sequence[str]
) -> None:
    totals = np.bincount(outcomes.targets, minlength=len(classes))
    names = [f"{label(classes[t], 28)} → {label(classes[p], 28)}" for t, p, _ in pairs]
    counts = [count for _, _, count in pairs]
    bars = axes.barh(range(len(pairs)), counts, color=_RED, height=0.7)
    shares = [f"{count} ({100 * count / totals[t]:.0f} %)" for t, _, count in pairs]
    axes.bar_label(bars, shares, padding=3, fontsize=8)
    axes.set_title(
        f"Most confused classes of {len(classes)}: true → predicted", loc="left", fontsize=11
    )
    _finish_bars(axes, names, "images (share of the true class)", 1.15 * max(counts, default=1))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_bars(axes: Axes, shown: Sequence[ClassFigures], title: str, top1: float) -> None:
    bars = axes.barh(range(len(shown)), [each.top1 for each in shown], color=_BLUE, height=0.7)
    axes.axvline(top1, color=_RED, linewidth=1, linestyle="--")
    texts = [f"{each.top1:.1f} % of {each.images}" for each in shown]
    over_line = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, texts, padding=3, fontsize=8, bbox=over_line)
    axes.set_title(f"{title}; dashed: all images, {top1:.1f} %", loc="left", fontsize=11)
    _finish_bars(axes, [label(each.name, 40) for each in shown], "top-1 accuracy (%)", 120)
    axes.set_xticks(range(0, 101, 20))


def _finish_bars(axes: Axes, names: Sequence[str], xlabel: str, right: float) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, right)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
