"""Resuming a run: found in its folder, with the settings that it was started with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compofa.errors import ConfigError
from compofa.io.untrusted import parse_json, read_text
from compofa.training.commands import task_words
from compofa.training.config import TrainConfig
from compofa.training.config_file import checked_settings
from compofa.training.device import is_available
from compofa.training.journal import SUMMARY
from compofa.training.plan import plan
from compofa.training.recipes import CHAINS
from compofa.training.run_folder import CONFIG, has_checkpoint, newest

if TYPE_CHECKING:
    from compofa.training.adviser import Adviser


@dataclass(frozen=True)
class SavedPhase:
    """A phase that was started in the folder of a run.

    Attributes:
        config: Its resolved settings.
        run: Settings of the run that it is part of: those of a chain, of a task whose teacher it
            is, or ``config``.
        completed: Whether it is completed.
    """

    config: TrainConfig
    run: TrainConfig
    completed: bool


def saved_phase(folder: Path) -> SavedPhase | None:
    """Return the phase in a folder, from its ``config.json``, or else from its checkpoint.

    Returns:
        The phase; ``None`` if none was started in the folder, or ended before it saved anything.

    Raises:
        ConfigError: The settings are not those of a run.
        CheckpointError: They are in a checkpoint alone, and it is damaged.
    """
    data, path = _written(folder / CONFIG), folder / CONFIG
    if data is None and has_checkpoint(folder):
        path, checkpoint = newest(folder)
        data = checkpoint.training
    if not data or "config" not in data:
        return None
    config = _config(data["config"], path)
    run = config if "run" not in data else _config(data["run"], path)
    return SavedPhase(config, run, (folder / SUMMARY).exists())


def _written(path: Path) -> dict[str, Any] | None:
    """Return the content of a ``config.json``; ``None`` if it is missing or damaged."""
    try:
        data = parse_json(read_text(path)) if path.is_file() else None
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) and "config" in data else None


def _config(data: Any, path: Path) -> TrainConfig:
    """Return settings, without those that a phase does not use and earlier versions stored."""
    config = TrainConfig(**checked_settings(data, str(path)))
    return config if config.task in CHAINS else config.of_phase(config.recipe_phase)


def resumed_plan(
    adviser: Adviser, given: Mapping[str, Any], output: Path, auto: bool = False
) -> tuple[TrainConfig, ...]:
    """Return the settings of the phases of the run to resume; those of the run go to ``adviser``.

    The run is the unfinished one in its folder, of the given task and phase if any. Settings come
    from the run, except those that are given again.

    Args:
        adviser: Adviser of a new run, which is planned if the folder holds no such run.
        given: Settings that were given.
        output: Folder of the run.
        auto: Whether the task and phase are those of ``config``, as for a run that is started and
            resumed by the same command.

    Raises:
        ConfigError: Several runs, or none, are unfinished.
        CompofaError: Settings or checkpoints are damaged.
    """
    folders = [path for path in sorted(output.glob("*")) if path.is_dir()]
    found = {path.name: saved_phase(path) for path in folders}
    saved = {name: phase for name, phase in found.items() if phase is not None}
    config = adviser.given
    chosen = given if not auto else {"task": config.task, "phase": config.phase}
    run = _run_to_resume(saved, chosen, output)
    if run is not None:
        again = {name: value for name, value in given.items() if name not in ("task", "phase")}
        adviser.use(replace(run, **again))

    def resolve(phase: TrainConfig) -> TrainConfig:
        started = saved.get(phase.recipe_phase.folder)
        if started is not None:
            phase = _with_saved(phase, started, given, config.device)
        return adviser.resolve(phase)

    return plan(adviser.given, resolve)


def keep_completed(phase: TrainConfig, output: Path) -> TrainConfig:
    """Return the settings of a phase that later ones of its chain build on, if it is completed.

    Its epochs are those that it was trained for: with more, its checkpoint would be another one
    than the later phases started from.
    """
    saved = saved_phase(output / phase.recipe_phase.folder)
    if saved is None or not saved.completed:
        return phase
    names = ("epochs", "warmup_epochs", "patience")
    return replace(phase, **{name: getattr(saved.config, name) for name in names})


def with_progress(first: TrainConfig, output: Path) -> TrainConfig:
    """Return the settings of an unfinished teacher: its own, but for those of the machine."""
    saved = saved_phase(output / first.recipe_phase.folder)
    if saved is None:
        return first
    own = ("epochs", "patience", "init_path", "teacher_path")
    machine = {
        setting.name: getattr(first, setting.name)
        for setting in fields(first)
        if setting.metadata["may_change"] and setting.name not in own
    }
    return replace(saved.config, **machine)


def _run_to_resume(
    saved: Mapping[str, SavedPhase], given: Mapping[str, Any], output: Path
) -> TrainConfig | None:
    """Return the settings of the run that continues; ``None`` if the folder holds no such run."""
    runs: dict[tuple[str, int], TrainConfig] = {}
    for phase in saved.values():
        for config in (phase.config, phase.run) if given.get("task") else (phase.run,):
            key = (config.task, config.phase)
            if given.get("task", key[0]) == key[0] and given.get("phase", key[1]) == key[1]:
                runs.setdefault(key, config)
    if len(runs) < 2:
        return next(iter(runs.values()), None)

    def unfinished(config: TrainConfig) -> bool:
        folders = [phase.recipe_phase.folder for phase in plan(config, lambda phase: phase)]
        return not all(name in saved and saved[name].completed for name in folders)

    left = [config for config in runs.values() if unfinished(config)]
    if len(left) == 1:
        return left[0]
    usual = (given.get("task"), TrainConfig.phase)
    if not left and usual in runs:
        return runs[usual]
    state = "unfinished" if left else "completed"
    which = ", ".join(shlex.join(task_words(config)) for config in left or runs.values())
    raise ConfigError(f"{output} holds several {state} runs: expected --resume with one of {which}")


def _with_saved(
    phase: TrainConfig, saved: SavedPhase, given: Mapping[str, Any], device: str
) -> TrainConfig:
    """Return the settings of a phase that was started: its own, but for the ``given`` ones.

    ``device`` replaces the phase's if this machine lacks that.
    """
    again = dict(given) if is_available(saved.config.device) else {"device": device, **given}
    for name in {"task", "phase", *(phase.unused() if saved.run.task in CHAINS else ())}:
        again.pop(name, None)
    return replace(saved.config, **again).resolved()
