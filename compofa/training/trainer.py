"""The training loop: N subnets a step, one resolution a step, everything made from (seed, step)."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compofa.data import BrokenImages, DataSplits, dataset_info, steps_per_epoch, train_loader
from compofa.data.loaders import Batch
from compofa.distributed.backend import Backend, SingleProcess
from compofa.errors import CheckpointError, TrainingError
from compofa.evaluate import Evaluator
from compofa.networks.network_spec import FixedNetwork
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.seeds import derive_seed, rng
from compofa.space.subnet import Subnet
from compofa.training import worker_state
from compofa.training.config import TrainConfig
from compofa.training.guard import StepGuard
from compofa.training.losses import distillation_loss
from compofa.training.optim import learning_rate, make_optimizer, reduced_precision
from compofa.training.samplers import SAMPLERS
from compofa.training.saving import Saver
from compofa.training.stopping import GRACE_S, LOST
from compofa.training.tally import EpochStats, Tally

log = logging.getLogger(__name__)


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
        self.backend = backend or SingleProcess()
        self.config = config
        self.net = net
        self.phase = config.recipe_phase
        if isinstance(net, Supernet):
            space = self.phase.within(net.spec.space)
            self.extremes = {"smallest": space.smallest, "largest": space.largest}
            if space.smallest == space.largest:
                del self.extremes["smallest"]
            self.draw = partial(SAMPLERS[self.phase.sampler], space)
            layers: dict[Hashable, nn.Module] = {}
            self.run = lambda images, subnet: net.bind(subnet, layers)(images)
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
        self.guard = StepGuard(net)
        self.broken = BrokenImages(len(splits.train))
        self.tally = Tally(-1)
        self.sums = torch.zeros(3)  # loss, right answers, answers
        self.apart = False  # whether workers' BN statistics differ
        self.ranks: list[dict[str, Any]] = []  # each worker's own state, while a save needs it
        self.skipped = self.skipped_in_a_row = 0
        self.saver: Saver | None = None
        self.notes: list[float] = []
        self.evaluator = Evaluator(
            splits,
            normalisation=splits.normalisation,
            calibration_images=config.calibration_images,
            batch_size=self.batch_size,
            workers=config.workers,
            seed=config.seed,
            device=self.device,
            backend=self.backend,
            named=self.broken.named,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "tally": asdict(self.tally),
            "ranks": self.ranks,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "broken": list(self.broken.paths),
        }

    def load_state_dict(self, state: dict[str, Any], workers: int = 1) -> None:
        """Take over what :meth:`state_dict` returned, also that of a version that saved epochs.

        Args:
            state: What was returned.
            workers: How many there were then.

        Raises:
            CheckpointError: It is not such a state, or another network's.
        """
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for parameter, kept in self.optimizer.state.items():
                if kept["momentum_buffer"].shape != parameter.shape:
                    raise ValueError("momentum of another shape")
            tally = Tally(**state.get("tally", {"epoch": -1}))
            done = tally.steps * workers // self.backend.size  # the same images, in other batches
            self.tally = replace(tally if self.backend.is_main else Tally(tally.epoch), steps=done)
            ranks = state.get("ranks", ())
            self.apart = len(ranks) == self.backend.size
            if self.apart:
                self.tally = worker_state.put_back(self.net, ranks[self.backend.rank])
            self.skipped, self.skipped_in_a_row = map(int, state.get("skipped", (0, 0)))
            self.broken.count(state.get("broken", ()))
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the training state cannot be resumed: {error}") from error

    def subnets_at(self, step: int) -> list[Subnet]:
        """Return the subnets of a step: a pure function of the seed and the step.

        So all workers have the same ones without talking, and so it is with resolutions.
        """
        generator = rng(self.config.seed, "subnets", step)
        return self.draw(generator, self.config.dynamic_batch_size)

    def train_epoch(self, epoch: int, bar: bool = True, saver: Saver | None = None) -> EpochStats:
        """Run one epoch, or what is left of it in a run that was resumed.

        Args:
            epoch: Which one, from 0.
            bar: Whether to draw a progress bar.
            saver: Says after each step whether to save, and to stop.

        Raises:
            TrainingError: Too many steps in a row were skipped.
            StoppedError: It was asked for, and the state is saved.
        """
        config, self.saver = self.config, saver
        if self.tally.epoch != epoch:
            self.tally = Tally(epoch)
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
            first_step=self.tally.steps,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
        )
        self.net.train()
        # In double precision they come back from a saved state as they were.
        self.sums = torch.tensor(self.tally.sums, dtype=torch.float64, device=self.device)
        progress = tqdm(
            desc=f"epoch {epoch + 1}/{config.epochs}", unit="step", disable=not bar, leave=False,
            mininterval=0.5, total=self.steps, initial=self.tally.steps,
        )  # fmt: skip
        batches = iter(loader)
        with progress:
            while self.tally.steps < self.steps:
                started = time.perf_counter()
                batch, self.apart = self._next(batches), True
                self._train_batch(batch, epoch * self.steps + self.tally.steps)
                seconds = self.tally.seconds + time.perf_counter() - started
                self.tally = replace(self.tally, seconds=seconds)
                progress.update()
                if bar and batch is not None and self.tally.steps % 10 == 1:
                    self._describe(progress, batch.resolution)
                if any(self.notes):
                    self._save(saver)
        done = self._come_together()
        return done.stats(self._set_learning_rate((epoch + 1) * self.steps - 1))

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch; None where its makers were ended together with the run."""
        try:
            return next(batches)
        except LOST:
            time.sleep(GRACE_S)
            if self.saver is None or not self.saver.stopping:
                raise
            return None

    def _train_batch(self, batch: Batch | None, step: int) -> None:
        """Take one step, and count it."""
        self._set_learning_rate(step)
        images, before = 0, self.skipped
        if batch is not None:
            self.broken.add(batch.broken)
            images = len(batch.targets)
        if images < 2:  # the others were broken, and BN cannot learn from one
            happened, images, taken = self.update(0), 0, 0
        else:
            inputs = batch.images.to(
                self.device, non_blocking=True, memory_format=torch.channels_last
            )
            targets = batch.targets.to(self.device, non_blocking=True)
            self.sums += self.train_step(inputs, targets, step)
            happened, taken = True, int(self.skipped == before)
        if batch is None and not happened:
            return
        self.tally = replace(
            self.tally,
            steps=self.tally.steps + 1,
            taken=self.tally.taken + taken,
            images=self.tally.images + images,
            skipped=self.tally.skipped + self.skipped - before,
        )

    def _describe(self, progress: tqdm, resolution: int) -> None:
        """Show figures beside the progress bar."""
        loss, right, answers = self.sums.tolist()
        progress.set_postfix(
            loss=f"{loss / max(1, self.tally.taken):.3f}",
            top1=f"{100 * right / max(1, answers):.1f}",
            r=resolution,
            lr=f"{self.optimizer.param_groups[0]['lr']:.4f}",
            img_s=f"{self.tally.images_per_s:.0f}",
            **({"skipped": self.skipped} if self.skipped else {}),
        )

    def _save(self, saver: Saver) -> None:
        """Save what all workers are together; afterwards each is itself again."""
        self._share_broken()
        own = self._counted()
        with worker_state.together(self.backend, self.net, own) as (self.tally, self.ranks):
            try:
                saver.save(stopping=self.notes[0] > 0)
            finally:
                self.tally, self.ranks = own, []

    def _come_together(self) -> Tally:
        """End an epoch: average BN's statistics, and return what all workers counted."""
        done = worker_state.total(self.backend.gather(self._counted()))
        self.tally = done if self.backend.is_main else Tally(done.epoch, done.steps)
        if self.apart:
            self.backend.average_buffers(self.net)
            self.apart = False
        self._share_broken()
        return done

    def _counted(self) -> Tally:
        """Return this worker's tally with the sums that stand on the device."""
        loss, right, answers = self.sums.tolist()
        return replace(self.tally, loss=loss, right=right, answers=answers)

    def _share_broken(self) -> None:
        """Tell all workers which images any of them could not read."""
        broken = self.backend.gather(tuple(self.broken.paths))  # their workers have named them
        self.backend.local_main_first(lambda: self.broken.count(sum(broken, ())))

    def train_step(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Sum the gradients of the step's subnets, average over workers and update the weights.

        Args:
            images: [n, 3, r, r], normalised, on the device.
            targets: [n]; of the images that are this worker's.
            step: Counted from the start of the phase.

        Returns:
            This worker's mean loss of the subnets, right answers and answers, shape [3]; zeros
            where the step was skipped.
        """
        config = self.config
        self.guard.remember()
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
        before = self.skipped
        self.update(len(targets) / self.batch_size, sums[0])
        return sums if self.skipped == before else torch.zeros_like(sums)

    def update(self, weight: float, loss: Tensor | None = None) -> bool:
        """Average the gradients over workers, take the step and clear them.

        All workers call this once a step and do the same: whatever decides must be a function of
        the averaged gradients. Where these are not finite the step is skipped: weights, momentum
        and BN's statistics stay as they are.

        Args:
            weight: This worker's images as a share of the batch size; 0 for a worker whose images
                were broken, which takes the others' step.
            loss: Of this worker's images, if it has any.

        Returns:
            Whether any worker had images.

        Raises:
            TrainingError: Too many steps in a row were skipped.
        """
        if loss is not None:
            self.guard.mark(loss)
        self.notes = [] if self.saver is None else self.saver.wishes()
        half = self.config.fp16_allreduce
        total = self.backend.average_gradients(self.net.parameters(), weight, half, self.notes)
        if total > 0:
            self.scaler.unscale_(self.optimizer)
            finite, scale = self.guard.passes(), self.scaler.get_scale()
            if finite:
                self.scaler.step(self.optimizer)
                self.skipped_in_a_row = 0
            elif loss is not None:
                self.guard.restore()
            self.scaler.update()
            # Half precision overflows until the scale has come down: no fault, unless it stays.
            if not finite and not 1 <= self.scaler.get_scale() < scale:
                self._skip()
        self.optimizer.zero_grad(set_to_none=False)  # subnets hold views of the gradients
        return total > 0

    def _skip(self) -> None:
        """Count a skipped step."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.config.max_skipped:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row gave a loss or gradient that is not a "
                f"finite number (epoch {self.tally.epoch + 1}, step {self.tally.steps + 1} of "
                f"{self.steps})"
            )

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


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators for a while; the global ones are as before afterwards."""
    cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
