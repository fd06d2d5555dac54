"""The state of a run: all that changes while it trains, saved and restored as one object.

Within an epoch each rank has counts and BN running statistics of its own; at its end counts are
summed and statistics averaged. A checkpoint written within an epoch holds the merged state and,
beside it, that of each rank, so that no bit of a run depends on when it was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from compofa.data import BrokenImages
from compofa.distributed.backend import Backend
from compofa.errors import CheckpointError
from compofa.training.optim import check_state

PROGRESS = ("epoch", "score", "figures", "seconds")
"""Attributes of :class:`RunState` that a checkpoint stores as ``progress``."""


@dataclass(frozen=True)
class Tally:
    """Counts of one epoch, on one rank.

    Attributes:
        epoch: Number of the epoch, from 0; -1 before the first.
        steps: Steps done.
        taken: Steps that updated the weights.
        skipped: Steps skipped for a non-finite loss or gradient.
        images: Images seen.
        loss: Sum over ``taken`` steps of the mean loss of the subnets.
        right: Correct predictions.
        answers: Predictions.
        seconds: Training time.
    """

    epoch: int
    steps: int = 0
    taken: int = 0
    skipped: int = 0
    images: int = 0
    loss: float = 0.0
    right: float = 0.0
    answers: float = 0.0
    seconds: float = 0.0

    @property
    def images_per_s(self) -> float:
        """Images per second; 0 if no step was left to do. Subnets do not multiply the images."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def metrics(self, lr: float) -> dict[str, float]:
        """Return the means over the epoch, as written to ``metrics.jsonl``.

        Args:
            lr: Learning rate of the last step.
        """
        return {
            "loss": self.loss / max(1, self.taken),
            "top1": 100 * self.right / max(1, self.answers),
            "images_per_s": self.images_per_s,
            "lr": lr,
            "skipped": self.skipped,
        }


class RunState:
    """State of a run on one rank.

    Args:
        net: Network to train, on its device.
        optimizer: Its optimiser.
        scaler: Its gradient scaler.
        images: Number of training images.
        backend: Ranks that train together.
        average: Moving average of the weights; ``None`` for none.

    Attributes:
        epoch: Epochs completed.
        score: Best validation score, the mean top-1 accuracy of the subnets validated.
        figures: Figures of the best validation.
        stale: Validations since then.
        seconds: Training time up to the last checkpoint.
        tally: Counts of the current epoch.
        skipped: Steps skipped in the whole run.
        skipped_in_a_row: Consecutive steps skipped up to now.
        broken: Images that cannot be read.
        diverged: Whether BN running statistics may differ between ranks.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        images: int,
        backend: Backend,
        average: AveragedModel | None = None,
    ) -> None:
        self.average = average
        self.net, self.optimizer, self.scaler, self.backend = net, optimizer, scaler, backend
        self.epoch, self.score, self.seconds = 0, float("-inf"), 0.0
        self.figures: dict[str, Any] | None = None
        self.stale = 0
        self.tally = Tally(-1)
        self.skipped = self.skipped_in_a_row = 0
        self.broken = BrokenImages(images)
        self.diverged = False
        self._ranks: list[dict[str, Any]] = []

    @property
    def evaluated(self) -> nn.Module:
        """The network to validate and to use: the average if there is one."""
        return self.net if self.average is None else self.average.module

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the weights."""
        return {
            "trainer": {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "tally": asdict(self.tally),
                "ranks": self._ranks,
                "skipped": [self.skipped, self.skipped_in_a_row],
                "stale": self.stale,
                "broken": list(self.broken.paths),
                **({} if self.average is None else {"average": self.average.state_dict()}),
            },
            "progress": {name: getattr(self, name) for name in PROGRESS},
        }

    def load_state_dict(self, state: Mapping[str, Any], ranks: int = 1) -> None:
        """Restore what :meth:`state_dict` returned, here or in an earlier version.

        Args:
            state: The state.
            ranks: Number of ranks it was saved by.

        Raises:
            CheckpointError: It is damaged, or the state of another network.
        """
        try:
            for name in PROGRESS:
                setattr(self, name, state["progress"][name])
            saved = state["trainer"]
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            check_state(self.optimizer)
            if self.average is not None:
                self.average.load_state_dict(saved["average"])
            tally = Tally(**saved.get("tally", {"epoch": -1}))
            steps = tally.steps * ranks // self.backend.size  # the same number of images
            self.tally = replace(tally if self.backend.is_main else Tally(tally.epoch), steps=steps)
            own = saved.get("ranks", ())
            self.diverged = len(own) == self.backend.size
            if self.diverged:
                self._restore(own[self.backend.rank])
            self.skipped, self.skipped_in_a_row = map(int, saved.get("skipped", (0, 0)))
            self.stale = int(saved.get("stale", 0))
            self.broken.count(saved.get("broken", ()))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the training state cannot be resumed: {error}") from error

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Merge the state of all ranks within the block. All ranks enter it."""
        self.share_broken()
        if self.backend.size == 1:
            yield
            return
        buffers = {name: b.detach().to("cpu", copy=True) for name, b in self._buffers()}
        own = {"tally": asdict(self.tally), "buffers": buffers}
        self._ranks = self.backend.gather(own)
        self._average_buffers()
        self.tally = _total([Tally(**rank["tally"]) for rank in self._ranks])
        try:
            yield
        finally:
            self._restore(own)
            self._ranks = []

    def end_epoch(self) -> Tally:
        """Merge the state of all ranks for good, and return the counts of all."""
        total = _total(self.backend.gather(self.tally))
        self.tally = total if self.backend.is_main else Tally(total.epoch, total.steps)
        if self.diverged:
            self._average_buffers()
            self.diverged = False
        self.share_broken()
        return total

    def share_broken(self) -> None:
        """Tell all ranks which images any of them could not read."""
        broken = self.backend.gather(tuple(self.broken.paths))
        self.backend.local_main_first(lambda: self.broken.count(sum(broken, ())))

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers in which ranks differ within an epoch, by name."""
        yield from self.net.named_buffers()
        if self.average is not None:
            yield from self.average.module.named_buffers(prefix="average")

    def _average_buffers(self) -> None:
        """Average those buffers over ranks."""
        for network in dict.fromkeys((self.net, self.evaluated)):
            self.backend.average_buffers(network)

    @torch.no_grad()
    def _restore(self, own: Mapping[str, Any]) -> None:
        """Restore this rank's own counts and buffers."""
        for name, buffer in self._buffers():
            kept = own["buffers"][name]
            if kept.shape != buffer.shape:
                raise ValueError(f"{name} of another shape")
            buffer.copy_(kept)
        self.tally = Tally(**own["tally"])


def _total(tallies: Sequence[Tally]) -> Tally:
    """Return the counts of all ranks, with the time of rank 0."""
    names = ("taken", "images", "loss", "right", "answers")
    sums = {name: sum(getattr(tally, name) for tally in tallies) for name in names}
    return replace(tallies[0], **sums)
