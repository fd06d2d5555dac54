"""Commands that messages name: to continue a run, to make what it lacks, to evaluate its result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from compofa.training.config import TrainConfig, flag
from compofa.training.recipes import CHAINS, Phase
from compofa.training.run_folder import CONFIG

if TYPE_CHECKING:
    from compofa.training.predecessors import Origin

TRAIN = ("python", "train_ofa_net.py")
EVALUATE = ("python", "eval_sampled_config.py")


def task_words(config: TrainConfig) -> list[str]:
    """Return the options that name a task and, if it has several, its phase."""
    words = ["--task", config.task]
    phase = None if config.task in CHAINS else config.recipe_phase
    if phase is not None and phase.folder != phase.task:
        words += ["--phase", str(phase.number)]
    return words


def resume_command(run: TrainConfig, output: Path) -> str:
    """Return the command that continues a run."""
    return shlex.join([*TRAIN, *task_words(run), "--resume", "--output", str(output)])


def phase_command(config: TrainConfig, phase: Phase, output: Path) -> str:
    """Return the command that trains another phase for the one of these settings."""
    words = task_words(config.of_phase(phase))
    for name in ("dataset", "data_path", "init_path", "net", "heuristic", "width_mult"):
        value = getattr(config, name)
        words += [flag(name), str(value)] * (value is not None)
    if config.fixed_kernel is not None:
        words.append("--fixed-kernel" if config.fixed_kernel else "--no-fixed-kernel")
    return shlex.join([*TRAIN, *words, "--output", str(output)])


def restart_commands(
    run: TrainConfig, config: TrainConfig, output: Path, origins: Mapping[str, Origin]
) -> str:
    """Return the commands to continue after a phase that diverged.

    Args:
        run: Settings of the run.
        config: Settings of the phase.
        output: Folder of the run.
        origins: Files that the phase was started with.
    """
    config_file = output / config.recipe_phase.folder / CONFIG
    lower = [*TRAIN, "--config", str(config_file), "--lr", f"{config.lr / 10:.3g}"]
    for name, option in (("start", "init_path"), ("teacher", "teacher_path")):
        if name in origins and getattr(config, option) is None:
            lower += [flag(option), str(output / origins[name].path)]
    lower += ["--output", f"{output}-lower-lr"]
    more = f"{resume_command(run, output)} --max-skipped {10 * config.max_skipped}"
    return f"continue with: {more}; or start again with: {shlex.join(lower)}"


def evaluate_command(checkpoint: Path) -> str:
    """Return the command that evaluates a checkpoint."""
    return shlex.join([*EVALUATE, "--net", str(checkpoint)])
