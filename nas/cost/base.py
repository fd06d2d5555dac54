"""Costs of many subnets at once: a sum over layers, read from a table of blocks.

Any figure that is a sum over layers (multiply-accumulates, parameters, latency by lookup) is one
gather and one sum over a table with an entry for each choice of a block. A
:class:`~nas.cost.block_table.BlockTable` does the gather; :class:`LayerSumCost` fills it from a
function of :class:`~compofa.networks.layout.LayerSpec`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import attrgetter
from typing import ClassVar, Protocol

import numpy as np

from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Block, Subnet
from nas.cost.block_table import LIMIT, BlockTable, Dependence
from nas.cost.units import quantity_in

LayerFunction = Callable[[LayerSpec], float]


class Cost(Protocol):
    """What a search asks of a cost.

    Attributes:
        name: Of the device or count.
        unit: Of what a call returns, such as ``ms``, ``MACs``, ``parameters``, ``bytes`` or ``mJ``.
        error: Its error, for tables and plots; ``exact`` for counts.
        quantity: What it measures, such as ``latency`` or ``energy``; the name of a count.
    """

    name: str
    unit: str
    error: str
    quantity: str

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet, float64 of shape [n]."""


class LayerSumCost:
    """The sum over a subnet's layers of a function of the layer; a :class:`Cost`.

    Args:
        backbone: Widths and strides.
        classes: Outputs of the classifier.
        layer_cost: The summand. It may raise where it cannot say; it is only asked for layers
            that a subnet has.
        name: Of the device or count.
        unit: Of the sum.
        error: Its error, for tables and plots.

    Attributes:
        combine: How the numbers of layers become that of a network.
    """

    combine: ClassVar[np.ufunc] = np.add

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        layer_cost: LayerFunction,
        name: str,
        unit: str,
        error: str = "exact",
    ) -> None:
        self.backbone, self.classes = backbone, classes
        self.name, self.unit, self.error = name, unit, error
        self.quantity = quantity_in(unit, name)
        self.layer_cost = layer_cost
        self._specs: dict[tuple, dict[str, LayerSpec]] = {}
        self._table = BlockTable(
            len(backbone.stages),
            backbone.names,
            self._block,
            self._fixed,
            Dependence.of(backbone),
            {choice.name for choice in backbone.choices if 0 in choice.values},
            backbone.config_format.whole,
            max(LIMIT, *(value for choice in backbone.choices for value in choice.values)),
            self.combine,
        )

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet, float64 of shape [n].

        Raises:
            SpaceError: Shapes or values that no subnet has.
        """
        return self._table.sums(arrays)

    def _layers(
        self, block: Block, resolution: int, outer: tuple[int, ...]
    ) -> dict[str, LayerSpec]:
        """Return the layers of a subnet with two equal blocks in each stage, by name."""
        key = (block, resolution, outer)
        if key not in self._specs:
            subnet = Subnet(resolution, ((block,) * 2,) * len(self.backbone.stages), outer)
            layers = layout(self.backbone, subnet, self.classes)
            self._specs[key] = {layer.name: layer for layer in layers}
        return self._specs[key]

    def _block(
        self, stage: int, first: bool, block: Block, resolution: int, outer: tuple[int, ...]
    ) -> float:
        layers = self._layers(block, resolution, outer)
        return self.cost_of(layers[f"stages.{stage}.{0 if first else 1}"], resolution)

    def _fixed(self, resolution: int, outer: tuple[int, ...]) -> float:
        block = tuple(choice.values[0] for choice in self.backbone.choices)
        layers = self._layers(block, resolution, outer).values()
        fixed = [layer for layer in layers if not layer.name.startswith("stages.")]
        return reduce(self.combine, (self.cost_of(layer, resolution) for layer in fixed))

    def cost_of(self, layer: LayerSpec, resolution: int) -> float:
        """Return the cost of one layer of a network that takes images of ``resolution``."""
        return self.layer_cost(layer)


class LayerMaxCost(LayerSumCost):
    """The greatest number of a subnet's layers, none below 0; a :class:`Cost`."""

    combine = np.maximum


def macs_cost(backbone: Backbone, classes: int = 1000) -> LayerSumCost:
    """Return the cost that counts multiply-accumulates of one image."""
    return LayerSumCost(backbone, classes, attrgetter("macs"), "flops", "MACs")


def params_cost(backbone: Backbone, classes: int = 1000) -> LayerSumCost:
    """Return the cost that counts learned parameters."""
    return LayerSumCost(backbone, classes, attrgetter("params"), "params", "parameters")
