"""A run: set up, train, save after every epoch and when asked to."""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compofa.distributed.backend import Backend, SingleProcess
from compofa.distributed.threads import cpu_threads
from compofa.errors import StoppedError, TrainingError
from compofa.io.atomic import write_text_atomic
from compofa.io.checkpoint import save_checkpoint
from compofa.io.locks import exclusive_by_main
from compofa.training.config import TrainConfig
from compofa.training.journal import SUMMARY, Journal, cost_report
from compofa.training.saving import BEST, LAST, PREVIOUS, Saver
from compofa.training.setup import Setup, set_up
from compofa.training.stopping import Stopping

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

    Raises:
        StoppedError: It was asked for. What was done is saved, up to the last step.
        BusyError: Another process is training in ``output``.
        CompofaError: Something the user can mend; nothing is half-written.
    """
    config, backend, stop = config.resolved(), backend or SingleProcess(), stop or Stopping()
    with exclusive_by_main(backend, output, folder=True):
        return train_phase(
            config,
            Path(output),
            resume=resume,
            overwrite=overwrite,
            bar=bar,
            after_epoch=after_epoch,
            backend=backend,
            stop=stop,
        )


def train_phase(
    config: TrainConfig,
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    bar: bool,
    backend: Backend,
    stop: Stopping,
    discard: Sequence[Path] = (),
    after_epoch: Callable[[int], None] | None = None,
) -> RunResult:
    """Do what :func:`train` does, for a caller that holds the lock on ``output``.

    Settings are resolved. Of ``discard``, folders of later phases, the files go when this one
    begins.
    """

    def train_first(first: TrainConfig, unfinished: bool) -> Path:
        return train_phase(
            first.resolved(), output, resume=unfinished, overwrite=False, bar=bar,
            backend=backend, stop=stop,
        ).best  # fmt: skip

    with cpu_threads(config.threads):
        if any(backend.gather(stop.requested)):  # while the phase before this one came to its end
            raise stop.error(": go on with --resume")
        setup = set_up(config, output, resume, overwrite, train_first, backend)
        backend.from_main(lambda: setup.begin(discard))
        return Run(setup, stop, bar).fit(after_epoch)


class Run:
    """A phase in training: what it has come to, and its files.

    Args:
        setup: What it begins with.
        stop: How it is asked for an early end.
        bar: Whether to draw progress bars.
    """

    def __init__(self, setup: Setup, stop: Stopping, bar: bool) -> None:
        self.setup = setup
        self.stop = stop
        self.progress = setup.progress
        self.backend = setup.trainer.backend
        self.bar = bar and self.backend.is_main
        self.saver = Saver(self._write, setup.folder / LAST, setup.config.save_minutes, stop)
        self._began = time.perf_counter() - self.progress.seconds

    def fit(self, after_epoch: Callable[[int], None] | None = None) -> RunResult:
        """Train the epochs that are left.

        Args:
            after_epoch: Called with the number of epochs done after each is saved.

        Raises:
            StoppedError: An early end was asked for; the state is saved.
            TrainingError: Numbers went wrong too many times in a row.
        """
        setup, config = self.setup, self.setup.config
        main = self.backend.is_main
        first = self.progress.epoch
        journal = Journal(setup.folder, first, first * setup.trainer.steps) if main else None
        setup.describe()
        try:
            with self.stop.deferred():
                for epoch in range(self.progress.epoch, config.epochs):
                    self._epoch(epoch, journal)
                    if after_epoch is not None:
                        after_epoch(epoch + 1)
        except TrainingError as error:
            raise _explained(error, setup.folder) from None
        finally:
            if journal is not None:
                journal.close()
        return self._end()

    def _epoch(self, epoch: int, journal: Journal | None) -> None:
        """Train one epoch, validate where it is time to, and save."""
        config, trainer = self.setup.config, self.setup.trainer
        stats = trainer.train_epoch(epoch, self.bar, self.saver)
        metrics: dict[str, Any] = {"train": asdict(stats)}
        improved = False
        if (epoch + 1) % config.validate_every == 0 or epoch + 1 == config.epochs:
            metrics["validation"] = figures = self._validate()
            score = sum(f["top1"] for f in figures.values()) / len(figures)
            improved = score > self.progress.score
            if improved:
                self.progress = replace(self.progress, score=score, figures=figures)
        self.progress = replace(self.progress, epoch=epoch + 1)
        if journal is not None:
            if improved:
                save_checkpoint(self.setup.folder / BEST, self.setup.checkpoint(self.progress))
            journal.write({"epoch": epoch, "step": (epoch + 1) * trainer.steps, **metrics})
        self.saver.save()
        _say(epoch, config, metrics)
        self.backend.commit()

    def _validate(self) -> dict[str, dict[str, float]]:
        """Validate; a request to end does not wait for it.

        Raises:
            StoppedError: There was one.
        """
        try:
            with self.stop.at_once():
                return self.setup.trainer.validate()
        except StoppedError:
            self.saver.save(stopping=True)
            raise

    def _write(self) -> None:
        """Save the state to resume from."""
        setup, seconds = self.setup, time.perf_counter() - self._began
        self.progress = replace(self.progress, seconds=seconds)
        if self.backend.is_main:
            training = {
                "config": setup.config.to_json(),
                "origins": {name: [o.path, o.digest] for name, o in setup.origins.items()},
                "workers": self.backend.size,
                "trainer": setup.trainer.state_dict(),
                "progress": asdict(self.progress),
            }
            checkpoint = replace(setup.checkpoint(self.progress), training=training)
            save_checkpoint(setup.folder / LAST, checkpoint, setup.folder / PREVIOUS)

    def _end(self) -> RunResult:
        """Write the summary."""
        setup, config, progress = self.setup, self.setup.config, self.progress
        seconds = progress.seconds * self.backend.size
        cost = cost_report(seconds, config.device, config.price, config.power)
        summary = {"best": progress.figures, "seconds": progress.seconds, **cost}
        if setup.trainer.skipped:
            summary["skipped_steps"] = setup.trainer.skipped
        if setup.trainer.broken.paths:
            summary["broken_images"] = len(setup.trainer.broken.paths)
        text = json.dumps(summary, indent=2) + "\n"
        self.backend.from_main(lambda: write_text_atomic(setup.folder / SUMMARY, text))
        best, last = setup.folder / BEST, setup.folder / LAST
        return RunResult(best, last, progress.figures, progress.seconds, cost)


def _explained(error: TrainingError, folder: Path) -> TrainingError:
    """Say where the last good state is."""
    kept = [name for name in (LAST, BEST) if (folder / name).exists()]
    what, start = "nothing was saved yet", ""
    if kept:
        what = f"{folder / kept[0]} keeps the last good state"
        start = f", from --init-path {shlex.quote(str(folder / kept[-1]))}"
    return TrainingError(
        f"{error}; {what}: begin again with a lower --lr{start}, or raise --max-skipped"
    )


def _say(epoch: int, config: TrainConfig, metrics: dict[str, Any]) -> None:
    text = f"epoch {epoch + 1}/{config.epochs}: loss {metrics['train']['loss']:.3f}"
    for name, figures in metrics.get("validation", {}).items():
        text += f", {name} {figures['top1']:.2f} %"
    log.info(text)
