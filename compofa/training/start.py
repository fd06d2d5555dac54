"""Start of a phase: data, network, teacher and initial weights, or a checkpoint to resume."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from compofa.data import DataSplits, load_dataset
from compofa.data.identity import DataIdentity, identify
from compofa.distributed.backend import Backend
from compofa.errors import ConfigError
from compofa.io.checkpoint import Checkpoint
from compofa.io.open import OpenedNetwork
from compofa.io.weights import load_state
from compofa.networks.network_spec import Network
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn.build import build
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Number
from compofa.training.config import TrainConfig
from compofa.training.context import RunContext
from compofa.training.device import check_device
from compofa.training.external import external_teacher
from compofa.training.predecessors import (
    Origin,
    TrainFirst,
    find_predecessors,
    resumed_teacher,
    saved_origins,
    taught_by_start,
    tuned_from,
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
from compofa.training.transfer import (
    normalisation_of,
    require_supernet,
    student_network,
    with_classes_of,
)

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
    context: RunContext,
    resume: bool,
    overwrite: bool,
    train_first: TrainFirst,
) -> Start:
    """Load and build what a phase trains from, without writing to its folder.

    Args:
        config: Resolved settings.
        context: What the phases of the run share.
        resume: Whether to continue from the phase's last checkpoint.
        overwrite: Whether an existing run may be replaced.
        train_first: Trains a missing teacher.

    Raises:
        CompofaError: A user error.
    """
    backend, output, initial = context.backend, context.output, context.initial
    folder = output / config.recipe_phase.folder
    saved = backend.from_main(lambda: load_resumable(config, folder, resume, overwrite))
    begun: Checkpoint | None = saved["checkpoint"] if saved else None
    by_position = begun is not None and begun.data is None
    splits = _load_data(config, backend, context.splits, by_position)
    single = config.recipe_phase.single
    spec: Network | None = config.network(len(splits.classes)) if config.net else None
    teacher_path, initial_path = "", config.init_path

    @functools.cache  # rank 0 opens each network once
    def opened(source: str) -> OpenedNetwork:
        if source != initial_path:
            return open_source(source, spec, teaches=source == teacher_path)
        return initial or open_source(source, spec if config.net else None, teaches=False)

    if begun is not None and config.net is None:
        spec = begun.network
    elif single:
        begun = backend.from_main(lambda: take_subnet(opened(config.init_path), config, splits))
        spec = begun.network
    elif config.net is None:
        path, classes = config.init_path, len(splits.classes)
        spec = backend.from_main(lambda: student_network(opened(path), path, config, classes))
    device = backend.local_main_first(lambda: backend.device(config.device))
    start = ""
    if saved:
        training = begun.training
        origins = saved_origins(training)
    else:
        teacher_path, start = find_predecessors(
            config, output, train_first, backend, opened, splits.classes
        )
        sources = {"teacher": teacher_path, "start": start}
        origins = backend.from_main(
            lambda: {k: Origin.of(v, output, opened(v)) for k, v in sources.items() if v}
        )
    if begun is not None and (single or "start" in origins):
        splits = replace(splits, normalisation=begun.normalisation)
    elif start:
        norm = backend.from_main(lambda: normalisation_of(opened(start), start, splits))
        splits = replace(splits, normalisation=norm)
    if saved:
        data = backend.from_main(lambda: _require_same_data(folder, begun, splits, config.seed))
        teacher_path = backend.from_main(
            lambda: resumed_teacher(config, training["config"], origins, output)
        )
        initial_path = teacher_path if taught_by_start(training["config"], origins) else None
    teacher = None
    if config.teacher:
        weights = teacher_path or config.teacher_path
        before = origins.get("teacher")
        make = partial(external_teacher, config, splits, output, weights, before, context.teacher)
        teacher, origin = make() if context.teacher is not None else backend.from_main(make)
        teacher, origins = teacher.to(device), {**origins, "teacher": origin}
    elif teacher_path:
        teacher = backend.from_main(
            lambda: teacher_of(opened(teacher_path), teacher_path, spec, config, splits)
        ).to(device)
    net, before = build(spec, config.seed), begun
    if begun is not None:
        load_state(net, begun.weights, str(saved["path"] if saved else config.init_path))
    elif start:

        def load() -> tuple[dict[str, Tensor], Checkpoint]:
            own = "" if teacher_path in ("", config.teacher_path) else tuned_from(teacher_path)
            tuned = own and own == origins["start"].digest
            more = opened(teacher_path).checkpoint.weights if tuned else {}
            return _load_start(net, opened(start), start, more, config, splits)

        weights, before = backend.from_main(load)
        net.load_state_dict(weights)
    if not saved:
        data = backend.from_main(lambda: _identify(splits, config.seed, before))
    trainer = Trainer(config, net.to(device), teacher, splits, backend, context.bar)
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


def _load_data(
    config: TrainConfig, backend: Backend, given: DataSplits | None, by_position: bool
) -> DataSplits:
    """Load the data set, which must be the same on all ranks, unless it is given."""
    backend.local_main_first(lambda: check_device(config.device, config.amp, backend.size))
    splits = given or backend.local_main_first(
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
    net: Supernet,
    opened: OpenedNetwork,
    start: str,
    tuned: Mapping[str, Tensor],
    config: TrainConfig,
    splits: DataSplits,
) -> tuple[dict[str, Tensor], Checkpoint]:
    """Load the initial weights, with sorted channels if the phase says so, and their checkpoint.

    ``tuned`` are the weights of their largest subnet after it was fine-tuned as the teacher. They
    are all but the kernel matrices, and come with a trained classifier.
    """
    require_supernet(opened, start, config)
    fitted = with_classes_of(opened, start, splits, config.seed)
    before = load_initial(net, fitted, start)
    if tuned:
        load_state(net, {**net.state_dict(), **tuned}, start)
    if config.recipe_phase.sort:
        sort_channels(net, groups=_trained_widths(opened.spec, opened.described, config))
    return net.state_dict(), before


def _trained_widths(spec: NetworkSpec, described: bool, config: TrainConfig) -> tuple[Number, ...]:
    """Return the values of the last choice that initial weights were trained for.

    Weights without a definition are taken to be those of the phase before this one.
    """
    name = spec.space.names[-1]
    before = recipe_for(config.dataset).phase(*config.recipe_phase.starts_from)
    known = dict(before.values).get(name, ())
    if known and not described:
        return known
    return tuple(sorted({value for stage in spec.space.stages for value in stage.values(name)}))
