"""Settings of a run that depend on its images, on the network it starts from and on free memory."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from compofa.data import DataSplits, dataset_info, load_dataset
from compofa.data.loaders import most_workers
from compofa.data.survey import Survey, survey
from compofa.errors import ConfigError
from compofa.io.open import OpenedNetwork, open_network
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import at_resolution
from compofa.networks.network_spec import Network, network_from_json
from compofa.networks.zoo import NETWORKS, entry, warn_of_size
from compofa.training.config import TrainConfig, flag
from compofa.training.memory import ERROR, Need, cpus, free_bytes, readable
from compofa.training.own_images import (
    Before,
    Suggestion,
    filled,
    heading,
    suggest,
    table,
    with_network_for_sizes,
)
from compofa.training.recipes import OWN_IMAGES, Phase, recipe_for
from compofa.training.run_folder import CONFIG, has_checkpoint

log = logging.getLogger(__name__)

FEW_IMAGES = 1000
"""Photographs that are decoded without loader workers: starting them takes as long."""
_CLASSES = 1000  # assumed for the memory of a classifier before the data set is read


class _Fit(NamedTuple):
    """A batch size, a line about memory, and whether memory is short."""

    batch: int
    text: str
    short: bool


class Adviser:
    """Resolves the settings of phases, on one rank for all.

    Args:
        config: Settings of the task, as given.
        output: Folder of the run; ``None`` for the default.
        initial: The network of ``config.init_path``, if it is open already.
        ranks: Ranks on this machine, which share its memory and CPUs.
        resume: As in :func:`compofa.training.run.train`. Settings of phases that continue stay,
            whatever memory is free.
        splits: The data set, if it was given from Python.

    Attributes:
        notes: Lines to log before a phase is trained, by the name of its folder: pairs (level,
            text).
    """

    def __init__(
        self,
        config: TrainConfig,
        output: str | Path | None = None,
        initial: OpenedNetwork | None = None,
        ranks: int = 1,
        resume: bool | None = False,
        splits: DataSplits | None = None,
    ) -> None:
        self.given, self.ranks, self.resume = config, ranks, resume
        self.output = None if output is None else Path(output)
        self._initial, self._found, self._splits = initial, None, splits
        self.notes: dict[str, list[tuple[int, str]]] = {}

    def use(self, config: TrainConfig) -> None:
        """Take other settings of the task, such as those of a run that is resumed."""
        if config == self.given:
            return
        self._found = None
        if config.init_path != self.given.init_path:
            self._initial = None
        self.given = config

    @property
    def found(self) -> Survey:
        """What the data set holds; it is read once, when it is needed."""
        if self._found is None:
            self._found = self._survey()
        return self._found

    def _survey(self) -> Survey:
        if self._splits is not None:
            return survey(self._splits)
        config, logger = self.given, logging.getLogger("compofa.data")
        level = logger.level
        logger.setLevel(logging.WARNING)  # the phase reads the data set again, and says how
        try:
            splits = load_dataset(
                config.dataset,
                config.data_path,
                seed=config.seed,
                validation_images=config.validation_images,
            )
        finally:
            logger.setLevel(level)
        return survey(splits)

    @property
    def initial(self) -> OpenedNetwork | None:
        """The network that the run starts from, if it says which one it is."""
        given = self.given
        if self._initial is None and given.init_path and given.width_mult is None:
            self._initial = open_network(given.init_path, arch=given.net)
        return self._initial

    @property
    def opened(self) -> OpenedNetwork | None:
        """The network that the run starts from, if it is open already."""
        return self._initial

    def resolve(self, config: TrainConfig) -> TrainConfig:
        """Return the settings of a phase with all defaults filled in and validated.

        Raises:
            ConfigError: Settings are unknown or out of range, or a step needs more memory than is
                free.
            DataError: The data set cannot be read.
        """
        # Faults are reported before images are read.
        resolved = with_network_for_sizes(config).resolved()
        suggested: dict[str, Suggestion] = {}
        lines: list[tuple[int, str]] = []
        if recipe_for(config.dataset) is OWN_IMAGES and not _complete(config):
            before = self._before(config)
            suggested = suggest(config, self.found, before)
            resolved = filled(config, suggested).resolved()
            lines.append((logging.INFO, heading(self.found)))
            if before is not None and before.image_size and config.net is None:
                lines += self._differences(config, resolved, before)
        fit, usual = self._fit(config, resolved), resolved
        if fit.batch < usual.batch_size:
            smaller = replace(config, batch_size=fit.batch)
            if suggested:
                suggested = suggest(smaller, self.found, before)
                reason = f"{usual.batch_size} need more memory than is free"
                suggested["batch_size"] = Suggestion(fit.batch, reason)
            resolved = filled(smaller, suggested).resolved()
        workers = self._workers(config, resolved)
        if config.workers is None:
            resolved = replace(resolved, workers=workers.value)
        if suggested:
            suggested["workers"] = workers
            suggested["threads"] = Suggestion(resolved.threads, "one up to 64 pixels")
            lines.append((logging.INFO, "settings (options that are given win):"))
            lines += [(logging.INFO, text) for text in table(resolved, config, suggested)]
        elif workers.value and config.workers is None:
            lines.append((logging.INFO, f"{workers.value} loader workers: {workers.why}"))
        self.notes[resolved.recipe_phase.folder] = lines + self._remarks(resolved, usual, fit)
        return resolved

    def _remarks(
        self, resolved: TrainConfig, usual: TrainConfig, fit: _Fit
    ) -> list[tuple[int, str]]:
        """Return lines about memory, and about a network far from its image sizes.

        Args:
            resolved: The settings.
            usual: The settings if memory were enough.
            fit: What was found about memory.
        """
        lines = []
        if fit.batch < usual.batch_size:
            text = (
                f"--batch-size {fit.batch} instead of {usual.batch_size}, --lr {resolved.lr:.4g} "
                f"instead of {usual.lr:.4g}: {fit.text}"
            )
            lines.append((logging.WARNING, text))
        elif fit.text and (fit.short or self._found):
            lines.append((logging.WARNING if fit.short else logging.INFO, fit.text))
        spec, label = self._spec(resolved), resolved.net or resolved.init_path
        if spec is not None and (text := warn_of_size(spec, max(resolved.image_size), label)):
            lines.append((logging.WARNING, text))
        return lines

    # --- what came before ---

    def _before(self, config: TrainConfig) -> Before | None:
        """Return the network that a phase starts from or is taught by."""
        phase = config.recipe_phase
        own_teacher = None if config.teacher else config.teacher_path
        for option, path in (("init_path", config.init_path), ("teacher_path", own_teacher)):
            settings = path and _settings(Path(path).parent / CONFIG, config)
            if settings and _same_folder(settings, config) and not phase.single:
                return _as_trained(settings, flag(option), phase, option == "init_path")
        if config.init_path is not None:
            return self._trained(config) if self.initial is not None else None
        if own_teacher is not None or phase.starts_from is None:
            return None
        if self.given.task != config.task:  # one phase of several
            return None
        folder = recipe_for(config.dataset).phase(*phase.starts_from).folder
        found = {
            path.parent: settings
            for path in self._candidates(config, folder)
            if (settings := _settings(path, config)) and _same_folder(settings, config)
        }
        if len(found) > 1:  # several runs on these images: the one that they suggest, if any
            net = filled(config, suggest(config, self.found)).resolved().net
            found = {path: each for path, each in found.items() if each["net"] == net}
        if len(found) != 1:
            return None
        path, settings = found.popitem()
        return _as_trained(settings, f"the {folder} in {path.parent}", phase)

    def _candidates(self, config: TrainConfig, folder: str) -> list[Path]:
        if self.output is not None:
            return [self.output / folder / CONFIG]
        return sorted(Path("runs").glob(f"*/{folder}/{CONFIG}"))

    def _trained(self, config: TrainConfig) -> Before:
        """Return the network of ``--init-path``."""
        opened = self.initial
        same = bool(opened.classes) and opened.classes == self.found.classes
        net = None if config.recipe_phase.single else _net_id(opened.spec, config)
        return Before("--init-path", net, opened.image_size, initial=True, same_classes=same)

    def _differences(
        self, config: TrainConfig, resolved: TrainConfig, before: Before
    ) -> list[tuple[int, str]]:
        """Return a line if the images alone would lead to another network or other sizes."""
        scratch = replace(config, init_path=None, teacher_path=None)
        alone = filled(scratch, suggest(scratch, self.found)).resolved()
        net = resolved.net or before.net
        if alone.image_size == resolved.image_size and net in (None, alone.net):
            return []
        sizes = ",".join(map(str, alone.image_size))
        text = (
            f"network and sizes are those of {before.source}; the images alone suggest {alone.net} "
            f"at {sizes} pixels"
        )
        return [(logging.WARNING, text)]

    def _continues(self, config: TrainConfig) -> bool:
        """Whether a phase continues from its last checkpoint."""
        if self.output is None:
            return bool(self.resume)
        return self.resume is not False and has_checkpoint(self.output / config.recipe_phase.folder)

    # --- what there is to compute with ---

    def _fit(self, config: TrainConfig, resolved: TrainConfig) -> _Fit:
        """Compare what a step needs with the free memory.

        Raises:
            ConfigError: A given batch size, or any, needs more memory than is free.
        """
        batch, size = resolved.batch_size, max(resolved.image_size)
        layers = self._layers(resolved)
        free = free_bytes(resolved.device) if layers else None
        if free is None:
            return _Fit(batch, "", False)
        free //= 1 if resolved.device.startswith("cuda") else self.ranks
        need = Need.of(at_resolution(layers, size))
        taught = resolved.recipe_phase.teacher == "checkpoint" and resolved.kd_ratio > 0

        def step(images: int) -> int:
            images = min(images, self._training_images)
            return need.step(images, taught, resolved.workers, resolved.amp)

        single = resolved.recipe_phase.single
        calibration = 0 if single else min(resolved.calibration_images, self._training_images)
        tested = Need.of(at_resolution(layers, resolved.eval_size))
        text = (
            f"a step of {min(batch, self._training_images)} images at {size} pixels needs about "
            f"{readable(step(batch))}, {readable(free)} are free"
        )
        if self._continues(resolved):
            return _Fit(batch, text, max(step(batch), tested.validation(batch, calibration)) > free)
        given, limit = config.batch_size is not None, free / (1 + ERROR)
        if given and step(batch) > free:
            most = max((n for n in range(2, batch) if step(n) <= free), default=0)
            wish = f"at most {most}" if most else "smaller images (--image-size)"
            raise ConfigError(f"--batch-size: expected {wish}, got {batch}: {text}")
        if not given and step(2) > limit:
            raise ConfigError(f"--image-size: expected smaller images, or a smaller --net: {text}")
        least = tested.validation(batch if given else 2, calibration)
        if least > free:
            raise ConfigError(
                f"--calibration-images: expected fewer than {calibration}: validation at "
                f"{resolved.eval_size} pixels needs about {readable(least)}, {readable(free)} "
                "are free"
            )
        if given:
            return _Fit(batch, text, False)
        reduced = batch
        while reduced > 2 and (
            step(reduced) > limit or tested.validation(reduced, calibration) > max(limit, least)
        ):
            reduced = max(2, reduced // 2)
        return _Fit(reduced, text, reduced < batch)

    @property
    def _training_images(self) -> int:
        """Number of training images, if they were counted."""
        return self._found.train if self._found else sys.maxsize

    def _layers(self, config: TrainConfig) -> tuple[LayerSpec, ...]:
        """Return the layers of the largest network to train; none if it is unknown."""
        spec = self._spec(config)
        if spec is None:
            return ()
        return spec.layers_of(spec.space.largest) if spec.elastic else spec.layers

    def _spec(self, config: TrainConfig) -> Network | None:
        if config.net is None:  # that of the initial weights, which may have moved since
            return None if self._continues(config) or not self.initial else self.initial.spec
        return config.network(len(self._found.classes) if self._found else _CLASSES)

    def _workers(self, config: TrainConfig, resolved: TrainConfig) -> Suggestion:
        """Suggest the number of loader workers per rank."""
        info = dataset_info(config.dataset)
        if info.native_size is not None or (self._found and not self._found.files):
            return Suggestion(0, "images in memory")
        if self._found and self._found.train < FEW_IMAGES:
            return Suggestion(0, f"fewer than {FEW_IMAGES:,} images")
        share = max(1, cpus() // self.ranks)
        on_cpu = resolved.device == "cpu"
        count = min(4, share // 4) if on_cpu else min(8, share - 1)
        count = min(
            count, most_workers(resolved.batch_size, max(resolved.image_size)) // self.ranks
        )
        why = f"{share} CPUs per rank, {'which train too' if on_cpu else 'beside the GPU'}"
        return Suggestion(count, why)


def _complete(config: TrainConfig) -> bool:
    """Whether nothing is left to suggest, as in settings that were read from a run's file."""
    names = ["image_size", "eval_size", "batch_size", "epochs", "warmup_epochs", "lr"]
    names += ["validate_every"]
    names += ["net"] * (not config.recipe_phase.single and not config.follows_weights)
    return all(getattr(config, name) is not None for name in names)


def _settings(path: Path, config: TrainConfig) -> dict[str, Any] | None:
    """Return the settings in the file of a run; ``None`` if there are none."""
    try:
        data = parse_json(read_text(path))
        found = dict(data["config"])
        if found["net"] is None:  # it followed its initial weights
            found["net"] = _net_id(network_from_json(data["network"]), config)
        sizes = [found["eval_size"], *found["image_size"]]
        known = found["net"] in NETWORKS and all(type(size) is int for size in sizes)
        return found if known and isinstance(found["dataset"], str) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _same_folder(settings: dict[str, Any], config: TrainConfig) -> bool:
    path = settings.get("data_path")
    named = replace(config, dataset=settings["dataset"], data_path=path and str(path))
    return named.same_data(config)


def _as_trained(
    settings: dict[str, Any], source: str, phase: Phase, initial: bool = False
) -> Before:
    """Return what the settings of an earlier phase say."""
    free = entry(settings["net"]).coupling == "none"
    net = settings["net"] if free == phase.free else None
    return Before(source, net, settings["eval_size"], tuple(settings["image_size"]), initial)


def _net_id(spec: Network, config: TrainConfig) -> str | None:
    """Return the id of the network of the zoo that takes the weights of ``spec`` in this task."""
    if not spec.elastic:
        return None
    if config.init_path in NETWORKS:
        return config.init_path
    free = config.recipe_phase.free
    fits = [
        (row.coupling == ("none" if free else "simple"), row.elastic_kernel, name)
        for name, row in NETWORKS.items()
        if (row.backbone, row.width_mult) == (spec.backbone.name, spec.backbone.width_mult)
        and not row.shipped
    ]
    best = max(fits, key=lambda fit: (fit[0], fit[1] == spec.kernel_transform), default=None)
    return best[2] if best else None
