"""Options of a training run: one field each, with its default, help and bounds.

The options of the command line, the documentation and the checks of a run's settings are generated
from these fields.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from compofa.data.augmentation import AUTO_AUGMENTS
from compofa.data.catalog import DATASETS
from compofa.networks.zoo import NETWORKS
from compofa.training.optimizers import OPTIMIZERS

GROUPS = MODEL, DATA, TRAINING, REGULARISATION, RUN, RANKS = (
    "model", "data", "training (defaults depend on task and data set)",
    "augmentation and regularisation (off by default, as in the published runs)", "run",
    "distributed training",
)  # fmt: skip
"""Headings of the options in ``--help``."""


def option(
    default: Any,
    help_text: str,
    group: str,
    *,
    metavar: str | None = None,
    bounds: tuple[float, float] | None = None,
    choices: Collection[str] | None = None,
    may_change: bool = False,
) -> Any:
    """Return a dataclass field that is an option of the command line, too.

    Args:
        default: Default; ``None`` for one that depends on other settings.
        help_text: Help of the option, and documentation of the field.
        group: Heading in ``--help``.
        metavar: Placeholder of the value in ``--help``.
        bounds: Smallest and largest value.
        choices: Allowed values.
        may_change: Whether a run may be resumed with another value.
    """
    metadata = {
        "help": help_text, "group": group, "metavar": metavar, "bounds": bounds,
        "choices": choices, "may_change": may_change,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Options:
    """The fields of :class:`compofa.training.config.TrainConfig`."""

    # fmt: off
    task: str = option("compound", "training task", MODEL, metavar="TASK")
    phase: int = option(1, "phase of the task", MODEL, metavar="N")
    net: str | None = option(
        None, f"one of {', '.join(NETWORKS)} (default: that of --init-path, else by data "
        "set and task)", MODEL, metavar="ID")
    fixed_kernel: bool | None = option(
        None, "fix the kernel size of each stage (default: as the network's id says)", MODEL)
    heuristic: str | None = option(
        None, "coupling of depth and width: simple (that of the network), none, or pairs such as "
        "2:3,3:4,4:6 (for ResNet50D, 0:0.2,1:0.25,2:0.35)", MODEL, metavar="COUPLING")
    width_mult: float | None = option(
        None, "width multiplier (default: that of the network)", MODEL, metavar="X")
    init_path: str | None = option(
        None, "initial weights: a checkpoint or the id of a pretrained network, whose classifier "
        "is replaced if the classes differ (default: the best checkpoint of the preceding phase)",
        MODEL, metavar="ID|FILE", may_change=True)
    subnet: str | None = option(
        None, 'with --task finetune, the subnet of --init-path: {"ks", "e", "d", "r"} as JSON, a '
        "JSON file, largest or smallest", MODEL, metavar="JSON")

    dataset: str = option("digits", f"one of {', '.join(DATASETS)}", DATA, metavar="NAME")
    data_path: str | None = option(
        None, "folder of the data set; for imagefolder, class folders, optionally below train/ and "
        "val/", DATA, metavar="DIR", may_change=True)
    image_size: tuple[int, ...] | None = option(
        None, "training resolutions in pixels, one sampled per step (default: those of the data "
        "set)", DATA, metavar="R[,R...]")
    eval_size: int | None = option(
        None, "validation resolution in pixels (default: the largest of training)", DATA,
        metavar="R")
    validation_images: int | None = option(
        None, "training images held out for validation (default: depends on the data set)", DATA,
        metavar="N", bounds=(1, 10_000_000))
    calibration_images: int = option(
        2000, "training images for BN calibration before validation", DATA, metavar="N",
        bounds=(1, 10_000_000))
    workers: int | None = option(
        None, "loader workers per rank, which decode images (default: 0 for images in memory, else "
        "by the number of CPUs)", DATA, metavar="N", bounds=(0, 256), may_change=True)

    epochs: int | None = option(
        None, "number of epochs; a run may be resumed with more", TRAINING, metavar="N",
        bounds=(1, 100_000), may_change=True)
    batch_size: int | None = option(
        None, "images per step and rank", TRAINING, metavar="N", bounds=(2, 65_536))
    dynamic_batch_size: int | None = option(
        None, "subnets sampled per step; their gradients are summed", TRAINING, metavar="N",
        bounds=(1, 64))
    lr: float | None = option(
        None, "peak learning rate for this batch size on one rank", TRAINING, metavar="X",
        bounds=(0, 1000))
    scale_lr: bool = option(True, "multiply the learning rate by the number of ranks", TRAINING)
    warmup_epochs: int | None = option(
        None, "epochs of linear warm-up, at most --epochs", TRAINING, metavar="N")
    optimizer: str = option(
        "sgd", f"one of {', '.join(OPTIMIZERS)}; --lr, --momentum and --weight-decay have defaults "
        "of their own for each", TRAINING, metavar="NAME", choices=OPTIMIZERS)
    momentum: float | None = option(
        None, "momentum of sgd (Nesterov's) and rmsprop (default: 0.9)", TRAINING, metavar="X",
        bounds=(0, 0.9999))
    weight_decay: float | None = option(
        None, "weight decay, except of biases and BN parameters: an L2 penalty, or for adamw "
        "decoupled from the gradient (default for adamw: 0.05)", TRAINING, metavar="X",
        bounds=(0, 1))
    label_smoothing: float | None = option(
        None, "label smoothing", TRAINING, metavar="X", bounds=(0, 0.9999))
    dropout: float | None = option(
        None, "dropout probability before the classifier", TRAINING, metavar="X",
        bounds=(0, 0.9999))
    teacher_path: str | None = option(
        None, "checkpoint of the teacher, in any format (default: the run's own teacher, or "
        "the largest subnet of --init-path, fine-tuned first if the classes differ). With "
        "--resume, the new path of a teacher that was moved; likewise --init-path", TRAINING,
        metavar="FILE", may_change=True)
    kd_ratio: float = option(
        1.0, "weight of the distillation loss; 0 disables distillation", TRAINING, metavar="X",
        bounds=(0, 1000))
    kd_type: str = option(
        "ce", "distillation loss: ce (cross entropy) or mse (on the logits)", TRAINING,
        metavar="TYPE", choices=("ce", "mse"))
    teacher: str | None = option(
        None, "teacher of another library, timm:NAME or torchvision:NAME, with its weights in "
        "--teacher-path; without them, for ImageNet's classes, with the pretrained weights that "
        "the library downloads", TRAINING, metavar="NAME")
    validate_every: int | None = option(
        None, "epochs between validations", TRAINING, metavar="N", bounds=(1, 100_000))
    patience: int | None = option(
        None, "stop early after N validations without improvement (default: never)", TRAINING,
        metavar="N", bounds=(1, 100_000), may_change=True)

    auto_augment: str = option(
        "none", f"automatic augmentation of each training image, {' or '.join(AUTO_AUGMENTS)}: for "
        "few images whose classes differ neither in orientation nor in colour. randaugment is the "
        "milder one; trivialaugment rotates by up to 135 degrees and needs images of 32 pixels",
        REGULARISATION, metavar="NAME", choices=("none", *AUTO_AUGMENTS))
    random_erasing: float = option(
        0.0, "probability of erasing a rectangle of a training image; 0.1 to 0.25 are usual, "
        "against overfitting and for objects that are partly hidden", REGULARISATION, metavar="P",
        bounds=(0, 1))
    mixup: float = option(
        0.0, "mix pairs of images and their labels, with shares from Beta(A, A); 0.1 to 0.8 are "
        "usual, for long training", REGULARISATION, metavar="A", bounds=(0, 100))
    cutmix: float = option(
        0.0, "paste a rectangle of another image, and mix the labels by area, from Beta(A, A); 1 "
        "is usual. With --mixup, one of the two is drawn per step", REGULARISATION, metavar="A",
        bounds=(0, 100))
    crop_scale: float = option(
        0.08, "smallest area of the random crop of a photograph, as a share of it; 0.35 and more "
        "keep the object in the picture, for few or small photographs", REGULARISATION,
        metavar="X", bounds=(0.01, 1))
    color_jitter: float | None = option(
        None, "jitter of brightness, contrast and saturation of photographs; 0 where colour tells "
        "the classes apart, 0.4 is strong (default: brightness 0.125, saturation 0.5)",
        REGULARISATION, metavar="X", bounds=(0, 1))
    balanced_sampling: bool = option(
        False, "draw every class equally often, its images with probabilities inverse to the size "
        "of the class; epochs keep their length", REGULARISATION)
    ema: float = option(
        0.0, "decay per step of a moving average of the weights, which is validated and saved as "
        "best.pt; 1 - 1/N averages about N steps, and the steps of one to five epochs are usual",
        REGULARISATION, metavar="D", bounds=(0, 0.999999))
    clip_grad_norm: float = option(
        0.0, "scale gradients down to this L2 norm over all weights; 1 to 5 are usual, where "
        "losses jump", REGULARISATION, metavar="X", bounds=(0, 1e6))

    seed: int = option(0, "random seed", RUN, metavar="N", bounds=(0, 2**63 - 1))
    device: str = option(
        "cpu", "cpu, cuda or mps (default: cuda if available)", RUN, metavar="DEVICE",
        may_change=True)
    amp: bool = option(
        False, "automatic mixed precision: bfloat16, or float16 on GPUs without it", RUN)
    threads: int | None = option(
        None, "CPU threads (default: 1 for small images, else PyTorch's); results are reproducible "
        "to the bit only with the same number", RUN, metavar="N", bounds=(1, 1024))
    save_minutes: float = option(
        30.0, "minutes between checkpoints within an epoch", RUN, metavar="M",
        bounds=(0, 1_000_000), may_change=True)
    max_skipped: int = option(
        20, "steps in a row that may be skipped for a non-finite loss or gradient", RUN,
        metavar="N", bounds=(1, 1_000_000), may_change=True)
    price: float | None = option(
        None, "price per device hour, to report the cost", RUN, metavar="P",
        bounds=(0, 1_000_000), may_change=True)
    power: float | None = option(
        None, "power per device in watts, to report CO2 emissions", RUN, metavar="W",
        bounds=(0, 1_000_000), may_change=True)
    logger: str = option(
        "none", "experiment tracker beside TensorBoard: none, wandb or mlflow; both log to local "
        "files unless WANDB_MODE or MLFLOW_TRACKING_URI is set", RUN, metavar="NAME",
        choices=("none", "wandb", "mlflow"), may_change=True)

    fp16_allreduce: bool = option(False, "all-reduce gradients in half precision", RANKS)
    # fmt: on
