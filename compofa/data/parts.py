"""Recognises the parts of a data set by folder name: ``train``, ``Testing``, ``val_set``."""

import re
from collections.abc import Iterable
from itertools import product

PARTS = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout"),
}
"""Names of each part, alone or combined with filler words."""

_FILLERS = (
    "set", "sets", "data", "dataset", "image", "images", "img", "imgs", "seg", "split", "folder",
)  # fmt: skip
_PART_OF = {word: part for part, words in PARTS.items() for word in words}
_PART_OF |= {word + more: part for (word, part), more in product(_PART_OF.items(), _FILLERS)}


def part_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the part that a folder name stands for, and the remaining words of the name.

    Letter case, punctuation and filler words are ignored: ``seg_train``, ``TrainSet`` and
    ``training-data`` are all ``("train", ())``, and ``asl_alphabet_train`` is
    ``("train", ("asl", "alphabet"))``.

    Returns:
        A key of :data:`PARTS` and the remaining words, or None for any other name.
    """
    words = re.findall(r"[^\W\d_]+|\d+", name.casefold())
    parts = [word for word in words if word in _PART_OF]
    if len(parts) != 1:
        return None
    rest = tuple(word for word in words if word not in _FILLERS and word not in _PART_OF)
    return _PART_OF[parts[0]], rest


def group_parts(names: Iterable[str]) -> list[dict[str, list[str]]]:
    """Group folder names into possible divisions of a data set into parts.

    Names of one group have the same remaining words. A group with remaining words, such as
    ``flowers_train``, needs two parts: one alone is more likely a class.

    Returns:
        Per group, the names of each part.
    """
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        found = part_of(name)
        if found is not None:
            part, rest = found
            groups.setdefault(rest, {}).setdefault(part, []).append(name)
    return [group for rest, group in groups.items() if not rest or len(group) > 1]
