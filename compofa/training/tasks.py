"""Functions named in a phase: which subnets a step samples, and the loss of each.

A phase (:class:`compofa.training.recipes.Phase`) refers to one sampler and one loss. Imports torch
only when a loss is computed, so that ``--help`` does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A training step, as a sampler sees it.

    Attributes:
        index: Number of the step, from 0 to ``total`` - 1, over all epochs of the phase.
        total: Steps of the phase.
        subnets: Number of subnets to sample, from ``--dynamic-batch-size``.
        rng: Generator of this step, made from the seed and ``index``. It is the only source of
            randomness a sampler may use: resumed runs and other ranks draw the same subnets.
    """

    index: int
    total: int
    subnets: int
    rng: np.random.Generator


Sampler = Callable[[SearchSpace, Step], list[Subnet]]
"""Returns the subnets of a step, in the order in which they are trained."""

Loss = Callable[["Tensor", "Tensor", "Tensor | None", float, str, float], "Tensor"]
"""Returns the loss of one subnet; see :func:`distillation_loss` for the arguments."""


def uniform(space: SearchSpace, step: Step) -> list[Subnet]:
    """Sample subnets independently, with equal probability for each value of a gene."""
    return list(space.subnets_of(space.arrays(space.sample_genes(step.rng, step.subnets))))


def sandwich(space: SearchSpace, step: Step) -> list[Subnet]:
    """Return the largest subnet, the smallest, and uniform samples for the rest.

    The sandwich rule of Universally Slimmable Networks (Yu and Huang, ICCV 2019) and BigNAS (Yu
    et al., ECCV 2020). With one subnet per step, the largest only.
    """
    genes = space.sample_genes(step.rng, max(0, step.subnets - 2))
    rest = space.subnets_of(space.arrays(genes))
    return [space.largest, space.smallest, *rest][: step.subnets]


def distillation_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    kd_ratio: float = 1.0,
    kd_type: str = "ce",
    label_smoothing: float = 0.1,
) -> Tensor:
    """Return the training loss of the published runs.

    ``(cross_entropy + kd_ratio * distillation) * 2 / (1 + kd_ratio)``, or the cross entropy alone
    without a teacher or with a ratio of 0.

    Args:
        logits: Logits of the subnet, shape [n, classes].
        targets: Class indices, shape [n]; with mixup or cutmix the classes' probabilities, shape
            [n, classes].
        teacher_logits: Logits of the teacher, shape [n, classes], or ``None``.
        kd_ratio: Weight of the distillation term, at least 0.
        kd_type: ``ce`` for the cross entropy against the teacher's probabilities, or ``mse`` for
            the mean squared error of the logits.
        label_smoothing: Label smoothing in [0, 1).

    Returns:
        A scalar tensor.
    """
    import torch.nn.functional as F

    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if teacher_logits is None or kd_ratio == 0:
        return loss
    if kd_type == "ce":
        soft = F.cross_entropy(logits, teacher_logits.softmax(dim=1))
    else:
        soft = F.mse_loss(logits, teacher_logits)
    return (loss + kd_ratio * soft) * (2 / (1 + kd_ratio))
