"""Tables of an evaluation: per class, the confusion matrix, and per image."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compofa.details.outcomes import Outcomes
from compofa.io.atomic import write_text_atomic


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class, in percent; ``None`` where there is nothing to take them of.

    Attributes:
        name: Name of the class.
        images: Images of the class.
        top1: Share of them that were predicted as the class: its top-1 accuracy, or recall.
        precision: Share of the images predicted as the class that are of it.
        f1: Harmonic mean of precision and recall.
    """

    name: str
    images: int
    top1: float | None
    precision: float | None
    f1: float | None


def per_class(outcomes: Outcomes, classes: Sequence[str]) -> list[ClassFigures]:
    """Return the figures of every class, in the order of ``classes``."""
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, images = precision_recall_fscore_support(
        outcomes.targets, outcomes.predicted, labels=np.arange(len(classes)), zero_division=np.nan
    )
    columns = ([None if np.isnan(x) else 100 * float(x) for x in each]
               for each in (recall, precision, f1))  # fmt: skip
    return [
        ClassFigures(name, int(count), *figures)
        for name, count, *figures in zip(classes, images, *columns, strict=True)
    ]


def write_per_class(path: str | Path, figures: Iterable[ClassFigures]) -> None:
    """Write ``class,images,top1,recall,precision,f1``; percentages have two decimals."""
    rows = (
        [each.name, each.images, *map(_percent, (each.top1, each.top1, each.precision, each.f1))]
        for each in figures
    )
    _write(path, ("class", "images", "top1", "recall", "precision", "f1"), rows)


def write_confusion(path: str | Path, outcomes: Outcomes, classes: Sequence[str]) -> None:
    """Write the confusion matrix: a row per true class, a column per predicted class, in images."""
    counts = outcomes.confusion(len(classes)).tolist()
    rows = ([name, *row] for name, row in zip(classes, counts, strict=True))
    _write(path, ("true class", *classes), rows)


def write_images(
    path: str | Path, outcomes: Outcomes, classes: Sequence[str], names: Sequence[str]
) -> None:
    """Write ``image,true,predicted,probability,true_probability``, a row per image.

    Args:
        path: File to write.
        outcomes: What was said of the images.
        classes: Names of the classes.
        names: Names of the images, one per outcome.
    """
    columns = (outcomes.targets, outcomes.predicted, outcomes.probabilities,
               outcomes.true_probabilities)  # fmt: skip
    rows = (
        [name, classes[true], classes[said], f"{probability:.6f}", f"{true_probability:.6f}"]
        for name, true, said, probability, true_probability in zip(names, *columns, strict=True)
    )
    _write(path, ("image", "true", "predicted", "probability", "true_probability"), rows)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _write(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text_atomic(path, text.getvalue())
