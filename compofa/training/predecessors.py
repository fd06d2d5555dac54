"""What a phase builds on: its teacher and the weights that it starts from."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compofa.checkpoint import from_data, read_safely, weights_in
from compofa.convert import to_ours
from compofa.errors import CheckpointError, ConfigError
from compofa.extract import extract
from compofa.files import require_writable
from compofa.fixed import Network
from compofa.model_zoo import open_checkpoint
from compofa.network import NetworkSpec
from compofa.nn.static import StaticNetwork
from compofa.subnet import SLOTS
from compofa.supernet import Supernet
from compofa.training.config import TrainConfig, run_folder
from compofa.training.journal import SUMMARY
from compofa.training.recipes import Phase, recipe_for
from compofa.training.saving import was_begun
from compofa.weights import load_state
from compofa.workers import Backend

log = logging.getLogger(__name__)

TrainFirst = Callable[[TrainConfig, bool], Path]
"""Trains a predecessor, or goes on with an unfinished one; returns its best checkpoint."""


@dataclass(frozen=True)
class Predecessors:
    """Checkpoints that a phase builds on."""

    teacher: Path | None = None
    start: Path | None = None


def find_predecessors(
    config: TrainConfig, output: Path, train_first: TrainFirst, backend: Backend
) -> Predecessors:
    """Find the teacher and the weights to start from, training a quick teacher if need be."""
    phase = config.recipe_phase
    start = Path(config.init_path) if config.init_path else None
    teacher = Path(config.teacher_path) if config.teacher_path else None
    if phase.teacher == "given":
        return Predecessors(teacher, start)
    if phase.teacher != "checkpoint":
        return Predecessors(None, start)
    if teacher is None:
        teacher = _predecessor(config, output, "teacher", 1, "--teacher-path", train_first, backend)
    if start is None and phase.starts_from is not None:
        task, number = phase.starts_from
        start = teacher
        if task != "teacher":
            start = _predecessor(config, output, task, number, "--init-path", train_first, backend)
    return Predecessors(teacher, start)


def _predecessor(
    config: TrainConfig,
    output: Path,
    task: str,
    number: int,
    flag: str,
    train_first: TrainFirst,
    backend: Backend,
) -> Path:
    """Return the best checkpoint of an earlier phase of this run."""
    recipe = recipe_for(config.dataset)
    phase = recipe.phase(task, number)
    folder = output / phase.folder
    path = folder / "best.pt"

    def look() -> tuple[bool, bool]:
        unfinished = was_begun(folder) and not (folder / SUMMARY).exists()
        ready = path.exists() and not unfinished
        if not ready and not (recipe.quick and phase.largest_only):
            raise ConfigError(
                f"task {config.task} starts from the best checkpoint of a finished {task} run, "
                f"expected at {path}: give one with {flag}, or make it with: "
                f"{_command(config, phase, output)}{' --resume' * unfinished}"
            )
        if not ready:
            require_writable(run_folder(config, output))
        return ready, unfinished

    ready, unfinished = backend.from_main(look)
    if ready:
        return path
    log.info("%s %s at %s: training it first", "unfinished" if unfinished else "no", task, path)
    own = ("epochs", "lr", "warmup_epochs", "dynamic_batch_size", "teacher_path", "init_path")
    first = replace(config, task=task, phase=number, **dict.fromkeys(own))
    return train_first(first, unfinished)


def _command(config: TrainConfig, phase: Phase, output: Path) -> str:
    """Return the command that trains ``phase`` of the network that ``config`` describes."""
    words = ["python", "train_ofa_net.py", "--task", phase.task]
    words += ["--phase", str(phase.number)] * (not phase.largest_only)
    for name in ("dataset", "data_path", "net", "heuristic", "width_mult"):
        value = getattr(config, name)
        words += [f"--{name.replace('_', '-')}", str(value)] * (value is not None)
    if config.fixed_kernel is not None:
        words.append("--fixed-kernel" if config.fixed_kernel else "--no-fixed-kernel")
    return shlex.join([*words, "--output", str(output)])


def load_teacher(path: str | Path, student: Network) -> StaticNetwork:
    """Read a teacher: the largest subnet of a checkpoint, ours or of a published program.

    Args:
        path: The file.
        student: The network that will learn from it.

    Raises:
        CheckpointError: It cannot be read or has another number of classes.
    """
    net = _teacher(path, student)
    if net.classifier.out_features != student.classes:
        raise CheckpointError(
            f"{path}: expected a teacher with {student.classes} classes, "
            f"got {net.classifier.out_features}"
        )
    return (extract(net, net.spec.space.largest) if isinstance(net, Supernet) else net).eval()


def _teacher(path: str | Path, student: Network) -> Supernet | StaticNetwork:
    if not isinstance(student, NetworkSpec):
        return open_checkpoint(str(path))[1].build()
    data = read_safely(path)
    if data.get("format"):
        return from_data(path, data).build()
    return _foreign_teacher(path, data, student)


def _foreign_teacher(path: str | Path, data: dict[str, Any], student: NetworkSpec) -> Supernet:
    """Build a teacher from another program's weights, its classes and kernels read off them."""
    weights = weights_in(path, data)
    bias = to_ours(weights, SLOTS).get("classifier.bias")
    largest = max(student.backbone.kernels)
    spec = replace(
        student,
        classes=student.classes if bias is None else bias.numel(),
        space=student.backbone.free_space().restrict(kernels=(largest,)),
        kernel_transform=False,
    )
    net = Supernet(spec)
    load_state(net, weights, str(path))
    return net.eval()


def load_start(net: Supernet, path: Path) -> None:
    """Load the weights of the predecessor, ours or another program's."""
    data = read_safely(path)
    ours = bool(data.get("format"))
    weights = from_data(path, data).weights if ours else weights_in(path, data)
    load_state(net, weights, str(path))
