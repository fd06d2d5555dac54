"""Costs of many subnets at once: a sum over layers, read from a table of blocks.

Any figure that is a sum over layers (multiply-accumulates, parameters, latency by lookup) is one
gather and one sum over a table with an entry for each choice of a block. A
:class:`~nas.cost.block_table.BlockTable` does the gather; :class:`LayerSumCost` fills it from a
function of :class:`~compofa.networks.layout.LayerSpec`.

This module needs NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Protocol

import numpy as np

from compofa.networks.backbones import Backbone
from compofa.networks.layout import LayerSpec, layout
from compofa.space.subnet import Subnet, SubnetArrays
from nas.cost.block_table import BlockTable, Widths

LayerFunction = Callable[[LayerSpec], float]


class Cost(Protocol):
    """What a search asks of a cost.

    Attributes:
        name: Of the device or count.
        unit: Of what a call returns: ``ms``, ``MACs`` or ``parameters``.
        error: How wrong it is, in words; ``exact`` for counts.
    """

    name: str
    unit: str
    error: str

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
        error: How wrong it is, in words.
    """

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
        self.layer_cost = layer_cost
        self._specs: dict[tuple, tuple[LayerSpec, ...]] = {}
        self._table = BlockTable(
            len(backbone.stages), self._block, self._fixed, Widths.of(backbone)
        )

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet, float64 of shape [n].

        Raises:
            SpaceError: Shapes or values that no subnet has.
        """
        return self._table.sums(arrays)

    def _layers(
        self, kernel: int, expand: float, resolution: int, widths: tuple[int, ...]
    ) -> tuple[LayerSpec, ...]:
        """Return the layers of a subnet with two equal blocks in each stage."""
        key = (kernel, expand, resolution, widths)
        if key not in self._specs:
            blocks = ((kernel, expand),) * 2
            subnet = Subnet(resolution, (blocks,) * len(self.backbone.stages), widths)
            self._specs[key] = layout(self.backbone, subnet, self.classes)
        return self._specs[key]

    def _block(
        self,
        stage: int,
        first: bool,
        kernel: int,
        expand: float,
        resolution: int,
        widths: tuple[int, ...] = (),
    ) -> float:
        layers = self._layers(kernel, expand, resolution, widths)
        name = f"stages.{stage}.{0 if first else 1}"
        layer = next(layer for layer in layers if layer.name == name)
        return self.cost_of(layer, resolution)

    def _fixed(self, resolution: int, widths: tuple[int, ...] = ()) -> float:
        layers = self._layers(3, 3, resolution, widths)
        fixed = [layer for layer in layers if not layer.name.startswith("stages.")]
        return sum(self.cost_of(layer, resolution) for layer in fixed)

    def cost_of(self, layer: LayerSpec, resolution: int) -> float:
        """Return the cost of one layer of a network that takes images of ``resolution``."""
        return self.layer_cost(layer)


def macs_cost(backbone: Backbone, classes: int = 1000) -> LayerSumCost:
    """Return the cost that counts multiply-accumulates of one image."""
    return LayerSumCost(backbone, classes, attrgetter("macs"), "flops", "MACs")


def params_cost(backbone: Backbone, classes: int = 1000) -> LayerSumCost:
    """Return the cost that counts learned parameters."""
    return LayerSumCost(backbone, classes, attrgetter("params"), "params", "parameters")
