"""The folder of an evaluation's details: tables, pictures and a page of examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compofa.data.sources import FilesSource, ImageSource
from compofa.details.outcomes import Outcomes
from compofa.details.page import write_page
from compofa.details.pictures import plot_confusion, plot_per_class
from compofa.details.tables import per_class, write_confusion, write_images, write_per_class

PER_CLASS, CONFUSION, IMAGES = "per_class.csv", "confusion.csv", "images.csv"
PER_CLASS_PLOT, CONFUSION_PLOT, PAGE = "per_class.png", "confusion.png", "images.html"


def write_details(
    folder: str | Path,
    outcomes: Outcomes,
    classes: Sequence[str],
    source: ImageSource,
    part: str,
    title: str,
) -> None:
    """Write all details of an evaluation into ``folder``, replacing those of an earlier one.

    Args:
        folder: The folder; created if it is missing.
        outcomes: What the network said of each image.
        classes: Names of the classes.
        source: The images.
        part: Name of the part of the data set, for images that are in no file.
        title: Heading of the page.

    Raises:
        CompofaError: A file cannot be written.
    """
    folder, files = Path(folder), isinstance(source, FilesSource)
    names = [source.path(i) if files else f"{part}[{i}]" for i in outcomes.images.tolist()]
    figures = per_class(outcomes, classes)
    write_per_class(folder / PER_CLASS, figures)
    write_confusion(folder / CONFUSION, outcomes, classes)
    write_images(folder / IMAGES, outcomes, classes, names)
    plot_per_class(folder / PER_CLASS_PLOT, figures, outcomes.top1)
    plot_confusion(folder / CONFUSION_PLOT, outcomes, classes)
    write_page(folder / PAGE, title, outcomes, classes, source, names)
