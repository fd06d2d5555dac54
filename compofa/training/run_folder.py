"""The folder of a phase: its files, what is in it, and the checkpoint to resume from."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from compofa.errors import CheckpointError, ConfigError
from compofa.io.atomic import remove_drafts, require_other, require_writable, write_text_atomic
from compofa.io.checkpoint import Checkpoint, load_checkpoint
from compofa.io.untrusted import parse_json, read_text
from compofa.training.config import TrainConfig
from compofa.training.journal import DAMAGED, METRICS, SUMMARY
from compofa.training.loggers import LOGGED
from compofa.training.state import PROGRESS

log = logging.getLogger(__name__)

BEST, LAST, CONFIG = "best.pt", "last.pt", "config.json"
PREVIOUS = "previous.pt"
"""The checkpoint before ``last.pt``, used if that one is damaged."""


def has_checkpoint(folder: Path) -> bool:
    """Whether a phase's folder holds a checkpoint to resume from."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def is_unfinished(folder: Path) -> bool:
    """Whether a phase was started in its folder and not completed."""
    started = has_checkpoint(folder) or (folder / CONFIG).exists()
    return started and not (folder / SUMMARY).exists()


def require_no_run(folder: Path) -> None:
    """Check that a phase's folder holds no run.

    Raises:
        ConfigError: It holds one.
    """
    if has_checkpoint(folder):
        raise ConfigError(
            f"{folder} holds a run already: continue it with --resume, replace it with "
            "--overwrite, or choose another --name"
        )


def started_folders(folders: list[Path], resume: bool | None, overwrite: bool) -> list[Path]:
    """Return the folders with a checkpoint.

    Raises:
        ConfigError: There is one, and the run is a new one that must not overwrite it.
    """
    if resume is False and not overwrite:
        for folder in folders:
            require_no_run(folder)
    return [folder for folder in folders if has_checkpoint(folder)]


def load_resumable(
    config: TrainConfig, folder: Path, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Load the checkpoint to resume from.

    Args:
        config: Resolved settings.
        folder: The phase's folder.
        resume: Whether to resume.
        overwrite: Whether a new run may replace one in the folder.

    Returns:
        ``path`` and ``checkpoint``, of which ``training`` is the training state, and the number of
        ``ranks`` that saved it; ``None`` to start a new run, also if the one in the folder ended
        before its first checkpoint.

    Raises:
        ConfigError: There is a run already or nothing to resume, or settings have changed.
        CheckpointError: The checkpoint is damaged or holds no training state.
        CompofaError: A new run would overwrite its own teacher or initial weights.
    """
    if not resume:
        if not overwrite:
            require_no_run(folder)
        for name in (LAST, PREVIOUS, BEST):
            require_other(folder / name, config.init_path, config.teacher_path)
        return None
    if not has_checkpoint(folder):
        _require_started(config, folder)
        log.info("%s holds no checkpoint yet: starting a new run", folder)
        return None
    path, checkpoint = newest(folder)
    try:
        training = dict(checkpoint.training or {})
        changes = config.changes_since(training["config"])
        changes += _too_few_epochs(config, training)
        ranks = int(training.get("workers", 1))
        missing = {"trainer"} - training.keys() | set(PROGRESS) - training["progress"].keys()
        if missing:
            raise KeyError(*sorted(missing))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: no training state to resume from ({error!r})") from None
    _require_unchanged(folder, changes)
    if other := config.allowed_changes_since(training["config"]):
        log.info("resuming %s with other settings: %s", folder, "; ".join(other))
    return {"path": path, "checkpoint": checkpoint, "training": training, "ranks": ranks}


def newest(folder: Path) -> tuple[Path, Checkpoint]:
    """Return the newest checkpoint in a phase's folder that is not damaged, and its path."""
    last, previous = folder / LAST, folder / PREVIOUS
    try:
        return last, load_checkpoint(last)
    except CheckpointError as error:
        if not previous.exists():
            raise
        found = load_checkpoint(previous)
        log.warning("%s; resuming from the checkpoint before it, %s", error, previous)
        return previous, found


def _require_started(config: TrainConfig, folder: Path) -> None:
    """Check that a run with these settings was started in a folder without a checkpoint."""
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
        _require_unchanged(folder, changes)


def _too_few_epochs(config: TrainConfig, training: Mapping[str, Any]) -> list[str]:
    """Return the fault of fewer epochs than are done, that in progress included."""
    tally = training.get("trainer", {}).get("tally", {})
    begun = tally.get("steps", 0) > 0 and tally["epoch"] == training["progress"]["epoch"]
    done = training["progress"]["epoch"] + begun
    if config.epochs >= done:
        return []
    then = training["config"].get("epochs")
    return [f"epochs: {then!r} then, of which {done} are done or begun, {config.epochs} now"]


def _require_unchanged(folder: Path, changes: list[str]) -> None:
    if changes:
        raise ConfigError(f"cannot resume {folder} with changed settings: {'; '.join(changes)}")


def clear(folder: Path) -> None:
    """Remove the files of an earlier run."""
    require_writable(folder)
    remove_drafts(folder)
    damaged = (path.name for path in folder.glob(DAMAGED.format("*")))
    for name in (SUMMARY, LAST, PREVIOUS, BEST, METRICS, *damaged, LOGGED, CONFIG):
        (folder / name).unlink(missing_ok=True)


def prepare_new(folder: Path, discard: Iterable[Path]) -> None:
    """Remove the files of an earlier run, here and in the folders ``discard`` of later phases."""
    for old in filter(Path.exists, discard):
        clear(old)
    clear(folder)


def prepare_resume(folder: Path, used: Path, completed: bool) -> None:
    """Prepare a folder for continuing.

    Drafts are removed, and a damaged ``last.pt`` is replaced by the checkpoint ``used`` instead.

    Args:
        folder: The phase's folder.
        used: The checkpoint that the phase continues from.
        completed: Whether nothing is left to train. Otherwise a summary, of a phase that goes on
            for more epochs, is removed.
    """
    require_writable(folder)
    remove_drafts(folder)
    if used.name == PREVIOUS:  # otherwise the next save would keep the damaged one as previous
        used.replace(folder / LAST)
    if not completed:
        (folder / SUMMARY).unlink(missing_ok=True)


def write_settings(folder: Path, config: TrainConfig, run: TrainConfig, network: Any) -> None:
    """Write ``config.json``.

    Args:
        folder: The phase's folder.
        config: Resolved settings of the phase.
        run: Settings of the run that it is part of, which are written if they are other ones.
        network: Definition of its network, as JSON.
    """
    settings = {"config": config.to_json(), "network": network}
    if (run.task, run.phase) != (config.task, config.phase):
        settings["run"] = run.to_json()
    write_text_atomic(folder / CONFIG, json.dumps(settings, indent=2) + "\n")
