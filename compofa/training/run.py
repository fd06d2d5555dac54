"""A run: set up, find what it starts from, train, save after every epoch."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compofa.checkpoint import (
    Checkpoint,
    load_checkpoint,
    read_safely,
    save_checkpoint,
    weights_in,
)
from compofa.data import DataSplits, load_dataset
from compofa.errors import CheckpointError, ConfigError
from compofa.extract import extract
from compofa.files import require_writable, write_text_atomic
from compofa.network import NetworkSpec
from compofa.nn.static import StaticNetwork
from compofa.sorting import sort_channels
from compofa.supernet import Supernet
from compofa.threads import cpu_threads
from compofa.training.config import TrainConfig, run_folder
from compofa.training.journal import Journal, cost_report
from compofa.training.recipes import Phase, recipe_for
from compofa.training.trainer import Trainer
from compofa.weights import load_state

log = logging.getLogger(__name__)

SUMMARY = "summary.json"
"""Written at the end of a run: its presence says that the run is complete."""


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        best: Checkpoint of the best validation.
        last: Checkpoint of the last epoch, with the state to resume from.
        figures: The best validation's figures.
        seconds: Time in training, resumed parts included.
        cost: Device hours and what follows from them.
    """

    best: Path
    last: Path
    figures: dict[str, Any]
    seconds: float
    cost: dict[str, Any]


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    bar: bool = True,
    after_epoch: Callable[[int], None] | None = None,
) -> RunResult:
    """Train one phase, and on quick data the teacher that it lacks.

    Args:
        config: Settings; defaults are filled in here.
        output: Folder of the run; each phase has a folder of its own in it.
        resume: Go on from the last saved epoch. The result is that of a run that was never
            interrupted, bit for bit on a CPU with the same number of threads.
        overwrite: Begin again where a run of this phase already is.
        bar: Whether to draw progress bars.
        after_epoch: Called with the number of epochs done after each is saved.

    Raises:
        CompofaError: Something the user can mend; nothing is half-written.
    """
    config = config.resolved()
    with cpu_threads(config.threads):
        return _run(config, Path(output), resume, overwrite, bar, after_epoch)


def _run(
    config: TrainConfig,
    output: Path,
    resume: bool,
    overwrite: bool,
    bar: bool,
    after_epoch: Callable[[int], None] | None,
) -> RunResult:
    folder = run_folder(config, output)
    last, best = folder / "last.pt", folder / "best.pt"
    state = _saved_state(config, last, resume, overwrite)
    check_device(config.device)
    splits = load_dataset(
        config.dataset,
        config.data_path,
        seed=config.seed,
        validation_images=config.validation_images,
    )
    spec = config.network(len(splits.classes))
    predecessors = _find_predecessors(config, output, bar) if state is None else None
    net = Supernet(spec, config.seed).to(config.device)
    teacher = None
    if config.recipe_phase.teacher == "checkpoint":
        teacher_path = state["teacher"] if state else str(predecessors.teacher)
        teacher = load_teacher(teacher_path, spec).to(config.device)
    trainer = Trainer(config, net, teacher, splits)
    if state is not None:
        load_state(net, state["weights"], str(last))
        trainer.load_state_dict(state["trainer"])
    elif predecessors.start is not None:
        _load_start(net, predecessors.start)
        if config.recipe_phase.sort:
            recipe, origin = recipe_for(config.dataset), config.recipe_phase.starts_from
            sort_channels(net, groups=recipe.phase(*origin).expands or ())
    require_writable(folder)
    progress = _Progress(0, float("-inf"), {}, 0.0)
    if state is not None:
        progress = _Progress(**state["progress"])
    else:
        for old in (last, best, folder / "metrics.jsonl", folder / SUMMARY):
            old.unlink(missing_ok=True)
        settings = {"config": config.to_json(), "network": spec.to_json()}
        write_text_atomic(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    fixed = {
        "config": config.to_json(),
        "teacher": str(state["teacher"] if state else predecessors.teacher or ""),
    }
    journal = Journal(folder, progress.epoch)
    describe_run(config, splits, spec, trainer.steps, folder)
    try:
        for epoch in range(progress.epoch, config.epochs):
            started = time.perf_counter()
            stats = trainer.train_epoch(epoch, bar)
            metrics: dict[str, Any] = {"train": asdict(stats)}
            improved = False
            if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
                metrics["validation"] = figures = trainer.validate()
                score = sum(f["top1"] for f in figures.values()) / len(figures)
                improved = score > progress.score
                if improved:
                    progress = replace(progress, score=score, figures=figures)
            seconds = progress.seconds + time.perf_counter() - started
            progress = replace(progress, epoch=epoch + 1, seconds=seconds)
            checkpoint = _checkpoint(config, net, splits, progress)
            if improved:
                save_checkpoint(best, checkpoint)
            training = {**fixed, "trainer": trainer.state_dict(), "progress": asdict(progress)}
            journal.write({"epoch": epoch, "step": (epoch + 1) * trainer.steps, **metrics})
            save_checkpoint(last, replace(checkpoint, training=training))
            _say(epoch, config, metrics)
            if after_epoch is not None:
                after_epoch(epoch + 1)
    finally:
        journal.close()
    cost = cost_report(progress.seconds, config.device, config.price, config.power)
    summary = {"best": progress.figures, "seconds": progress.seconds, **cost}
    if trainer.broken.paths:
        summary["broken_images"] = len(trainer.broken.paths)
    write_text_atomic(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return RunResult(best, last, progress.figures, progress.seconds, cost)


@dataclass(frozen=True)
class _Progress:
    """How far a run is: epochs done, best score and its figures, seconds spent."""

    epoch: int
    score: float
    figures: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class _Predecessors:
    """Checkpoints that a phase builds on."""

    teacher: Path | None = None
    start: Path | None = None


def _saved_state(
    config: TrainConfig, last: Path, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Return the state to resume from, or ``None`` to begin."""
    if not resume:
        if last.exists() and not overwrite:
            raise ConfigError(
                f"{last.parent} holds a run already: go on with --resume, begin again with "
                "--overwrite, or choose another --name"
            )
        return None
    if not last.exists():
        raise ConfigError(f"nothing to resume: expected a checkpoint at {last}")
    checkpoint = load_checkpoint(last)
    try:
        training = dict(checkpoint.training or {})
        changes = config.changes_since(training["config"])
        state = {
            "weights": checkpoint.weights,
            "teacher": str(training["teacher"]),
            "trainer": training["trainer"],
            "progress": {name: training["progress"][name] for name in _Progress.__annotations__},
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{last}: no training state to resume from ({error!r})") from None
    if changes:
        raise ConfigError(
            f"cannot resume {last.parent} with changed settings: {'; '.join(changes)}"
        )
    return state


def _find_predecessors(config: TrainConfig, output: Path, bar: bool) -> _Predecessors:
    """Find the teacher and the weights to start from, training a quick teacher if need be."""
    phase = config.recipe_phase
    start = Path(config.init_path) if config.init_path else None
    if phase.teacher != "checkpoint":
        return _Predecessors(None, start)
    teacher = Path(config.teacher_path) if config.teacher_path else None
    if teacher is None:
        teacher = _predecessor(config, output, "teacher", 1, "--teacher-path", bar)
    if start is None and phase.starts_from is not None:
        task, number = phase.starts_from
        start = teacher
        if task != "teacher":
            start = _predecessor(config, output, task, number, "--init-path", bar)
    return _Predecessors(teacher, start)


def _predecessor(
    config: TrainConfig, output: Path, task: str, number: int, flag: str, bar: bool
) -> Path:
    """Return the best checkpoint of an earlier phase of this run."""
    recipe = recipe_for(config.dataset)
    phase = recipe.phase(task, number)
    folder = output / phase.folder
    path = folder / "best.pt"
    unfinished = (folder / "last.pt").exists() and not (folder / SUMMARY).exists()
    if path.exists() and not unfinished:
        return path
    if not (recipe.quick and phase.largest_only):
        raise ConfigError(
            f"task {config.task} starts from the best checkpoint of a finished {task} run, "
            f"expected at {path}: give one with {flag}, or make it with: "
            f"{_command(config, phase, output)}{' --resume' * unfinished}"
        )
    log.info("%s %s at %s: training it first", "unfinished" if unfinished else "no", task, path)
    require_writable(run_folder(config, output))
    own = ("epochs", "lr", "warmup_epochs", "dynamic_batch_size", "teacher_path", "init_path")
    first = replace(config, task=task, phase=number, **dict.fromkeys(own))
    return train(first, output, resume=unfinished, bar=bar).best


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


def load_teacher(path: str | Path, student: NetworkSpec) -> StaticNetwork:
    """Read a teacher: the largest subnet of a checkpoint, ours or of a published program.

    Args:
        path: The file.
        student: The network that will learn from it.

    Raises:
        CheckpointError: It cannot be read or has another number of classes.
    """
    data = read_safely(path)
    if data.get("format"):
        net = load_checkpoint(path).build()
    else:
        net = _foreign_teacher(path, data, student)
    if net.spec.classes != student.classes:
        raise CheckpointError(
            f"{path}: expected a teacher with {student.classes} classes, got {net.spec.classes}"
        )
    return extract(net, net.spec.space.largest).eval()


def _foreign_teacher(path: str | Path, data: dict[str, Any], student: NetworkSpec) -> Supernet:
    """Build a teacher from another program's weights, its classes and kernels read off them."""
    weights = weights_in(path, data)
    bias = next((v for k, v in weights.items() if k.endswith("classifier.linear.bias")), None)
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


def _load_start(net: Supernet, path: Path) -> None:
    """Load the weights of the predecessor, ours or another program's."""
    data = read_safely(path)
    ours = bool(data.get("format"))
    weights = load_checkpoint(path).weights if ours else weights_in(path, data)
    load_state(net, weights, str(path))


def _checkpoint(
    config: TrainConfig, net: Supernet, splits: DataSplits, progress: _Progress
) -> Checkpoint:
    trained = config.recipe_phase.within(net.spec.space)  # only these subnets are worth drawing
    return Checkpoint(
        network=replace(net.spec, space=trained),
        weights=net.state_dict(),
        classes=splits.classes,
        mean=splits.normalisation.mean,
        std=splits.normalisation.std,
        dataset=config.dataset,
        data_path=config.data_path or "",
        data_seed=config.seed,
        validation_images=config.validation_images,
        image_size=config.eval_size,
        figures={"validation": progress.figures, "epoch": progress.epoch},
    )


def check_device(device: str) -> None:
    """Check that a device exists.

    Raises:
        ConfigError: It does not, or its name is unknown.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: got {device!r}, but torch sees no CUDA device here")


def describe_run(
    config: TrainConfig, splits: DataSplits, spec: NetworkSpec, steps: int, folder: Path
) -> None:
    """Log what is about to be trained."""
    space = config.recipe_phase.within(spec.space)
    log.info(
        "%s: %s on %s (%d training, %d validation images, %d classes); "
        "space %s of %.4g subnets; %d epochs of %d steps; results in %s",
        config.recipe_phase.folder, config.net, config.dataset, len(splits.train),
        len(splits.validation), len(splits.classes), space.name, space.size,
        config.epochs, steps, folder,
    )  # fmt: skip


def _say(epoch: int, config: TrainConfig, metrics: dict[str, Any]) -> None:
    text = f"epoch {epoch + 1}/{config.epochs}: loss {metrics['train']['loss']:.3f}"
    for name, figures in metrics.get("validation", {}).items():
        text += f", {name} {figures['top1']:.2f} %"
    log.info(text)
