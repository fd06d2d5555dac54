"""Recipes: one row per phase of each ``--task``, per kind of data set.

The ImageNet rows are those of the published runs (Once-for-All, ICLR 2020, and CompOFA, ICLR
2021): SGD with Nesterov momentum, a cosine schedule per step, label smoothing, and distillation
from the largest network. The rows for small images were tuned here to train in minutes. A task of
your own is a row for :func:`register_task`.

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

from compofa.errors import ConfigError, unknown_name
from compofa.space.config import DEPTH
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Number
from compofa.training.tasks import Loss, Sampler, distillation_loss, sandwich, uniform

Values = tuple[tuple[str, tuple[Number, ...]], ...]
REFERENCE_BATCH = 2048
"""Images per step that the base learning rates are for; rates scale linearly with the batch."""


@dataclass(frozen=True)
class Phase:
    """A phase of a task.

    Attributes:
        task: Value of ``--task``.
        number: Value of ``--phase``, from 1.
        subnets: Subnets sampled per step.
        epochs: Epochs.
        base_lr: Peak learning rate for 2,048 images per step.
        warmup_epochs: Epochs of linear warm-up.
        largest_only: Whether the network has no elastic choices: training of a teacher.
        starts_from: The (task, phase) whose weights initialise this one; ``None`` for random
            initialisation.
        sort: Whether to sort channels by importance at the start: all channels, or, if the
            predecessor trained several widths, only within the groups between those widths.
        free: Whether the default network is the one with free (uncoupled) choices.
        values: What to sample of some choices: pairs (name of the choice, its values). All of the
            network's are sampled of the others.
        sampler: Function that returns the subnets of a step.
        loss: Function that returns the loss of a subnet.
        teacher: Source of the soft targets: ``checkpoint``, the largest network trained beforehand;
            ``self``, the first subnet of the step, which the sampler must make the largest;
            ``given``, the checkpoint of ``--teacher-path``, if any; or ``none``.
        single: Whether to train one subnet of a trained supernet as a plain network.
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
    values: Values = ()
    sampler: Sampler = uniform
    loss: Loss = distillation_loss
    teacher: str = "checkpoint"
    single: bool = False

    @property
    def folder(self) -> str:
        """Name of the phase's folder within the run's."""
        return self.task if self.largest_only or self.single else f"{self.task}-{self.number}"

    def within(self, space: SearchSpace) -> SearchSpace:
        """Return the part of a network's search space that this phase trains.

        Raises:
            ConfigError: The phase restricts depths, expand ratios or kernels, and the space couples
                them.
            SpaceError: No subnet is left.
        """
        if not self.values:
            return space
        names = [name for name, _ in self.values]
        if space.outer or not {*names} <= {*space.names, DEPTH}:
            raise ConfigError(
                f"task {self.task}: expected a network with the choices {', '.join(names)} alone, "
                f"got one of {', '.join([*space.names, *(c.name for c in space.outer[:1])])}; "
                "expected --task supernet or compound"
            )
        if any(stage.coupling is not None for stage in space.stages):
            raise ConfigError(
                f"task {self.task}: expected a network in which every choice is free, such as "
                f"ofa-small, or --heuristic none; got one of the space {space.name}"
            )
        return space.restrict(**dict(self.values))


@dataclass(frozen=True)
class Recipe:
    """The phases for one kind of data set, and the defaults they share.

    Attributes:
        phases: All phases.
        batch_size: Images per step and rank.
        weight_decay: L2 penalty on weights, except biases and BN parameters.
        label_smoothing: Label smoothing.
        dropout: Dropout probability before the classifier.
        quick: Whether a missing teacher is trained first.
        validate_every: Epochs between validations.
        free_network: Default network of phases with free choices.
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
        """Return a phase of this recipe, or of :func:`register_task`.

        Raises:
            ConfigError: There is none; the message lists the tasks or phases.
        """
        phases = {(p.task, p.number): p for p in (*self.phases, *REGISTERED)}
        if (task, number) in phases:
            return phases[task, number]
        numbers = [str(n) for name, n in phases if name == task]
        if numbers:
            raise ConfigError(f"task {task}: expected phase {' or '.join(numbers)}, got {number}")
        raise ConfigError(unknown_name("task", task, task_names()))

    def chain(self, task: str) -> tuple[Phase, ...]:
        """Return the phases of a task of :data:`CHAINS`, first to last."""
        phases = [self.phase(*CHAINS[task])]
        while phases[0].starts_from is not None:
            phases.insert(0, self.phase(*phases[0].starts_from))
        return tuple(phases)


CHAINS = {"progressive": ("expand", 2)}
"""Tasks that run several phases in a row: all that their last phase builds on, and that phase."""


def _values(depths: tuple[int, ...], expands: tuple[int, ...]) -> Values:
    """Return what a phase of progressive shrinking samples."""
    return (("kernel", (3, 5, 7)), ("depth", depths), ("expand", expands))


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
    free=True, values=_values((4,), (6,)),
)  # fmt: skip
DEPTH_1 = replace(
    KERNEL, task="depth", subnets=2, epochs=25, base_lr=0.08, warmup_epochs=0,
    starts_from=("kernel", 1), values=_values((3, 4), (6,)),
)  # fmt: skip
DEPTH_2 = replace(
    DEPTH_1, number=2, epochs=120, base_lr=0.24, warmup_epochs=5,
    starts_from=("depth", 1), values=_values((2, 3, 4), (6,)),
)  # fmt: skip
EXPAND_1 = replace(
    DEPTH_2, task="expand", number=1, subnets=4, epochs=25, base_lr=0.08, warmup_epochs=0,
    starts_from=("depth", 2), sort=True,
    values=_values((2, 3, 4), (4, 6)),
)  # fmt: skip
EXPAND_2 = replace(
    EXPAND_1, number=2, epochs=120, base_lr=0.24, warmup_epochs=5,
    starts_from=("expand", 1), values=_values((2, 3, 4), (3, 4, 6)),
)  # fmt: skip
SUPERNET = Phase(
    "supernet", 1, subnets=4, epochs=180, base_lr=0.65, warmup_epochs=5,
    free=True, sampler=sandwich, teacher="self",
)  # fmt: skip
FINETUNE = Phase("finetune", 1, subnets=1, epochs=25, base_lr=0.08, teacher="given", single=True)

IMAGENET = Recipe(
    (
        TEACHER, COMPOUND_1, COMPOUND_2, KERNEL, DEPTH_1, DEPTH_2, EXPAND_1, EXPAND_2, SUPERNET,
        FINETUNE,
    )
)  # fmt: skip
"""The published ImageNet runs of Once-for-All and CompOFA. Two rows were tuned here: ``supernet``,
the single stage of BigNAS (Yu et al., ECCV 2020) with this library's optimiser, and the learning
rate of ``finetune``, for which Once-for-All reports only 25 and 75 epochs."""

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
"""CIFAR-10/100 and Fashion-MNIST: best on a GPU."""

OWN_IMAGES = Recipe(
    (
        replace(TEACHER, epochs=120, base_lr=3.2, warmup_epochs=6),
        replace(COMPOUND_1, epochs=40, base_lr=1.6, warmup_epochs=1),
        replace(COMPOUND_2, epochs=40, base_lr=1.6, warmup_epochs=2),
        replace(KERNEL, epochs=40, base_lr=1.6, warmup_epochs=1),
        replace(DEPTH_1, epochs=12, base_lr=0.8),
        replace(DEPTH_2, epochs=40, base_lr=1.6, warmup_epochs=2),
        replace(EXPAND_1, epochs=12, base_lr=0.8),
        replace(EXPAND_2, epochs=40, base_lr=1.6, warmup_epochs=2),
        replace(SUPERNET, epochs=120, base_lr=1.6, warmup_epochs=6),
        replace(FINETUNE, epochs=20, base_lr=0.5, warmup_epochs=1),
    ),
    batch_size=64,
    weight_decay=1e-4,
)
"""Data sets without a recipe of their own: rows for about 2,000 images, which
:mod:`compofa.training.own_images` fits to what it finds."""

TRANSFER = OWN_IMAGES.phases[-1]
"""Schedule of every task that takes trained weights to other classes."""

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
"""scikit-learn's digits: minutes on two CPU cores."""

RECIPES = {
    "digits": DIGITS,
    "cifar10": SMALL_IMAGES,
    "cifar100": SMALL_IMAGES,
    "fashion-mnist": SMALL_IMAGES,
    "imagenet": IMAGENET,
    "imagefolder": OWN_IMAGES,
}
"""Recipes by data set; registered ones have :data:`OWN_IMAGES`."""

REGISTERED: list[Phase] = []
"""Phases of :func:`register_task`."""


def register_task(*phases: Phase) -> None:
    """Register a task for ``TrainConfig(task=...)`` and ``--task``, on every data set.

    To use it in the command, register it and call the command's ``main``:
    ``compofa.cli.train.main(["--task", "late", ...])``.

    Args:
        phases: Its phases, numbered from 1.

    Raises:
        ConfigError: A task of this name exists, or the phases are not numbered 1, 2, ...

    Example::

        def largest_first(space, step):
            if step.index < step.total // 2:
                return [space.largest]
            return uniform(space, step)

        register_task(
            Phase("late", 1, subnets=2, epochs=20, base_lr=0.8, sampler=largest_first,
                  teacher="none")
        )
    """
    keys = [(phase.task, phase.number) for phase in phases]
    if keys != [(phases[0].task, number) for number in range(1, len(phases) + 1)]:
        raise ConfigError(f"expected phases 1, 2, ... of one task, got {keys}")
    if phases[0].task in task_names():
        raise ConfigError(f"expected the name of a new task, got {phases[0].task!r}")
    REGISTERED.extend(phases)


def task_names() -> tuple[str, ...]:
    """Return the values of ``--task``."""
    return (*dict.fromkeys(phase.task for phase in (*IMAGENET.phases, *REGISTERED)), *CHAINS)


def recipe_for(dataset: str) -> Recipe:
    """Return the recipe of a data set; :data:`OWN_IMAGES` if it has none of its own."""
    return RECIPES.get(dataset, OWN_IMAGES)
