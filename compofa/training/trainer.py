"""The training loop. What a step samples is a function of the seed and the step number only."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from compofa.data import DataSplits, dataset_info, steps_per_epoch, train_loader
from compofa.data.loaders import Batch
from compofa.distributed.backend import Backend, SingleProcess
from compofa.errors import TrainingError
from compofa.evaluate import Evaluator
from compofa.networks.network_spec import FixedNetwork
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.seeds import derive_seed, rng
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig
from compofa.training.device import sums_dtype
from compofa.training.optim import StepGuard, learning_rate, make_optimizer, reduced_precision
from compofa.training.optimizers import OPTIMIZERS
from compofa.training.regularisation import augmentation_settings, averaged, mix
from compofa.training.shutdown import GRACE_S, LOADER_ERRORS, Saver
from compofa.training.state import RunState, Tally
from compofa.training.tasks import Step

RUNNING_STEPS = 100
"""Steps after which the initial value's weight in a running average of BN (momentum 0.1) is below
1e-4, so that a network of one subnet is validated with it."""


class Trainer:
    """Trains a network for one phase.

    Args:
        config: Resolved settings.
        net: A supernet, or the specialised network that a phase fine-tunes, on its device.
        teacher: Teacher in evaluation mode; ``None`` for none.
        splits: The data set.
        backend: Ranks that train together, each on a part of every step's images.
        bar: Whether rank 0 shows progress bars while validating.

    Attributes:
        state: All that changes while training.
        steps: Steps per epoch.
        peak_lr: Peak learning rate for this number of ranks.
        extremes: Subnets to validate, by name.
        after_step: Called with the seconds of each step.
    """

    def __init__(
        self,
        config: TrainConfig,
        net: Supernet | StaticNetwork,
        teacher: nn.Module | None,
        splits: DataSplits,
        backend: Backend | None = None,
        bar: bool = False,
    ) -> None:
        self.backend = backend or SingleProcess()
        self.config = config
        self.net = net
        self.teacher = teacher
        self.splits = splits
        self.phase = config.recipe_phase
        if isinstance(net, Supernet):
            space = self.phase.within(net.spec.space)
            self.extremes = {"smallest": space.smallest, "largest": space.largest}
            if space.smallest == space.largest:
                del self.extremes["smallest"]
            self.sample = partial(self.phase.sampler, space)
            layers: dict[Hashable, nn.Module] = {}
            self.run = lambda images, subnet: net.bind(subnet, layers)(images)
        else:
            subnet = FixedNetwork(net.specs).subnet
            self.extremes = {"fine-tuned": subnet}
            self.sample = lambda step: [subnet] * step.subnets
            self.run = lambda images, subnet: net(images)
        self.device = torch.device(self.backend.device(config.device))
        self.batch_size = min(config.batch_size, len(splits.train))
        self.steps = steps_per_epoch(len(splits.train), self.batch_size, self.backend.size)
        kind = OPTIMIZERS[config.optimizer]
        self.peak_lr = kind.scaled(config.lr, self.backend.size if config.scale_lr else 1)
        self.autocast = reduced_precision(self.device) if config.amp else None
        self.state = RunState(
            net,
            make_optimizer(net, config.weight_decay, config.momentum, config.optimizer),
            torch.amp.GradScaler(self.device.type, enabled=self.autocast is torch.float16),
            len(splits.train),
            self.backend,
            averaged(net, config.ema) if config.ema else None,
        )
        self.guard = StepGuard(net)
        self.sums = torch.zeros(3)  # of the epoch: loss, correct predictions, predictions
        self.saver: Saver | None = None
        self.after_step: Callable[[float], None] = lambda seconds: None
        self.stop_save_flags: list[float] = []
        self.evaluator = Evaluator(
            splits,
            normalisation=splits.normalisation,
            calibration_images=config.calibration_images,
            batch_size=self.batch_size,
            workers=config.workers,
            seed=config.seed,
            device=self.device,
            backend=self.backend,
            named=self.state.broken.named,
            bar=bar,
        )

    def subnets_at(self, step: int) -> list[Subnet]:
        """Return the subnets of a step, the same on all ranks and in resumed runs.

        Args:
            step: Number of the step, from the start of the phase.
        """
        config = self.config
        generator = rng(config.seed, "subnets", step)
        total = config.epochs * self.steps
        return self.sample(Step(step, total, config.dynamic_batch_size, generator))

    def train_epoch(
        self, epoch: int, bar: bool = True, saver: Saver | None = None
    ) -> dict[str, float]:
        """Train one epoch, or the rest of it in a resumed run.

        Args:
            epoch: Number of the epoch, from 0.
            bar: Whether to show a progress bar.
            saver: Says after each step whether to save, and whether to stop.

        Returns:
            Metrics of all ranks: loss, top1 in percent, images_per_s, lr and skipped.

        Raises:
            TrainingError: Too many consecutive steps were skipped.
            StoppedError: A stop was requested; the state is saved.
        """
        config, state, self.saver = self.config, self.state, saver
        if state.tally.epoch != epoch:
            state.tally = Tally(epoch)
        loader = train_loader(
            self.splits.train,
            dataset_info(self.splits.name),
            batch_size=self.batch_size,
            resolutions=config.image_size,
            seed=config.seed,
            epoch=epoch,
            normalisation=self.splits.normalisation,
            rank=self.backend.rank,
            world_size=self.backend.size,
            first_step=state.tally.steps,
            workers=config.workers,
            pin_memory=self.device.type == "cuda",
            augment=augmentation_settings(config),
            balanced=config.balanced_sampling,
        )
        self.net.train()
        # In double precision, where there is any, sums of ranks and resumed runs are exact.
        sums = (state.tally.loss, state.tally.right, state.tally.answers)
        self.sums = torch.tensor(sums, dtype=sums_dtype(self.device), device=self.device)
        progress = tqdm(
            desc=f"epoch {epoch + 1}/{config.epochs}", unit="step", disable=not bar, leave=False,
            mininterval=0.5, total=self.steps, initial=state.tally.steps,
        )  # fmt: skip
        batches = iter(loader)
        with progress:
            while state.tally.steps < self.steps:
                started = time.perf_counter()
                batch, state.diverged = self._next(batches), True
                self._train_batch(batch, epoch * self.steps + state.tally.steps)
                seconds = time.perf_counter() - started
                state.tally = replace(state.tally, seconds=state.tally.seconds + seconds)
                self.after_step(seconds)
                progress.update()
                if bar and batch is not None and state.tally.steps % 10 == 1:
                    self._describe(progress, batch.resolution)
                if any(self.stop_save_flags):
                    self._update_sums()
                    with state.merged():
                        saver.save(stopping=self.stop_save_flags[0] > 0)
        self._update_sums()
        return state.end_epoch().metrics(self._set_learning_rate((epoch + 1) * self.steps - 1))

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        """Return the next batch; ``None`` if a stop signal also ended the loader workers."""
        try:
            return next(batches)
        except LOADER_ERRORS:
            time.sleep(GRACE_S)
            if self.saver is None or not self.saver.stopping:
                raise
            return None

    def _train_batch(self, batch: Batch | None, step: int) -> None:
        """Take one step and count it."""
        self._set_learning_rate(step)
        images, state = 0, self.state
        skipped = state.skipped
        if batch is not None:
            state.broken.add(batch.broken)
            images = len(batch.targets)
        if images < 2:  # the others are broken, and BN needs two
            any_images, images, taken = self.update(0), 0, 0
        else:
            inputs = batch.images.to(
                self.device, non_blocking=True, memory_format=torch.channels_last
            )
            targets = batch.targets.to(self.device, non_blocking=True)
            self.sums += self.train_step(inputs, targets, step)
            any_images, taken = True, int(state.skipped == skipped)
        if batch is None and not any_images:
            return
        state.tally = replace(
            state.tally,
            steps=state.tally.steps + 1,
            taken=state.tally.taken + taken,
            images=state.tally.images + images,
            skipped=state.tally.skipped + state.skipped - skipped,
        )

    def _describe(self, progress: tqdm, resolution: int) -> None:
        """Show metrics in the progress bar."""
        loss, right, answers = self.sums.tolist()
        state = self.state
        progress.set_postfix(
            loss=f"{loss / max(1, state.tally.taken):.3f}",
            top1=f"{100 * right / max(1, answers):.1f}",
            r=resolution,
            lr=f"{state.optimizer.param_groups[0]['lr']:.3g}",
            img_s=f"{state.tally.images_per_s:.0f}",
            **({"skipped": state.skipped} if state.skipped else {}),
        )

    def _update_sums(self) -> None:
        """Copy the sums from the device to the tally."""
        loss, right, answers = self.sums.tolist()
        self.state.tally = replace(self.state.tally, loss=loss, right=right, answers=answers)

    def train_step(self, images: Tensor, targets: Tensor, step: int) -> Tensor:
        """Sum the gradients of the step's subnets, average them over ranks and update the weights.

        With mixup or cutmix, teacher and subnets see the mixed images, and a prediction counts as
        correct if it is the class with the larger share.

        Args:
            images: Normalised images of this rank on the device, shape [n, 3, r, r].
            targets: Class indices, shape [n].
            step: Number of the step, from the start of the phase.

        Returns:
            On this rank the mean loss of the subnets, correct predictions and predictions, shape
            [3]; zeros if the step was skipped.
        """
        config, phase = self.config, self.phase
        self.guard.remember()
        subnets = self.subnets_at(step)
        rank = (self.backend.rank,) * (self.backend.rank > 0)  # ranks draw differently
        images, targets = mix(
            images, targets, len(self.splits.classes), config,
            derive_seed(config.seed, "mix", step, *rank),
        )  # fmt: skip
        largest = targets if targets.ndim == 1 else targets.argmax(1)
        sums = torch.zeros(3, device=self.device)
        soft = None
        if self.teacher is not None and config.kd_ratio > 0:
            with torch.no_grad(), self._precision():
                soft = self.teacher(images).float()
        for index, subnet in enumerate(subnets):
            dropout_seed = derive_seed(config.seed, "dropout", step, index, *rank)
            with seeded(dropout_seed, self.device), self._precision():
                logits = self.run(images, subnet).float()
            loss = phase.loss(
                logits, targets, soft, config.kd_ratio, config.kd_type, config.label_smoothing
            )
            self.state.scaler.scale(loss).backward()
            if index == 0 and phase.teacher == "self":
                soft = logits.detach()
            with torch.no_grad():
                right = (logits.argmax(1) == largest).sum()
                sums += torch.stack([loss / len(subnets), right, right.new_tensor(len(targets))])
        skipped = self.state.skipped
        self.update(len(targets) / self.batch_size, sums[0])
        return sums if self.state.skipped == skipped else torch.zeros_like(sums)

    def update(self, weight: float, loss: Tensor | None = None) -> bool:
        """Average the gradients over ranks, update the weights and clear the gradients.

        All ranks call this once per step and must decide alike, so every decision is a function of
        the averaged gradients. If these are non-finite the step is skipped: weights, momentum and
        BN statistics stay unchanged.

        Args:
            weight: This rank's images as a share of the batch size; 0 for a rank whose images are
                all broken, which follows the step of the others.
            loss: Loss on this rank's images, if it has any.

        Returns:
            Whether any rank had images.

        Raises:
            TrainingError: Too many consecutive steps were skipped.
        """
        if loss is not None:
            self.guard.mark(loss)
        self.stop_save_flags = [] if self.saver is None else self.saver.stop_save_flags()
        optimizer, scaler = self.state.optimizer, self.state.scaler
        half = self.config.fp16_allreduce
        total = self.backend.average_gradients(
            self.net.parameters(), weight, half, self.stop_save_flags
        )
        if total > 0:
            scaler.unscale_(optimizer)
            finite, scale = self.guard.passes(self.config.clip_grad_norm), scaler.get_scale()
            if finite:
                scaler.step(optimizer)
                if self.state.average is not None:
                    self.state.average.update_parameters(self.net)
                self.state.skipped_in_a_row = 0
            elif loss is not None:
                self.guard.restore()
            scaler.update()
            # Overflow in half precision is expected until the scale has come down.
            if not finite and not 1 <= scaler.get_scale() < scale:
                self._skip()
        optimizer.zero_grad(set_to_none=False)  # subnets hold views of the gradients
        return total > 0

    def _skip(self) -> None:
        """Count a skipped step."""
        state = self.state
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= self.config.max_skipped:
            raise TrainingError(
                f"{state.skipped_in_a_row} steps in a row had a non-finite loss or gradient "
                f"(epoch {state.tally.epoch + 1}, step {state.tally.steps + 1} of {self.steps})"
            )

    def validate(self) -> dict[str, dict[str, float]]:
        """Evaluate the smallest and the largest subnet of the phase on the validation images.

        With ``--ema`` these are subnets of the averaged weights. A network that has been trained
        without elastic choices keeps its running BN statistics once they are those of enough steps;
        otherwise the statistics of a subnet are calibrated.
        """
        figures, net = {}, self.state.evaluated
        done = self.state.epoch * self.steps + self.state.tally.steps
        if isinstance(net, Supernet) and len(self.extremes) == 1 and done >= RUNNING_STEPS:
            net = extract(net, self.extremes["largest"])
        for name, subnet in self.extremes.items():
            found = self.evaluator.accuracy(net, subnet.at(self.config.eval_size))
            figures[name] = {"top1": found.top1, "top5": found.top5, "loss": found.loss}
        return figures

    def _set_learning_rate(self, step: int) -> float:
        config = self.config
        lr = learning_rate(
            step, config.epochs * self.steps, config.warmup_epochs * self.steps, self.peak_lr
        )
        for group in self.state.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _precision(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators within the block, and restore them afterwards."""
    cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
