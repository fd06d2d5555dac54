"""A page of examples: the most confident right, the most confident wrong, the least certain."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from compofa.data.decoding import UnreadableImageError
from compofa.data.sources import ImageSource, RawImage
from compofa.details.outcomes import Outcomes
from compofa.io.atomic import write_text_atomic
from compofa.io.untrusted import printable

EXAMPLES = 24
"""Images per section."""
_SIDE = 192  # of a thumbnail, in pixels
_SMALL = 64  # images up to this side are kept as they are and shown enlarged, with visible pixels

_STYLE = """\
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1c2430; --soft: #56606f;
        --line: #d9dee5; --right: #0a6b3d; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181e; --card: #1d232b; --text: #e8ecf1; --soft: #a3b0bf; --line: #39434f;
          --right: #6fd39b; --wrong: #ff9d94; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
       font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 22px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 28px 0 2px; }
p { margin: 0 0 10px; color: var(--soft); }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px;
     list-style: none; margin: 0; padding: 0; }
li { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px;
     font-size: 13px; overflow-wrap: anywhere; }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; margin-bottom: 6px;
      border-radius: 4px; }
img.small { image-rendering: pixelated; }
.right { color: var(--right); font-weight: 600; }
.wrong { color: var(--wrong); font-weight: 600; }
.soft { color: var(--soft); }
"""


def write_page(
    path: str | Path,
    title: str,
    outcomes: Outcomes,
    classes: Sequence[str],
    source: ImageSource,
    names: Sequence[str],
) -> None:
    """Write a self-contained HTML page of examples, without scripts or requests.

    Args:
        path: File to write.
        title: Heading.
        outcomes: What was said of the images.
        classes: Names of the classes.
        source: The images, by the indices of ``outcomes``.
        names: Names of the images, one per outcome.

    Raises:
        CompofaError: The file cannot be written.
    """
    sure = np.argsort(-outcomes.probabilities, kind="stable")
    right, wrong = sure[outcomes.right[sure]], sure[~outcomes.right[sure]]
    sections = (
        ("Most confident, right", "Highest probability of the true class.", right),
        ("Most confident, wrong", "Highest probability of another class than the true one: often "
         "wrong labels, several objects, or classes that look alike.", wrong),
        ("Least certain", "Lowest probability of the predicted class.", sure[::-1]),
    )  # fmt: skip
    body = "".join(
        f"<h2>{escape(heading)}</h2>\n<p>{escape(text)}</p>\n"
        + _section(rows[:EXAMPLES], lambda row: _example(row, outcomes, classes, source, names))
        for heading, text, rows in sections
    )
    right_count = int(outcomes.right.sum())
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'"
    write_text_atomic(
        path,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_text(title)}</h1>\n"
        f"<p>{right_count} of {len(outcomes)} images right: top-1 {outcomes.top1:.2f} %</p>\n"
        f"{body}</main>\n</body>\n</html>\n",
    )


def _section(rows: NDArray[np.int64], example: Callable[[int], str]) -> str:
    if not len(rows):
        return "<p>None.</p>\n"
    return "<ul>\n" + "".join(f"<li>{example(int(row))}</li>\n" for row in rows) + "</ul>\n"


def _example(
    row: int,
    outcomes: Outcomes,
    classes: Sequence[str],
    source: ImageSource,
    names: Sequence[str],
) -> str:
    true, said = (_text(classes[each[row]]) for each in (outcomes.targets, outcomes.predicted))
    probability, of_true = (
        f"{100 * each[row]:.1f}\u00a0%"
        for each in (outcomes.probabilities, outcomes.true_probabilities)
    )
    if outcomes.right[row]:
        verdict = f'<span class="right">✓ {said}</span> {probability}'
        alt = f"{true}, predicted rightly"
    else:
        verdict = (
            f'<span class="wrong">✗ {said}</span> {probability}<br>'
            f'true: {true} <span class="soft">{of_true}</span>'
        )
        alt = f"{true}, predicted as {said}"
    name = _text(names[row])
    where = f'<br><span class="soft">{_text(Path(names[row]).name)}</span>'
    try:
        image = source.load(int(outcomes.images[row]))
    except UnreadableImageError:  # since the evaluation
        return f"{verdict}<br>unreadable{where}"
    small, data = _thumbnail(image)
    kind = ' class="small"' if small else ""
    return f'<img{kind} src="{data}" alt="{alt}" title="{name}" loading="lazy">{verdict}{where}'


def _thumbnail(image: RawImage) -> tuple[bool, str]:
    """Return whether an image is small, and a data URI of at most ``_SIDE`` pixels a side."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image.numpy().transpose(1, 2, 0))
    small = max(image.size) <= _SMALL
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=82)
    kind = "png" if small else "jpeg"
    return small, f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _text(text: str) -> str:
    return escape(printable(text))
