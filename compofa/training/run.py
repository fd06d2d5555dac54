"""Runs: plan the phases of a task, train each, save after every epoch and on request."""

from __future__ import annotations

import json
import logging
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compofa.distributed.backend import Backend, SingleProcess
from compofa.distributed.threads import cpu_threads
from compofa.errors import ConfigError, StoppedError, TrainingError
from compofa.io.atomic import write_text_atomic
from compofa.io.checkpoint import Checkpoint, save_checkpoint
from compofa.io.locks import exclusive_by_main
from compofa.io.open import OpenedNetwork
from compofa.training.config import TrainConfig, default_network, flag
from compofa.training.journal import SUMMARY, Journal, cost_report
from compofa.training.recipes import CHAINS, recipe_for
from compofa.training.run_folder import (
    BEST,
    CONFIG,
    LAST,
    PREVIOUS,
    clear,
    has_checkpoint,
    prepare_resume,
    require_no_run,
)
from compofa.training.shutdown import Saver, Stopping
from compofa.training.start import Start, start_phase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Attributes:
        best: Checkpoint of the best validation.
        last: Checkpoint of the last epoch, with the state to resume from.
        figures: Figures of the best validation, by subnet.
        seconds: Training time, including that before a resumption.
        cost: Device hours of all ranks and what follows from them; see
            :func:`compofa.training.journal.cost_report`.
    """

    best: Path
    last: Path
    figures: dict[str, Any]
    seconds: float
    cost: dict[str, Any]


def plan(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """Return the resolved settings of each phase of a task, in order.

    Most tasks are one phase. In a chain all phases share the network of the last and the settings
    that were given, and a given teacher is not trained.

    Raises:
        ConfigError: Settings are unknown or out of range; the message lists all of them.
    """
    if config.task not in CHAINS:
        return (config.resolved(),)
    faults = []
    if config.phase != 1:
        faults.append(f"task {config.task}: expected phase 1, got {config.phase}")
    if config.init_path is not None:
        faults.append(f"--init-path: expected none with --task {config.task}")
    if faults:
        raise ConfigError("; ".join(faults))
    chain = recipe_for(config.dataset).chain(config.task)
    phases = [replace(config, task=phase.task, phase=phase.number) for phase in chain]
    unused = set.intersection(*({*phase.unused()} for phase in phases))
    faults = [
        f"{flag(name)}: expected none with --task {config.task}"
        for name in phases[-1].given(sorted(unused))
    ]
    if faults:
        raise ConfigError("; ".join(faults))
    net = config.net or default_network(config.dataset, chain[-1])
    return tuple(
        config.of_phase(phase, net=net).resolved()
        for phase in chain
        if not (phase.largest_only and config.teacher_path)
    )


def train(
    config: TrainConfig,
    output: str | Path | None = None,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    bar: bool = True,
    after_epoch: Callable[[int], None] | None = None,
    backend: Backend | None = None,
    stop: Stopping | None = None,
    initial: OpenedNetwork | None = None,
) -> RunResult:
    """Train a task: one phase, or those of a chain, and on quick data a missing teacher first.

    Args:
        config: Settings.
        output: Folder of the run, with one folder per phase; by default
            ``runs/DATASET-NET``.
        resume: Continue from the last checkpoint; completed phases are kept. The result equals that
            of an uninterrupted run, to the bit on a CPU with the same number of threads. ``None``
            resumes if there is a checkpoint, and starts a new run otherwise.
        overwrite: Replace an existing run.
        bar: Whether to show progress bars.
        after_epoch: Called with the number of completed epochs of the phase after each is saved.
        backend: Ranks that all call this with the same arguments. Only rank 0 needs access to
            ``output``.
        stop: Requests to stop.
        initial: The network of ``config.init_path``, if it is open already.

    Returns:
        The result of the last phase, with time and cost of all.

    Raises:
        StoppedError: A stop was requested; the state up to the last step is saved.
        BusyError: Another process is training in ``output``.
        CompofaError: Another user error; no file is left half-written.
    """
    backend, stop = backend or SingleProcess(), stop or Stopping()
    phases = backend.local_main_first(lambda: plan(config))
    if output is None:
        output = Path("runs") / f"{config.dataset}-{phases[-1].net or config.task}"
    output = Path(output)
    with exclusive_by_main(backend, output, folder=True):
        folders = [output / phase.recipe_phase.folder for phase in phases]
        started = backend.from_main(lambda: _started(folders, resume, overwrite))
        resume = bool(started) if resume is None else resume
        stale = folders[1:] if overwrite and not resume else []
        results = [
            train_phase(
                phase,
                output,
                resume=resume and (folder in started or (folder == folders[0] and not started)),
                overwrite=overwrite,
                bar=bar,
                after_epoch=after_epoch,
                backend=backend,
                stop=stop,
                initial=initial,
                discard=stale if folder == folders[0] else (),
            )
            for phase, folder in zip(phases, folders, strict=True)
        ]
    cost = sum((Counter(result.cost) for result in results), Counter())
    return replace(results[-1], seconds=sum(result.seconds for result in results), cost=dict(cost))


def _started(folders: list[Path], resume: bool | None, overwrite: bool) -> list[Path]:
    """Return the folders with a checkpoint, which a new run must not have unless it overwrites."""
    if resume is False and not overwrite:
        for folder in folders:
            require_no_run(folder)
    return [folder for folder in folders if has_checkpoint(folder)]


def train_phase(
    config: TrainConfig,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    bar: bool = True,
    after_epoch: Callable[[int], None] | None = None,
    backend: Backend | None = None,
    stop: Stopping | None = None,
    initial: OpenedNetwork | None = None,
    discard: Sequence[Path] = (),
) -> RunResult:
    """Train one phase as :func:`train` does, for callers that hold the lock on ``output``.

    ``config`` must be resolved. The folders of later phases, ``discard``, are cleared when this one
    starts.
    """
    backend, stop = backend or SingleProcess(), stop or Stopping()

    def train_first(first: TrainConfig, unfinished: bool) -> Path:
        return train_phase(
            first.resolved(), output, resume=unfinished, bar=bar, backend=backend, stop=stop
        ).best

    with cpu_threads(config.threads):
        if any(backend.gather(stop.requested)):  # while the phase before this one was ending
            raise stop.error("; continue with --resume")
        folder = output / config.recipe_phase.folder
        start = start_phase(
            config, output, folder, resume, overwrite, train_first, backend, initial
        )
        return Run(config, folder, start, stop, bar).fit(after_epoch, discard)


class Run:
    """One phase in training.

    Args:
        config: Resolved settings.
        folder: Folder of its files.
        start: Network, data and state to train from.
        stop: Requests to stop.
        bar: Whether to show progress bars.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, start: Start, stop: Stopping, bar: bool
    ) -> None:
        self.config, self.folder, self.start, self.stop = config, folder, start, stop
        self.trainer, self.state = start.trainer, start.trainer.state
        self.backend = self.trainer.backend
        self.bar = bar and self.backend.is_main
        self.saver = Saver(self._save, folder / LAST, config.save_minutes, stop)
        self._began = time.perf_counter() - self.state.seconds

    def fit(
        self, after_epoch: Callable[[int], None] | None = None, discard: Sequence[Path] = ()
    ) -> RunResult:
        """Train the remaining epochs.

        Args:
            after_epoch: Called with the number of completed epochs after each is saved.
            discard: Folders of later phases, cleared first.

        Raises:
            StoppedError: A stop was requested; the state is saved.
            TrainingError: Too many consecutive steps were skipped.
        """
        self.backend.from_main(lambda: self._prepare_folder(discard))
        first, journal = self.state.epoch, None
        if self.backend.is_main:
            journal = Journal(self.folder, first, first * self.trainer.steps)
        self._log_start()
        try:
            with self.stop.deferred():
                for epoch in range(first, self.config.epochs):
                    self._epoch(epoch, journal)
                    if after_epoch is not None:
                        after_epoch(epoch + 1)
        except TrainingError as error:
            raise self._with_advice(error) from None
        finally:
            if journal is not None:
                journal.close()
        return self._finish()

    def _prepare_folder(self, discard: Sequence[Path]) -> None:
        """Remove files of other runs and write the settings."""
        if self.start.resumed is not None:
            prepare_resume(self.folder, self.start.resumed)
            return
        for old in filter(Path.exists, discard):
            clear(old)
        clear(self.folder)
        settings = {"config": self.config.to_json(), "network": self.start.spec.to_json()}
        write_text_atomic(self.folder / CONFIG, json.dumps(settings, indent=2) + "\n")

    def _log_start(self) -> None:
        config, splits, spec = self.config, self.start.splits, self.start.spec
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
            config.epochs, self.trainer.steps, self.folder,
        )  # fmt: skip

    def _epoch(self, epoch: int, journal: Journal | None) -> None:
        """Train one epoch, validate if due, and save."""
        config, state = self.config, self.state
        metrics: dict[str, Any] = {"train": self.trainer.train_epoch(epoch, self.bar, self.saver)}
        improved = False
        if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
            metrics["validation"] = figures = self._validate()
            score = sum(f["top1"] for f in figures.values()) / len(figures)
            improved = score > state.score
            if improved:
                state.score, state.figures = score, figures
        state.epoch = epoch + 1
        if journal is not None:
            if improved:
                save_checkpoint(self.folder / BEST, self.checkpoint())
            step = (epoch + 1) * self.trainer.steps
            journal.write({"epoch": epoch, "step": step, **metrics})
        self.saver.save()
        text = f"epoch {epoch + 1}/{config.epochs}: loss {metrics['train']['loss']:.3f}"
        for name, figures in metrics.get("validation", {}).items():
            text += f", {name} {figures['top1']:.2f} %"
        log.info(text)
        self.backend.commit()

    def _validate(self) -> dict[str, dict[str, float]]:
        """Validate. Requests to stop are not deferred.

        Raises:
            StoppedError: A stop was requested; the state is saved.
        """
        try:
            with self.stop.at_once():
                return self.trainer.validate()
        except StoppedError:
            self.saver.save(stopping=True)
            raise

    def checkpoint(self) -> Checkpoint:
        """Return the network as it is now, without the state to resume from."""
        config, spec, splits = self.config, self.start.spec, self.start.splits
        if spec.elastic:  # only the subnets that were trained
            spec = replace(spec, space=config.recipe_phase.within(spec.space))
        return Checkpoint(
            network=spec,
            weights=self.trainer.net.state_dict(),
            classes=splits.classes,
            mean=splits.normalisation.mean,
            std=splits.normalisation.std,
            dataset=config.dataset,
            data_path=os.path.abspath(config.data_path) if config.data_path else "",
            data_seed=config.seed,
            validation_images=config.validation_images,
            image_size=config.eval_size,
            figures={"validation": self.state.figures, "epoch": self.state.epoch},
            data=self.start.data,
            resolutions=config.image_size or (),
        )

    def _save(self) -> None:
        """Write the checkpoint to resume from."""
        self.state.seconds = time.perf_counter() - self._began
        if self.backend.is_main:
            origins = self.start.origins.items()
            training = {
                "config": self.config.to_json(),
                "origins": {name: [origin.path, origin.digest] for name, origin in origins},
                "workers": self.backend.size,
                **self.state.state_dict(),
            }
            checkpoint = replace(self.checkpoint(), training=training)
            save_checkpoint(self.folder / LAST, checkpoint, self.folder / PREVIOUS)

    def _finish(self) -> RunResult:
        """Write the summary, whose presence marks the phase as completed."""
        config, state = self.config, self.state
        cost = cost_report(
            state.seconds * self.backend.size, config.device, config.price, config.power
        )
        summary = {"best": state.figures, "seconds": state.seconds, **cost}
        if state.skipped:
            summary["skipped_steps"] = state.skipped
        if state.broken.paths:
            summary["broken_images"] = len(state.broken.paths)
        text = json.dumps(summary, indent=2) + "\n"
        self.backend.from_main(lambda: write_text_atomic(self.folder / SUMMARY, text))
        best, last = self.folder / BEST, self.folder / LAST
        return RunResult(best, last, state.figures, state.seconds, cost)

    def _with_advice(self, error: TrainingError) -> TrainingError:
        """Add to an error where the last checkpoint is and what to do."""
        kept = [name for name in (LAST, BEST) if (self.folder / name).exists()]
        saved, start = "no checkpoint was saved", ""
        if kept:
            saved = f"the last checkpoint is {self.folder / kept[0]}"
            start = f" and --init-path {shlex.quote(str(self.folder / kept[-1]))}"
        return TrainingError(
            f"{error}; {saved}: start again with a lower --lr{start}, or raise --max-skipped"
        )
