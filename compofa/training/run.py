"""Runs: plan the phases of a task, train each, save after every epoch and on request."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from compofa.distributed.backend import Backend, SingleProcess
from compofa.distributed.threads import cpu_threads
from compofa.errors import StoppedError, TrainingError
from compofa.io.atomic import write_text_atomic
from compofa.io.checkpoint import Checkpoint, save_checkpoint
from compofa.io.locks import exclusive_by_main
from compofa.io.open import OpenedNetwork
from compofa.training.adviser import Adviser
from compofa.training.config import TrainConfig
from compofa.training.external import MODULE
from compofa.training.journal import SUMMARY, Journal, cost_report
from compofa.training.loggers import open_loggers, require_logger
from compofa.training.pace import Pace
from compofa.training.plan import default_output, describe, plan
from compofa.training.resume import (
    keep_completed,
    restart_commands,
    resume_command,
    resumed_plan,
    with_progress,
)
from compofa.training.run_folder import (
    BEST,
    LAST,
    PREVIOUS,
    prepare_new,
    prepare_resume,
    started_folders,
    write_settings,
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
    given: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
) -> RunResult:
    """Train a task: one phase, or those of a chain, and on quick data a missing teacher first.

    Args:
        config: Settings.
        output: Folder of the run, with one folder per phase; by default
            ``runs/DATASET-NET``, or ``runs/FOLDER-NET`` for a folder of images.
        resume: Continue from the last checkpoint; completed phases are kept. The result equals that
            of an uninterrupted run, to the bit on a CPU with the same number of threads. ``None``
            resumes if there is a checkpoint, and starts a new run otherwise. Settings that affect
            the result must be those of the run, except that ``epochs`` may be any number from those
            done.
        overwrite: Replace an existing run.
        bar: Whether to show progress bars.
        after_epoch: Called with the number of completed epochs of the phase after each is saved.
        backend: Ranks that all call this with the same arguments. Only rank 0 needs access to
            ``output``.
        stop: Requests to stop.
        initial: The network of ``config.init_path``, if it is open already.
        given: The settings of ``config`` that were given: a resumed run takes all others from its
            own ``config.json``, and the task and phase, too, if it is the only unfinished run in
            ``output``. By default all of ``config``.
        teacher: A module that teaches, from images [n, 3, r, r] normalised as the student's to
            logits [n, classes]; :class:`compofa.training.external.ExternalTeacher` for another
            normalisation. It is moved to the device. A resumed run needs the same.

    Returns:
        The result of the last phase, with time and cost of all.

    Raises:
        StoppedError: A stop was requested; the state up to the last step is saved.
        BusyError: Another process is training in ``output``.
        CompofaError: Another user error; no file is left half-written.
    """
    backend, stop = backend or SingleProcess(), stop or Stopping()
    if teacher is not None:
        config = replace(config, teacher=f"{MODULE}:{type(teacher).__name__}")
    ranks = backend.gather(platform.node()).count(platform.node())
    adviser = Adviser(config, output, initial, ranks, resumed=resume is True)
    from_run, phases = resume is not False and given is not None, ()
    if output is None or not from_run:
        phases = backend.from_main(lambda: plan(config, adviser.resolve))
    if output is None:
        output = backend.from_main(lambda: default_output(phases[-1], resume is not False))
    adviser.output = output = Path(output)
    with exclusive_by_main(backend, output, folder=True):
        if from_run:
            if backend.size > 1:  # the process group was formed for this device
                given = {"device": config.device, **given}
            auto = resume is None
            phases = backend.from_main(lambda: resumed_plan(adviser, given, output, auto))
            adviser.use(backend.from_main(lambda: adviser.given))
        run = adviser.given
        backend.from_main(lambda: require_logger(run.logger))
        launched = ", under the same launcher," * (backend.size > 1)
        stop.advice = f"continue{launched} with: {resume_command(run, output)}"
        folders = [output / phase.recipe_phase.folder for phase in phases]
        started = backend.from_main(lambda: started_folders(folders, resume, overwrite))
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
                teacher=teacher if phase.teacher else None,
                discard=stale if folder == folders[0] else (),
                adviser=adviser,
                final=folder == folders[-1],
            )
            for phase, folder in zip(phases, folders, strict=True)
        ]
    cost = sum((Counter(result.cost) for result in results), Counter())
    return replace(results[-1], seconds=sum(result.seconds for result in results), cost=dict(cost))


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
    teacher: nn.Module | None = None,
    discard: Sequence[Path] = (),
    adviser: Adviser | None = None,
    final: bool = True,
) -> RunResult:
    """Train one phase as :func:`train` does, for callers that hold the lock on ``output``.

    ``config`` must be resolved. The folders of later phases, ``discard``, are cleared when this one
    starts. ``adviser`` is that of the run that the phase is part of, in which it is the ``final``
    one or one that others build on.
    """
    backend, stop, adviser = (
        backend or SingleProcess(), stop or Stopping(), adviser or Adviser(config, output)
    )  # fmt: skip
    if resume and not final:
        config = backend.from_main(lambda: keep_completed(config, output))

    def train_first(first: TrainConfig, unfinished: bool) -> Path:
        if unfinished:
            first = backend.from_main(lambda: with_progress(first, output))
        first = backend.from_main(lambda: adviser.resolve(first))
        return train_phase(
            first, output, resume=unfinished, bar=bar, backend=backend, stop=stop, adviser=adviser
        ).best

    with cpu_threads(config.threads):
        if any(backend.gather(stop.requested)):  # while the phase before this one was ending
            raise stop.error(f"; {stop.advice}")
        folder = output / config.recipe_phase.folder
        start = start_phase(
            config, output, folder, resume, overwrite, train_first, backend, initial, bar, teacher
        )
        for level, text in adviser.notes.get(folder.name, ()):
            log.log(level, "%s", text)
        return Run(config, folder, start, stop, bar, adviser.given).fit(after_epoch, discard)


class Run:
    """One phase in training.

    Args:
        config: Resolved settings.
        folder: Folder of its files.
        start: Network, data and state to train from.
        stop: Requests to stop.
        bar: Whether to show progress bars.
        run: Settings of the run that the phase is part of.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        start: Start,
        stop: Stopping,
        bar: bool,
        run: TrainConfig,
    ) -> None:
        self.config, self.folder, self.start, self.stop = config, folder, start, stop
        self.run = run
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
            loggers = open_loggers(self.config, self.folder)
            journal = Journal(self.folder, first, first * self.trainer.steps, loggers)
        splits, spec, steps = self.start.splits, self.start.spec, self.trainer.steps
        log.info("%s; results in %s", describe(self.config, splits, spec, steps), self.folder)
        tally = self.state.tally
        done = tally.steps if tally.epoch == first else 0
        left = (self.config.epochs - first) * steps - done
        self.trainer.after_step = Pace(steps, left).add
        try:
            with self.stop.deferred():
                for epoch in range(first, self.config.epochs):
                    if self._out_of_patience():
                        log.info("stopped early: no better validation in %d", self.state.stale)
                        break
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
        config, resumed = self.config, self.start.resumed
        if resumed is None:
            prepare_new(self.folder, discard)
        else:
            completed = self.state.epoch >= config.epochs or self._out_of_patience()
            prepare_resume(self.folder, resumed, completed)
        write_settings(self.folder, config, self.run, self.start.spec.to_json())

    def _out_of_patience(self) -> bool:
        """Return whether ``--patience`` validations in a row brought no improvement."""
        return self.config.patience is not None and self.state.stale >= self.config.patience

    def _epoch(self, epoch: int, journal: Journal | None) -> None:
        """Train one epoch, validate if due, and save."""
        config, state = self.config, self.state
        metrics: dict[str, Any] = {"train": self.trainer.train_epoch(epoch, self.bar, self.saver)}
        improved = False
        if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
            metrics["validation"] = figures = self._validate()
            score = sum(f["top1"] for f in figures.values()) / len(figures)
            improved = score > state.score
            state.stale = 0 if improved else state.stale + 1
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
            weights=self.state.evaluated.state_dict(),
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
            weights = self.trainer.net.state_dict()  # with --ema, not those to use
            checkpoint = replace(self.checkpoint(), weights=weights, training=training)
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
        last, output = self.folder / LAST, self.folder.parent
        saved = f"the last checkpoint is {last}" if last.exists() else "no checkpoint was saved"
        advice = restart_commands(self.run, self.config, output, self.start.origins)
        return TrainingError(f"{error}; {saved}: {advice}")
