"""A run: set up, find what it starts from, train, save after every epoch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compofa.checkpoint import Checkpoint, save_checkpoint
from compofa.data import DataSplits, Normalisation, load_dataset
from compofa.errors import ConfigError, StoppedError, TrainingError
from compofa.files import write_text_atomic
from compofa.fixed import Network
from compofa.nn.static import StaticNetwork
from compofa.sorting import sort_channels
from compofa.supernet import Supernet
from compofa.threads import cpu_threads
from compofa.training.config import TrainConfig, run_folder
from compofa.training.finetune import open_single
from compofa.training.journal import SUMMARY, Journal, cost_report
from compofa.training.predecessors import find_predecessors, load_start, load_teacher
from compofa.training.recipes import recipe_for
from compofa.training.saving import (
    BEST,
    CONFIG,
    LAST,
    PREVIOUS,
    Progress,
    Saver,
    clear,
    mend,
    saved_state,
)
from compofa.training.stopping import Stopping
from compofa.training.trainer import Trainer
from compofa.weights import load_state
from compofa.workers import Alone, Backend

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """What a run ended with.

    Attributes:
        best: Checkpoint of the best validation.
        last: Checkpoint of the last epoch, with the state to resume from.
        figures: The best validation's figures.
        seconds: Time in training, resumed parts included.
        cost: Device hours of all workers and what follows from them.
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
    backend: Backend | None = None,
    stop: Stopping | None = None,
    discard: Sequence[Path] = (),
) -> RunResult:
    """Train one phase, and on quick data the teacher that it lacks.

    Args:
        config: Settings; defaults are filled in here.
        output: Folder of the run; each phase has a folder of its own in it.
        resume: Go on from the last saved step. The result is that of a run that was never
            interrupted, bit for bit on a CPU with the same number of threads.
        overwrite: Begin again where a run of this phase already is.
        bar: Whether to draw progress bars.
        after_epoch: Called with the number of epochs done after each is saved.
        backend: Workers that all call this with the same arguments. Worker 0 reads and writes the
            run's files; nobody else needs to see its folder.
        stop: How to ask for an early end.
        discard: Folders of later phases, whose files go when this one begins.

    Raises:
        StoppedError: It was asked for. What was done is saved, up to the last step.
        CompofaError: Something the user can mend; nothing is half-written.
    """
    config = config.resolved()
    with cpu_threads(config.threads):
        return _run(
            config, Path(output), resume, overwrite, bar, after_epoch, backend or Alone(),
            stop or Stopping(), discard,
        )  # fmt: skip


def _run(
    config: TrainConfig,
    output: Path,
    resume: bool,
    overwrite: bool,
    bar: bool,
    after_epoch: Callable[[int], None] | None,
    backend: Backend,
    stop: Stopping,
    discard: Sequence[Path],
) -> RunResult:
    if any(backend.gather(stop.requested)):  # while the phase before this one came to its end
        raise stop.error(": go on with --resume")
    folder = run_folder(config, output)
    last, best = folder / LAST, folder / BEST
    state = backend.from_main(lambda: saved_state(config, folder, resume, overwrite))
    backend.in_turn(lambda: check_device(config.device))
    splits = backend.in_turn(
        lambda: load_dataset(
            config.dataset,
            config.data_path,
            seed=config.seed,
            validation_images=config.validation_images,
        )
    )
    found = (len(splits.train), len(splits.validation), len(splits.classes))
    backend.require_same("numbers of training images, validation images and classes", found)
    single = config.recipe_phase.single
    if single:
        begun = (
            state["checkpoint"]
            if state
            else backend.from_main(partial(open_single, config, splits))
        )
        spec = begun.network
        splits = replace(splits, normalisation=Normalisation(begun.mean, begun.std))
    else:
        spec = config.network(len(splits.classes))

    def train_first(first: TrainConfig, unfinished: bool) -> Path:
        return train(first, output, resume=unfinished, bar=bar, backend=backend, stop=stop).best

    device = backend.in_turn(lambda: backend.device(config.device))
    if state is not None:
        teacher_path = state["teacher"]
    else:
        predecessors = find_predecessors(config, output, train_first, backend)
        teacher_path = str(predecessors.teacher or "")
    teacher = None
    if teacher_path:
        teacher = backend.from_main(lambda: load_teacher(teacher_path, spec)).to(device)
    net = spec.build() if single else Supernet(spec, config.seed)
    if state is not None:
        load_state(net, state["weights"], str(state["path"]))
    elif single:
        load_state(net, begun.weights, config.init_path)
    elif predecessors.start is not None:

        def start() -> dict[str, Tensor]:
            load_start(net, predecessors.start)
            if config.recipe_phase.sort:
                recipe, origin = recipe_for(config.dataset), config.recipe_phase.starts_from
                sort_channels(net, groups=recipe.phase(*origin).expands or ())
            return net.state_dict()

        net.load_state_dict(backend.from_main(start))
    net.to(device)
    trainer = Trainer(config, net, teacher, splits, backend)
    if state is not None:
        trainer.load_state_dict(state["trainer"], state["workers"])
    progress = Progress()
    if state is not None:
        progress = Progress(**state["progress"])
        _say_changed_workers(state["workers"], backend.size)
    elif single:
        log.info("before fine-tuning: %.2f %%", trainer.validate()["fine-tuned"]["top1"])

    def begin() -> None:
        if state is not None:
            mend(folder, state["path"])
            return
        for old in filter(Path.exists, discard):
            clear(old)
        clear(folder)
        settings = {"config": config.to_json(), "network": spec.to_json()}
        write_text_atomic(folder / CONFIG, json.dumps(settings, indent=2) + "\n")

    backend.from_main(begin)
    fixed = {"config": config.to_json(), "teacher": teacher_path, "workers": backend.size}
    bar = bar and backend.is_main
    journal = Journal(folder, progress.epoch) if backend.is_main else None
    describe_run(config, splits, spec, trainer.steps, folder)
    started = time.perf_counter() - progress.seconds

    def write() -> None:
        nonlocal progress
        progress = replace(progress, seconds=time.perf_counter() - started)
        if backend.is_main:
            training = {**fixed, "trainer": trainer.state_dict(), "progress": asdict(progress)}
            checkpoint = _checkpoint(config, net, spec, splits, progress)
            save_checkpoint(last, replace(checkpoint, training=training), folder / PREVIOUS)

    saver = Saver(write, last, config.save_minutes, stop)
    try:
        with stop.deferred():
            for epoch in range(progress.epoch, config.epochs):
                stats = trainer.train_epoch(epoch, bar, saver)
                metrics: dict[str, Any] = {"train": asdict(stats)}
                improved = False
                if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
                    try:
                        with stop.at_once():
                            metrics["validation"] = figures = trainer.validate()
                    except StoppedError:
                        saver.save(stopping=True)
                    score = sum(f["top1"] for f in figures.values()) / len(figures)
                    improved = score > progress.score
                    if improved:
                        progress = replace(progress, score=score, figures=figures)
                progress = replace(progress, epoch=epoch + 1)
                if journal is not None:
                    if improved:
                        save_checkpoint(best, _checkpoint(config, net, spec, splits, progress))
                    journal.write({"epoch": epoch, "step": (epoch + 1) * trainer.steps, **metrics})
                saver.save()
                _say(epoch, config, metrics)
                backend.saved()
                if after_epoch is not None:
                    after_epoch(epoch + 1)
    except TrainingError as error:
        raise _explained(error, folder) from None
    finally:
        if journal is not None:
            journal.close()
    cost = cost_report(progress.seconds * backend.size, config.device, config.price, config.power)
    summary = {"best": progress.figures, "seconds": progress.seconds, **cost}
    if trainer.skipped:
        summary["skipped_steps"] = trainer.skipped
    if trainer.broken.paths:
        summary["broken_images"] = len(trainer.broken.paths)
    text = json.dumps(summary, indent=2) + "\n"
    backend.from_main(lambda: write_text_atomic(folder / SUMMARY, text))
    return RunResult(best, last, progress.figures, progress.seconds, cost)


def _checkpoint(
    config: TrainConfig,
    net: Supernet | StaticNetwork,
    spec: Network,
    splits: DataSplits,
    progress: Progress,
) -> Checkpoint:
    if spec.elastic:  # only the subnets that this phase trained are worth drawing
        spec = replace(spec, space=config.recipe_phase.within(spec.space))
    return Checkpoint(
        network=spec,
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


def _explained(error: TrainingError, folder: Path) -> TrainingError:
    """Say where the last good state is."""
    kept = [name for name in (LAST, BEST) if (folder / name).exists()]
    what, start = "nothing was saved yet", ""
    if kept:
        what = f"{folder / kept[0]} keeps the last good state"
        start = f", from --init-path {folder / kept[-1]}"
    return TrainingError(
        f"{error}; {what}: begin again with a lower --lr{start}, or raise --max-skipped"
    )


def _say_changed_workers(then: int, now: int) -> None:
    if then != now:
        log.info(
            "begun with %d worker(s), going on with %d: batches and learning rates differ",
            then, now,
        )  # fmt: skip


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
    config: TrainConfig, splits: DataSplits, spec: Network, steps: int, folder: Path
) -> None:
    """Log what is about to be trained."""
    if spec.elastic:
        space = config.recipe_phase.within(spec.space)
        what = f"space {space.name} of {space.size:.4g} subnets"
    else:
        what = str(spec.subnet)
    log.info(
        "%s: %s on %s (%d training, %d validation images, %d classes); "
        "%s; %d epochs of %d steps; results in %s",
        config.recipe_phase.folder, config.net or config.init_path, config.dataset,
        len(splits.train), len(splits.validation), len(splits.classes), what,
        config.epochs, steps, folder,
    )  # fmt: skip


def _say(epoch: int, config: TrainConfig, metrics: dict[str, Any]) -> None:
    text = f"epoch {epoch + 1}/{config.epochs}: loss {metrics['train']['loss']:.3f}"
    for name, figures in metrics.get("validation", {}).items():
        text += f", {name} {figures['top1']:.2f} %"
    log.info(text)
