"""Networks that a search is compared with: only those that can be priced."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from compofa.errors import CompofaError
from compofa.seeds import rng
from compofa.space.search_space import SearchSpace
from nas.cost.base import Cost

PROBES = 500
"""Random subnets whose cost is asked for before a network is compared."""
log = logging.getLogger(__name__)
_T = TypeVar("_T")


def require_priced(space: SearchSpace, cost: Cost) -> None:
    """Check that a cost serves a space, on its smallest, its largest and random subnets.

    Raises:
        CompofaError: It does not.
    """
    ends = [space.encode(space.smallest), space.encode(space.largest)]
    drawn = space.sample_genes(rng(0, "priced"), PROBES)
    cost(space.arrays(np.concatenate([ends, drawn])))


def unless_unpriced(name: str, open_comparison: Callable[[], _T]) -> _T | None:
    """Return what a comparison needs; ``None``, with a note, where it cannot be had."""
    try:
        return open_comparison()
    except CompofaError as error:
        log.warning("not compared with %s: %s", name, error)
        return None
