"""One phase in training: its epochs, validations, checkpoints and metrics."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compofa.errors import StoppedError, TrainingError
from compofa.io.atomic import write_text_atomic
from compofa.io.checkpoint import Checkpoint, save_checkpoint
from compofa.training.commands import restart_commands
from compofa.training.config import TrainConfig
from compofa.training.context import RunContext
from compofa.training.journal import SUMMARY, Journal, cost_report
from compofa.training.loggers import open_loggers
from compofa.training.pace import Pace
from compofa.training.plan import describe
from compofa.training.run_folder import (
    BEST,
    LAST,
    PREVIOUS,
    prepare_new,
    prepare_resume,
    write_settings,
)
from compofa.training.shutdown import Saver
from compofa.training.start import Start

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


class PhaseRun:
    """One phase in training.

    Args:
        config: Resolved settings.
        start: Network, data and state to train from.
        context: What the phases of the run share.

    Attributes:
        config: Resolved settings.
        folder: Folder of its files.
        trainer: Network, teacher and training loop.
        state: All that changes while training.
    """

    def __init__(self, config: TrainConfig, start: Start, context: RunContext) -> None:
        self.config, self.start, self.context = config, start, context
        self.folder = context.output / config.recipe_phase.folder
        self.trainer, self.state = start.trainer, start.trainer.state
        self.backend, self.stop = context.backend, context.stop
        self.bar = context.bar and self.backend.is_main
        self.saver = Saver(self._save, self.folder / LAST, config.save_minutes, self.stop)
        self._began = time.perf_counter() - self.state.seconds

    def fit(self, discard: Sequence[Path] = ()) -> RunResult:
        """Train the remaining epochs.

        Args:
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
        pace = Pace(steps, (self.config.epochs - first) * steps - done)

        def after_step(seconds: float) -> None:
            pace.add(seconds)
            for callback in self.context.callbacks:
                callback.on_step(self)

        self.trainer.after_step = after_step
        try:
            for callback in self.context.callbacks:
                callback.on_start(self)
            with self.stop.deferred():
                for epoch in range(first, self.config.epochs):
                    if self._out_of_patience():
                        log.info("stopped early: no better validation in %d", self.state.stale)
                        break
                    metrics = self._epoch(epoch, journal)
                    for callback in self.context.callbacks:
                        callback.on_epoch(self, metrics)
        except TrainingError as error:
            raise self._with_advice(error) from None
        finally:
            if journal is not None:
                journal.close()
        result = self._finish()
        for callback in self.context.callbacks:
            callback.on_finish(self, result)
        return result

    def _prepare_folder(self, discard: Sequence[Path]) -> None:
        """Remove files of other runs and write the settings."""
        config, resumed = self.config, self.start.resumed
        if resumed is None:
            prepare_new(self.folder, discard)
        else:
            completed = self.state.epoch >= config.epochs or self._out_of_patience()
            prepare_resume(self.folder, resumed, completed)
        write_settings(self.folder, config, self.context.run, self.start.spec.to_json())

    def _out_of_patience(self) -> bool:
        """Return whether ``--patience`` validations in a row brought no improvement."""
        return self.config.patience is not None and self.state.stale >= self.config.patience

    def _epoch(self, epoch: int, journal: Journal | None) -> dict[str, Any]:
        """Train one epoch, validate if due, and save; returns the metrics."""
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
        return {"epoch": epoch, **metrics}

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
        advice = restart_commands(self.context.run, self.config, output, self.start.origins)
        return TrainingError(f"{error}; {saved}: {advice}")
