"""Batches for training, evaluation and calibration.

Each call builds one :class:`torch.utils.data.DataLoader`, which is cheap without workers. Starting
workers costs about 0.1 s each with fork, and a few seconds with spawn (they import torch again),
every time a loader is gone through: with small data, no workers are fastest.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from compofa.data.catalog import DatasetInfo, Normalisation
from compofa.data.sampling import SampleKey, TrainBatches, eval_batches
from compofa.data.sources import ImageSource
from compofa.data.transforms import eval_images, normalise, train_images
from compofa.errors import DataError
from compofa.seeds import rng


class Batch(NamedTuple):
    """One step's images.

    Attributes:
        images: float32 [n, 3, resolution, resolution], normalised. n is smaller than the batch
            size, at worst 0, where images were broken.
        targets: int64 [n].
        resolution: Side, pixels.
        broken: Path of each image that was skipped, and what is wrong with it: for
            :class:`compofa.data.BrokenImages`.
    """

    images: torch.Tensor
    targets: torch.Tensor
    resolution: int
    broken: tuple[tuple[str, str], ...]


class TransformedImages(Dataset[Batch]):
    """Makes whole batches from keys; holds no state, so that it can be sent to any worker.

    Args:
        source: The images.
        info: Names the transforms.
        normalisation: Means and deviations.
        augment: Whether to vary the images (training).
    """

    def __init__(
        self, source: ImageSource, info: DatasetInfo, normalisation: Normalisation, augment: bool
    ) -> None:
        self.source, self.info, self.augment = source, info, augment
        self.normalisation = normalisation

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        """Make one batch of keys that share a resolution."""
        indices = np.array([key.index for key in keys])
        images, kept, broken = self.source.load_all(indices)
        resolution = keys[0].resolution
        if self.augment:
            seeds = np.array([key.seed for key in keys], dtype=np.uint64)[kept]
            images = train_images(images, seeds, resolution, self.info)
        else:
            images = eval_images(images, resolution, self.info)
        targets = torch.from_numpy(self.source.targets[indices[kept]])
        return Batch(normalise(images, self.normalisation), targets, resolution, broken)


def train_loader(
    source: ImageSource,
    info: DatasetInfo,
    *,
    batch_size: int,
    resolutions: tuple[int, ...],
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
    first_step: int = 0,
    workers: int = 0,
    normalisation: Normalisation | None = None,
    context: str | None = None,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return the batches of one training epoch on one rank.

    The batches are the same, bit for bit, for any number of workers; see
    :class:`compofa.data.TrainBatches`.

    Args:
        source: Training images.
        info: Names the augmentation.
        batch_size: Images per rank and step.
        resolutions: Choices, pixels; one is drawn for each step.
        seed: Seed of the run.
        epoch: Epoch since the start of training, from 0.
        rank: This process, from 0.
        world_size: Number of processes.
        first_step: Step of this epoch to begin with.
        workers: Processes that make batches; 0 makes them in this one.
        normalisation: By default the data set's own.
        context: How to start workers: "fork", "spawn" or "forkserver"; None is the platform's.
        pin_memory: Whether to put batches into page-locked memory, for a GPU.

    Raises:
        DataError: Too few images, or a number out of range.
    """
    batches = TrainBatches(
        len(source), batch_size, resolutions, seed, epoch, rank, world_size, first_step
    )
    dataset = TransformedImages(source, info, normalisation or info.normalisation, True)
    return _loader(dataset, batches, workers, context, pin_memory)


def eval_loader(
    source: ImageSource,
    info: DatasetInfo,
    *,
    resolution: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    normalisation: Normalisation | None = None,
    context: str | None = None,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return the batches of an evaluation: every image once, in order; see :func:`train_loader`.

    With several ranks each takes every ``world_size``-th image; a rank may get none.

    Raises:
        DataError: There are no images, or a number is out of range.
    """
    if not len(source):
        raise DataError("expected images to evaluate on, got an empty part of the data set")
    batches = eval_batches(range(rank, len(source), world_size), batch_size, resolution)
    dataset = TransformedImages(source, info, normalisation or info.normalisation, False)
    return _loader(dataset, batches, workers, context, pin_memory)


def calibration_loader(
    source: ImageSource,
    info: DatasetInfo,
    *,
    resolution: int,
    batch_size: int,
    seed: int,
    n_images: int = 2000,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    normalisation: Normalisation | None = None,
    context: str | None = None,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """Return training images, prepared as for evaluation, to measure BN statistics on.

    Args:
        source: Training images.
        info: Names the transforms.
        resolution: Side, pixels.
        batch_size: Images per batch.
        seed: Decides on the images: the same for the same seed, whatever the resolution.
        n_images: How many; all images where there are fewer.
        rank: This process, from 0: each takes every ``world_size``-th image, some perhaps none.
        world_size: Number of processes.
        workers: See :func:`train_loader`, and so for what follows.
        normalisation: By default the data set's own.
        context: How to start workers.
        pin_memory: For a GPU.

    Raises:
        DataError: There are no training images, or a number is out of range.
    """
    if not len(source) or n_images < 1:
        raise DataError(
            f"calibration needs training images: got {n_images} of a part with {len(source)}"
        )
    n_images = min(n_images, len(source))
    indices = rng(seed, "calibration").choice(len(source), n_images, replace=False)
    batches = eval_batches(indices[rank::world_size].tolist(), batch_size, resolution)
    dataset = TransformedImages(source, info, normalisation or info.normalisation, False)
    return _loader(dataset, batches, workers, context, pin_memory)


def _loader(
    dataset: TransformedImages,
    batches: TrainBatches | list[list[SampleKey]],
    workers: int,
    context: str | None,
    pin_memory: bool,
) -> DataLoader[Batch]:
    if workers < 0:
        raise DataError(f"expected 0 or more data workers, got {workers}")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        multiprocessing_context=context if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # else it draws from the global one
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch
