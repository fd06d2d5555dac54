"""Evaluation: calibrate a subnet, measure top-1 and top-5, return a record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from compofa.data import (
    BrokenImages,
    DataSplits,
    MemorySource,
    Normalisation,
    calibration_loader,
    dataset_info,
    eval_loader,
)
from compofa.data.loaders import Batch
from compofa.details.outcomes import Observer, Outcomes
from compofa.distributed.backend import Backend, SingleProcess
from compofa.distributed.threads import cpu_threads, default_threads
from compofa.errors import DataError
from compofa.io.records import EvalRecord
from compofa.networks.layout import at_resolution, macs, params
from compofa.nn.calibrate import calibrate
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Subnet

T = TypeVar("T")


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on a set of images.

    Attributes:
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent; 100 with five classes or fewer.
        images: Number of images.
        loss: Mean cross entropy.
    """

    top1: float
    top5: float
    images: int
    loss: float


def measure_accuracy(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    backend: Backend | None = None,
    observe: Observer | None = None,
) -> Accuracy:
    """Measure the accuracy of ``network`` in evaluation mode.

    Args:
        network: The network, on its device.
        batches: Pairs of images [n, 3, r, r] and targets [n].
        backend: Ranks that call this together, each with its own share of the images, which may be
            empty; every rank gets the accuracy on all of them.
        observe: Collects what the network says of each image.

    Raises:
        DataError: There are no images, or non-finite logits.
    """
    hits1 = hits5 = images = broken = 0
    loss = 0.0
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    with torch.inference_mode():
        for inputs, targets in batches:
            if not len(targets):
                continue
            logits = network(inputs.to(device, memory_format=torch.channels_last)).float()
            targets = targets.to(device)
            predicted = logits.topk(min(5, logits.shape[1]), dim=1).indices
            best = predicted == targets[:, None]
            hits1 += int(best[:, 0].sum())
            hits5 += int(best.sum())
            loss += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            images += len(targets)
            broken += int((~logits.isfinite()).any(dim=1).sum())
            if observe is not None:
                observe(logits, targets, predicted[:, 0])
    network.train(training)
    sums = (backend or SingleProcess()).sum((hits1, hits5, images, broken, loss))
    hits1, hits5, images, broken, loss = *map(int, sums[:4]), sums[4]
    if not images:
        raise DataError("evaluation needs images, got none")
    if broken:
        raise DataError(
            f"expected finite logits, got NaN or infinite ones for {broken} of {images} images: "
            "check the weights, and the mean and standard deviation of the normalisation"
        )
    return Accuracy(100 * hits1 / images, 100 * hits5 / images, images, loss / images)


class Evaluator:
    """Measures the accuracy of networks on one part of a data set.

    Calibration images are cached between subnets of the same resolution, and so are evaluation
    images if they are few.

    Args:
        splits: The data set.
        part: ``validation`` or ``test``.
        normalisation: Normalisation of the network's inputs; by default the data set's.
        calibration_images: Number of training images for BN calibration; 0 for networks that
            keep their BN statistics.
        batch_size: Images per batch.
        workers: Loader workers.
        seed: Seed for choosing the calibration images.
        device: Device to run on.
        backend: Ranks that measure together, each on a share of the images.
        named: See :class:`compofa.data.BrokenImages`.
        bar: Whether rank 0 shows progress bars.
    """

    def __init__(
        self,
        splits: DataSplits,
        part: str = "validation",
        *,
        normalisation: Normalisation | None = None,
        calibration_images: int = 2000,
        batch_size: int = 256,
        workers: int = 0,
        seed: int = 0,
        device: str | torch.device = "cpu",
        backend: Backend | None = None,
        named: set[str] | None = None,
        bar: bool = False,
    ) -> None:
        self.splits = splits
        self.part = part
        self.info = dataset_info(splits.name)
        self.source = {"validation": splits.validation, "test": splits.test}[part]
        self.calibration_images = min(calibration_images, len(splits.train))
        self.seed = seed
        self.device = torch.device(device)
        self.batch_size = batch_size
        self.backend = backend or SingleProcess()
        self.bar = bar and self.backend.is_main
        self.options = {
            "rank": self.backend.rank,
            "world_size": self.backend.size,
            "workers": workers,
            "normalisation": normalisation,
            "pin_memory": self.device.type == "cuda",
        }
        self.broken = BrokenImages(len(self.source) + self.calibration_images, named)
        self._calibration: tuple[int, list[Tensor]] = (0, [])
        self._evaluation: tuple[int, list[tuple[Tensor, Tensor]]] = (0, [])
        self._indices: list[int] = []  # of the images of the last evaluation, in its order

    def check_images(self, resolution: int, calibration: bool = True) -> None:
        """Read every image file that a measurement needs; all ranks call this together.

        Args:
            resolution: Resolution of the measurement, in pixels.
            calibration: Whether it needs calibration images.

        Raises:
            DataError: More than 1 % of them are broken, or there are none.
        """
        if isinstance(self.source, MemorySource):
            return
        loaders = [self._evaluation_loader(resolution)]
        if calibration:
            loaders.append(self._calibration_loader(resolution, self.batch_size))
        broken = tuple(
            image
            for loader in loaders
            for batch in self._progress(loader, "reading images")
            for image in batch.broken
        )
        found = [image for images in self.backend.gather(broken) for image in images]
        self.backend.from_main(lambda: self.broken.add(found))
        self.broken.count(path for path, _ in found)

    def calibration_batches(self, resolution: int) -> list[Tensor]:
        """Return the calibration images at ``resolution``, on the device."""
        if self._calibration[0] != resolution:
            in_memory = resolution <= 64
            size = self.calibration_images if in_memory else self.batch_size
            loader = self._calibration_loader(resolution, size)
            batches = self._progress(loader, "calibration images")
            images = [self._checked(batch)[0].to(self.device) for batch in batches]
            images = [image.contiguous(memory_format=torch.channels_last) for image in images]
            self._calibration = (resolution, images)
        return self._calibration[1]

    def evaluation_batches(self, resolution: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of (images, targets) of the part at ``resolution``."""
        if self._evaluation[0] == resolution:
            return self._evaluation[1]
        self._indices = []
        batches = (self._noted(batch) for batch in self._evaluation_loader(resolution))
        if len(self.source) * resolution**2 > 20_000_000:
            return batches
        self._evaluation = (resolution, list(map(_unshared, batches)))
        return self._evaluation[1]

    def _progress(self, batches: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
        """Return batches with a progress bar."""
        return tqdm(
            batches, what, total, unit="batch", leave=False, mininterval=0.5, disable=not self.bar
        )

    def _calibration_loader(self, resolution: int, batch_size: int) -> Iterable[Batch]:
        return calibration_loader(
            self.splits.train,
            self.info,
            resolution=resolution,
            batch_size=batch_size,
            seed=self.seed,
            n_images=self.calibration_images,
            **self.options,
        )

    def _evaluation_loader(self, resolution: int) -> Iterable[Batch]:
        return eval_loader(
            self.source,
            self.info,
            resolution=resolution,
            batch_size=self.batch_size,
            **self.options,
        )

    def _checked(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.broken.add(batch.broken)
        return batch.images, batch.targets

    def _noted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self._indices += batch.indices
        return self._checked(batch)

    def accuracy(
        self,
        network: Supernet | StaticNetwork,
        subnet: Subnet,
        observe: Observer | None = None,
    ) -> Accuracy:
        """Measure the accuracy of a subnet at its resolution.

        A subnet of a supernet is extracted and calibrated; a plain network keeps its BN statistics.
        ``observe`` collects what it says of each image, for :meth:`outcomes`.
        """
        resolution = subnet.resolution
        with cpu_threads(default_threads(resolution)):
            if isinstance(network, Supernet):
                images = self.calibration_batches(resolution)
                network = calibrate(network, images, subnet, self.backend, self.bar)
            total = -(-len(self.source) // (self.batch_size * self.backend.size))
            batches = self._progress(self.evaluation_batches(resolution), self.part, total)
            return measure_accuracy(network, batches, self.backend, observe)

    def outcomes(self, observed: Observer) -> Outcomes:
        """Return what the last network that was measured said of each image, on every rank.

        Args:
            observed: The observer of that measurement alone.
        """
        return observed.outcomes(np.array(self._indices, dtype=np.int64), self.backend)

    def measure(
        self,
        network: Supernet | StaticNetwork,
        subnet: Subnet,
        net: str = "",
        checkpoint: str = "",
        observe: Observer | None = None,
    ) -> EvalRecord:
        """Measure ``subnet`` and return its record.

        Args:
            network: A supernet that has the subnet, or a plain network.
            subnet: The subnet, at the resolution to evaluate.
            net: Name or path of the network, for the record.
            checkpoint: Hash of the checkpoint, for the record.
            observe: See :meth:`accuracy`.
        """
        if isinstance(network, Supernet):
            network.spec.check_resolution(subnet.resolution)
            layers = network.spec.layers_of(subnet)
        else:
            layers = at_resolution(network.specs, subnet.resolution)
        accuracy = self.accuracy(network, subnet, observe)
        return EvalRecord(
            subnet=subnet,
            top1=accuracy.top1,
            top5=accuracy.top5,
            images=accuracy.images,
            macs=macs(layers),
            params=params(layers),
            net=net,
            dataset=self.splits.name,
            part=self.part,
            calibration_images=self.calibration_images,
            seed=self.seed,
            checkpoint=checkpoint,
            device=str(self.device),
        )


def _unshared(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a batch to cache, copied out of the shared memory of loader workers."""
    images, targets = (tensor.clone() if tensor.is_shared() else tensor for tensor in batch)
    return images, targets
