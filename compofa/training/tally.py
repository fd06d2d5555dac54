"""What is counted during an epoch, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EpochStats:
    """Means over one epoch's training steps.

    Attributes:
        loss: Loss, averaged over subnets.
        top1: Accuracy on the training images as they were shown, in percent.
        images_per_s: Images a second of all workers, a step's subnets not counted as more images.
        lr: Learning rate of the last step.
        skipped: Steps whose loss or gradient was not a finite number.
    """

    loss: float
    top1: float
    images_per_s: float
    lr: float
    skipped: int = 0


@dataclass(frozen=True)
class Tally:
    """What was done of an epoch, to be gone on with.

    Attributes:
        epoch: Which one; -1 before the first.
        steps: Steps done.
        taken: Steps that moved the weights.
        skipped: Steps whose loss or gradient was not a finite number.
        images: Images seen.
        loss: Sum over the steps taken.
        right: Right answers.
        answers: Answers.
        seconds: Time.
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
    def sums(self) -> tuple[float, float, float]:
        """What is summed on the device: loss, right answers and answers."""
        return self.loss, self.right, self.answers

    @property
    def images_per_s(self) -> float:
        """Images a second; 0 where no time has passed, as in an epoch without a step left."""
        return self.images / self.seconds if self.seconds > 0 else 0.0

    def stats(self, lr: float) -> EpochStats:
        """Return the means over an epoch that ended with learning rate ``lr``."""
        loss, top1 = self.loss / max(1, self.taken), 100 * self.right / max(1, self.answers)
        return EpochStats(loss, top1, self.images_per_s, lr, self.skipped)
