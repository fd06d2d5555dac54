"""Recipes: what each ``--task`` trains, as rows of data.

The ImageNet rows are those of the published runs (Once-for-All, ICLR 2020, and CompOFA, ICLR
2021): SGD with Nesterov momentum, a cosine schedule per step, label smoothing, distillation from
the largest network. The rows for small images were chosen here for a demonstration in minutes.

===========  ======================================================  ============================
task         command                                                 time and accuracy to expect
===========  ======================================================  ============================
teacher      ``train_ofa_net.py --task teacher``                     digits: about a minute, 99 %
compound     ``train_ofa_net.py --task compound --phase 1``          digits: two minutes, 98-99 %
compound     the same with ``--dataset imagenet --data-path DIR``    145 epochs in two phases;
                                                                     CompOFA reports 493.5 V100
                                                                     hours, the teacher included
kernel,      ``train_ofa_net.py --task kernel``, then ``--task       ImageNet: 410 epochs;
depth,       depth --phase 1``, ``--phase 2``, then ``--task         Once-for-All reports 978.3
expand       expand --phase 1``, ``--phase 2``                       V100 hours, all included
progressive  ``train_ofa_net.py --task progressive``: the teacher    digits: six minutes, 98-99 %
             and the five phases of the row above
supernet     ``train_ofa_net.py --task supernet``                    digits: ``--epochs 12`` 87 %
supernet     the same with ``--net ofa-resnet50-small --epochs 8``   digits: 96-97 %, 80 seconds
finetune     ``train_ofa_net.py --task finetune --init-path FILE     ImageNet: 25 or 75 epochs
             --subnet JSON``
===========  ======================================================  ============================
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compofa.errors import ConfigError
from compofa.space.search_space import SearchSpace

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
        sort: Whether channels are sorted by importance at the start: all of them, or, where the
            predecessor trained narrower widths, within the groups between those widths.
        free: Whether its usual network is Once-for-All's, in which every choice is free.
        depths: Depths that are sampled; ``None`` for all of the network's.
        expands: Expand ratios that are sampled, likewise.
        kernels: Kernel sizes that are sampled, likewise.
        sampler: How a step draws its subnets: a key of
            :data:`compofa.training.samplers.SAMPLERS`.
        teacher: What a step learns from beside the labels: ``checkpoint``, the largest network
            trained beforehand; ``self``, the step's first subnet, which its sampler makes the
            largest; ``given``, a checkpoint where one is named; or ``none``.
        single: Whether it trains one subnet of a trained supernet by itself, as a plain network.
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
    free: bool = False
    depths: tuple[int, ...] | None = None
    expands: tuple[int, ...] | None = None
    kernels: tuple[int, ...] | None = None
    sampler: str = "random"
    teacher: str = "checkpoint"
    single: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder within a run's."""
        alone = self.largest_only or self.single
        return self.task if alone else f"{self.task}-{self.number}"

    def within(self, space: SearchSpace) -> SearchSpace:
        """Return the part of a network's space that this phase trains.

        Raises:
            ConfigError: The phase picks choices one by one, and the space couples them.
            SpaceError: Nothing would be left.
        """
        named = {"depth": self.depths, "kernel": self.kernels, "expand": self.expands}
        wanted = {name: values for name, values in named.items() if values is not None}
        if not wanted:
            return space
        if space.outer:
            raise ConfigError(
                f"task {self.task}: Once-for-All published no such recipe for ResNet50D, whose "
                "kernels are fixed and whose widths are elastic; expected --task supernet or "
                "compound"
            )
        if any(stage.coupling is not None for stage in space.stages):
            raise ConfigError(
                f"task {self.task}: expected a network in which every choice is free, such as "
                f"ofa-small, or --heuristic none; got one of the space {space.name}"
            )
        return space.restrict(**wanted)


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
        free_network: Id of the usual network of phases whose choices are free.
    """

    phases: tuple[Phase, ...]
    batch_size: int = 256
    weight_decay: float = 3e-5
    label_smoothing: float = 0.1
    dropout: float = 0.1
    quick: bool = False
    validate_every: int = 1
    free_network: str = "ofa_mbv3_d234_e346_k357_w1.0"

    def phase(self, task: str, number: int = 1) -> Phase:
        """Return a phase.

        Raises:
            ConfigError: There is none; the message lists the tasks or phases.
        """
        tasks = {phase.task: None for phase in self.phases}
        if task not in tasks:
            known = ", ".join([*tasks, *CHAINS])
            raise ConfigError(f"unknown task {task!r}: expected one of {known}")
        numbers = [phase.number for phase in self.phases if phase.task == task]
        if number not in numbers:
            known = " or ".join(map(str, numbers))
            raise ConfigError(f"task {task}: expected phase {known}, got {number}")
        return next(p for p in self.phases if (p.task, p.number) == (task, number))

    def chain(self, task: str) -> tuple[Phase, ...]:
        """Return the phases of a task of :data:`CHAINS`, first to last."""
        phases = [self.phase(*CHAINS[task])]
        while phases[0].starts_from is not None:
            phases.insert(0, self.phase(*phases[0].starts_from))
        return tuple(phases)


CHAINS = {"progressive": ("expand", 2)}
"""Tasks that are a phase and, before it, all that it builds on."""

TEACHER = Phase("teacher", 1, subnets=1, epochs=180, base_lr=2.6, largest_only=True, teacher="none")
COMPOUND_1 = Phase(
    "compound", 1, subnets=4, epochs=25, base_lr=0.08, starts_from=("teacher", 1), sort=True
)
COMPOUND_2 = Phase(
    "compound", 2, subnets=4, epochs=120, base_lr=0.24, warmup_epochs=5,
    starts_from=("compound", 1),
)  # fmt: skip
KERNEL = Phase(
    "kernel", 1, subnets=1, epochs=120, base_lr=2.6, warmup_epochs=5, starts_from=("teacher", 1),
    free=True, depths=(4,), expands=(6,), kernels=(3, 5, 7),
)  # fmt: skip
DEPTH_1 = replace(
    KERNEL, task="depth", subnets=2, epochs=25, base_lr=0.08, warmup_epochs=0,
    starts_from=("kernel", 1), depths=(3, 4),
)  # fmt: skip
DEPTH_2 = replace(
    DEPTH_1, number=2, epochs=120, base_lr=0.24, warmup_epochs=5,
    starts_from=("depth", 1), depths=(2, 3, 4),
)  # fmt: skip
EXPAND_1 = replace(
    DEPTH_2, task="expand", number=1, subnets=4, epochs=25, base_lr=0.08, warmup_epochs=0,
    starts_from=("depth", 2), sort=True, expands=(4, 6),
)  # fmt: skip
EXPAND_2 = replace(
    EXPAND_1, number=2, epochs=120, base_lr=0.24, warmup_epochs=5,
    starts_from=("expand", 1), expands=(3, 4, 6),
)  # fmt: skip
SUPERNET = Phase(
    "supernet", 1, subnets=4, epochs=180, base_lr=0.65, warmup_epochs=5,
    free=True, sampler="sandwich", teacher="self",
)  # fmt: skip
FINETUNE = Phase("finetune", 1, subnets=1, epochs=25, base_lr=0.08, teacher="given", single=True)

IMAGENET = Recipe(
    (
        TEACHER, COMPOUND_1, COMPOUND_2, KERNEL, DEPTH_1, DEPTH_2, EXPAND_1, EXPAND_2, SUPERNET,
        FINETUNE,
    )
)  # fmt: skip
"""REFERENCE: the published ImageNet runs of Once-for-All and CompOFA. The row ``supernet``, the
single stage of BigNAS (Yu et al., ECCV 2020) with this library's optimiser, was chosen here, and so
was the learning rate of ``finetune``: Once-for-All reports networks fine-tuned for 25 and for 75
epochs, not how."""

SMALL_IMAGES = Recipe(
    (
        replace(TEACHER, epochs=60, base_lr=3.2, warmup_epochs=3),
        replace(COMPOUND_1, epochs=40, base_lr=1.6, warmup_epochs=1),
        replace(COMPOUND_2, epochs=40, base_lr=1.6, warmup_epochs=2),
        replace(KERNEL, epochs=30, base_lr=1.6, warmup_epochs=1),
        replace(DEPTH_1, epochs=10, base_lr=0.8),
        replace(DEPTH_2, epochs=30, base_lr=1.6, warmup_epochs=1),
        replace(EXPAND_1, epochs=10, base_lr=0.8),
        replace(EXPAND_2, epochs=40, base_lr=1.6, warmup_epochs=2),
        replace(SUPERNET, epochs=100, base_lr=1.6, warmup_epochs=3),
        replace(FINETUNE, base_lr=0.4),
    ),
    batch_size=128,
    weight_decay=1e-4,
    free_network="ofa-small",
)
"""CIFAR-10/100 and Fashion-MNIST on one GPU or some patience."""

DIGITS = Recipe(
    (
        replace(TEACHER, epochs=30, base_lr=3.2, warmup_epochs=2),
        replace(COMPOUND_1, subnets=2, epochs=30, base_lr=1.6, warmup_epochs=1),
        replace(COMPOUND_2, subnets=2, epochs=30, base_lr=0.8, warmup_epochs=1),
        replace(KERNEL, epochs=10, base_lr=1.6, warmup_epochs=1),
        replace(DEPTH_1, epochs=5, base_lr=0.8),
        replace(DEPTH_2, epochs=15, base_lr=1.6, warmup_epochs=1),
        replace(EXPAND_1, subnets=2, epochs=10, base_lr=0.8),
        replace(EXPAND_2, subnets=2, epochs=20, base_lr=1.6, warmup_epochs=1),
        replace(SUPERNET, epochs=40, base_lr=1.6, warmup_epochs=2),
        replace(FINETUNE, epochs=15, base_lr=0.4),
    ),
    batch_size=64,
    weight_decay=1e-4,
    quick=True,
    validate_every=5,
    free_network="ofa-small",
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
TASKS = (*dict.fromkeys(phase.task for phase in IMAGENET.phases), *CHAINS)


def recipe_for(dataset: str) -> Recipe:
    """Return the recipe of a data set; ImageNet's where it has none of its own."""
    return RECIPES.get(dataset, IMAGENET)
