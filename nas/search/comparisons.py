"""Networks that a search is compared with: only those that can be priced."""

from __future__ import annotations

import numpy as np

from compofa.seeds import rng
from compofa.space.search_space import SearchSpace
from nas.cost.base import Cost

PROBES = 500
"""Random subnets whose cost is asked for before a network is compared."""


def require_priced(space: SearchSpace, cost: Cost) -> None:
    """Check that a cost serves a space, on its smallest, its largest and random subnets.

    Raises:
        CompofaError: It does not.
    """
    ends = [space.encode(space.smallest), space.encode(space.largest)]
    drawn = space.sample_genes(rng(0, "priced"), PROBES)
    cost(space.arrays(np.concatenate([ends, drawn])))
