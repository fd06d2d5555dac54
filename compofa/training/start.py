"""Start of a phase: data, network, teacher and initial weights, or a checkpoint to resume."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from compofa.data import DataSplits, load_dataset
from compofa.data.identity import DataIdentity, identify
from compofa.distributed.backend import Backend
from compofa.errors import ConfigError
from compofa.io.checkpoint import Checkpoint
from compofa.io.open import OpenedNetwork
from compofa.io.weights import load_state
from compofa.networks.network_spec import Network
from compofa.nn.build import build
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig
from compofa.training.external import external_teacher
from compofa.training.predecessors import (
    Origin,
    TrainFirst,
    find_predecessors,
    resumed_teacher,
    saved_origins,
)
from compofa.training.recipes import recipe_for
from compofa.training.run_folder import load_resumable
from compofa.training.sources import (
    first_difference,
    load_initial,
    open_source,
    take_subnet,
    teacher_of,
)
from compofa.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a phase trains from.

    Attributes:
        splits: The data set, normalised as the network expects.
        spec: Definition of the network.
        trainer: Network, teacher and training state.
        origins: Files of the ``teacher`` and of the initial weights (``start``), if any.
        data: Identity of the data set; ``None`` in a run that an earlier version started.
        resumed: The checkpoint that the phase continues from; ``None`` for a new run.
    """

    splits: DataSplits
    spec: Network
    trainer: Trainer
    origins: Mapping[str, Origin]
    data: DataIdentity | None
    resumed: Path | None


def start_phase(
    config: TrainConfig,
    output: Path,
    folder: Path,
    resume: bool,
    overwrite: bool,
    train_first: TrainFirst,
    backend: Backend,
    initial: OpenedNetwork | None,
    module: nn.Module | None = None,
) -> Start:
    """Load and build what a phase trains from, without writing to its folder.

    Args:
        config: Resolved settings.
        output: Folder of the run.
        folder: Folder of the phase.
        resume: Whether to continue from the phase's last checkpoint.
        overwrite: Whether an existing run may be replaced.
        train_first: Trains a missing teacher.
        backend: Ranks that all call this.
        initial: The network of ``config.init_path``, if it is open already.
        module: The teacher, if it was given from Python.

    Raises:
        CompofaError: A user error.
    """
    saved = backend.from_main(lambda: load_resumable(config, folder, resume, overwrite))
    begun: Checkpoint | None = saved["checkpoint"] if saved else None
    splits = _load_data(config, backend, by_position=begun is not None and begun.data is None)
    single = config.recipe_phase.single
    spec = None if single else config.network(len(splits.classes))
    teacher_path = ""

    @functools.cache  # rank 0 opens each network once
    def opened(source: str) -> OpenedNetwork:
        if initial is not None and source == config.init_path:
            return initial
        return open_source(source, spec, teaches=source == teacher_path)

    if single:
        begun = begun or backend.from_main(
            lambda: take_subnet(opened(config.init_path), config, splits)
        )
        spec, splits = begun.network, replace(splits, normalisation=begun.normalisation)
    device = backend.local_main_first(lambda: backend.device(config.device))
    if saved:
        training, start = saved["checkpoint"].training, None
        data = backend.from_main(
            lambda: _require_same_data(folder, saved["checkpoint"], splits, config.seed)
        )
        origins = saved_origins(training)
        teacher_path = backend.from_main(
            lambda: resumed_teacher(config, training["config"], origins, output)
        )
    else:
        teacher_path, start = find_predecessors(config, output, train_first, backend)
        sources = {"teacher": teacher_path, "start": start}
        origins = backend.from_main(
            lambda: {k: Origin.of(v, output, opened(v)) for k, v in sources.items() if v}
        )
    teacher = None
    if config.teacher:
        weights = teacher_path or config.teacher_path
        before = origins.get("teacher")
        make = partial(external_teacher, config, splits, output, weights, before, module)
        teacher, origin = make() if module is not None else backend.from_main(make)
        teacher, origins = teacher.to(device), {**origins, "teacher": origin}
    elif teacher_path:
        teacher = backend.from_main(
            lambda: teacher_of(opened(teacher_path), teacher_path, spec, splits)
        ).to(device)
    net, before = build(spec, config.seed), begun
    if begun is not None:
        load_state(net, begun.weights, str(saved["path"] if saved else config.init_path))
    elif start:
        weights, before = backend.from_main(
            lambda: _load_start(net, opened(start), start, config, splits)
        )
        net.load_state_dict(weights)
    if not saved:
        data = backend.from_main(lambda: _identify(splits, config.seed, before))
    trainer = Trainer(config, net.to(device), teacher, splits, backend)
    if saved:
        trainer.state.load_state_dict(training, saved["ranks"])
        if saved["ranks"] != backend.size:
            log.info(
                "saved by %d worker processes, resuming with %d: batches and learning rates differ",
                saved["ranks"], backend.size,
            )  # fmt: skip
    if trainer.state.epoch < config.epochs:
        trainer.evaluator.check_images(config.eval_size, calibration=not single)
    if single and not saved:
        log.info("before fine-tuning: %.2f %%", trainer.validate()["fine-tuned"]["top1"])
    return Start(splits, spec, trainer, origins, data, saved["path"] if saved else None)


def _load_data(config: TrainConfig, backend: Backend, by_position: bool) -> DataSplits:
    """Load the data set, which must be the same on all ranks."""
    backend.local_main_first(lambda: check_device(config.device))
    splits = backend.local_main_first(
        lambda: load_dataset(
            config.dataset,
            config.data_path,
            seed=config.seed,
            validation_images=config.validation_images,
            by_position=by_position,
        )
    )
    found = (len(splits.train), len(splits.validation), len(splits.classes))
    backend.require_same("numbers of training images, validation images and classes", found)
    return splits


def _require_same_data(
    folder: Path, saved: Checkpoint, splits: DataSplits, seed: int
) -> DataIdentity | None:
    """Check that a run is resumed with the data it was started with, and return their identity.

    Raises:
        ConfigError: Classes, images or normalisation differ.
    """
    faults = []
    if saved.classes and saved.classes != splits.classes:
        faults.append(f"expected {first_difference(saved.classes, splits.classes)}")
    norm = saved.normalisation
    if norm != splits.normalisation:
        faults.append(f"images normalised with {norm} then, {splits.normalisation} now")
    if saved.data is not None:
        faults += saved.data.differences(identify(splits, seed))
    if faults:
        raise ConfigError(f"cannot resume {folder} with other data: {'; '.join(faults)}")
    return saved.data


def _identify(splits: DataSplits, seed: int, before: Checkpoint | None) -> DataIdentity:
    """Return the identity of the data; warn if the initial weights were trained on held-out images.

    Args:
        splits: The data set.
        seed: Seed of the split into training and validation images.
        before: Checkpoint of the initial weights.
    """
    if before is None:
        return identify(splits, seed)
    if before.data is None and before.dataset == splits.name and splits.held:
        log.warning(
            "the checkpoint of the initial weights was written by an earlier version and does not "
            "say which images it was trained on: if %s images are among them, their accuracy is "
            "overestimated", " and ".join(splits.held),
        )  # fmt: skip
    for part in ("validation", "test"):
        if before.data is not None and (seen := before.data.seen_in(getattr(splits, part))):
            log.warning(
                "at least %d of the %s images were trained on before, for the initial weights: "
                "accuracy on them is overestimated", seen, part,
            )  # fmt: skip
    return identify(splits, seed, [before.data])


def _load_start(
    net: Supernet, opened: OpenedNetwork, start: str, config: TrainConfig, splits: DataSplits
) -> tuple[dict[str, Tensor], Checkpoint]:
    """Load the initial weights, with sorted channels if the phase says so, and their checkpoint."""
    before = load_initial(net, opened, start, splits)
    if config.recipe_phase.sort:
        recipe, origin = recipe_for(config.dataset), config.recipe_phase.starts_from
        trained = dict(recipe.phase(*origin).values)
        sort_channels(net, groups=trained.get(net.spec.space.names[-1], ()))
    return net.state_dict(), before


def check_device(device: str) -> None:
    """Check that a device is ``cpu`` or an available ``cuda``.

    Raises:
        ConfigError: It is not.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: got {device!r}, but PyTorch finds no CUDA device")
