"""Which folders of a data set are its parts, by name: ``train``, ``Testing``, ``val_set``."""

import re
from collections.abc import Iterable
from itertools import product

PARTS = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout"),
}
"""What each part is called, alone or together with words that say nothing."""

_FILLERS = (
    "set", "sets", "data", "dataset", "image", "images", "img", "imgs", "seg", "split", "folder",
)  # fmt: skip
_PART_OF = {word: part for part, words in PARTS.items() for word in words}
_PART_OF |= {word + more: part for (word, part), more in product(_PART_OF.items(), _FILLERS)}


def part_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return which part a folder is by its name, and the words of the name that are left.

    Letter case, punctuation and filler words do not count: ``seg_train``, ``TrainSet`` and
    ``training-data`` are all ``("train", ())``, and ``asl_alphabet_train`` is
    ``("train", ("asl", "alphabet"))``. None for any other name.
    """
    words = re.findall(r"[^\W\d_]+|\d+", name.casefold())
    parts = [word for word in words if word in _PART_OF]
    if len(parts) != 1:
        return None
    rest = tuple(word for word in words if word not in _FILLERS and word not in _PART_OF)
    return _PART_OF[parts[0]], rest


def group_parts(names: Iterable[str]) -> list[dict[str, list[str]]]:
    """Return the sets of folders that divide a data set: the folders of each part.

    The names of one set have the same words left. Where some are left, as in ``flowers_train``,
    it takes two parts: one alone is rather a class.
    """
    groups: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in names:
        found = part_of(name)
        if found is not None:
            part, rest = found
            groups.setdefault(rest, {}).setdefault(part, []).append(name)
    return [group for rest, group in groups.items() if not rest or len(group) > 1]
