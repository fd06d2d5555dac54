"""Files that a phase builds on: its teacher and initial weights, found again when it is resumed."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compofa.distributed.backend import Backend
from compofa.errors import CompofaError, ConfigError
from compofa.io.atomic import require_writable
from compofa.io.checkpoint import file_hash, load_checkpoint
from compofa.io.classifier import outputs_of
from compofa.io.open import OpenedNetwork, open_network
from compofa.training.commands import phase_command, resume_command
from compofa.training.config import TrainConfig, flag
from compofa.training.optimizers import OPTIMIZERS
from compofa.training.recipes import OWN_IMAGES, recipe_for
from compofa.training.resume import saved_phase
from compofa.training.run_folder import BEST, LAST, is_unfinished

log = logging.getLogger(__name__)

SCHEDULE = ("epochs", "lr", "warmup_epochs")
"""Settings of a task that do not apply to a teacher which is trained first."""
_OWN = (*SCHEDULE, "validate_every", "dynamic_batch_size", "teacher_path", "init_path")

TrainFirst = Callable[[TrainConfig, bool], Path]
"""Trains a teacher, or resumes an unfinished one; returns its best checkpoint."""


def find_predecessors(
    config: TrainConfig,
    output: Path,
    train_first: TrainFirst,
    backend: Backend,
    opened: Callable[[str], OpenedNetwork],
    classes: tuple[str, ...],
) -> tuple[str, str]:
    """Return teacher and initial weights of a new run, training a missing teacher if possible.

    A teacher that is used and not given is the best checkpoint of the run's own teacher. If there
    is none, the largest subnet of the network of ``--init-path`` teaches: as it is if it knows the
    classes, and otherwise fine-tuned first, as the run's teacher. Without ``--init-path`` a quick
    teacher is trained first.

    Args:
        config: Resolved settings.
        output: Folder of the run.
        train_first: Trains a missing teacher.
        backend: Ranks that all call this.
        opened: Opens a network, on rank 0.
        classes: Classes of the data set.

    Returns:
        What :func:`compofa.io.open.open_network` takes; empty for none.

    Raises:
        ConfigError: The preceding phase is missing or unfinished, or the run's own teacher was
            fine-tuned from other weights than those of ``--init-path``.
    """
    if config.teacher:  # which teaches in place of the run's own
        config = replace(config, kd_ratio=0.0, teacher_path=None)
    phase = config.recipe_phase
    taught = phase.teacher == "checkpoint" and config.kd_ratio > 0
    own = output / recipe_for(config.dataset).phase("teacher").folder
    begun = backend.from_main(lambda: (own / BEST).exists() or is_unfinished(own))
    teacher, start = config.teacher_path or "", config.init_path or ""

    def best(task: str, number: int, option: str) -> str:
        return str(_best_of(config, output, task, number, option, train_first, backend))

    def knows_classes() -> bool:
        return outputs_of(opened(start).checkpoint, classes) is not None

    if taught and not teacher:
        if start and not begun and backend.from_main(knows_classes):
            log.info("no teacher given: the largest subnet of %s teaches", start)
            teacher = start
        else:
            teacher = best("teacher", 1, "--teacher-path")
            if start and begun:
                backend.from_main(lambda: _require_tuned(teacher, start, opened(start).digest))
    if not start and phase.starts_from is not None:
        from_teacher = phase.starts_from[0] == "teacher"
        start = teacher if from_teacher else ""
        if not start and from_teacher and not taught and not begun:
            log.info("no %s and no --init-path: starting from random weights", own / BEST)
        elif not start:
            start = best(*phase.starts_from, "--init-path")
    return teacher if config.kd_ratio > 0 else "", start


def _best_of(
    config: TrainConfig,
    output: Path,
    task: str,
    number: int,
    option: str,
    train_first: TrainFirst,
    backend: Backend,
) -> Path:
    """Return the best checkpoint of an earlier phase of this run."""
    recipe = recipe_for(config.dataset)
    phase = recipe.phase(task, number)
    folder = output / phase.folder
    path = folder / BEST
    first = config.of_phase(phase, **dict.fromkeys(_OWN))
    if phase.largest_only and config.init_path:  # adapted as a fine-tuned network is
        tuned = recipe.phase("finetune")
        first = replace(first, init_path=config.init_path, net=config.net)
    if first.init_path and recipe is not OWN_IMAGES:  # for which this is suggested
        first = replace(
            first,
            epochs=tuned.epochs,
            lr=OPTIMIZERS[config.optimizer].default_lr(tuned.base_lr, config.batch_size),
            warmup_epochs=0,
        )

    def look() -> tuple[bool, bool]:
        unfinished = is_unfinished(folder)
        ready = path.exists() and not unfinished
        if not ready and not (phase.largest_only and (recipe.quick or config.init_path)):
            command = (
                resume_command(config.of_phase(phase), output)
                if unfinished
                else phase_command(config, phase, output)
            )
            raise ConfigError(
                f"task {config.task} starts from the best checkpoint of a finished {task} run, "
                f"expected at {path}{_other_run(config, folder)}: name one with {option}, or make "
                f"it with: {command}"
            )
        if not ready:
            require_writable(output / config.recipe_phase.folder)
        return ready, unfinished

    ready, unfinished = backend.from_main(look)
    if ready:
        return path
    log.info("%s %s at %s: training it first", "unfinished" if unfinished else "no", task, path)
    return train_first(first, unfinished)


def _other_run(config: TrainConfig, folder: Path) -> str:
    """Return where another run completed the phase of ``folder`` on the same data, for errors."""
    for other in sorted(folder.parent.parent.glob(f"*/{folder.name}")):
        with suppress(CompofaError):
            found = saved_phase(other)
            if found is not None and found.completed and found.config.same_data(config):
                return f" ({shlex.join(['--output', str(other.parent)])} has one)"
    return ""


@dataclass(frozen=True)
class Origin:
    """A file that a run was started with, as its checkpoints record it.

    Attributes:
        path: Its path at the start: relative to the run's folder for a file in it, else absolute.
        digest: Its :func:`compofa.io.checkpoint.file_hash`; empty in runs of earlier versions.
    """

    path: str
    digest: str = ""

    @classmethod
    def of(cls, source: str | Path, output: Path, opened: OpenedNetwork | None = None) -> Origin:
        """Return the origin of a network.

        Args:
            source: What :func:`compofa.io.open.open_network` takes.
            output: Folder of the run.
            opened: The network, if it is open already.
        """
        file = Path(source)
        if not file.is_file():
            opened = opened or open_network(source)
            file = opened.path
        digest = opened.digest if opened and file == opened.path else file_hash(file)
        absolute, folder = Path(os.path.abspath(file)), Path(os.path.abspath(output))
        inside = absolute.is_relative_to(folder)
        return cls(str(absolute.relative_to(folder) if inside else absolute), digest)

    def locate(self, given: str | None, option: str, output: Path) -> str:
        """Return the path of the file now.

        Args:
            given: Its new path, if the user gave one.
            option: The option for that path.
            output: Folder of the run.

        Raises:
            ConfigError: The file is missing or another one.
        """
        path = given or str(output / self.path if self.digest else Path(self.path))
        if self.digest:
            now = Origin.of(path, output) if given or Path(path).is_file() else None
            if now is None or now.digest != self.digest:
                found = f"one of hash {now.digest}" if now else "nothing there"
                raise ConfigError(
                    f"{option}: expected the file of hash {self.digest} that the run was started "
                    f"with, then {self.path}, got {found} at {path}: name its path with {option}"
                )
        return path


def saved_origins(training: Mapping[str, Any]) -> dict[str, Origin]:
    """Return the origins, ``teacher`` and ``start``, in the training state of a checkpoint."""
    if "origins" not in training:  # written by an earlier version
        return {"teacher": Origin(str(training["teacher"]))} if training["teacher"] else {}
    pairs = training["origins"].items()
    return {name: Origin(str(path), str(digest)) for name, (path, digest) in pairs}


def tuned_from(teacher: str) -> str:
    """Return the hash of the weights that the teacher of a run was fine-tuned from; empty for none.

    Args:
        teacher: Its checkpoint.
    """
    last = Path(teacher).with_name(LAST)
    training = load_checkpoint(last).training if last.is_file() else None
    start = saved_origins(training).get("start") if training else None
    return start.digest if start else ""


def _require_tuned(teacher: str, start: str, digest: str) -> None:
    """Check that the teacher of a run was not fine-tuned from other weights than ``start``."""
    if tuned_from(teacher) not in ("", digest):
        raise ConfigError(
            f"{teacher}: expected a teacher fine-tuned from --init-path {start}, got one of other "
            "weights: use it with --teacher-path, or choose another --name"
        )
    log.info("taught by %s", teacher)


def taught_by_start(then: Mapping[str, Any], origins: Mapping[str, Origin]) -> bool:
    """Whether the network of ``--init-path`` teaches in a resumed run.

    Args:
        then: Settings that the run was started with.
        origins: Files that it was started with.
    """
    same = "start" in origins and origins["start"] == origins.get("teacher")
    return same and then.get("init_path") is not None


def resumed_teacher(
    config: TrainConfig, then: Mapping[str, Any], origins: Mapping[str, Origin], output: Path
) -> str:
    """Return the path of the teacher of a resumed run; empty for none.

    Args:
        config: Settings, whose paths may be new as long as they lead to the same files.
        then: Settings that the run was started with.
        origins: Files that it was started with.
        output: Folder of the run.

    Raises:
        ConfigError: A file is missing or another one.
    """
    for name, known in (("init_path", ("start",)), ("teacher_path", ("teacher", "start"))):
        given, before = getattr(config, name), then.get(name)
        if given in (None, before):
            continue
        origin = next((origins[each] for each in known if each in origins), None)
        if origin is None:
            raise ConfigError(f"cannot resume with another {name}: {before!r} then, {given!r} now")
        origin.locate(given, flag(name), output)
    if "teacher" not in origins or origins["teacher"].path == config.teacher:
        return ""
    given = config.teacher_path
    if given and given == then.get("teacher_path") and not Path(given).is_file():
        given = None  # a relative path, and another working directory
    return origins["teacher"].locate(given, "--teacher-path", output)
