"""Losses: cross entropy with label smoothing, plus distillation from a teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(
    logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor | None,
    kd_ratio: float = 1.0,
    kd_type: str = "ce",
    label_smoothing: float = 0.1,
) -> Tensor:
    """Return the training loss of the published runs.

    ``(cross_entropy + kd_ratio * distillation) * 2 / (1 + kd_ratio)``; without a teacher, or with
    a ratio of 0, the cross entropy alone.

    Args:
        logits: Student outputs [n, classes].
        targets: Class indices [n].
        teacher_logits: Teacher outputs [n, classes], or ``None``.
        kd_ratio: Weight of the distillation term, at least 0.
        kd_type: ``ce``: cross entropy against the teacher's probabilities; ``mse``: mean squared
            difference of the logits.
        label_smoothing: Share of the target spread over all classes.

    Returns:
        A scalar.
    """
    loss = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    if teacher_logits is None or kd_ratio == 0:
        return loss
    if kd_type == "ce":
        soft = F.cross_entropy(logits, teacher_logits.softmax(dim=1))
    else:
        soft = F.mse_loss(logits, teacher_logits)
    return (loss + kd_ratio * soft) * (2 / (1 + kd_ratio))
