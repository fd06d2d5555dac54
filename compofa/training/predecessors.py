"""What a phase builds on: its teacher and the weights that it starts from."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from compofa.data import DataSplits
from compofa.data.imagenet import require_order
from compofa.distributed.backend import Backend
from compofa.errors import CheckpointError, ConfigError
from compofa.io.atomic import require_writable
from compofa.io.checkpoint import Checkpoint
from compofa.io.open import OpenedNetwork, open_network
from compofa.io.weights import load_state
from compofa.networks.network_spec import Network
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig, flag
from compofa.training.recipes import Phase, recipe_for
from compofa.training.run_folder import BEST, is_unfinished

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
    phase, taught = config.recipe_phase, config.kd_ratio > 0
    start = Path(config.init_path) if config.init_path else None
    teacher = Path(config.teacher_path) if config.teacher_path else None
    if teacher is None and taught and phase.teacher == "checkpoint":
        teacher = _predecessor(config, output, "teacher", 1, "--teacher-path", train_first, backend)
    if start is None and phase.starts_from is not None:
        task, number = phase.starts_from
        start = teacher if task == "teacher" else None
        if start is None:
            start = _predecessor(config, output, task, number, "--init-path", train_first, backend)
    return Predecessors(teacher if taught else None, start)


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
    path = folder / BEST

    def look() -> tuple[bool, bool]:
        unfinished = is_unfinished(folder)
        ready = path.exists() and not unfinished
        if not ready and not (recipe.quick and phase.largest_only):
            raise ConfigError(
                f"task {config.task} starts from the best checkpoint of a finished {task} run, "
                f"expected at {path}: give one with {flag}, or make it with: "
                f"{_command(config, phase, output)}{' --resume' * unfinished}"
            )
        if not ready:
            require_writable(output / config.recipe_phase.folder)
        return ready, unfinished

    ready, unfinished = backend.from_main(look)
    if ready:
        return path
    log.info("%s %s at %s: training it first", "unfinished" if unfinished else "no", task, path)
    own = ("epochs", "lr", "warmup_epochs", "dynamic_batch_size", "teacher_path", "init_path")
    first = config.of_phase(phase, **dict.fromkeys(own))
    return train_first(first, unfinished)


def _command(config: TrainConfig, phase: Phase, output: Path) -> str:
    """Return the command that trains ``phase`` of the network that ``config`` describes."""
    words = ["python", "train_ofa_net.py", "--task", phase.task]
    words += ["--phase", str(phase.number)] * (not phase.largest_only)
    for name in ("dataset", "data_path", "net", "heuristic", "width_mult"):
        value = getattr(config, name)
        words += [flag(name), str(value)] * (value is not None)
    if config.fixed_kernel is not None:
        words.append("--fixed-kernel" if config.fixed_kernel else "--no-fixed-kernel")
    return shlex.join([*words, "--output", str(output)])


def open_predecessor(source: str, student: Network | None, teaches: bool) -> OpenedNetwork:
    """Open a network that a phase builds on.

    Args:
        source: What :func:`compofa.io.open.open_network` takes.
        student: Definition of the network to train, whose weights those without a definition are;
            ``None`` to recognise them.
        teaches: Whether it is the teacher, which has the largest kernels of the student's backbone
            and whose stages are as large as they get.

    Raises:
        CompofaError: It cannot be used.
    """
    if not isinstance(student, NetworkSpec):
        return open_network(source)
    if teaches:
        largest = student.backbone.free_space().restrict(kernels=(max(student.backbone.kernels),))
        student = replace(student, space=largest, kernel_transform=False)
    return open_network(source, arch=student)


def check_fits(found: Checkpoint, option: str, path: str, splits: DataSplits) -> None:
    """Check that a network sees the images, and names the classes, as those of ``splits``.

    Weights without names of their classes do not say how their images were normalised either.

    Raises:
        CheckpointError: It has other classes or another order of them, or another normalisation.
        DataError: It does not name its classes, and numbered folders are in another order.
    """
    if not found.classes:
        require_order(splits.classes)
        return
    if found.classes != splits.classes:
        raise CheckpointError(
            f"{option} {path}: expected {differing(splits.classes, found.classes)}"
        )
    wanted, norm = splits.normalisation, found.normalisation
    if norm != wanted:
        raise CheckpointError(
            f"{option} {path}: expected images normalised with mean {wanted.mean} and deviation "
            f"{wanted.std}, got {norm.mean} and {norm.std}"
        )


def differing(wanted: tuple[str, ...], found: tuple[str, ...]) -> str:
    """Say how lists of classes differ: ``class 2 of 3 to be 'cat', got 'dog' of 3``."""
    pairs = enumerate(zip_longest(wanted, found), 1)
    number, (one, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return f"class {number} of {len(wanted)} to be {one!r}, got {other!r} of {len(found)}"


def teacher_of(
    opened: OpenedNetwork, path: str, student: Network, splits: DataSplits
) -> StaticNetwork:
    """Return a teacher: a specialised network, or the largest subnet of a supernet.

    Args:
        opened: The network.
        path: What to call it in errors.
        student: The network that will learn from it.
        splits: The data set, normalised as the student's images are.

    Raises:
        CheckpointError: It has other classes or another normalisation.
    """
    check_fits(opened.checkpoint, "--teacher-path", path, splits)
    net = opened.network
    if net.classifier.out_features != student.classes:
        raise CheckpointError(
            f"{path}: expected a teacher with {student.classes} classes, "
            f"got {net.classifier.out_features}"
        )
    return (extract(net, net.spec.space.largest) if isinstance(net, Supernet) else net).eval().cpu()


def load_start(net: Supernet, opened: OpenedNetwork, path: str, splits: DataSplits) -> Checkpoint:
    """Load the weights of the predecessor.

    Args:
        net: The network to train.
        opened: The predecessor.
        path: What to call it in errors.
        splits: The data set.

    Returns:
        What its file says of it, without weights and training state.

    Raises:
        CheckpointError: The weights do not fit, or are for other classes or another normalisation.
    """
    found = opened.checkpoint
    check_fits(found, "--init-path", path, splits)
    load_state(net, found.weights, path)
    return replace(found, weights={}, training=None)
