"""The phases of a task and their settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from compofa.errors import ConfigError
from compofa.training.config import TrainConfig, flag
from compofa.training.recipes import CHAINS, recipe_for


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
        if not (phase.largest_only and config.teacher_path)
    )
