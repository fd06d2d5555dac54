"""Errors that users can cause. Each message is one line: what was expected and what was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompofaError(Exception):
    """Base class of errors that commands report in one line, without a traceback."""


class SpaceError(CompofaError, ValueError):
    """A subnet, coupling or choice that is not valid in a search space."""


class UnregisteredError(SpaceError):
    """A family, block or activation of one's own that is not registered where a file is opened."""


class DataError(CompofaError):
    """A data set that is missing, empty, unknown or damaged."""


class LoaderError(DataError):
    """Loader workers that could not be started, died, or cannot send batches."""


class CheckpointError(CompofaError):
    """A checkpoint or weights file that cannot be used."""


class ConfigError(CompofaError, ValueError):
    """Settings that are invalid or contradict each other."""


class TableError(CompofaError):
    """A table or model of measurements that cannot be used."""


class SearchError(CompofaError):
    """A search without a feasible result."""


class TrainingError(CompofaError):
    """Training that diverged, with non-finite losses or gradients, or lost its gradient buffers."""


class BusyError(CompofaError):
    """An output that another process has locked for writing."""


class StoppedError(CompofaError):
    """A run that a signal stopped.

    Attributes:
        status: Exit status, 128 plus the number of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WorkerError(CompofaError):
    """Another rank died or timed out."""


class OtherWorkerError(CompofaError):
    """Another rank failed and reports its error; this one exits silently."""


def unknown_name(kind: str, name: str, known: Iterable[str], expected: str = "") -> str:
    """Return the message for a name that is not known, with the known names most like it.

    Args:
        kind: What it should name, such as ``device``.
        name: The name that was given.
        known: The names that there are.
        expected: What is expected; by default one of ``known``, which are all listed.
    """
    known = list(known)
    found = did_you_mean(name, known)
    wanted = expected or f"expected one of {', '.join(known)}"
    return f"unknown {kind} {name[:80]!r}: {found}{wanted}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean A or B? `` for the known names most like ``name``, else nothing."""
    lower: dict[str, str] = {}
    for each in known:
        lower.setdefault(each.lower(), each)
    like = difflib.get_close_matches(name.lower(), lower, 2, 0.6)
    if not like:  # the beginning of a long name
        begins = {each[: len(name)]: each for each in reversed(lower)}
        like = [begins[b] for b in difflib.get_close_matches(name.lower(), begins, 2, 0.8)]
    return f"did you mean {' or '.join(lower[each] for each in like)}? " if like else ""
