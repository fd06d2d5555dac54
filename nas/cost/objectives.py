"""Objectives beside latency: any function of a network's layers, and limits on several costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from compofa.errors import ConfigError
from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.space.arrays import SubnetArrays
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.cost.base import Cost
from nas.cost.units import quantity_in

LayersFunction = Callable[[tuple[LayerSpec, ...]], float]

_COLUMNS = {"flops": "macs", "params": "params"}
_LABELS = {
    "flops": "Multiply-accumulates",
    "params": "Parameters",
    "peak_memory": "Peak memory in float32",
    "peak_memory_int8": "Peak memory in int8",
}


def column_names(costs: Sequence[Cost]) -> list[str]:
    """Return the columns of costs in a table: ``latency_ms``, ``macs``, ``params``, ``energy_mj``.

    They are named after what a cost measures and its unit. A second cost of the same quantity is
    named after its device, as ``v100_ms``.

    Raises:
        ConfigError: Two costs are the same.
    """
    if len({cost.name for cost in costs}) < len(costs):
        listed = ", ".join(cost.name for cost in costs)
        raise ConfigError(f"expected different costs, got {listed}")
    names: list[str] = []
    for cost in costs:
        usual, own = (
            re.sub(r"\W+", "_", f"{name}_{cost.unit}".rstrip("_")).lower()
            for name in (cost.quantity, cost.name)
        )
        usual = _COLUMNS.get(cost.name, usual)
        names.append(own if usual in names else usual)
    return names


def split_quantity(name: str) -> tuple[str, str]:
    """Return the quantity, if any, and the device of a name such as ``latency:note10``."""
    quantity, colon, device = name.partition(":")
    return (quantity, device) if colon else ("", name)


def require_quantity(name: str, cost: Cost) -> Cost:
    """Return ``cost`` if it is of the quantity that its name starts with, if any.

    Raises:
        ConfigError: It measures something else.
    """
    quantity, device = split_quantity(name)
    if quantity and quantity != cost.quantity:
        raise ConfigError(
            f"expected {cost.quantity}:{device}, which is what it measures (in {cost.unit}), "
            f"got {name!r}"
        )
    return cost


def cost_label(cost: Cost) -> str:
    """Return what a cost is, for titles and axes, such as ``Latency on note10``; without its unit.

    A count, or a cost that is named after what it measures, has no device.
    """
    if cost.name in _LABELS:
        return _LABELS[cost.name]
    quantity = cost.quantity.replace("_", " ")
    named = quantity[:1].upper() + quantity[1:]
    return named if cost.name == cost.quantity else f"{named} on {cost.name}"


class LayersCost:
    """A function of a subnet's layers; a :class:`~nas.cost.base.Cost`. Results are cached.

    Args:
        backbone: Widths and strides.
        classes: Outputs of the classifier.
        space: The space of the subnets.
        function: From the layers of a network, in the order they run, to its cost.
        name: Name of the quantity.
        unit: Its unit.
        error: Its error.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        space: SearchSpace,
        function: LayersFunction,
        name: str,
        unit: str,
        error: str = "exact",
    ) -> None:
        self.backbone, self.classes, self.space = backbone, classes, space
        self.name, self.unit, self.error = name, unit, error
        self.quantity = quantity_in(unit, name)
        self._function = function
        self._known: dict[Subnet, float] = {}

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet, float64 of shape [n]."""
        return np.array([self._of(subnet) for subnet in self.space.subnets_of(arrays)], dtype=float)

    def _of(self, subnet: Subnet) -> float:
        if subnet not in self._known:
            layers = layout(self.backbone, subnet, self.classes)
            self._known[subnet] = float(self._function(layers))
        return self._known[subnet]


class LimitedCost:
    """A cost of subnets that also meet limits on other costs; a :class:`~nas.cost.base.Cost`.

    A subnet above a limit costs more than any budget: ``ceiling``, times the ratio by which it
    exceeds the limit, so that a search is led back within it.

    Args:
        cost: The cost of the subnets that meet all limits.
        limits: Other costs, each with the most it may be, above 0.
        ceiling: At least the cost of every subnet.
    """

    def __init__(self, cost: Cost, limits: Sequence[tuple[Cost, float]], ceiling: float) -> None:
        self.name, self.unit, self.error = cost.name, cost.unit, cost.error
        self.quantity = cost.quantity
        self._cost, self._limits, self._ceiling = cost, tuple(limits), ceiling

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet, float64 of shape [n]."""
        own = self._cost(arrays)
        ratio = np.max([cost(arrays) / most for cost, most in self._limits], axis=0, initial=1.0)
        return np.where(ratio > 1, self._ceiling * (1 + ratio), own)
