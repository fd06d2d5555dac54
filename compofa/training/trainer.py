"""The training loop: N subnets a step, one resolution a step, everything made from (seed, step)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compofa.data import BrokenImages, DataSplits, dataset_info, steps_per_epoch, train_loader
from compofa.errors import CheckpointError
from compofa.evaluate import Evaluator
from compofa.fixed import FixedNetwork
from compofa.nn.static import StaticNetwork
from compofa.seeds import derive_seed, rng
from compofa.subnet import Subnet
from compofa.supernet import Supernet
from compofa.training.backends import Alone, Backend
from compofa.training.config import TrainConfig
from compofa.training.losses import distillation_loss
from compofa.training.optim import learning_rate, make_optimizer
from compofa.training.samplers import SAMPLERS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpochStats:
    """Means over one epoch's training steps.

    Attributes:
        loss: Loss, averaged over subnets.
        top1: Accuracy on the training images as they were shown, in percent.
        images_per_s: Images a second of all workers, a step's subnets not counted as more images.
        lr: Learning rate of the last step.
    """

    loss: float
    top1: float
    images_per_s: float
    lr: float


class Trainer:
    """Trains a network for one phase.

    Args:
        config: Resolved settings.
        net: A supernet, or the plain network that a phase fine-tunes, on its device.
        teacher: Network to learn from, in evaluation mode; ``None`` for none.
        splits: The data set.
        backend: Workers that train together, each on a part of every step's images.
    """

    def __init__(
        self,
        config: TrainConfig,
        net: Supernet | StaticNetwork,
        teacher: nn.Module | None,
        splits: DataSplits,
        backend: Backend | None = None,
    ) -> None:
        self.backend = backend or Alone()
        self.config = config
        self.net = net
        self.phase = config.recipe_phase
        if isinstance(net, Supernet):
            space = self.phase.within(net.spec.space)
            self.extremes = {"smallest": space.smallest, "largest": space.largest}
            if space.smallest == space.largest:
                del self.extremes["smallest"]
            self.draw = partial(SAMPLERS[self.phase.sampler], space)
            self.run = net
        else:
            subnet = FixedNetwork(net.specs).subnet
            self.extremes = {"fine-tuned": subnet}
            self.draw = lambda generator, count: [subnet] * count
            self.run = lambda images, subnet: net(images)
        self.teacher = teacher
        self.splits = splits
        self.info = dataset_info(splits.name)
        self.device = torch.device(self.backend.device(config.device))
        self.batch_size = min(config.batch_size, len(splits.train))
        self.steps = steps_per_epoch(len(splits.train), self.batch_size, self.backend.size)
        self.peak_lr = config.lr * (self.backend.size if config.scale_lr else 1)
        self.optimizer = make_optimizer(net, config.weight_decay, config.momentum)
        self.autocast = reduced_precision(self.device) if config.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16)
        self.broken = BrokenImages(len(splits.train))
        self.evaluator = Evaluator(
            splits,
            normalisation=splits.normalisation,
            calibration_images=config.calibration_images,
            batch_size=self.batch_size,
            workers=config.workers,
            seed=config.seed,
            device=self.device,
            backend=self.backend,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            CheckpointError: It is not such a state, or another network's.
        """
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for parameter, kept in self.optimizer.state.items():
                if kept["momentum_buffer"].shape != parameter.shape:
                    raise ValueError("momentum of another shape")
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the training state cannot be resumed: {error}") from error

    def subnets_at(self, step: int) -> list[Subnet]:
        """Return the subnets of a step: a pure function of the seed and the step.

        So all workers have the same ones without talking, and so it is with resolutions.
        """
        generator = rng(self.config.seed, "subnets", step)
        return self.draw(generator, self.config.dynamic_batch_size)

    def train_epoch(self, epoch: int, bar: bool = True) -> EpochStats:
        """Run one epoch, counted from 0."""
        config = self.config
        loader = train_loader(
            self.splits.train,
            self.info,
            batch_size=self.batch_size,
            resolutions=config.image_size,
            seed=config.seed,
            epoch=epoch,
            normalisation=self.splits.normalisation,
            rank=self.backend.rank,
            world_size=self.backend.size,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.net.train()
        sums = torch.zeros(3, device=self.device)  # loss, right answers, answers
        images, started, lr = 0, time.perf_counter(), 0.0
        progress = tqdm(
            loader, desc=f"epoch {epoch + 1}/{config.epochs}", unit="step", disable=not bar,
            leave=False, mininterval=0.5,
        )  # fmt: skip
        for position, batch in enumerate(progress):
            self.broken.add(batch.broken)
            step = epoch * self.steps + position
            lr = self._set_learning_rate(step)
            if len(batch.targets) < 2:  # the others were broken, and BN cannot learn from one
                self.update(0)
                continue
            inputs = batch.images.to(
                self.device, non_blocking=True, memory_format=torch.channels_last
            )
            sums += self.train_step(inputs, batch.targets.to(self.device, non_blocking=True), step)
            images += len(batch.targets)
            if bar and position % 10 == 0:
                loss, right, answers = sums.tolist()
                progress.set_postfix(
                    loss=f"{loss / (position + 1):.3f}",
                    top1=f"{100 * right / answers:.1f}",
                    r=batch.resolution,
                    lr=f"{lr:.4f}",
                    img_s=f"{images / (time.perf_counter() - started):.0f}",
                )
        loss, right, answers, images = self.backend.sum((*sums.tolist(), images))
        self.backend.average_buffers(self.net)
        for broken in self.backend.gather(tuple(self.broken.paths)):
            self.broken.paths.update(dict.fromkeys(broken))  # their workers have named them
        self.backend.in_turn(lambda: self.broken.add(()))
        seconds = time.perf_counter() - started
        loss /= self.steps * self.backend.size
        return EpochStats(loss, 100 * right / max(1, answers), images / seconds, lr)

    def train_step(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Sum the gradients of the step's subnets, average over workers and update the weights.

        Args:
            images: [n, 3, r, r], normalised, on the device.
            targets: [n]; of the images that are this worker's.
            step: Counted from the start of the phase.

        Returns:
            This worker's mean loss of the subnets, right answers and answers, shape [3].
        """
        config = self.config
        subnets = self.subnets_at(step)
        sums = torch.zeros(3, device=self.device)
        soft = None
        if self.teacher is not None and config.kd_ratio > 0:
            with torch.no_grad(), self._precision():
                soft = self.teacher(images).float()
        for index, subnet in enumerate(subnets):
            own = (self.backend.rank,) * (self.backend.rank > 0)  # other images, other masks
            dropout_seed = derive_seed(config.seed, "dropout", step, index, *own)
            with seeded(dropout_seed, self.device), self._precision():
                logits = self.run(images, subnet).float()
            loss = distillation_loss(
                logits, targets, soft, config.kd_ratio, config.kd_type, config.label_smoothing
            )
            self.scaler.scale(loss).backward()
            if index == 0 and self.phase.teacher == "self":  # it teaches those that follow
                soft = logits.detach()
            with torch.no_grad():
                right = (logits.argmax(1) == targets).sum()
                sums += torch.stack([loss / len(subnets), right, right.new_tensor(len(targets))])
        self.update(len(targets) / self.batch_size)
        return sums

    def update(self, weight: float) -> None:
        """Average the gradients over workers, take the step and clear them.

        All workers call this once a step and do the same: whatever decides must be a function of
        the averaged gradients.

        Args:
            weight: This worker's images as a share of the batch size; 0 for a worker whose images
                were broken, which takes the others' step.
        """
        half = self.config.fp16_allreduce
        if self.backend.average_gradients(self.net.parameters(), weight, half) > 0:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)

    def validate(self) -> dict[str, dict[str, float]]:
        """Measure the smallest and the largest subnet of the phase on the held-out images."""
        figures = {}
        for name, subnet in self.extremes.items():
            found = self.evaluator.accuracy(self.net, subnet.at(self.config.eval_size))
            figures[name] = {"top1": found.top1, "top5": found.top5, "loss": found.loss}
        return figures

    def _set_learning_rate(self, step: int) -> float:
        config = self.config
        lr = learning_rate(
            step, config.epochs * self.steps, config.warmup_epochs * self.steps, self.peak_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )


def reduced_precision(device: torch.device) -> torch.dtype:
    """Return the number format of ``--amp``: bfloat16 where the device has it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for a while; the global ones are as before afterwards."""
    cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
