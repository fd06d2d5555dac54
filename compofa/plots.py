"""Plots of evaluation records, and helpers for text from untrusted names in plots."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compofa.io.atomic import write_atomic
from compofa.io.records import EvalRecord
from compofa.io.untrusted import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure


@contextmanager
def literal_text() -> Iterator[None]:
    """Draw and save figures with literal text within the block: ``$`` does not start a formula.

    Characters that the font lacks are drawn as boxes, without warnings.
    """
    import matplotlib

    settings = {
        "text.parse_math": False, "text.usetex": False, "axes.formatter.use_mathtext": False,
        "font.family": "DejaVu Sans", "svg.hashsalt": "compofa",
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph ")
        yield


def label(text: str, limit: int = 60) -> str:
    """Return printable ``text``, with its middle elided if it exceeds ``limit`` characters."""
    text = printable(text)
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def draw_legend(owner: Any, entries: Sequence[tuple[Artist, str]], **options: Any) -> None:
    """Draw the legend of axes or a figure, including labels that begin with ``_``.

    Args:
        owner: The axes or the figure.
        entries: Artists with their labels.
        options: Options of matplotlib's ``legend``.
    """
    legend = owner.legend([artist for artist, _ in entries], [" "] * len(entries), **options)
    for text, (_, name) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(label(name, 40))


def plot_accuracy(groups: Mapping[str, Sequence[EvalRecord]], path: str | Path, title: str) -> None:
    """Plot top-1 accuracy over multiply-accumulates.

    Args:
        groups: Records by label of the legend.
        path: Image file; its suffix, ``.png`` or ``.svg``, selects the format.
        title: Title of the plot.

    Raises:
        CompofaError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = Path(path).suffix.lstrip(".") or "png"
    with literal_text():
        figure = Figure(figsize=(7, 4.5), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        _draw(figure, groups, title)
        write_atomic(path, lambda file: figure.savefig(file, format=kind))


def _draw(figure: Figure, groups: Mapping[str, Sequence[EvalRecord]], title: str) -> None:
    axes = figure.add_subplot()
    colours = ("#9aa5b1", "#0b6e99", "#d1495b", "#edae49")
    entries = []
    for order, (name, records) in enumerate(groups.items()):
        dots = axes.scatter(
            [record.macs / 1e6 for record in records],
            [record.top1 for record in records],
            s=22 if len(records) > 20 else 48,
            color=colours[order % len(colours)],
            edgecolors="white",
            linewidths=0.6,
            zorder=2 + order,
        )
        entries.append((dots, f"{name} ({len(records)})"))
    axes.set_xlabel("MACs per image (millions)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.set_title(label(title, 90), loc="left", fontsize=11)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    draw_legend(axes, entries, frameon=False, loc="lower right")
