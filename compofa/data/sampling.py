"""Which images a step gets, at which resolution: pure functions of the seed and the step.

Nothing here is shared between processes: the batch sampler writes index, resolution and
augmentation seed into the keys that a worker receives. So any number of workers, forked or spawned,
gives the same batches, and a resumed run replays exactly.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compofa.errors import DataError
from compofa.seeds import derive_seed, rng

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SampleKey(NamedTuple):
    """What a worker needs to make one image: its index, side (pixels) and augmentation seed."""

    index: int
    resolution: int
    seed: int


def random_bits(seeds: NDArray[np.uint64], counter: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the ``counter``-th value of the SplitMix64 stream of each seed, vectorised.

    SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    with np.errstate(over="ignore"):
        z = seeds + (np.asarray(counter, np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def image_order(names: NDArray[np.uint64], *purpose: int | str) -> NDArray[np.uint64]:
    """Return each image's place in an order that depends on its own name only.

    Args:
        names: 64-bit hashes of the images' names.
        *purpose: Parts of the seed that the order is drawn from.
    """
    return random_bits(names, np.uint64(derive_seed(*purpose)))


def held_by_share(
    order: NDArray[np.uint64], targets: NDArray[np.int64], share: float
) -> NDArray[np.bool_]:
    """Hold out the images in the first places of all possible ones.

    So an image is held out, or not, whatever other images there are, but for classes so small that
    none or all would be: every class keeps its last image, and of two or more the first is held
    out.

    Args:
        order: Places of the images [n], see :func:`image_order`.
        targets: Class numbers [n].
        share: Of the places, from 0 to 1.

    Returns:
        Whether each image is held out, [n].
    """
    within = order < np.uint64(min(int(share * 2**64), 2**64 - 1))
    counts = np.bincount(targets)
    take = np.bincount(targets, within, len(counts)).astype(np.int64)
    return _first(order, targets, take.clip(np.minimum(counts - 1, 1), counts - 1))


def held_by_count(
    order: NDArray[np.uint64], targets: NDArray[np.int64], n_held: int
) -> NDArray[np.bool_]:
    """Hold out the first images of each class, as many in all as asked for.

    Args:
        order: Places of the images [n], see :func:`image_order`.
        targets: Class numbers [n].
        n_held: At most n minus the number of classes; each class has its :func:`quotas`.

    Returns:
        Whether each image is held out, [n].
    """
    return _first(order, targets, quotas(np.bincount(targets), n_held))


def quotas(counts: NDArray[np.int64], n_held: int) -> NDArray[np.int64]:
    """Share ``n_held`` images out among classes in proportion, largest remainders first.

    Args:
        counts: Images of each class; one of each is not held out.
        n_held: At most their sum minus the number of classes.
    """
    most = np.maximum(counts - 1, 0)
    assert n_held <= most.sum()
    quota = n_held * counts / max(1, counts.sum())
    take = np.minimum(quota.astype(np.int64), most)
    while (missing := n_held - take.sum()) > 0:
        wish = np.where(take < most, quota - take, -np.inf)
        order = np.argsort(-wish, kind="stable")[: min(missing, np.count_nonzero(take < most))]
        take[order] += 1
    return take


def _first(
    order: NDArray[np.uint64], targets: NDArray[np.int64], take: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell which images are among the first of their class."""
    by_class = np.lexsort((order, targets))
    starts = np.cumsum(np.bincount(targets)) - np.bincount(targets)
    first = np.zeros(len(targets), dtype=bool)
    ranks = np.arange(len(targets)) - starts[targets[by_class]]
    first[by_class] = ranks < take[targets[by_class]]
    return first


def resolution_at(seed: int, step: int, resolutions: Sequence[int]) -> int:
    """Return the resolution of a training step, the same on every rank and worker.

    Args:
        seed: Seed of the run.
        step: Step since the start of training (not of the epoch).
        resolutions: Choices, pixels; drawn uniformly.
    """
    return int(resolutions[rng(seed, "resolution", step).integers(len(resolutions))])


def augmentation_seeds(seed: int, epoch: int, indices: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return a 63-bit seed for each image in this epoch."""
    base = np.full(1, derive_seed(seed, "augmentation", epoch), np.uint64)
    return random_bits(base, np.asarray(indices).astype(np.uint64)) >> np.uint64(1)


def steps_per_epoch(n_images: int, batch_size: int, world_size: int = 1) -> int:
    """Return the steps of an epoch: whole global batches, or one smaller one if there is no more.

    Args:
        n_images: Training images of the data set.
        batch_size: Images per rank and step.
        world_size: Number of ranks.

    Raises:
        DataError: There is not one image for each rank.
    """
    if batch_size < 1:
        raise DataError(f"expected a batch size of at least 1, got {batch_size}")
    if n_images < world_size:
        raise DataError(f"{n_images} training images are too few for {world_size} worker(s)")
    return max(1, n_images // (batch_size * world_size))


class TrainBatches:
    """Batch sampler of one training epoch on one rank.

    The order of the images comes from (seed, epoch), the resolution from (seed, global step), each
    image's augmentation from (seed, epoch, index). In every step the ranks take disjoint slices of
    one global batch. Images that do not fill the last batch are left out of the epoch.

    Args:
        n_images: Training images of the data set.
        batch_size: Images per rank and step.
        resolutions: Choices, pixels.
        seed: Seed of the run.
        epoch: Epoch since the start of training, from 0.
        rank: This process, from 0.
        world_size: Number of processes.
        first_step: Step of this epoch to begin with, when a run is resumed within an epoch.

    Raises:
        DataError: Too few images, no resolution, or a rank that does not exist.
    """

    def __init__(
        self,
        n_images: int,
        batch_size: int,
        resolutions: Sequence[int],
        seed: int,
        epoch: int,
        rank: int = 0,
        world_size: int = 1,
        first_step: int = 0,
    ) -> None:
        self.steps = steps_per_epoch(n_images, batch_size, world_size)
        if not resolutions or min(resolutions) < 1:
            raise DataError(f"expected positive resolutions, got {tuple(resolutions)}")
        if not 0 <= rank < world_size:
            raise DataError(f"expected a rank in 0...{world_size - 1}, got {rank}")
        if not 0 <= first_step <= self.steps:
            raise DataError(f"expected a first step in 0...{self.steps}, got {first_step}")
        self.n_images, self.batch_size, self.resolutions = n_images, batch_size, tuple(resolutions)
        self.seed, self.epoch, self.rank, self.world_size = seed, epoch, rank, world_size
        self.first_step = first_step

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        order = rng(self.seed, "order", self.epoch).permutation(self.n_images)
        global_batch = self.batch_size * self.world_size
        for step in range(self.first_step, self.steps):
            batch = order[step * global_batch : (step + 1) * global_batch]
            mine = np.array_split(batch, self.world_size)[self.rank]
            resolution = resolution_at(self.seed, self.epoch * self.steps + step, self.resolutions)
            seeds = augmentation_seeds(self.seed, self.epoch, mine)
            yield [
                SampleKey(index, resolution, seed)
                for index, seed in zip(mine.tolist(), seeds.tolist(), strict=True)
            ]


def eval_batches(indices: Sequence[int], batch_size: int, resolution: int) -> list[list[SampleKey]]:
    """Cut ``indices`` into batches in their order; the last one may be smaller."""
    if batch_size < 1 or resolution < 1:
        raise DataError(
            f"expected a positive batch size and resolution, got {batch_size} and {resolution}"
        )
    return [
        [SampleKey(int(index), resolution, 0) for index in indices[start : start + batch_size]]
        for start in range(0, len(indices), batch_size)
    ]
