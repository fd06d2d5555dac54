"""Plan of a run: the phases of its task, its folder, and what a phase is about to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from compofa.data import DataSplits
from compofa.errors import ConfigError
from compofa.networks.network_spec import Network
from compofa.training.config import TrainConfig, flag
from compofa.training.recipes import CHAINS, recipe_for

log = logging.getLogger(__name__)


def plan(
    config: TrainConfig, resolve: Callable[[TrainConfig], TrainConfig] = TrainConfig.resolved
) -> tuple[TrainConfig, ...]:
    """Return the resolved settings of each phase of a task, in order.

    Most tasks are one phase. In a chain all phases share the network of the last and the settings
    that were given, and a given teacher is not trained.

    Args:
        config: Settings.
        resolve: Fills in the defaults of one phase; see
            :meth:`compofa.training.adviser.Adviser.resolve`.

    Raises:
        ConfigError: Settings are unknown or out of range; the message lists all of them.
    """
    if config.task not in CHAINS:
        return (resolve(config),)
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
    net = config.net or resolve(config.of_phase(chain[-1])).net
    return tuple(
        resolve(config.of_phase(phase, net=net))
        for phase in chain
        if not (phase.largest_only and config.teacher_path and not config.teacher)
    )


def default_output(config: TrainConfig, resume: bool = False) -> Path:
    """Return the folder of a run that is not named: ``runs/DATASET-NET``.

    Runs on a folder of images are named after that folder instead of the data set.

    Args:
        config: Resolved settings of the last phase.
        resume: Whether a run may be continued that an earlier version named after the data set.
    """
    network = config.net or config.task
    path = earlier = Path("runs") / f"{config.dataset}-{network}"
    if config.dataset == "imagefolder" and config.data_path:
        data = Path(config.data_path).resolve()
        name = data.name if data.is_dir() else data.stem
        path = Path("runs") / f"{name or config.dataset}-{network}"
    if resume and not path.exists() and earlier.exists():
        log.info("found no %s: continuing %s, as earlier versions called it", path, earlier)
        return earlier
    return path


def describe(config: TrainConfig, splits: DataSplits, spec: Network, steps: int) -> str:
    """Return what a phase is about to do, in one line.

    Args:
        config: Resolved settings.
        splits: The data set.
        spec: Definition of the network.
        steps: Steps per epoch.
    """
    if spec.elastic:
        space = config.recipe_phase.within(spec.space)
        what = f"space {space.name} of {space.size:.4g} subnets"
    else:
        what = str(spec.subnet)
    return (
        f"{config.recipe_phase.folder}: {config.net or config.init_path} on {config.dataset} "
        f"({len(splits.train)} training, {len(splits.validation)} validation images, "
        f"{len(splits.classes)} classes); {what}; {config.epochs} epochs of {steps} steps"
    )
