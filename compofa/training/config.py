"""A run's whole configuration: frozen, checked at once, written beside the results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from compofa.data import dataset_info
from compofa.distributed.threads import default_threads
from compofa.errors import CompofaError, ConfigError
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import entry, network_spec
from compofa.space.coupling import parse_coupling
from compofa.training.recipes import REFERENCE_BATCH, Phase, recipe_for

KD_TYPES = ("ce", "mse")
DEFAULT_NETWORKS = {"imagenet": "compofa-elastic"}
"""Where a recipe's network is not the data set's usual one: the published runs vary kernels."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. ``None`` is replaced by the recipe's value in ``resolved``.

    Attributes:
        task: What to train: a task of the recipe.
        phase: Which of its phases.
        dataset: Name of the data set.
        data_path: Its folder.
        net: Name of the network; by default the data set's usual one for the task.
        fixed_kernel: Whether kernels are fixed; by default as the network's name says.
        heuristic: Coupling of depth and expand ratio, see
            :func:`compofa.space.coupling.parse_coupling`.
        width_mult: Width multiplier; by default the network's own.
        epochs: Passes over the training images.
        lr: Peak learning rate for this batch size on one worker.
        scale_lr: Whether to multiply it by the number of workers, as the published runs do.
        warmup_epochs: Epochs of linear warm-up; by default the recipe's, short of ``epochs``.
        batch_size: Images a step and worker.
        momentum: Of SGD.
        weight_decay: L2 penalty on weights other than biases and BN.
        label_smoothing: Share of the target spread over all classes.
        dropout: Probability before the classifier.
        dynamic_batch_size: Subnets whose gradients a step sums.
        teacher_path: Checkpoint to learn from; by default the run's own teacher.
        init_path: Checkpoint to start from; by default the predecessor's. For ``finetune`` also
            a network of the zoo.
        subnet: What ``finetune`` takes out of it: a subnet as JSON, ``largest`` or ``smallest``.
        kd_ratio: Weight of the distillation term.
        kd_type: ``ce`` or ``mse``.
        image_size: Resolutions that steps draw from, in pixels.
        eval_size: Resolution to validate at, in pixels.
        validation_images: Images held out of the training images.
        validate_every: Epochs between validations.
        calibration_images: Training images to measure BN statistics on.
        workers: Data-loading processes.
        seed: Of every random choice.
        device: Such as ``cpu`` or ``cuda``.
        amp: Whether to compute in reduced precision.
        fp16_allreduce: Whether workers send gradients in half precision.
        threads: CPU threads; by default one for small images, otherwise torch's choice. The
            last bits of a result depend on it.
        max_skipped: Steps in a row whose loss or gradient is not a finite number, and which are
            skipped, that end the run.
        save_minutes: Minutes between saves within an epoch.
        price: Price of an hour of one device, for the report.
        power: Power of one device in watts, for the report.
    """

    task: str = "compound"
    phase: int = 1
    dataset: str = "digits"
    data_path: str | None = None
    net: str | None = None
    fixed_kernel: bool | None = None
    heuristic: str | None = None
    width_mult: float | None = None
    epochs: int | None = None
    lr: float | None = None
    scale_lr: bool = True
    warmup_epochs: int | None = None
    batch_size: int | None = None
    momentum: float = 0.9
    weight_decay: float | None = None
    label_smoothing: float | None = None
    dropout: float | None = None
    dynamic_batch_size: int | None = None
    teacher_path: str | None = None
    init_path: str | None = None
    subnet: str | None = None
    kd_ratio: float = 1.0
    kd_type: str = "ce"
    image_size: tuple[int, ...] | None = None
    eval_size: int | None = None
    validation_images: int | None = None
    validate_every: int | None = None
    calibration_images: int = 2000
    workers: int = 0
    seed: int = 0
    device: str = "cpu"
    amp: bool = False
    fp16_allreduce: bool = False
    threads: int | None = None
    max_skipped: int = 20
    save_minutes: float = 30.0
    price: float | None = None
    power: float | None = None

    UNIMPORTANT: ClassVar[tuple[str, ...]] = (
        "data_path", "teacher_path", "init_path", "workers", "device", "max_skipped",
        "save_minutes", "price", "power",
    )  # fmt: skip
    """Settings that may change between a run and its resumption: what the paths lead to may not."""

    @property
    def recipe_phase(self) -> Phase:
        """The row of the recipe that this run follows."""
        return recipe_for(self.dataset).phase(self.task, self.phase)

    def of_phase(self, task: str, number: int, **more: Any) -> TrainConfig:
        """Return these settings for another phase, without those that it does not use."""
        config = replace(self, task=task, phase=number, **more)
        defaults = {field.name: field.default for field in fields(self)}
        return replace(config, **{name: defaults[name] for name in config.unused()})

    def unused(self) -> tuple[str, ...]:
        """Return the names of settings that the phase does not use."""
        phase, names = self.recipe_phase, []
        starts = phase.starts_from == ("teacher", 1) and not self.init_path
        taught = phase.teacher in ("checkpoint", "given") and self.kd_ratio > 0
        if not taught and not starts:
            names.append("teacher_path")
        if phase.teacher == "none" or (phase.teacher == "given" and not self.teacher_path):
            names += ["kd_ratio", "kd_type"]
        if phase.largest_only or phase.single:
            names.append("dynamic_batch_size")
        if not phase.single:
            names.append("subnet")
        return tuple(names)

    def given(self, names: Iterable[str]) -> list[str]:
        """Return which of these settings are not what they are by default."""
        usual = {field.name: (field.default,) for field in fields(self)}
        usual["dynamic_batch_size"] = (None, self.recipe_phase.subnets)
        return [name for name in names if getattr(self, name) not in usual[name]]

    def resolved(self) -> TrainConfig:
        """Return the configuration with every default filled in, all of it checked.

        Raises:
            ConfigError: Settings are unknown or out of range; all of them are listed.
        """
        info, recipe, phase = self._lookup()
        usual = DEFAULT_NETWORKS.get(self.dataset, info.network)
        if phase.single:
            usual = None
        filled = {
            "net": recipe.free_network if phase.free else usual,
            "epochs": phase.epochs,
            "batch_size": recipe.batch_size,
            "weight_decay": recipe.weight_decay,
            "label_smoothing": recipe.label_smoothing,
            "dropout": recipe.dropout,
            "dynamic_batch_size": phase.subnets,
            "image_size": (info.eval_resolution,) if phase.single else info.train_resolutions,
            "validate_every": recipe.validate_every,
        }
        unset = {name: value for name, value in filled.items() if getattr(self, name) is None}
        config = replace(self, **unset)
        sizes = tuple(sorted(set(config.image_size)))
        late = {
            "image_size": sizes,
            "threads": default_threads(max(sizes, default=0), self.threads),
        }
        if config.warmup_epochs is None:
            late["warmup_epochs"] = max(0, min(phase.warmup_epochs, config.epochs - 1))
        if config.lr is None:
            late["lr"] = phase.base_lr * config.batch_size / REFERENCE_BATCH
        if config.eval_size is None:
            usual = info.eval_resolution
            late["eval_size"] = usual if self.image_size is None else max(sizes, default=usual)
        config = replace(config, **late)
        faults = config._faults()
        if faults:
            raise ConfigError("; ".join(faults))
        return config

    def _lookup(self) -> tuple[Any, Any, Phase]:
        """Look up data set and phase, reporting all unknown names at once."""
        found, faults = [], []
        for look in (
            lambda: dataset_info(self.dataset),
            lambda: recipe_for(self.dataset),
            lambda: self.recipe_phase,
            lambda: entry(self.net) if self.net else None,
        ):
            try:
                found.append(look())
            except CompofaError as error:
                faults.append(str(error))
        if faults:
            raise ConfigError("; ".join(faults))
        return found[0], found[1], found[2]

    def _faults(self) -> list[str]:
        ranges = {
            "epochs": (1, 100_000),
            "lr": (0, 1000),
            "warmup_epochs": (0, max(0, self.epochs)),
            "batch_size": (2, 65_536),  # BN learns nothing from one image
            "momentum": (0, 0.9999),
            "weight_decay": (0, 1),
            "label_smoothing": (0, 0.9999),
            "dropout": (0, 0.9999),
            "dynamic_batch_size": (1, 64),
            "kd_ratio": (0, 1000),
            "validate_every": (1, 100_000),
            "calibration_images": (1, 10_000_000),
            "validation_images": (1, 10_000_000),
            "workers": (0, 256),
            "seed": (0, 2**63 - 1),
            "max_skipped": (1, 1_000_000),
            "save_minutes": (0, 1_000_000),
        }
        optional = {"price": (0, 1_000_000), "power": (0, 1_000_000)}
        ranges |= {name: r for name, r in optional.items() if getattr(self, name) is not None}
        faults = [
            f"--{name.replace('_', '-')}: expected {low} to {high}, got {getattr(self, name)}"
            for name, (low, high) in ranges.items()
            if getattr(self, name) is not None and not low <= getattr(self, name) <= high
        ]
        if self.threads is not None and not 1 <= self.threads <= 1024:
            faults.append(f"--threads: expected 1 to 1024, got {self.threads}")
        if self.kd_type not in KD_TYPES:
            faults.append(f"--kd-type: expected {' or '.join(KD_TYPES)}, got {self.kd_type!r}")
        if dataset_info(self.dataset).needs_path and not self.data_path:
            faults.append(f"--data-path: expected the folder of {self.dataset}")
        faults += [
            f"--{name.replace('_', '-')}: expected none with --task {self.task}, which does not "
            f"use it{' at --kd-ratio 0' * (name == 'teacher_path' and self.kd_ratio == 0)}"
            for name in self.given(self.unused())
        ]
        if self.recipe_phase.single:
            return faults + self._single_faults()
        try:
            network = self.network(10)
            self.recipe_phase.within(network.space)
            for size in (*self.image_size, self.eval_size):
                network.check_resolution(size)
        except CompofaError as error:
            faults.append(str(error))
        return faults

    def _single_faults(self) -> list[str]:
        """Return what is wrong with the settings of a phase whose network is a checkpoint's."""
        faults = [
            f"--{name.replace('_', '-')}: expected none with --task {self.task}, whose network is "
            "that of --init-path"
            for name in ("net", "fixed_kernel", "heuristic", "width_mult")
            if getattr(self, name) is not None
        ]
        if not self.init_path:
            faults.append(f"--init-path: expected the checkpoint whose subnet to {self.task}")
        return faults

    def network(self, classes: int) -> NetworkSpec:
        """Return the definition of the supernet that this configuration describes."""
        heuristic = entry(self.net).coupling if self.heuristic is None else self.heuristic
        spec = network_spec(
            self.net,
            classes,
            coupling=parse_coupling(heuristic),
            elastic_kernel=None if self.fixed_kernel is None else not self.fixed_kernel,
            width_mult=self.width_mult,
            resolutions=(self.eval_size,),
            dropout=self.dropout,
        )
        return spec.largest_only() if self.recipe_phase.largest_only else spec

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def changes_since(self, earlier: Mapping[str, Any]) -> list[str]:
        """List the settings that differ from ``earlier`` JSON and would change the result.

        Settings that are not in it, because there was no such setting then, had its default.
        """
        now = self.to_json()
        earlier = {field.name: field.default for field in fields(self)} | dict(earlier)
        summed = {"dynamic_batch_size"}  # which earlier versions let every task do
        ignored = {*self.UNIMPORTANT, *self.unused()} - summed
        return [
            f"{field.name}: {earlier.get(field.name)!r} then, {now[field.name]!r} now"
            for field in fields(self)
            if field.name not in ignored and now[field.name] != earlier.get(field.name)
        ]


def run_folder(config: TrainConfig, output: Path) -> Path:
    """Return the folder of a run's phase within ``output``."""
    return output / config.recipe_phase.folder
