"""Sampling of images and resolutions, as pure functions of the seed and the step.

Processes share no state: the batch sampler sends index, resolution and augmentation seed of each
image to the loader workers. Batches are therefore identical for any number of workers, forked or
spawned, and a resumed run replays exactly.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compofa.errors import DataError
from compofa.seeds import derive_seed, rng

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class SampleKey(NamedTuple):
    """Index, resolution (pixels) and augmentation seed of one image of a batch."""

    index: int
    resolution: int
    seed: int


def random_bits(seeds: NDArray[np.uint64], counter: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the ``counter``-th value of the SplitMix64 stream of each seed, vectorised.

    SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.

    Args:
        seeds: uint64, any shape.
        counter: Index into the streams, from 0; broadcast against ``seeds``.

    Returns:
        uint64, of the broadcast shape.
    """
    with np.errstate(over="ignore"):
        z = seeds + (np.asarray(counter, np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def image_order(names: NDArray[np.uint64], *purpose: int | str) -> NDArray[np.uint64]:
    """Return pseudorandom sort keys of images; each depends only on the image's own name.

    Args:
        names: uint64 [n], hashes of the images' names.
        *purpose: Parts of the seed of the order; see :func:`compofa.seeds.derive_seed`.

    Returns:
        uint64 [n].
    """
    return random_bits(names, np.uint64(derive_seed(*purpose)))


def hold_out_by_share(
    order: NDArray[np.uint64], targets: NDArray[np.int64], share: float
) -> NDArray[np.bool_]:
    """Hold out the images whose sort key is in the lowest ``share`` of the uint64 range.

    Whether an image is held out does not depend on other images, except in very small classes:
    every class keeps at least one image, and every class of two or more has one held out.

    Args:
        order: Sort keys, uint64 [n]; see :func:`image_order`.
        targets: Class indices, int64 [n].
        share: Share of the images, in [0, 1].

    Returns:
        Mask of the images held out, bool [n].
    """
    within = order < np.uint64(min(int(share * 2**64), 2**64 - 1))
    counts = np.bincount(targets)
    take = np.bincount(targets, within, len(counts)).astype(np.int64)
    return _first(order, targets, take.clip(np.minimum(counts - 1, 1), counts - 1))


def hold_out_by_count(
    order: NDArray[np.uint64], targets: NDArray[np.int64], n_held: int
) -> NDArray[np.bool_]:
    """Hold out ``n_held`` images, those of each class with the lowest sort keys.

    Args:
        order: Sort keys, uint64 [n]; see :func:`image_order`.
        targets: Class indices, int64 [n].
        n_held: At most n minus the number of classes; divided among classes by :func:`quotas`.

    Returns:
        Mask of the images held out, bool [n].
    """
    return _first(order, targets, quotas(np.bincount(targets), n_held))


def stratified_split(
    targets: NDArray[np.int64], n_held: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out images at random, stratified by class (:func:`quotas`).

    Args:
        targets: Class indices, int64 [n].
        n_held: At most n minus the number of classes.
        generator: Source of randomness.

    Returns:
        Sorted indices of the images kept [n - n_held] and held out [n_held].
    """
    counts = np.bincount(targets)
    take = quotas(counts, n_held)
    order = generator.permutation(len(targets))
    order = order[np.argsort(targets[order], kind="stable")]
    place = np.arange(len(targets)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = place < np.repeat(take, counts)
    return np.sort(order[~held]), np.sort(order[held])


def quotas(counts: NDArray[np.int64], n_held: int) -> NDArray[np.int64]:
    """Divide ``n_held`` images among classes in proportion, by the largest remainder method.

    Args:
        counts: Images per class, int64 [classes]; one of each class is never held out.
        n_held: At most the sum of ``counts`` minus the number of classes.

    Returns:
        Images to hold out per class, int64 [classes].
    """
    most = np.maximum(counts - 1, 0)
    assert n_held <= most.sum()
    quota = n_held * counts / max(1, counts.sum())
    take = np.minimum(quota.astype(np.int64), most)
    while (missing := n_held - take.sum()) > 0:
        remainder = np.where(take < most, quota - take, -np.inf)
        order = np.argsort(-remainder, kind="stable")[: min(missing, np.count_nonzero(take < most))]
        take[order] += 1
    return take


def _first(
    order: NDArray[np.uint64], targets: NDArray[np.int64], take: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return the mask of the ``take`` images per class with the lowest sort keys, bool [n]."""
    by_class = np.lexsort((order, targets))
    starts = np.cumsum(np.bincount(targets)) - np.bincount(targets)
    first = np.zeros(len(targets), dtype=bool)
    ranks = np.arange(len(targets)) - starts[targets[by_class]]
    first[by_class] = ranks < take[targets[by_class]]
    return first


def resolution_at(seed: int, step: int, resolutions: Sequence[int]) -> int:
    """Return the resolution of a training step in pixels, the same on every rank.

    Args:
        seed: Seed of the run.
        step: Steps since the start of training (not of the epoch).
        resolutions: Resolutions to sample from uniformly, in pixels.
    """
    return int(resolutions[rng(seed, "resolution", step).integers(len(resolutions))])


def augmentation_seeds(seed: int, epoch: int, indices: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return the augmentation seed (63 bits) of each image in an epoch, uint64 [n]."""
    base = np.full(1, derive_seed(seed, "augmentation", epoch), np.uint64)
    return random_bits(base, np.asarray(indices).astype(np.uint64)) >> np.uint64(1)


def steps_per_epoch(n_images: int, batch_size: int, world_size: int = 1) -> int:
    """Return the steps per epoch: the number of whole global batches, but at least 1.

    Args:
        n_images: Training images of the data set.
        batch_size: Images per rank and step.
        world_size: Number of ranks.

    Raises:
        DataError: There is less than one image per rank, or the batch size is below 1.
    """
    if batch_size < 1:
        raise DataError(f"expected a batch size of at least 1, got {batch_size}")
    if n_images < world_size:
        raise DataError(
            f"expected one training image per rank, got {n_images} for {world_size} ranks"
        )
    return max(1, n_images // (batch_size * world_size))


def balanced_draws(targets: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw as many images as there are, an equal number per class, in random order.

    An image is drawn with a probability that is inversely proportional to the size of its class.
    Numbers per class differ by at most one, and so do those of the images of a class: images of
    a large class are drawn once or not at all, images of a small class several times.

    Args:
        targets: Class indices, int64 [n]. Classes without images get no share.
        generator: Source of randomness.

    Returns:
        int64 [n]: of the k-th draw of image i, counted from 0, the number i + k n.
    """
    n = len(targets)
    counts = np.bincount(targets)
    present = np.flatnonzero(counts)
    shares = np.full(len(present), n // len(present))
    shares[generator.permutation(len(present))[: n % len(present)]] += 1
    images = np.split(np.argsort(targets, kind="stable"), np.cumsum(counts[present])[:-1])
    draws = []
    for members, share in zip(images, shares.tolist(), strict=True):
        rounds = range(-(-share // len(members)))
        drawn = [generator.permutation(members) + n * k for k in rounds]
        draws.append(np.concatenate([members[:0], *drawn])[:share])
    return generator.permutation(np.concatenate(draws))


class TrainBatches:
    """Batch sampler of one training epoch on one rank.

    The order of images is a function of (seed, epoch), the resolution of (seed, global step), and
    the augmentation of (seed, epoch, index). In every step, ranks take disjoint slices of one
    global batch. Images that do not fill the last batch are dropped. With ``targets``, classes have
    equal shares of an epoch of the same length, and an image that is drawn several times is
    augmented in another way each time.

    Args:
        n_images: Training images of the data set.
        batch_size: Images per rank and step.
        resolutions: Resolutions to sample from, in pixels.
        seed: Seed of the run.
        epoch: Epoch since the start of training, from 0.
        rank: Rank of this process, from 0.
        world_size: Number of ranks.
        first_step: First step within the epoch, for a run resumed within an epoch.
        targets: Class indices, int64 [n_images], for :func:`balanced_draws`; by default every image
            is drawn once.

    Raises:
        DataError: There are too few images, or a resolution, rank or step is out of range.
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
        targets: NDArray[np.int64] | None = None,
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
        self.first_step, self.targets = first_step, targets

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = rng(self.seed, "order", self.epoch)
        if self.targets is None:
            order = generator.permutation(self.n_images)
        else:
            order = balanced_draws(self.targets, generator)
        global_batch = self.batch_size * self.world_size
        for step in range(self.first_step, self.steps):
            batch = order[step * global_batch : (step + 1) * global_batch]
            mine = np.array_split(batch, self.world_size)[self.rank]
            resolution = resolution_at(self.seed, self.epoch * self.steps + step, self.resolutions)
            seeds = augmentation_seeds(self.seed, self.epoch, mine)
            yield [
                SampleKey(index, resolution, seed)
                for index, seed in zip((mine % self.n_images).tolist(), seeds.tolist(), strict=True)
            ]


def eval_batches(indices: Sequence[int], batch_size: int, resolution: int) -> list[list[SampleKey]]:
    """Divide ``indices`` into batches, in order; the last batch may be smaller.

    Args:
        indices: Indices of images.
        batch_size: Images per batch.
        resolution: Image side in pixels.

    Raises:
        DataError: The batch size or the resolution is below 1.
    """
    if batch_size < 1 or resolution < 1:
        raise DataError(
            f"expected a positive batch size and resolution, got {batch_size} and {resolution}"
        )
    return [
        [SampleKey(int(index), resolution, 0) for index in indices[start : start + batch_size]]
        for start in range(0, len(indices), batch_size)
    ]
