"""Evaluation: calibrate a subnet, measure top-1 and top-5, write a record."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
from compofa.distributed.backend import Backend, SingleProcess
from compofa.distributed.threads import cpu_threads, default_threads
from compofa.errors import DataError
from compofa.io.records import EvalRecord
from compofa.networks.layout import at_resolution, macs, params
from compofa.nn.calibrate import calibrate
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Subnet


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers.

    Attributes:
        top1: First guess right, in percent.
        top5: Among the first five (or all, with fewer classes), in percent.
        images: Images seen.
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
) -> Accuracy:
    """Run ``network`` in evaluation mode over (images, targets) and count right answers.

    Args:
        network: On its device.
        batches: What to run it on.
        backend: Workers that call this together, each with images of its own (or none); all get
            the figures of all images.

    Raises:
        DataError: There are no images, or logits that are not finite numbers: such are no answers.
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
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
            hits1 += int(best[:, 0].sum())
            hits5 += int(best.sum())
            loss += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            images += len(targets)
            broken += int((~logits.isfinite()).any(dim=1).sum())
    network.train(training)
    sums = (backend or SingleProcess()).sum((hits1, hits5, images, broken, loss))
    hits1, hits5, images, broken, loss = *map(int, sums[:4]), sums[4]
    if not images:
        raise DataError("evaluation needs images, got none")
    if broken:
        raise DataError(
            f"expected finite logits, got NaN or infinite ones for {broken} of {images} images: "
            "check the weights, and the mean and standard deviation that images are normalised with"
        )
    return Accuracy(100 * hits1 / images, 100 * hits5 / images, images, loss / images)


class Evaluator:
    """Measures subnets of one supernet on one part of a data set.

    Calibration images are kept between subnets of the same resolution, and evaluation images
    too where they are in memory anyway.

    Args:
        splits: The data set.
        part: ``validation`` or ``test``.
        normalisation: What the network's inputs are normalised with; the data set's own when
            left out.
        calibration_images: Training images to measure BN statistics on; 0 for networks that
            keep their own.
        batch_size: Images a batch.
        workers: Data-loading processes.
        seed: Picks the calibration images.
        device: Where to run.
        backend: Workers that measure together, each on a part of the images.
        named: See :class:`compofa.data.BrokenImages`.
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

    def check_images(self, resolution: int, calibration: bool = True) -> None:
        """Read every image file that a measurement needs; all workers call this together.

        Args:
            resolution: Of the measurement.
            calibration: Whether it needs calibration images.

        Raises:
            DataError: More than 1 % of them are broken, or there are none.
        """
        if isinstance(self.source, MemorySource):
            return
        loaders = [self._evaluation_loader(resolution)]
        if calibration:
            loaders.append(self._calibration_loader(resolution, self.batch_size))
        broken = tuple(image for loader in loaders for batch in loader for image in batch.broken)
        found = [image for images in self.backend.gather(broken) for image in images]
        self.backend.from_main(lambda: self.broken.add(found))
        self.broken.count(path for path, _ in found)

    def calibration_batches(self, resolution: int) -> list[Tensor]:
        """Return the calibration images at ``resolution``, on the device."""
        if self._calibration[0] != resolution:
            in_memory = resolution <= 64
            size = self.calibration_images if in_memory else self.batch_size
            batches = self._calibration_loader(resolution, size)
            images = [self._checked(batch)[0].to(self.device) for batch in batches]
            images = [image.contiguous(memory_format=torch.channels_last) for image in images]
            self._calibration = (resolution, images)
        return self._calibration[1]

    def evaluation_batches(self, resolution: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return (images, targets) of the part at ``resolution``."""
        if self._evaluation[0] == resolution:
            return self._evaluation[1]
        batches = (self._checked(batch) for batch in self._evaluation_loader(resolution))
        if len(self.source) * resolution**2 > 20_000_000:
            return batches
        self._evaluation = (resolution, list(map(_unshared, batches)))
        return self._evaluation[1]

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

    def accuracy(self, network: Supernet | StaticNetwork, subnet: Subnet) -> Accuracy:
        """Measure the accuracy of a subnet at its resolution.

        A supernet's is calibrated on a copy; a plain network keeps the statistics it has.
        """
        resolution = subnet.resolution
        with cpu_threads(default_threads(resolution)):
            if isinstance(network, Supernet):
                images = self.calibration_batches(resolution)
                network = calibrate(network, images, subnet, self.backend)
            return measure_accuracy(network, self.evaluation_batches(resolution), self.backend)

    def measure(
        self,
        network: Supernet | StaticNetwork,
        subnet: Subnet,
        net: str = "",
        checkpoint: str = "",
    ) -> EvalRecord:
        """Measure ``subnet`` and return the record.

        Args:
            network: Its weights: a supernet's, or its own.
            subnet: The network, at the resolution to evaluate.
            net: Name or path for the record.
            checkpoint: Hash for the record.
        """
        if isinstance(network, Supernet):
            network.spec.check_resolution(subnet.resolution)
            layers = network.spec.layers_of(subnet)
        else:
            layers = at_resolution(network.specs, subnet.resolution)
        accuracy = self.accuracy(network, subnet)
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
    """Return a batch to keep: what workers made would fill the shared memory."""
    images, targets = (tensor.clone() if tensor.is_shared() else tensor for tensor in batch)
    return images, targets
