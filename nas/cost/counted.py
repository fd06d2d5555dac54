"""Latency as a weighted sum of counts: for networks of any family, from few measurements.

The counts of a layer follow from its convolutions alone (:class:`compofa.networks.kinds.ConvSpec`),
so a block of one's own family has them too. Few weights, none below 0, make the model trustworthy
on some sixty measured networks, and let it serve resolutions between the measured ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.space.arrays import SubnetArrays
from nas.cost.base import LayerSumCost
from nas.cost.fitted import FittedModel
from nas.model_file import Shapes, check_arrays

COUNT_ARRAYS: Shapes = {
    "count_names": ("U", ("counts",)),
    "weights": ("fiu", ("counts",)),
    "resolutions": ("fiu", ("resolutions",)),
}
CONSTANT = "network"
"""The count that every network has once."""


def layer_counts(layer: LayerSpec) -> dict[str, float]:
    """Return the counts of a layer: operations, traffic and weights by kind, most in millions.

    Each name says what was seen: a kernel size or activation that no measured network had is
    missing from a model, which then refuses the layer instead of guessing.
    """
    counts: defaultdict[str, float] = defaultdict(float)
    for conv in layer.convs:
        pixels, millions = conv.size**2, conv.macs * 1e-6
        if conv.size == conv.kernel == 1:  # a matrix product, or squeeze-and-excitation
            counts["dense"] += 1
            counts["dense_weights"] += conv.weights * 1e-6
            continue
        outputs = pixels * conv.out_channels * 1e-6
        inputs = pixels * conv.stride**2 * conv.in_channels * 1e-6
        kind = "depthwise" if conv.groups == conv.in_channels > 1 else "conv"
        kind = "grouped" if kind == "conv" and conv.groups > 1 else kind
        counts[f"{kind}{conv.kernel}_macs"] += millions
        counts[f"{kind}_inputs"] += inputs
        counts[f"{kind}_outputs"] += outputs
        counts["convs"] += 1
        if kind == "conv":
            counts["conv_weights"] += conv.weights * 1e-6
        if conv.act != "none":
            counts[f"{conv.act}_outputs"] += outputs
    if layer.se_channels:
        counts["se_scaled"] += layer.out_size**2 * layer.mid_channels * 1e-6
    if layer.residual:
        counts["residual_outputs"] += layer.out_size**2 * layer.out_channels * 1e-6
    if not layer.convs:
        counts[f"{layer.kind}_inputs"] += layer.in_size**2 * layer.in_channels * 1e-6
    return counts


class CountModel(FittedModel):
    """Latency of networks of one backbone and width, fitted on measured networks.

    ``ms = weight[CONSTANT] + sum over layers of weight * count``.
    """

    kind = "counts"

    def __init__(self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        super().__init__(arrays, card)
        a = self.arrays
        check_arrays(a, COUNT_ARRAYS)
        if a["weights"].min() < 0:
            raise TableError(f"expected weights of at least 0, got {a['weights'].min():g}")
        if (np.diff(a["resolutions"]) <= 0).any():
            raise TableError("expected rising values in resolutions")
        self._weights = dict(zip(a["count_names"].tolist(), a["weights"].tolist(), strict=True))

    @property
    def measured_resolutions(self) -> tuple[int, ...]:
        """The resolutions of the measured networks."""
        return tuple(int(value) for value in self.arrays["resolutions"])

    def serves(self, resolution: int) -> bool:
        """Whether networks of this resolution can be predicted: it is between measured ones."""
        return self.measured_resolutions[0] <= resolution <= self.measured_resolutions[-1]

    @property
    def constant_ms(self) -> float:
        """What every network takes besides its layers, ms."""
        return self._weights.get(CONSTANT, 0.0)

    def layer_ms(self, layer: LayerSpec) -> float:
        """Return the latency of a layer, ms.

        Raises:
            SpaceError: No measured network had anything like it.
        """
        total = 0.0
        for name, value in layer_counts(layer).items():
            if name not in self._weights:
                raise SpaceError(
                    f"the latency model {self.name} was measured on networks without "
                    f"{name.replace('_', ' ')}, which the layer {layer.name} has"
                )
            total += self._weights[name] * value
        return total

    def cost(self, backbone: Backbone, classes: int = 1000) -> CountCost:
        """Return the cost of networks of ``backbone``.

        Raises:
            TableError: It was measured on another backbone or width.
        """
        self.require_measured(backbone)
        return CountCost(self, backbone, classes)


class CountCost(LayerSumCost):
    """The cost of networks by a :class:`CountModel`, in its unit.

    Attributes:
        model: The model.
    """

    def __init__(self, model: CountModel, backbone: Backbone, classes: int) -> None:
        super().__init__(backbone, classes, model.layer_ms, model.name, model.unit, model.error)
        self.quantity = model.quantity
        self.model = model

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the latency of each subnet in ms, float64 of shape [n].

        Raises:
            SpaceError: A resolution or layer that nothing measured is like.
        """
        return self.model.constant_ms + super().__call__(arrays)

    def cost_of(self, layer: LayerSpec, resolution: int) -> float:
        """Return the latency of a layer, ms."""
        if not self.model.serves(resolution):
            sizes = self.model.measured_resolutions
            raise SpaceError(
                f"expected resolutions from {sizes[0]} to {sizes[-1]} for the latency model "
                f"{self.model.name}, got {resolution}"
            )
        return super().cost_of(layer, resolution)
