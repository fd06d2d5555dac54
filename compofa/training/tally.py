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
    """What was done of an epoch, to be gone on with; on worker 0 for all workers when saved.

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
