"""Loaders of batches for training, evaluation and BN calibration.

Each function builds one :class:`torch.utils.data.DataLoader`. Starting loader workers takes about
0.1 s each with fork and a few seconds with spawn (they import torch again), on every iteration over
a
loader: small data sets are fastest without.

Loader workers send batches through shared memory, on Linux ``/dev/shm``. A container has 64 MB of
it by default, and a batch of 256 photographs at 224 pixels takes 154 MB.
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

from compofa.data.augmentation import AugmentationSettings
from compofa.data.catalog import DatasetInfo, Normalisation
from compofa.data.sampling import SampleKey, TrainBatches, eval_batches
from compofa.data.sources import ImageSource
from compofa.data.transforms import eval_images, normalise, random_erasing, train_images
from compofa.errors import DataError, LoaderError
from compofa.seeds import rng

_LOG = logging.getLogger(__name__)
_SHARED_MEMORY = "/dev/shm"
_PREFETCH = (2, 1)  # batches prefetched per loader worker: the first that fits into memory
_ADVICE = "use fewer loader workers, smaller batches, or more memory"


class Batch(NamedTuple):
    """The images of one step.

    Attributes:
        images: Normalised images, float32 [n, 3, resolution, resolution]. n is below the batch
        size,
            and possibly 0, if images were unreadable.
        targets: Class indices, int64 [n].
        resolution: Image side in pixels.
        broken: (path, reason) of each skipped image, for :class:`compofa.data.BrokenImages`.
        indices: Index of each image in its source.
    """

    images: torch.Tensor
    targets: torch.Tensor
    resolution: int
    broken: tuple[tuple[str, str], ...]
    indices: tuple[int, ...] = ()


class TransformedImages(Dataset[Batch]):
    """Loads and transforms whole batches. Stateless, so that any loader worker can use it.

    Args:
        source: The images.
        info: The data set, with its augmentation.
        normalisation: Means and standard deviations.
        augment: How to augment the images for training; ``None`` transforms them as for evaluation.
    """

    def __init__(
        self,
        source: ImageSource,
        info: DatasetInfo,
        normalisation: Normalisation,
        augment: AugmentationSettings | None = None,
    ) -> None:
        self.source, self.info, self.augment = source, info, augment
        self.normalisation = normalisation

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        """Return one batch; all keys have the same resolution."""
        indices = np.array([key.index for key in keys])
        images, kept, broken = self.source.load_all(indices)
        resolution = keys[0].resolution
        indices = indices[kept]
        rest = (torch.from_numpy(self.source.targets[indices]), resolution, broken)
        if self.augment is None:
            images = normalise(eval_images(images, resolution, self.info), self.normalisation)
            return Batch(images, *rest, tuple(indices.tolist()))
        seeds = np.array([key.seed for key in keys], dtype=np.uint64)[kept]
        images = train_images(images, seeds, resolution, self.info, self.augment)
        images = normalise(images, self.normalisation)
        images = random_erasing(images, seeds, self.augment.random_erasing)
        return Batch(images, *rest, tuple(indices.tolist()))


class BatchLoader:
    """Iterates over a DataLoader and raises :class:`LoaderError` if its loader workers fail.

    Args:
        loader: Loader of the batches.
    """

    def __init__(self, loader: DataLoader[Batch]) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Start the loader workers and return an iterator over their batches.

        Raises:
            LoaderError: Loader workers cannot be started, died, or cannot send a batch.
        """
        try:
            batches = iter(self.loader)
        except OSError as error:
            reason = error.strerror or str(error)
            raise LoaderError(f"cannot start loader workers ({reason}): {_ADVICE}") from error
        return _checked(batches)


def _checked(batches: Iterator[Batch | LoaderError]) -> Iterator[Batch]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            if str(error).startswith("Caught "):  # raised in a loader worker, with its traceback
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LoaderError(f"a loader worker died ({reason}): {_ADVICE}") from error
        if isinstance(batch, LoaderError):
            raise batch
        yield batch


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
    augment: AugmentationSettings | None = None,
    balanced: bool = False,
) -> BatchLoader:
    """Return the batches of one training epoch on one rank.

    Batches are bit-identical for any number of loader workers; see
    :class:`compofa.data.TrainBatches`.

    Args:
        source: Training images.
        info: The data set, with its augmentation.
        batch_size: Images per rank and step.
        resolutions: Resolutions in pixels; one is sampled per step.
        seed: Seed of the run.
        epoch: Epoch since the start of training, from 0.
        rank: Rank of this process, from 0.
        world_size: Number of ranks.
        first_step: First step within the epoch.
        workers: Number of loader workers; 0 loads batches in this process.
        normalisation: Means and standard deviations; by default those of the data set.
        context: Start method of loader workers, "fork", "spawn" or "forkserver"; by default the
            platform's.
        pin_memory: Whether to copy batches into page-locked memory, for a GPU.
        augment: What is done besides the data set's own augmentation; by default nothing.
        balanced: Whether every class has an equal share of the images drawn.

    Raises:
        DataError: There are too few images, a number is out of range, or shared memory is too
        small.
    """
    batches = TrainBatches(
        len(source), batch_size, resolutions, seed, epoch, rank, world_size, first_step,
        source.targets if balanced else None,
    )  # fmt: skip
    dataset = TransformedImages(
        source, info, normalisation or info.normalisation, augment or AugmentationSettings()
    )
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
    """Return the batches of an evaluation: every image once, in order.

    Rank i takes every ``world_size``-th image from the i-th on, possibly none.

    Args:
        source: Images to evaluate on.
        info: The data set, with its transforms.
        resolution: Image side in pixels.
        batch_size: Images per batch.
        rank: Rank of this process, from 0.
        world_size: Number of ranks.
        workers: As for :func:`train_loader`, like the arguments below.
        normalisation: Means and standard deviations.
        context: Start method of loader workers.
        pin_memory: Whether to use page-locked memory.

    Raises:
        DataError: There are no images, a number is out of range, or shared memory is too small.
    """
    if not len(source):
        raise DataError("expected images to evaluate on, got an empty part of the data set")
    batches = eval_batches(range(rank, len(source), world_size), batch_size, resolution)
    dataset = TransformedImages(source, info, normalisation or info.normalisation)
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
    """Return training images, transformed as for evaluation, to calibrate BN statistics on.

    Args:
        source: Training images.
        info: The data set, with its transforms.
        resolution: Image side in pixels.
        batch_size: Images per batch.
        seed: Seed of the sample of images, which does not depend on the resolution.
        n_images: Number of images; all of them if there are fewer.
        rank: Rank of this process, from 0; see :func:`eval_loader`.
        world_size: Number of ranks.
        workers: As for :func:`train_loader`, like the arguments below.
        normalisation: Means and standard deviations.
        context: Start method of loader workers.
        pin_memory: Whether to use page-locked memory.

    Raises:
        DataError: There are no images, a number is out of range, or shared memory is too small.
    """
    if not len(source) or n_images < 1:
        raise DataError(
            f"expected 1 or more calibration images, got {n_images} of {len(source)} training "
            "images"
        )
    n_images = min(n_images, len(source))
    indices = rng(seed, "calibration").choice(len(source), n_images, replace=False)
    batches = eval_batches(indices[rank::world_size].tolist(), batch_size, resolution)
    dataset = TransformedImages(source, info, normalisation or info.normalisation)
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
        raise DataError(f"expected 0 or more loader workers, got {workers}")
    if workers:
        _require_processes(workers)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        prefetch_factor=_prefetch(batch_bytes, len(batches), workers) if workers else None,
        collate_fn=_share,
        worker_init_fn=_exit_on_send_error,
        multiprocessing_context=context if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(0),  # by default it uses the global one
    )
    return BatchLoader(loader)


def _require_processes(workers: int) -> None:
    """Check that loader workers can be started: torch would fail half-way, with tracebacks.

    Raises:
        DataError: The limit of open files is too low (each loader worker takes three, and
            batches some more), or semaphores cannot be created.
    """
    most, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 48 + 3 * workers
    if most != resource.RLIM_INFINITY and most < needed:
        raise DataError(
            f"expected a limit of at least {needed} open files for {workers} loader workers, got "
            f"{most}: raise it (ulimit -n {needed}), or use fewer loader workers"
        )
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise DataError(
            f"cannot share memory with {workers} loader workers: {error.strerror or error}: make "
            "/dev/shm writable, or use no loader workers"
        ) from error


def _image_bytes(images: int, resolution: int) -> int:
    return images * 3 * resolution**2 * 4


def _prefetch(batch_bytes: int, batches: int, workers: int) -> int:
    """Return how many batches each loader worker may prefetch.

    Raises:
        DataError: Shared memory is too small for one each, beside the batch in use.
    """
    free = _free_shared_memory()
    for ahead in _PREFETCH:
        need = min(workers * ahead + 1, batches) * batch_bytes
        if free is None or need <= free:
            return ahead
    raise DataError(
        f"expected {need / 1e6:.3g} MB free in {_SHARED_MEMORY} for {workers} loader workers, got "
        f"{free / 1e6:.3g} MB: use fewer loader workers, smaller batches, or give a "
        "container more shared memory (docker run --shm-size)"
    )


def most_workers(batch_size: int, resolution: int) -> int:
    """Return how many loader workers shared memory has room for, with one batch each.

    Args:
        batch_size: Images per batch.
        resolution: Image side in pixels.
    """
    free = _free_shared_memory()
    if free is None:
        return sys.maxsize
    return max(0, free // _image_bytes(batch_size, resolution) - 1)


def _free_shared_memory() -> int | None:
    """Return the free bytes of shared memory; None if there is no such limit."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None  # sharing a tensor reports the error
    return 0 if status.f_flag & os.ST_RDONLY else status.f_bavail * status.f_frsize


def _share(batch: Batch) -> Batch | LoaderError:
    """Move a loader worker's batch into shared memory, or return the error.

    Torch would do so in a thread whose error is lost, and wait for the batch forever.
    """
    if get_worker_info() is not None:
        try:
            for tensor in (batch.images, batch.targets):
                tensor.share_memory_()
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            return LoaderError(f"a loader worker cannot share a batch ({reason}): {_ADVICE}")
    return batch


def _exit_on_send_error(worker: int) -> None:
    """Let a loader worker exit, which torch detects, if its thread cannot send a batch."""

    def end(error: Exception, batch: object) -> None:
        _LOG.error("loader worker %d cannot send a batch: %s", worker, " ".join(str(error).split()))
        os._exit(1)

    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end)
