"""Pictures of evaluation records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from compofa.files import write_atomic
from compofa.records import EvalRecord


def plot_accuracy(groups: Mapping[str, Sequence[EvalRecord]], path: str | Path, title: str) -> None:
    """Draw top-1 accuracy against multiply-accumulates.

    Args:
        groups: Records by the name that the legend shows.
        path: The picture; its suffix decides on the format, ``.png`` or ``.svg``.
        title: Heading.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = ("#9aa5b1", "#0b6e99", "#d1495b", "#edae49")
    for order, (name, records) in enumerate(groups.items()):
        axes.scatter(
            [record.macs / 1e6 for record in records],
            [record.top1 for record in records],
            s=22 if len(records) > 20 else 48,
            color=colours[order % len(colours)],
            edgecolors="white",
            linewidths=0.6,
            zorder=2 + order,
            label=f"{name} ({len(records)})",
        )
    axes.set_xlabel("multiply-accumulates for one image (millions)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    kind = Path(path).suffix.lstrip(".") or "png"
    write_atomic(path, lambda file: figure.savefig(file, format=kind))
