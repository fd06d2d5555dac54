"""What a run saves, when, and how it is found again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compofa.errors import CheckpointError, ConfigError
from compofa.io.atomic import remove_drafts, require_other, require_writable
from compofa.io.checkpoint import Checkpoint, load_checkpoint
from compofa.io.untrusted import parse_json, read_text
from compofa.training.config import TrainConfig
from compofa.training.journal import DAMAGED, METRICS, SUMMARY
from compofa.training.origin import origins_in
from compofa.training.stopping import Stopping

log = logging.getLogger(__name__)

LAST, BEST, CONFIG = "last.pt", "best.pt", "config.json"
PREVIOUS = "previous.pt"
"""What ``last.pt`` was before: gone on with where that one is damaged."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: epochs done, best score and its figures, seconds spent."""

    epoch: int = 0
    score: float = float("-inf")
    figures: dict[str, Any] | None = None
    seconds: float = 0.0


class Saver:
    """Says within an epoch when to save, and when to stop.

    Args:
        write: Writes the state; all workers call it after the same step.
        path: Where it is then.
        minutes: Between two of these.
        stop: Whether the end was asked for.
    """

    def __init__(
        self, write: Callable[[], None], path: Path, minutes: float, stop: Stopping
    ) -> None:
        self._write, self._path, self._seconds, self._stop = write, path, 60 * minutes, stop
        self._next = time.monotonic() + self._seconds

    @property
    def stopping(self) -> bool:
        """Whether this worker was asked to end."""
        return self._stop.requested > 0

    def wishes(self) -> list[float]:
        """Return 1 or 0 for stopping and for saving: what one worker wants, all of them do."""
        return [float(self.stopping), float(time.monotonic() >= self._next)]

    def save(self, stopping: bool = False) -> None:
        """Write the state.

        Raises:
            StoppedError: All of them stop here.
        """
        self._write()
        self._next = time.monotonic() + self._seconds
        if stopping:
            raise self._stop.error(f": all is in {self._path}, go on with --resume")


def holds_run(folder: Path) -> bool:
    """Whether a phase's folder holds something to go on with."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def was_begun(folder: Path) -> bool:
    """Whether a phase was begun in its folder, where ``best.pt`` alone may be a copy."""
    return holds_run(folder) or (folder / CONFIG).exists()


def saved_state(
    config: TrainConfig, folder: Path, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Return the state to resume from, or ``None`` to begin.

    A run that was ended before it had saved anything is begun again.

    Raises:
        ConfigError: There is a run already, or nothing to resume, or settings have changed.
        CheckpointError: What was saved cannot be used.
        CompofaError: A run that begins would write over what it is to start or learn from.
    """
    if not resume:
        if holds_run(folder) and not overwrite:
            raise ConfigError(
                f"{folder} holds a run already: go on with --resume, begin again with "
                "--overwrite, or choose another --name"
            )
        for name in (LAST, PREVIOUS, BEST):  # which go when the run begins
            require_other(folder / name, config.init_path, config.teacher_path)
        return None
    if not holds_run(folder):
        _require_begun(config, folder)
        log.info("%s was begun, and nothing saved yet: beginning again", folder)
        return None
    path, checkpoint = _newest(folder)
    try:
        training = dict(checkpoint.training or {})
        changes = config.changes_since(training["config"])
        state = {
            "path": path,
            "checkpoint": checkpoint,
            "config": dict(training["config"]),
            "origins": origins_in(training),
            "trainer": training["trainer"],
            "workers": int(training.get("workers", 1)),
            "progress": {name: training["progress"][name] for name in Progress.__annotations__},
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: no training state to resume from ({error!r})") from None
    _require_same(folder, changes)
    return state


def _newest(folder: Path) -> tuple[Path, Checkpoint]:
    """Read the newest file that is whole."""
    last, previous = folder / LAST, folder / PREVIOUS
    try:
        return last, load_checkpoint(last)
    except CheckpointError as error:
        if not previous.exists():
            raise
        found = load_checkpoint(previous)
        log.warning("%s; going on from the one saved before it, %s", error, previous)
        return previous, found


def _require_begun(config: TrainConfig, folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"nothing to resume: expected a checkpoint at {folder / LAST}")
    settings = folder / CONFIG
    if settings.exists():
        try:
            changes = config.changes_since(parse_json(read_text(settings))["config"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"nothing to resume: expected a checkpoint at {folder / LAST}, or settings in "
                f"{settings}, got {error}"
            ) from error
        _require_same(folder, changes)


def _require_same(folder: Path, changes: list[str]) -> None:
    if changes:
        raise ConfigError(f"cannot resume {folder} with changed settings: {'; '.join(changes)}")


def clear(folder: Path) -> None:
    """Remove what an earlier run left in a phase's folder."""
    require_writable(folder)
    remove_drafts(folder)
    damaged = (path.name for path in folder.glob(DAMAGED.format("*")))
    for name in (SUMMARY, LAST, PREVIOUS, BEST, METRICS, *damaged, CONFIG):
        (folder / name).unlink(missing_ok=True)


def mend(folder: Path, used: Path) -> None:
    """Prepare a folder for going on from ``used``: drafts and a damaged last file go."""
    require_writable(folder)
    remove_drafts(folder)
    if used.name == PREVIOUS:  # before it is replaced by the damaged one
        used.replace(folder / LAST)
