"""What the phases of a run share besides their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compofa.data import DataSplits
from compofa.distributed.backend import Backend, SingleProcess
from compofa.io.open import OpenedNetwork
from compofa.training.adviser import Adviser
from compofa.training.config import TrainConfig
from compofa.training.shutdown import Stopping

if TYPE_CHECKING:
    from compofa.training.phase_run import PhaseRun, RunResult


class Callback:
    """Code of one's own in a run; subclasses override what they need.

    Every rank calls it. What it raises ends the run.
    """

    def on_start(self, run: PhaseRun) -> None:
        """Called before the first step of a phase."""

    def on_step(self, run: PhaseRun) -> None:
        """Called after each step, also a skipped one; ``run.state.tally`` has its number."""

    def on_epoch(self, run: PhaseRun, metrics: Mapping[str, Any]) -> None:
        """Called after each epoch, once its checkpoint is saved.

        Args:
            run: The phase.
            metrics: ``epoch`` (from 0), ``train`` and, if there was one, ``validation``, as in
                ``metrics.jsonl``.
        """

    def on_finish(self, run: PhaseRun, result: RunResult) -> None:
        """Called when the phase is completed."""


@dataclass(frozen=True)
class RunContext:
    """What the phases of a run share besides their settings.

    Attributes:
        output: Folder of the run.
        adviser: Fills in settings; it has those of the run.
        backend: Ranks that train together.
        stop: Requests to stop.
        bar: Whether to show progress bars.
        initial: The network of ``init_path``, if it is open already.
        teacher: The teacher, if it was given from Python.
        splits: The data set, if it was given from Python.
        callbacks: Code of the user.
    """

    output: Path
    adviser: Adviser
    backend: Backend = field(default_factory=SingleProcess)
    stop: Stopping = field(default_factory=Stopping)
    bar: bool = True
    initial: OpenedNetwork | None = None
    teacher: nn.Module | None = None
    splits: DataSplits | None = None
    callbacks: Sequence[Callback] = ()

    @property
    def run(self) -> TrainConfig:
        """Settings of the run."""
        return self.adviser.given
