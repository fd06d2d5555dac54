"""What a run has before its first step: data, network, teacher, and the weights it begins with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from compofa.checkpoint import Checkpoint
from compofa.data import DataSplits, Normalisation, load_dataset
from compofa.errors import ConfigError
from compofa.files import write_text_atomic
from compofa.fixed import Network
from compofa.sorting import sort_channels
from compofa.supernet import Supernet
from compofa.training.config import TrainConfig, run_folder
from compofa.training.finetune import open_single
from compofa.training.predecessors import TrainFirst, find_predecessors, load_start, load_teacher
from compofa.training.recipes import recipe_for
from compofa.training.saving import CONFIG, Progress, clear, mend, saved_state
from compofa.training.trainer import Trainer
from compofa.weights import load_state
from compofa.workers import Backend

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
        teacher: Checkpoint that the teacher came from; empty without one.
        progress: How far the phase is.
        resumed: The file that it goes on from; ``None`` for a new one.
    """

    config: TrainConfig
    folder: Path
    splits: DataSplits
    spec: Network
    trainer: Trainer
    teacher: str
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
            data_path=config.data_path or "",
            data_seed=config.seed,
            validation_images=config.validation_images,
            image_size=config.eval_size,
            figures={"validation": progress.figures, "epoch": progress.epoch},
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
    splits = _open_data(config, backend)
    single = config.recipe_phase.single
    begun: Checkpoint | None = state["checkpoint"] if state else None
    if single:
        begun = begun or backend.from_main(lambda: open_single(config, splits))
        spec = begun.network
        used = replace(splits, normalisation=Normalisation(begun.mean, begun.std))
    else:
        spec, used = config.network(len(splits.classes)), splits
    device = backend.in_turn(lambda: backend.device(config.device))
    start = None
    if state is not None:
        teacher_path = state["teacher"]
    else:
        predecessors = find_predecessors(config, output, train_first, backend)
        teacher_path, start = str(predecessors.teacher or ""), predecessors.start
    teacher = None
    if teacher_path:
        teacher = backend.from_main(lambda: load_teacher(teacher_path, spec)).to(device)
    net = spec.build() if single else Supernet(spec, config.seed)
    if begun is not None:
        load_state(net, begun.weights, str(state["path"] if state else config.init_path))
    elif start is not None:
        net.load_state_dict(backend.from_main(lambda: _started(net, start, config)))
    net.to(device)
    trainer = Trainer(config, net, teacher, used, backend)
    progress = Progress()
    if state is not None:
        trainer.load_state_dict(state["trainer"], state["workers"])
        progress = Progress(**state["progress"])
        _say_changed_workers(state["workers"], backend.size)
    elif single:
        log.info("before fine-tuning: %.2f %%", trainer.validate()["fine-tuned"]["top1"])
    resumed = state["path"] if state else None
    return Setup(config, folder, used, spec, trainer, teacher_path, progress, resumed)


def _open_data(config: TrainConfig, backend: Backend) -> DataSplits:
    """Load the data set, the same one on all workers."""
    backend.in_turn(lambda: check_device(config.device))
    splits = backend.in_turn(
        lambda: load_dataset(
            config.dataset,
            config.data_path,
            seed=config.seed,
            validation_images=config.validation_images,
        )
    )
    found = (len(splits.train), len(splits.validation), len(splits.classes))
    backend.require_same("numbers of training images, validation images and classes", found)
    return splits


def _started(net: Supernet, start: Path, config: TrainConfig) -> dict[str, Tensor]:
    """Load the predecessor's weights, sorted where the phase wants that, and return them."""
    load_start(net, start)
    if config.recipe_phase.sort:
        recipe, origin = recipe_for(config.dataset), config.recipe_phase.starts_from
        sort_channels(net, groups=recipe.phase(*origin).expands or ())
    return net.state_dict()


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
