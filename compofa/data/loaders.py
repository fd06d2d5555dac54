"""Batches for training, evaluation and calibration.

Each call builds one :class:`torch.utils.data.DataLoader`, which is cheap without workers. Starting
workers costs about 0.1 s each with fork, and a few seconds with spawn (they import torch again),
every time a loader is gone through: with small data, no workers are fastest.

Batches come from workers through shared memory, on Linux ``/dev/shm``: a container has 64 MB of it
by default, and a batch of 256 photographs takes 154 MB.
"""

import logging
import multiprocessing.queues
import os
import resource
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from compofa.data.catalog import DatasetInfo, Normalisation
from compofa.data.sampling import SampleKey, TrainBatches, eval_batches
from compofa.data.sources import ImageSource
from compofa.data.transforms import eval_images, normalise, train_images
from compofa.errors import DataError, LoaderError
from compofa.seeds import rng

_LOG = logging.getLogger(__name__)
_SHARED_MEMORY = "/dev/shm"
_PREFETCH = (2, 1)  # batches per worker that are made ahead: as many as there is room for
_WHAT_HELPS = "use fewer or no data workers, smaller batches, or more memory"


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


class BatchLoader:
    """Goes through batches that one or several processes make.

    Args:
        loader: Makes the batches.
    """

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Start the workers.

        Raises:
            LoaderError: They cannot be started.
        """
        try:
            return _Batches(iter(self.loader))
        except OSError as error:
            reason = error.strerror or str(error)
            raise LoaderError(f"cannot start data workers ({reason}): {_WHAT_HELPS}") from error


class _Batches(Iterator[Batch]):
    """Batches of workers; see :class:`BatchLoader`."""

    def __init__(self, batches: Iterator[Batch | LoaderError]) -> None:
        self._batches = batches

    def __next__(self) -> Batch:
        """Wait for the next batch.

        Raises:
            LoaderError: A worker was lost, or cannot hand it over.
        """
        try:
            batch = next(self._batches)
        except (RuntimeError, OSError, EOFError) as error:
            if str(error).startswith("Caught "):  # what a worker raised, with its traceback
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LoaderError(f"lost a data worker ({reason}): {_WHAT_HELPS}") from error
        if isinstance(batch, LoaderError):
            raise batch
        return batch


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
) -> BatchLoader:
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
        DataError: Too few images, a number out of range, or too little shared memory.
    """
    batches = TrainBatches(
        len(source), batch_size, resolutions, seed, epoch, rank, world_size, first_step
    )
    dataset = TransformedImages(source, info, normalisation or info.normalisation, True)
    batch_bytes = _image_bytes(min(batch_size, len(source)), max(resolutions))
    return _loader(dataset, batches, batch_bytes, workers, context, pin_memory)


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
) -> BatchLoader:
    """Return the batches of an evaluation: every image once, in order; see :func:`train_loader`.

    With several ranks each takes every ``world_size``-th image; a rank may get none.

    Raises:
        DataError: There are no images, a number is out of range, or there is too little shared
            memory.
    """
    if not len(source):
        raise DataError("expected images to evaluate on, got an empty part of the data set")
    batches = eval_batches(range(rank, len(source), world_size), batch_size, resolution)
    dataset = TransformedImages(source, info, normalisation or info.normalisation, False)
    batch_bytes = _image_bytes(max(map(len, batches), default=0), resolution)
    return _loader(dataset, batches, batch_bytes, workers, context, pin_memory)


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
) -> BatchLoader:
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
        DataError: There are no training images, a number is out of range, or there is too little
            shared memory.
    """
    if not len(source) or n_images < 1:
        raise DataError(
            f"calibration needs training images: got {n_images} of a part with {len(source)}"
        )
    n_images = min(n_images, len(source))
    indices = rng(seed, "calibration").choice(len(source), n_images, replace=False)
    batches = eval_batches(indices[rank::world_size].tolist(), batch_size, resolution)
    dataset = TransformedImages(source, info, normalisation or info.normalisation, False)
    batch_bytes = _image_bytes(max(map(len, batches), default=0), resolution)
    return _loader(dataset, batches, batch_bytes, workers, context, pin_memory)


def _loader(
    dataset: TransformedImages,
    batches: TrainBatches | list[list[SampleKey]],
    batch_bytes: int,
    workers: int,
    context: str | None,
    pin_memory: bool,
) -> BatchLoader:
    if workers < 0:
        raise DataError(f"expected 0 or more data workers, got {workers}")
    if workers:
        _require_processes(workers)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=_prefetch(batch_bytes, len(batches), workers) if workers else None,
        collate_fn=_hand_over,
        worker_init_fn=_end_when_a_batch_is_lost,
        multiprocessing_context=context if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # else it draws from the global one
    )
    return BatchLoader(loader)


def _require_processes(workers: int) -> None:
    """Check that data-loading processes can be started: torch fails half-way, with tracebacks.

    Raises:
        DataError: Few files may be open (three are for each, beside what batches take on their
            way), or no semaphore can be made.
    """
    most, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 48 + 3 * workers
    if most != resource.RLIM_INFINITY and most < needed:
        raise DataError(
            f"expected a limit of at least {needed} open files for {workers} data-loading "
            f"processes, got {most}: raise it (ulimit -n {needed}), or use fewer"
        )
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise DataError(
            f"expected to share memory with {workers} data-loading processes, got: "
            f"{error.strerror or error}: make /dev/shm writable, or load data without any"
        ) from error


def _image_bytes(images: int, resolution: int) -> int:
    return images * 3 * resolution**2 * 4


def _prefetch(batch_bytes: int, batches: int, workers: int) -> int:
    """Return how many batches each worker makes ahead.

    Raises:
        DataError: Shared memory has no room for even one, beside the batch that is in use.
    """
    free = _free_shared_memory()
    for ahead in _PREFETCH:
        need = min(workers * ahead + 1, batches) * batch_bytes
        if free is None or need <= free:
            return ahead
    raise DataError(
        f"expected {need / 1e6:.3g} MB free in {_SHARED_MEMORY} for batches of {workers} data "
        f"worker(s), got {free / 1e6:.3g} MB: use fewer or no workers, smaller batches, or give a "
        "container more shared memory (docker run --shm-size)"
    )


def _free_shared_memory() -> int | None:
    """Return the bytes that are free for sharing tensors; None where that is not limited so."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None  # sharing says what is missing
    return 0 if status.f_flag & os.ST_RDONLY else status.f_bavail * status.f_frsize


def _hand_over(batch: Batch) -> Batch | LoaderError:
    """Put a worker's batch into shared memory, or say why not.

    Torch would do so in a thread, whose error nobody sees and whose batch is waited for.
    """
    if get_worker_info() is not None:
        try:
            for tensor in (batch.images, batch.targets):
                tensor.share_memory_()
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            return LoaderError(f"a data worker cannot share a batch ({reason}): {_WHAT_HELPS}")
    return batch


def _end_when_a_batch_is_lost(worker: int) -> None:
    """Let a worker end where its thread cannot send a batch, which is noticed: see above."""

    def end(error: Exception, batch: object) -> None:
        _LOG.error("data worker %d cannot send a batch: %s", worker, " ".join(str(error).split()))
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)
