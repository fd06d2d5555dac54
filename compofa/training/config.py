"""Settings of a training run: frozen, validated at once, stored beside the results.

The settings themselves are the fields of :class:`compofa.training.options.Options`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from compofa.data.catalog import dataset_info
from compofa.distributed.threads import default_threads
from compofa.errors import CompofaError, ConfigError, did_you_mean
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import entry, network_spec
from compofa.space.coupling import parse_coupling
from compofa.training import regularisation
from compofa.training.optimizers import OPTIMIZERS
from compofa.training.options import Options
from compofa.training.recipes import Phase, Recipe, recipe_for

DEFAULT_NETWORKS = {"imagenet": "compofa-elastic"}
"""Networks of recipes that differ from the data set's own: the published runs vary kernels."""


@dataclass(frozen=True)
class TrainConfig(Options):
    """Settings of a training run. :meth:`resolved` replaces ``None`` by the default."""

    @property
    def recipe_phase(self) -> Phase:
        """The phase of the recipe that this run trains."""
        return recipe_for(self.dataset).phase(self.task, self.phase)

    @property
    def follows_weights(self) -> bool:
        """Whether the network is that of the initial weights."""
        return bool(self.init_path) and self.net is None and self.width_mult is None

    def _usual_net(self, phase: Phase) -> str | None:
        return None if self.follows_weights else default_network(self.dataset, phase)

    def of_phase(self, phase: Phase, **settings: Any) -> TrainConfig:
        """Return these settings for another phase, without those that it does not use."""
        config = replace(self, task=phase.task, phase=phase.number, **settings)
        return replace(config, **{name: DEFAULTS[name] for name in config.unused()})

    def unused(self) -> tuple[str, ...]:
        """Return the names of settings that the phase does not use."""
        phase, names = self.recipe_phase, []
        starts = phase.starts_from == ("teacher", 1) and not self.init_path
        taught = phase.teacher in ("checkpoint", "given") and self.kd_ratio > 0
        if not taught and not starts:
            names.append("teacher_path")
        if not taught:
            names.append("teacher")
        if phase.teacher == "none" or (
            phase.teacher == "given" and not self.teacher_path and not self.teacher
        ):
            names += ["kd_ratio", "kd_type"]
        if phase.largest_only or phase.single:
            names.append("dynamic_batch_size")
        if not phase.single:
            names.append("subnet")
        if self.follows_weights:
            names.append("net")
        return tuple(names)

    def given(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names`` whose settings differ from their defaults."""
        usual = {name: (default,) for name, default in DEFAULTS.items()}
        usual["dynamic_batch_size"] = (None, self.recipe_phase.subnets)
        return [name for name in names if getattr(self, name) not in usual[name]]

    def resolved(self) -> TrainConfig:
        """Return the settings with all defaults filled in and validated.

        Raises:
            ConfigError: Settings are unknown or out of range; the message lists all of them.
        """
        recipe, phase = self._rows()

        def default(name: str, value: Any) -> Any:
            given = getattr(self, name)
            return value if given is None else given

        info = dataset_info(self.dataset)
        usual_sizes = (info.eval_resolution,) if phase.single else info.train_resolutions
        sizes = tuple(sorted(set(default("image_size", usual_sizes))))
        largest = max(sizes, default=info.eval_resolution)
        epochs = default("epochs", phase.epochs)
        batch_size = default("batch_size", recipe.batch_size)
        kind = OPTIMIZERS.get(self.optimizer, OPTIMIZERS["sgd"])
        decay = recipe.weight_decay if kind.weight_decay is None else kind.weight_decay
        config = replace(
            self,
            net=default("net", None if phase.single else self._usual_net(phase)),
            image_size=sizes,
            eval_size=default(
                "eval_size", info.eval_resolution if self.image_size is None else largest
            ),
            epochs=epochs,
            batch_size=batch_size,
            dynamic_batch_size=default("dynamic_batch_size", phase.subnets),
            lr=default("lr", kind.default_lr(phase.base_lr, batch_size)),
            warmup_epochs=default("warmup_epochs", max(0, min(phase.warmup_epochs, epochs - 1))),
            momentum=default("momentum", kind.momentum),
            weight_decay=default("weight_decay", decay),
            label_smoothing=default("label_smoothing", recipe.label_smoothing),
            dropout=default("dropout", recipe.dropout),
            validate_every=default("validate_every", recipe.validate_every),
            workers=default("workers", 0),
            threads=default_threads(largest, self.threads),
        )
        faults = config._faults()
        if faults:
            raise ConfigError("; ".join(faults))
        return config

    def _rows(self) -> tuple[Recipe, Phase]:
        """Return recipe and phase, reporting all unknown names at once."""
        faults = []
        for look_up in (
            lambda: dataset_info(self.dataset),
            lambda: self.recipe_phase,
            lambda: entry(self.net) if self.net else None,
        ):
            try:
                look_up()
            except CompofaError as error:
                faults.append(str(error))
        if faults:
            raise ConfigError("; ".join(faults))
        return recipe_for(self.dataset), self.recipe_phase

    def _faults(self) -> list[str]:
        faults = []
        for setting in fields(self):
            value, choices = getattr(self, setting.name), setting.metadata["choices"]
            bounds = setting.metadata["bounds"]
            if setting.name == "warmup_epochs":
                bounds = (0, max(0, self.epochs))
            if value is not None and bounds and not bounds[0] <= value <= bounds[1]:
                faults.append(
                    f"{flag(setting.name)}: expected {bounds[0]} to {bounds[1]}, got {value}"
                )
            if choices and value not in choices:
                expected = f"{did_you_mean(value, choices)}expected {' or '.join(choices)}"
                faults.append(f"{flag(setting.name)}: {expected}, got {value!r}")
        if dataset_info(self.dataset).needs_path and not self.data_path:
            faults.append(f"--data-path: expected the folder of {self.dataset}")
        faults += [
            f"{flag(name)}: expected none with --task {self.task}, which does not use it"
            f"{' at --kd-ratio 0' * (name == 'teacher_path' and self.kd_ratio == 0)}"
            for name in self.given(self.unused())
        ]
        faults += regularisation.faults(self)
        if self.recipe_phase.single:
            return faults + self._single_faults()
        if self.follows_weights:  # checked once they are open
            return faults
        try:
            network = self.network(10)
            self.recipe_phase.within(network.space)
            for size in (*self.image_size, self.eval_size):
                network.check_resolution(size)
        except CompofaError as error:
            faults.append(str(error))
        return faults

    def _single_faults(self) -> list[str]:
        """Return the faults of a phase that takes its network from a checkpoint."""
        faults = [
            f"{flag(name)}: expected none with --task {self.task}, whose network is that of "
            "--init-path"
            for name in ("net", "fixed_kernel", "heuristic", "width_mult")
            if getattr(self, name) is not None
        ]
        if not self.init_path:
            faults.append(f"--init-path: expected the checkpoint whose subnet to {self.task}")
        return faults

    def network(self, classes: int) -> NetworkSpec:
        """Return the definition of the supernet to train."""
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

    def same_data(self, other: TrainConfig) -> bool:
        """Whether the data set is that of other settings, in the same folder."""
        paths = (each.data_path and os.path.realpath(each.data_path) for each in (self, other))
        return self.dataset == other.dataset and len({*paths}) == 1

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON data."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    def changes_since(self, earlier: Mapping[str, Any]) -> list[str]:
        """List the settings that differ from those of ``earlier`` and affect the result.

        Args:
            earlier: What :meth:`to_json` returned. A setting that its version did not have
                counts as the default.
        """
        now, then = self.to_json(), DEFAULTS | dict(earlier)
        # Earlier versions accepted and used --dynamic-batch-size with every task.
        unused = set(self.unused()) - {"dynamic_batch_size"}
        return [
            f"{setting.name}: {then[setting.name]!r} then, {now[setting.name]!r} now"
            for setting in fields(self)
            if not setting.metadata["may_change"]
            and setting.name not in unused
            and now[setting.name] != then[setting.name]
        ]

    def allowed_changes_since(self, earlier: Mapping[str, Any]) -> list[str]:
        """List the settings that differ from those of ``earlier`` and may change in a run."""
        now, then = self.to_json(), DEFAULTS | dict(earlier)
        return [
            f"{setting.name}: {then[setting.name]!r} then, {now[setting.name]!r} now"
            for setting in fields(self)
            if setting.metadata["may_change"]
            and now[setting.name] not in (None, then[setting.name])
        ]


DEFAULTS = {setting.name: setting.default for setting in fields(TrainConfig)}
TrainConfig.__doc__ = f"{TrainConfig.__doc__}\n\n    Attributes:\n" + "".join(
    f"        {setting.name}: {setting.metadata['help']}.\n" for setting in fields(TrainConfig)
)


def flag(name: str) -> str:
    """Return the option of a setting, such as ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def default_network(dataset: str, phase: Phase) -> str:
    """Return the id of the network that a phase trains on a data set by default."""
    if phase.free:
        return recipe_for(dataset).free_network
    return DEFAULT_NETWORKS.get(dataset, dataset_info(dataset).network)
