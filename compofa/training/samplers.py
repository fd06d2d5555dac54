"""Samplers: which subnets a training step sums the gradients of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet


def random(space: SearchSpace, rng: np.random.Generator, n: int) -> list[Subnet]:
    """Return ``n`` subnets drawn independently, every choice of every gene equally likely."""
    return list(space.subnets_of(space.arrays(space.sample_genes(rng, n))))


def sandwich(space: SearchSpace, rng: np.random.Generator, n: int) -> list[Subnet]:
    """Return the largest subnet, the smallest and ``n - 2`` random ones, in this order.

    The sandwich rule of Universally Slimmable Networks (Yu and Huang, ICCV 2019) and BigNAS (Yu
    et al., ECCV 2020). With ``n`` of 1 the largest alone.
    """
    return [space.largest, space.smallest, *random(space, rng, max(0, n - 2))][:n]


SAMPLERS: dict[str, Callable[[SearchSpace, np.random.Generator, int], list[Subnet]]] = {
    "random": random,
    "sandwich": sandwich,
}
"""What a phase's ``sampler`` may be."""
