"""Specialised networks of the zoo beside what a search found: those within the same budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compofa.errors import ConfigError, SpaceError, TableError
from compofa.io.hub import is_downloaded
from compofa.networks.backbone import Backbone
from compofa.networks.layout import macs, params
from compofa.networks.published import SPECIALISED, Specialised
from compofa.space.search_space import SearchSpace
from nas.cost.base import Cost
from nas.cost.devices import FittedDevice, find_device
from nas.cost.objectives import column_names
from nas.search.pipeline import Outcome
from nas.tables import Table, rounded, write_columns

CostLoader = Callable[[Backbone, SearchSpace], Cost]
"""Returns a cost of the networks of another backbone, or raises what says that it does not serve
them."""


@dataclass(frozen=True)
class Priced:
    """A specialised network and its costs.

    Attributes:
        row: The network.
        costs: Its costs: that of the budgets, then those of the limits.
        source: Where the first is from: ``published`` if it was measured on that device when the
            network was, ``counted`` or ``predicted``.
    """

    row: Specialised
    costs: tuple[float, ...]
    source: str

    @property
    def weights(self) -> str:
        """Whether its weights are on this machine: ``downloaded`` or ``download``."""
        there = is_downloaded(f"ofa_specialized/{self.row.folder}/init")
        return "downloaded" if there else "download"


def within_limits(outcome: Outcome, loaders: Sequence[CostLoader]) -> list[Priced]:
    """Return the specialised networks within the limits and the largest budget, by rising cost.

    Left out are networks that a cost does not serve, such as those of another backbone.

    Args:
        outcome: A search of a network of ImageNet.
        loaders: For each of ``outcome.costs``, how it is loaded for other backbones.
    """
    own = outcome.targets[0].backbone
    bounds = (max(found.budget for found in outcome.found), *(most for _, most in outcome.limits))
    wanted = [
        _Pricing(cost, bound, load, {own: cost})
        for cost, bound, load in zip(outcome.costs, bounds, loaders, strict=True)
    ]
    found = []
    for row in SPECIALISED.values():
        costs = [value for pricing in wanted if (value := pricing.within(row)) is not None]
        if len(costs) == len(wanted):
            own_cost = wanted[0].cost
            source = "counted" if own_cost.error == "exact" else "predicted"
            if published_cost(row, own_cost) is not None:
                source = "published"
            found.append(Priced(row, tuple(costs), source))
    return sorted(found, key=lambda each: each.costs[0])


@dataclass(frozen=True)
class _Pricing:
    """A cost with its bound, and those of the backbones that it was loaded for."""

    cost: Cost
    bound: float
    load: CostLoader
    known: dict[Backbone, Cost | None]

    def within(self, row: Specialised) -> float | None:
        """Return the cost of a network, published or predicted, if it is known and in bounds."""
        value = published_cost(row, self.cost)
        if value is None:
            value = self._predicted(row)
        return value if value is not None and value <= self.bound else None

    def _predicted(self, row: Specialised) -> float | None:
        table, subnet = row.backbone, row.subnet
        if table is None or subnet is None:
            return None
        space = table.free_space((row.resolution,))
        try:
            if table not in self.known:
                self.known[table] = None
                self.known[table] = self.load(table, space)
            cost = self.known[table]
            return None if cost is None else float(cost(space.arrays_of([subnet]))[0])
        except (ConfigError, SpaceError, TableError):  # another backbone, width or resolution
            return None


def best_within(priced: Sequence[Priced], budget: float) -> Priced | None:
    """Return the most accurate network within a budget; ``None`` if there is none."""
    inside = [each for each in priced if each.costs[0] <= budget]
    return max(inside, key=lambda each: each.row.top1, default=None)


def published_cost(row: Specialised, cost: Cost) -> float | None:
    """Return the published cost of a network, if it is that of ``cost``.

    It is where the network was measured on the same device, and for multiply-accumulates where
    nothing but the published number is known.
    """
    if cost.name == "flops":
        return None if row.device or row.subnet else row.value
    named = f"{row.device}-b{row.batch}" if row.batch > 1 else row.device
    measured = isinstance(find_device(cost.name), FittedDevice)  # the zoo's cpu is another one
    return row.value if measured and cost.name == named else None


def write_specialised(path: str | Path, outcome: Outcome, priced: Sequence[Priced]) -> None:
    """Write specialised networks as a table, one per row, with their ids in the first column."""
    columns: dict[str, list[object]] = {
        "top1": [each.row.top1 for each in priced],
        "r": [each.row.resolution if each.row.supernet else None for each in priced],
    }
    for place, name in enumerate(column_names(outcome.costs)):
        columns[name] = rounded(np.array([each.costs[place] for each in priced]))
    columns["source"] = [each.source for each in priced]
    layers = [each.row.network.layers if each.row.network else () for each in priced]
    for name, count in (("macs", macs), ("params", params)):
        columns.setdefault(name, [count(each) or None for each in layers])
    columns["weights"] = [each.weights for each in priced]
    rows = [[each.row.net_id] for each in priced]
    write_columns(path, Table(Path(path), ["id"], rows), columns)
