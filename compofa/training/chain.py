"""Tasks that are several phases in a row, such as progressive shrinking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compofa.distributed.backend import Backend, SingleProcess
from compofa.errors import ConfigError
from compofa.io.locks import exclusive_by_main
from compofa.training.config import TrainConfig, run_folder
from compofa.training.recipes import CHAINS, recipe_for
from compofa.training.run import RunResult, train_phase
from compofa.training.saving import holds_run
from compofa.training.stopping import Stopping


def plan(config: TrainConfig) -> tuple[TrainConfig, ...]:
    """Return the settings of each phase of a task, in their order, resolved.

    A task that is no chain is one phase. In a chain every phase has the network of the last,
    settings that were given hold for all phases, and a given teacher is not trained.

    Raises:
        ConfigError: Settings are unknown or out of range; all of them are listed.
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
    of = [replace(config, task=phase.task, phase=phase.number) for phase in chain]
    wasted = set.intersection(*({*each.unused()} for each in of))
    faults = [
        f"--{name.replace('_', '-')}: expected none with --task {config.task}"
        for name in of[-1].given(sorted(wasted))
    ]
    if faults:
        raise ConfigError("; ".join(faults))
    last = config.of_phase(chain[-1].task, chain[-1].number).resolved()
    return tuple(
        config.of_phase(phase.task, phase.number, net=last.net).resolved()
        for phase in chain
        if not (phase.largest_only and config.teacher_path)
    )


def train_task(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool | None = False,
    overwrite: bool = False,
    bar: bool = True,
    backend: Backend | None = None,
    stop: Stopping | None = None,
) -> RunResult:
    """Train a task: one phase, or those of a chain one after another.

    Args:
        config: Settings, not necessarily resolved.
        output: Folder of the run; each phase has a folder of its own in it.
        resume: Go on where the task was: finished phases are kept. ``None`` goes on if anything
            was saved, and begins otherwise.
        overwrite: Begin again, with the first phase.
        bar: Whether to draw progress bars.
        backend: Workers that all call this; see :func:`compofa.training.run.train`.
        stop: How to ask for an early end.

    Returns:
        The result of the last phase, with time and cost of all.

    Raises:
        BusyError: Another process is training in ``output``.
        CompofaError: Something the user can mend; nothing is half-written.
    """
    phases, backend, stop = plan(config), backend or SingleProcess(), stop or Stopping()
    with exclusive_by_main(backend, output, folder=True):
        return _train_phases(phases, Path(output), resume, overwrite, bar, backend, stop)


def _train_phases(
    phases: Sequence[TrainConfig],
    output: Path,
    resume: bool | None,
    overwrite: bool,
    bar: bool,
    backend: Backend,
    stop: Stopping,
) -> RunResult:
    folders = [run_folder(phase, output) for phase in phases]
    begun = backend.from_main(lambda: _begun(folders, resume, overwrite))
    resume = bool(begun) if resume is None else resume
    stale = folders[1:] if overwrite and not resume else []  # must not look like this run's
    results = [
        train_phase(
            phase,
            output,
            resume=resume and (folder in begun or (folder == folders[0] and not begun)),
            overwrite=overwrite,
            bar=bar,
            backend=backend,
            stop=stop,
            discard=stale if folder == folders[0] else (),
        )
        for phase, folder in zip(phases, folders, strict=True)
    ]
    cost = sum((Counter(result.cost) for result in results), Counter())
    return replace(results[-1], seconds=sum(result.seconds for result in results), cost=dict(cost))


def _begun(folders: list[Path], resume: bool | None, overwrite: bool) -> list[Path]:
    """Return the folders that hold a saved run."""
    begun = [folder for folder in folders if holds_run(folder)]
    if begun and resume is False and not overwrite:
        raise ConfigError(
            f"{begun[0]} holds a run already: go on with --resume, begin again with "
            "--overwrite, or choose another --name"
        )
    return begun
