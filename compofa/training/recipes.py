"""Recipes: what each ``--task`` trains, as rows of data.

The ImageNet rows are those of the published runs (Once-for-All, ICLR 2020, and CompOFA, ICLR
2021): SGD with Nesterov momentum, a cosine schedule per step, label smoothing, distillation from
the largest network. The rows for small images were chosen here for a demonstration in minutes.

==========  =======================================================  ============================
task        command                                                  time and accuracy to expect
==========  =======================================================  ============================
teacher     ``train_ofa_net.py --task teacher``                      digits: about a minute, 99 %
compound    ``train_ofa_net.py --task compound --phase 1``           digits: two minutes, 98-99 %
compound    the same with ``--dataset imagenet --data-path DIR``     145 epochs in two phases;
                                                                     CompOFA reports 493.5 V100
                                                                     hours, the teacher included
==========  =======================================================  ============================
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compofa.errors import ConfigError

REFERENCE_BATCH = 2048
"""Images a step that the base learning rates belong to; rates scale with the batch."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        task: Its ``--task``.
        number: Its ``--phase``, from 1.
        subnets: Subnets whose gradients a step sums.
        epochs: Passes over the training images.
        base_lr: Peak learning rate for 2,048 images a step.
        warmup_epochs: Epochs of linear warm-up.
        largest_only: Whether only the largest network exists: a teacher's training.
        starts_from: The (task, phase) whose weights it begins with; ``None`` begins afresh.
        sort: Whether channels are sorted by importance at the start, which is right only
            before the first phase that narrows them.
    """

    task: str
    number: int
    subnets: int
    epochs: int
    base_lr: float
    warmup_epochs: int = 0
    largest_only: bool = False
    starts_from: tuple[str, int] | None = None
    sort: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder within a run's."""
        return self.task if self.largest_only else f"{self.task}-{self.number}"


@dataclass(frozen=True)
class Recipe:
    """The phases for one kind of data, and the settings they share.

    Attributes:
        phases: Every phase.
        batch_size: Images a step and worker.
        weight_decay: L2 penalty on weights other than biases and BN.
        label_smoothing: Share of the target spread over all classes.
        dropout: Probability before the classifier.
        quick: Whether a missing predecessor is trained on the spot.
        validate_every: Epochs between validations.
    """

    phases: tuple[Phase, ...]
    batch_size: int = 256
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    dropout: float = 0.1
    quick: bool = False
    validate_every: int = 1

    def phase(self, task: str, number: int = 1) -> Phase:
        """Return a phase.

        Raises:
            ConfigError: There is none; the message lists the tasks or phases.
        """
        tasks = {phase.task: None for phase in self.phases}
        if task not in tasks:
            raise ConfigError(f"unknown task {task!r}: expected one of {', '.join(tasks)}")
        numbers = [phase.number for phase in self.phases if phase.task == task]
        if number not in numbers:
            known = " or ".join(map(str, numbers))
            raise ConfigError(f"task {task}: expected phase {known}, got {number}")
        return next(p for p in self.phases if (p.task, p.number) == (task, number))


TEACHER = Phase("teacher", 1, subnets=1, epochs=180, base_lr=2.6, largest_only=True)
COMPOUND_1 = Phase(
    "compound", 1, subnets=4, epochs=25, base_lr=0.08, starts_from=("teacher", 1), sort=True
)
COMPOUND_2 = Phase(
    "compound", 2, subnets=4, epochs=120, base_lr=0.24, warmup_epochs=5,
    starts_from=("compound", 1),
)  # fmt: skip

IMAGENET = Recipe((TEACHER, COMPOUND_1, COMPOUND_2))
"""REFERENCE: the published ImageNet runs of Once-for-All and CompOFA."""

SMALL_IMAGES = Recipe(
    (
        replace(TEACHER, epochs=60, base_lr=3.2, warmup_epochs=3),
        replace(COMPOUND_1, epochs=40, base_lr=1.6, warmup_epochs=1),
        replace(COMPOUND_2, epochs=40, base_lr=1.6, warmup_epochs=2),
    ),
    batch_size=128,
    weight_decay=1e-4,
)
"""CIFAR-10/100 and Fashion-MNIST on one GPU or some patience."""

DIGITS = Recipe(
    (
        replace(TEACHER, epochs=30, base_lr=3.2, warmup_epochs=2),
        replace(COMPOUND_1, subnets=2, epochs=30, base_lr=1.6, warmup_epochs=1),
        replace(COMPOUND_2, subnets=2, epochs=30, base_lr=0.8, warmup_epochs=1),
    ),
    batch_size=64,
    weight_decay=1e-4,
    quick=True,
    validate_every=5,
)
"""scikit-learn's digits on two CPU cores, in minutes."""

RECIPES = {
    "digits": DIGITS,
    "cifar10": SMALL_IMAGES,
    "cifar100": SMALL_IMAGES,
    "fashion-mnist": SMALL_IMAGES,
    "imagenet": IMAGENET,
    "imagefolder": IMAGENET,
}
TASKS = tuple(dict.fromkeys(phase.task for phase in IMAGENET.phases))


def recipe_for(dataset: str) -> Recipe:
    """Return the recipe of a data set; ImageNet's where it has none of its own."""
    return RECIPES.get(dataset, IMAGENET)
