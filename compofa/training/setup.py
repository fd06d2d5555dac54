"""What a run has before its first step: data, network, teacher, and the weights it begins with."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compofa.data import DataSplits, Normalisation, load_dataset
from compofa.data.identity import DataIdentity, identify
from compofa.distributed.backend import Backend
from compofa.errors import ConfigError
from compofa.io.atomic import write_text_atomic
from compofa.io.checkpoint import Checkpoint
from compofa.io.weights import load_state
from compofa.networks.network_spec import Network
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig, run_folder
from compofa.training.finetune import open_single
from compofa.training.origin import Origin, origins_of, resumed_teacher
from compofa.training.predecessors import (
    TrainFirst,
    differing,
    find_predecessors,
    load_start,
    load_teacher,
)
from compofa.training.recipes import recipe_for
from compofa.training.saving import CONFIG, Progress, clear, mend, saved_state
from compofa.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """A phase that is ready to be trained.

    Attributes:
        config: Resolved settings.
        folder: Where its files go.
        splits: The data set, normalised as the network takes it.
        spec: The network's definition.
        trainer: The network with its weights, its teacher and what has been done so far.
        origins: Files that it began with: ``teacher``, ``start``.
        data: Identity of the data set; ``None`` in a run that an earlier version began.
        progress: How far the phase is.
        resumed: The file that it goes on from; ``None`` for a new one.
    """

    config: TrainConfig
    folder: Path
    splits: DataSplits
    spec: Network
    trainer: Trainer
    origins: Mapping[str, Origin]
    data: DataIdentity | None
    progress: Progress
    resumed: Path | None

    def begin(self, discard: Sequence[Path]) -> None:
        """Prepare the folder: what is left of other runs goes, the settings are written.

        Args:
            discard: Folders of later phases, which must not look like this run's.

        Raises:
            CompofaError: A folder cannot be written.
        """
        if self.resumed is not None:
            mend(self.folder, self.resumed)
            return
        for old in filter(Path.exists, discard):
            clear(old)
        clear(self.folder)
        settings = {"config": self.config.to_json(), "network": self.spec.to_json()}
        write_text_atomic(self.folder / CONFIG, json.dumps(settings, indent=2) + "\n")

    def checkpoint(self, progress: Progress) -> Checkpoint:
        """Return the network as it is now, without the state to resume from."""
        config, spec = self.config, self.spec
        if spec.elastic:  # only the subnets that this phase trained are worth drawing
            spec = replace(spec, space=config.recipe_phase.within(spec.space))
        return Checkpoint(
            network=spec,
            weights=self.trainer.net.state_dict(),
            classes=self.splits.classes,
            mean=self.splits.normalisation.mean,
            std=self.splits.normalisation.std,
            dataset=config.dataset,
            data_path=os.path.abspath(config.data_path) if config.data_path else "",
            data_seed=config.seed,
            validation_images=config.validation_images,
            image_size=config.eval_size,
            figures={"validation": progress.figures, "epoch": progress.epoch},
            data=self.data,
        )

    def describe(self) -> None:
        """Log what is about to be trained."""
        config, splits, spec = self.config, self.splits, self.spec
        if spec.elastic:
            space = config.recipe_phase.within(spec.space)
            what = f"space {space.name} of {space.size:.4g} subnets"
        else:
            what = str(spec.subnet)
        log.info(
            "%s: %s on %s (%d training, %d validation images, %d classes); "
            "%s; %d epochs of %d steps; results in %s",
            config.recipe_phase.folder, config.net or config.init_path, config.dataset,
            len(splits.train), len(splits.validation), len(splits.classes), what,
            config.epochs, self.trainer.steps, self.folder,
        )  # fmt: skip


def set_up(
    config: TrainConfig,
    output: Path,
    resume: bool,
    overwrite: bool,
    train_first: TrainFirst,
    backend: Backend,
) -> Setup:
    """Load and build all that a phase needs; its folder is left as it is.

    Args:
        config: Resolved settings.
        output: Folder of the run.
        resume: Whether to go on with what was saved.
        overwrite: Whether a run may be there already.
        train_first: Trains a predecessor that is missing.
        backend: Workers that all call this.

    Raises:
        CompofaError: Something the user can mend.
    """
    folder = run_folder(config, output)
    state = backend.from_main(lambda: saved_state(config, folder, resume, overwrite))
    begun: Checkpoint | None = state["checkpoint"] if state else None
    splits = _open_data(config, backend, by_position=begun is not None and begun.data is None)
    single = config.recipe_phase.single
    if single:
        begun = begun or backend.from_main(lambda: open_single(config, splits))
        spec = begun.network
        used = replace(splits, normalisation=Normalisation(begun.mean, begun.std))
    else:
        spec, used = config.network(len(splits.classes)), splits
    device = backend.local_main_first(lambda: backend.device(config.device))
    if state is not None:
        data = backend.from_main(lambda: _same_data(folder, state["checkpoint"], used, config.seed))
        origins, start = state["origins"], None
        teacher_path = backend.from_main(
            lambda: resumed_teacher(config, state["config"], origins, output)
        )
    else:
        found = find_predecessors(config, output, train_first, backend)
        teacher_path, start = str(found.teacher or ""), str(found.start or "")
        origins = backend.from_main(lambda: origins_of(found.teacher, found.start, output))
    teacher = None
    if teacher_path:
        teacher = backend.from_main(lambda: load_teacher(teacher_path, spec, used)).to(device)
    net = spec.build() if single else Supernet(spec, config.seed)
    before = begun
    if begun is not None:
        load_state(net, begun.weights, str(state["path"] if state else config.init_path))
    elif start:
        weights, before = backend.from_main(lambda: _started(net, start, config, used))
        net.load_state_dict(weights)
    if state is None:
        data = backend.from_main(lambda: _identified(used, config.seed, before))
    net.to(device)
    trainer = Trainer(config, net, teacher, used, backend)
    progress = Progress()
    if state is not None:
        trainer.load_state_dict(state["trainer"], state["workers"])
        progress = Progress(**state["progress"])
        _say_changed_workers(state["workers"], backend.size)
    if progress.epoch < config.epochs:
        trainer.evaluator.check_images(config.eval_size, calibration=not single)
    if single and state is None:
        log.info("before fine-tuning: %.2f %%", trainer.validate()["fine-tuned"]["top1"])
    resumed = state["path"] if state else None
    return Setup(config, folder, used, spec, trainer, origins, data, progress, resumed)


def _open_data(config: TrainConfig, backend: Backend, by_position: bool) -> DataSplits:
    """Load the data set, the same one on all workers."""
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


def _same_data(
    folder: Path, saved: Checkpoint, splits: DataSplits, seed: int
) -> DataIdentity | None:
    """Return the identity of the data that a run goes on with, which must be what it began with.

    Raises:
        ConfigError: It has other classes, images or means and deviations.
    """
    faults = []
    if saved.classes and saved.classes != splits.classes:
        faults.append(f"expected {differing(saved.classes, splits.classes)}")
    norm = Normalisation(saved.mean, saved.std)
    if norm != splits.normalisation:
        faults.append(f"images normalised with {norm} then, {splits.normalisation} now")
    if saved.data is not None:
        faults += saved.data.differences(identify(splits, seed))
    if faults:
        raise ConfigError(f"cannot resume {folder} with other data: {'; '.join(faults)}")
    return saved.data


def _identified(splits: DataSplits, seed: int, before: Checkpoint | None) -> DataIdentity:
    """Return the identity of the data; say if what the weights came from had seen held-out images.

    Args:
        splits: The data set.
        seed: That the validation images were held out with.
        before: What the weights came from.
    """
    if before is None:
        return identify(splits, seed)
    if before.data is None and before.dataset == splits.name and splits.held:
        log.warning(
            "what this begins with is of an earlier version, which did not say which images it was "
            "trained on: if %s images are among them, their accuracy will be too high",
            " and ".join(splits.held),
        )  # fmt: skip
    for part in ("validation", "test"):
        if before.data is not None and (seen := before.data.seen_in(getattr(splits, part))):
            log.warning(
                "%d or more of the %s images were trained on by what this begins with: their "
                "accuracy will be too high", seen, part,
            )  # fmt: skip
    return identify(splits, seed, [before.data])


def _started(
    net: Supernet, start: str, config: TrainConfig, splits: DataSplits
) -> tuple[dict[str, Tensor], Checkpoint]:
    """Load the predecessor's weights, sorted where the phase wants that; return all about them."""
    before = load_start(net, start, splits)
    if config.recipe_phase.sort:
        recipe, origin = recipe_for(config.dataset), config.recipe_phase.starts_from
        sort_channels(net, groups=recipe.phase(*origin).expands or ())
    return net.state_dict(), before


def _say_changed_workers(then: int, now: int) -> None:
    if then != now:
        log.info(
            "begun with %d worker(s), going on with %d: batches and learning rates differ",
            then, now,
        )  # fmt: skip


def check_device(device: str) -> None:
    """Check that a device exists.

    Raises:
        ConfigError: It does not, or its name is unknown.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device: got {device!r}, but torch sees no CUDA device here")
