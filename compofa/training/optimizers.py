"""The optimisers, one row each, with the defaults that belong to them. Importable without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compofa.training.recipes import REFERENCE_BATCH, TEACHER

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class OptimizerKind:
    """A row of :data:`OPTIMIZERS`.

    Attributes:
        build: Name of a class of ``torch.optim``, or a function that is called like one.
        settings: Its arguments besides learning rate, weight decay and momentum.
        momentum: Default momentum; ``None`` for an optimiser without this setting.
        weight_decay: Default weight decay; ``None`` for that of the recipe.
        lr: Peak learning rate of training from scratch with ``batch`` images per step; ``None``
            for that of the recipe. Phases that start from trained weights take the same fraction
            of it as they take of SGD's.
        batch: Images per step that ``lr`` is for.
        sqrt: Whether the learning rate grows with the square root of the images per step instead
            of their number, as suits optimisers that normalise gradients (Malladi et al., NeurIPS
            2022). ``lr`` then holds for fewer images than ``batch``, too.
    """

    build: str | Callable[..., Optimizer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    momentum: float | None = None
    weight_decay: float | None = None
    lr: float | None = None
    batch: int = REFERENCE_BATCH
    sqrt: bool = False

    def scaled(self, lr: float, factor: float) -> float:
        """Return a learning rate for ``factor`` times as many images per step."""
        return lr * (math.sqrt(factor) if self.sqrt else factor)

    def default_lr(self, base_lr: float, batch_size: int) -> float:
        """Return the peak learning rate of a phase.

        Args:
            base_lr: The phase's own, which is SGD's for 2,048 images per step.
            batch_size: Images per step.
        """
        if self.lr is None:
            return base_lr * batch_size / REFERENCE_BATCH
        more = batch_size / self.batch
        return self.scaled(self.lr * base_lr / TEACHER.base_lr, max(1, more) if self.sqrt else more)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "sgd": OptimizerKind("SGD", {"nesterov": True}, momentum=0.9),
    "adamw": OptimizerKind("AdamW", weight_decay=0.05, lr=2e-3, batch=1024, sqrt=True),
    "rmsprop": OptimizerKind(
        "RMSprop", {"alpha": 0.9, "eps": 0.0316}, momentum=0.9, weight_decay=1e-5, lr=0.064,
        batch=1024,
    ),
}  # fmt: skip
"""Values of ``--optimizer``.

``sgd`` is that of the published runs. ``adamw`` (Loshchilov and Hutter, ICLR 2019) has the weight
decay and, at the same 4,096 images per step, the learning rate of ConvNeXt (Liu et al., CVPR 2022):
0.05 and 4e-3. Trainings with small batches are short, and a rate that falls below 2e-3 with the
batch is too low for them: of a small teacher of the digits, with 64 images per step, 8 epochs led
to 29 % at 1e-3, 65 % at 3e-3 and 88 % at 1e-2. ``rmsprop`` has the settings that torchvision
trained MobileNetV3 with.
"""
