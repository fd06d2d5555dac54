"""Runs: plan the phases of a task, train each, save after every epoch and on request."""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compofa.data import DataSplits
from compofa.distributed.backend import Backend, SingleProcess
from compofa.distributed.threads import cpu_threads
from compofa.errors import ConfigError
from compofa.io.locks import exclusive_by_main
from compofa.io.open import OpenedNetwork
from compofa.training.adviser import Adviser
from compofa.training.commands import phase_command, resume_command
from compofa.training.config import TrainConfig, flag
from compofa.training.context import Callback, RunContext
from compofa.training.external import MODULE
from compofa.training.loggers import require_logger
from compofa.training.phase_run import PhaseRun, RunResult
from compofa.training.plan import default_output, plan
from compofa.training.predecessors import SCHEDULE
from compofa.training.resume import keep_completed, resumed_plan, with_progress
from compofa.training.run_folder import started_folders
from compofa.training.shutdown import Stopping
from compofa.training.start import start_phase

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    output: str | Path | None = None,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    bar: bool = True,
    callbacks: Sequence[Callback] = (),
    backend: Backend | None = None,
    stop: Stopping | None = None,
    initial: OpenedNetwork | None = None,
    given: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    splits: DataSplits | None = None,
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
        callbacks: Called at the start and the end of each phase, after each step and each epoch.
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
        splits: The data set, in place of what ``config.dataset`` and ``config.data_path`` lead to;
            its name must be that of ``config.dataset``. Images of PyTorch data sets are
            :class:`compofa.data.DatasetSource`. A resumed run needs the same.

    Returns:
        The result of the last phase, with time and cost of all.

    Raises:
        StoppedError: A stop was requested; the state up to the last step is saved.
        BusyError: Another process is training in ``output``.
        CompofaError: Another user error; no file is left half-written.
    """
    backend, stop = backend or SingleProcess(), stop or Stopping()
    if splits is not None and splits.name != config.dataset:
        raise ConfigError(f"splits: expected data set {config.dataset!r}, got {splits.name!r}")
    if teacher is not None:
        config = replace(config, teacher=f"{MODULE}:{type(teacher).__name__}")
    ranks = backend.gather(platform.node()).count(platform.node())
    adviser = Adviser(config, output, initial, ranks, resume, splits)
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
        context = RunContext(
            output, adviser, backend, stop, bar, adviser.opened, teacher, splits, callbacks
        )
        results = [
            train_phase(
                phase,
                context if phase.teacher else replace(context, teacher=None),
                resume=resume and (folder in started or (folder == folders[0] and not started)),
                overwrite=overwrite,
                discard=stale if folder == folders[0] else (),
                final=folder == folders[-1],
            )
            for phase, folder in zip(phases, folders, strict=True)
        ]
    cost = sum((Counter(result.cost) for result in results), Counter())
    return replace(results[-1], seconds=sum(result.seconds for result in results), cost=dict(cost))


def train_phase(
    config: TrainConfig,
    context: RunContext,
    *,
    resume: bool = False,
    overwrite: bool = False,
    discard: Sequence[Path] = (),
    final: bool = True,
) -> RunResult:
    """Train one phase as :func:`train` does, for callers that hold the lock on its folder.

    Args:
        config: Resolved settings.
        context: What the phases of the run share.
        resume: Continue from the last checkpoint of the phase.
        overwrite: Replace an existing phase.
        discard: Folders of later phases, which are cleared when this one starts.
        final: Whether no other phase of the run builds on this one.
    """
    backend, adviser = context.backend, context.adviser
    if resume and not final:
        config = backend.from_main(lambda: keep_completed(config, context.output))

    def train_first(first: TrainConfig, unfinished: bool) -> Path:
        first = replace(first, validate_every=context.run.validate_every)
        if unfinished:
            first = backend.from_main(lambda: with_progress(first, context.output))
        first = backend.from_main(lambda: adviser.resolve(first))
        if not unfinished and (given := context.run.given(SCHEDULE)):
            log.info(
                "%s: for %s only; the teacher is trained for %d epochs with --lr %.4g. To choose "
                "its settings, train it first: %s",
                " and ".join(map(flag, given)), config.recipe_phase.folder,
                first.epochs, first.lr, phase_command(config, first.recipe_phase, context.output),
            )  # fmt: skip
        alone = replace(context, initial=None, teacher=None, callbacks=())
        return train_phase(first, alone, resume=unfinished).best

    with cpu_threads(config.threads):
        if any(backend.gather(context.stop.requested)):  # while the phase before was ending
            raise context.stop.error(f"; {context.stop.advice}")
        start = start_phase(config, context, resume, overwrite, train_first)
        for level, text in adviser.notes.get(config.recipe_phase.folder, ()):
            log.log(level, "%s", text)
        return PhaseRun(config, start, context).fit(discard)
