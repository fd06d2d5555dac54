"""What a phase builds on: its teacher and the weights that it starts from."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from compofa.data import DataSplits, Normalisation
from compofa.data.imagenet import require_order
from compofa.distributed.backend import Backend
from compofa.errors import CheckpointError, ConfigError
from compofa.io.atomic import require_writable
from compofa.io.checkpoint import Checkpoint, read_safely, weights_in
from compofa.io.formats.names import to_ours
from compofa.io.formats.specialised import EXTRA, find_specialised
from compofa.io.weights import load_state
from compofa.networks.network_spec import Network
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import open_checkpoint
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig, run_folder
from compofa.training.journal import SUMMARY
from compofa.training.recipes import Phase, recipe_for
from compofa.training.saving import was_begun

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
    first = config.of_phase(task, number, **dict.fromkeys(own))
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


def open_predecessor(path: str, student: Network) -> tuple[Path, Checkpoint]:
    """Read a checkpoint of any format, by the definition in it where it has one.

    Args:
        path: A file, or whatever :func:`compofa.networks.zoo.open_checkpoint` takes.
        student: Whose weights those without a definition are.

    Returns:
        The file of the weights, and what it holds.

    Raises:
        CompofaError: It cannot be read.
    """
    file = Path(path)
    if isinstance(student, NetworkSpec) and file.is_file() and find_specialised(file) is None:
        data = read_safely(file)
        if not {"format", EXTRA} & data.keys():
            return file, Checkpoint(student, weights_in(file, data))
    return open_checkpoint(path)


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
    wanted, norm = splits.normalisation, Normalisation(found.mean, found.std)
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


def load_teacher(path: str, student: Network, splits: DataSplits) -> StaticNetwork:
    """Read a teacher: the largest subnet of a checkpoint, ours or of a published program.

    Args:
        path: The file.
        student: The network that will learn from it.
        splits: The data set, normalised as the student's images are.

    Raises:
        CheckpointError: It cannot be read, has other classes or sees images otherwise normalised.
    """
    file, found = open_predecessor(path, student)
    check_fits(found, "--teacher-path", path, splits)
    if found.network is student and isinstance(student, NetworkSpec):
        found = _largest(found, student)
    net = found.build(str(file))
    if net.classifier.out_features != student.classes:
        raise CheckpointError(
            f"{path}: expected a teacher with {student.classes} classes, "
            f"got {net.classifier.out_features}"
        )
    return (extract(net, net.spec.space.largest) if isinstance(net, Supernet) else net).eval()


def _largest(found: Checkpoint, student: NetworkSpec) -> Checkpoint:
    """Define the network of weights alone, its classes and kernels read off them."""
    bias = to_ours(found.weights).get("classifier.bias")
    spec = replace(
        student,
        classes=student.classes if bias is None else bias.numel(),
        space=student.backbone.free_space().restrict(
            kernel=(max(student.backbone.values("kernel")),)
        ),
        kernel_transform=False,
    )
    return replace(found, network=spec)


def load_start(net: Supernet, path: str, splits: DataSplits) -> Checkpoint:
    """Load the weights of the predecessor, ours or another program's.

    Returns:
        What the file says of them, without weights and training state.

    Raises:
        CheckpointError: They cannot be read, do not fit, or are for other classes or images
            otherwise normalised.
    """
    found = open_predecessor(path, net.spec)[1]
    check_fits(found, "--init-path", path, splits)
    load_state(net, found.weights, path)
    return replace(found, weights={}, training=None)
