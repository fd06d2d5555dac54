"""Teachers that this library does not define: classifiers of timm and torchvision, own modules."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compofa.data import DataSplits, Normalisation, import_torchvision
from compofa.data.imagenet import require_order
from compofa.errors import CheckpointError, ConfigError, did_you_mean
from compofa.io.checkpoint import weights_in
from compofa.io.tensors import checksum, first_line, read_safely
from compofa.io.weights import copy_checked
from compofa.training.config import TrainConfig
from compofa.training.predecessors import Origin

log = logging.getLogger(__name__)

LIBRARIES = ("timm", "torchvision")
MODULE = "module"
"""What ``--teacher`` begins with, in the settings of a run, for a module given from Python."""
_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError, OSError, ImportError)
"""What other libraries raise for names, weights, downloads and images that they refuse."""


class ExternalTeacher(nn.Module):
    """A classifier that takes images as its student does, whatever its own normalisation is.

    Args:
        network: From normalised images [n, 3, r, r] to logits [n, classes].
        normalisation: Normalisation of its inputs; ``None`` for that of the student.
        size: Side of its images in pixels if it takes no other: they are resized, bilinearly.
    """

    def __init__(
        self,
        network: nn.Module,
        normalisation: Normalisation | None = None,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self.network, self.normalisation, self.size = network, normalisation, size
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def teaches(self, student: Normalisation) -> ExternalTeacher:
        """Convert from a student's normalisation; returns itself, in evaluation mode."""
        own = self.normalisation
        if own is None or own == student:
            self.scale = self.shift = None
        else:
            mean, std, own_mean, own_std = (
                torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
                for values in (student.mean, student.std, own.mean, own.std)
            )
            self.scale, self.shift = (std / own_std).float(), ((mean - own_mean) / own_std).float()
        return self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Classify images that are normalised as the student's; returns logits [n, classes]."""
        if self.scale is not None:
            images = images * self.scale + self.shift
        if self.size is not None and images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear")
        return self.network(images)


def load_teacher(name: str, weights: str | None, classes: tuple[str, ...]) -> ExternalTeacher:
    """Load a classifier of another library.

    Args:
        name: ``timm:NAME`` or ``torchvision:NAME``.
        weights: File of its state dict, of ``torch.save`` or safetensors; ``None`` for the
            pretrained weights, which the library downloads.
        classes: Class names of the data set, in the order of the logits.

    Raises:
        ConfigError: The name is unknown, the library is not installed, the download fails, or the
            pretrained weights are for other classes.
        CheckpointError: The file cannot be read or does not fit.
        DataError: There is no file, and numbered class folders are not in numerical order.
    """
    library, _, own_name = name.partition(":")
    if library not in LIBRARIES or not own_name:
        hint = did_you_mean(library, LIBRARIES)
        raise ConfigError(f"--teacher: {hint}expected timm:NAME or torchvision:NAME, got {name!r}")
    state = None if weights is None else _read_weights(weights)
    load = _load_timm if library == "timm" else _load_torchvision
    try:
        teacher = load(name, own_name, len(classes), pretrained=state is None)
    except _REFUSALS as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--teacher {name}: {library} cannot load it: {first_line(error)}"
        ) from error
    if state is None:
        require_order(classes)
    else:
        copy_checked(teacher.network, state, f"--teacher-path {weights}: {name}")
    return teacher


def _load_timm(name: str, own_name: str, classes: int, pretrained: bool) -> ExternalTeacher:
    if importlib.util.find_spec("timm") is None:
        raise ConfigError(f"--teacher {name} needs timm: pip install 'compofa[timm]'")
    import_torchvision()  # which timm imports
    import timm

    config = timm.models.get_pretrained_cfg(own_name)
    if config is None:
        hint = did_you_mean(own_name.partition(".")[0], timm.list_models())
        raise ConfigError(
            f"--teacher: {hint}expected timm:NAME of one of timm's models, got {name}"
        )
    if pretrained:
        _require_classes(name, config.num_classes, classes)
    network = timm.create_model(own_name, pretrained=pretrained, num_classes=classes)
    size = config.input_size[-1] if config.fixed_input_size else None
    return ExternalTeacher(network, Normalisation(tuple(config.mean), tuple(config.std)), size)


def _load_torchvision(name: str, own_name: str, classes: int, pretrained: bool) -> ExternalTeacher:
    models = import_torchvision().models
    known = models.list_models(module=models)
    if own_name not in known:
        raise ConfigError(
            f"--teacher: {did_you_mean(own_name, known)}expected torchvision:NAME of one of "
            f"torchvision's classifiers, such as resnet50, got {name}"
        )
    weights = models.get_model_weights(own_name).DEFAULT
    if pretrained:
        _require_classes(name, len(weights.meta["categories"]), classes)
        network = models.get_model(own_name, weights=weights)
    else:
        network = models.get_model(own_name, weights=None, num_classes=classes)
    preset = weights.transforms()
    normalisation = Normalisation(tuple(preset.mean), tuple(preset.std))
    return ExternalTeacher(network, normalisation, getattr(network, "image_size", None))


def _require_classes(name: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(
            f"--teacher {name}: expected pretrained weights for the {wanted} classes of the data "
            f"set, got {found} classes: fine-tune it on them (timm's train.py, or torchvision's "
            "references/classification/train.py) and name the weights with --teacher-path"
        )


def _read_weights(path: str) -> Mapping[str, Tensor]:
    """Read the state dict of a file without running code from it.

    Raises:
        CheckpointError: It cannot be read.
        ConfigError: It is of safetensors, which is not installed.
    """
    if Path(path).suffix != ".safetensors":
        return weights_in(path, read_safely(path))
    if importlib.util.find_spec("safetensors") is None:
        raise ConfigError(f"--teacher-path {path} needs safetensors: pip install 'compofa[export]'")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {first_line(error)}") from error


def check_teacher(teacher: ExternalTeacher, config: TrainConfig, splits: DataSplits) -> None:
    """Check that a teacher classifies images of the run's sizes, and log what it is.

    Raises:
        ConfigError: It does not, or has another number of classes.
    """
    wanted = [2, len(splits.classes)]
    for size in sorted({min(config.image_size), max(config.image_size)}):
        try:
            with torch.no_grad():
                logits = teacher(torch.zeros(2, 3, size, size))
            found = f"shape {list(logits.shape)}" if list(logits.shape) != wanted else ""
        except _REFUSALS as error:
            found = first_line(error)
        if found:
            raise ConfigError(
                f"--teacher {config.teacher}: expected logits of shape {wanted} for 2 images of "
                f"{size} pixels, got {found}"
            )
    own = teacher.normalisation or splits.normalisation
    count = sum(parameter.numel() for parameter in teacher.parameters())
    log.info(
        "teacher: %s, %s parameters; images normalised with mean %s and deviation %s%s",
        config.teacher, f"{count:,}", own.mean, own.std,
        f", resized to {teacher.size} pixels" if teacher.size else "",
    )  # fmt: skip


def recorded(
    teacher: ExternalTeacher, config: TrainConfig, weights: str | None, output: Path,
    before: Origin | None,
) -> Origin:  # fmt: skip
    """Return the origin of a teacher, for checkpoints: its file, or its name and a hash of weights.

    Args:
        teacher: The teacher.
        config: Resolved settings.
        weights: File of its weights, if it has one.
        output: Folder of the run.
        before: Origin that a resumed run was started with.

    Raises:
        ConfigError: The run was started with other weights.
    """
    if weights:
        return before or Origin.of(weights, output)
    state: dict[str, Any] = dict(teacher.network.state_dict())
    found = Origin(str(config.teacher), checksum(state)[:16])
    if before is not None and before != found:
        raise ConfigError(
            f"--teacher: expected {before.path} with the weights of hash {before.digest} that the "
            f"run was started with, got {found.path} with those of hash {found.digest}"
        )
    return found


def external_teacher(
    config: TrainConfig,
    splits: DataSplits,
    output: Path,
    weights: str | None,
    before: Origin | None,
    module: nn.Module | None,
) -> tuple[ExternalTeacher, Origin]:
    """Return the teacher that ``config.teacher`` names, on the CPU, and its origin.

    Args:
        config: Resolved settings.
        splits: The data set, normalised as the student expects.
        output: Folder of the run.
        weights: File of its weights; empty for none.
        before: Origin that a resumed run was started with.
        module: The module, where it was given from Python.

    Raises:
        CompofaError: See :func:`load_teacher`, :func:`check_teacher` and :func:`recorded`.
    """
    if module is not None:
        own = isinstance(module, ExternalTeacher)
        teacher = module if own else ExternalTeacher(module)
    elif config.teacher.startswith(f"{MODULE}:"):
        raise ConfigError(
            f"the run was started with a teacher from Python, {config.teacher}: resume it from "
            "there, with compofa.training.run.train(config, teacher=...)"
        )
    else:
        teacher = load_teacher(config.teacher, weights or None, splits.classes)
    teacher.teaches(splits.normalisation)
    check_teacher(teacher, config, splits)
    return teacher, recorded(teacher, config, weights, output, before)
