"""Fitted latency models: of layers (any width and resolution) and of whole networks (GPUs).

Both are arrays and a card with what they were fitted on and their held-out error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Block
from nas.cost.base import LayerSumCost
from nas.cost.block_table import BlockTable
from nas.cost.units import quantity_in
from nas.model_file import (
    Shapes,
    card_text,
    check_arrays,
    measured_width,
    require_near,
    write_model,
)

MAX_LOG_RATIO = 1.0
LAYERS_NEAR = 2.0
"""The largest ratio of a network's width to the measured one that a layer model answers for. With
whole stages left out, whose neighbours are up to twice as wide, its error was 4 to 9 %."""

LAYER_ARRAYS: Shapes = {
    "feature_names": ("U", ("features",)),
    "weights": ("fiu", ("features",)),
    "factor_names": ("U", ("factors?",)),
    "factors": ("fiu", ("factors?",)),
    "expands": ("fiu", ("expands",)),
    "resolution_range": ("fiu", (2,)),
}
NETWORK_ARRAYS: Shapes = {
    "kernels": ("fiu", ("kernels",)),
    "expands": ("fiu", ("expands",)),
    "depths": ("fiu", ("depths",)),
    "resolutions": ("fiu", ("resolutions",)),
    "block_ms": ("fiu", ("stages", 2, "kernels", "expands", "resolutions")),
    "fixed_ms": ("fiu", ("resolutions",)),
    "grid_ms": ("fiu", ("resolutions", "points?")),
    "log_ratio": ("fiu", ("resolutions", "combinations", "points?")),
}


def layer_features(layer: LayerSpec) -> dict[str, float]:
    """Return the features of a layer's latency: work and traffic by kind, in millions.

    They are counts from the layer's shapes, so a model on them serves any width and size.
    """
    values: defaultdict[str, float] = defaultdict(float)
    for conv in layer.convs:
        pixels = conv.size**2
        if conv.name.startswith("se."):
            values["se_weights"] += conv.weights
        elif layer.kind in ("mix", "linear"):
            values.update(dense=1e6, dense_weights=conv.weights)
        elif conv.groups > 1:
            kernel = f"depthwise{conv.kernel}"
            values[f"{kernel}_stride{conv.stride}_macs"] = conv.macs
            values[f"{kernel}_rows"] = conv.size * conv.out_channels * 100.0
            if layer.se_channels:
                values["se_output"] = pixels * conv.out_channels
        elif conv.kernel > 1:
            values["stem_macs"] = conv.macs
        else:
            values["pointwise_macs"] += conv.macs
            values["pointwise_weights"] += conv.weights
            if conv.act != "none":
                values["expand_output"] = pixels * conv.out_channels
        if conv.act == "hswish" and (conv.groups > 1 or conv.kernel == 1):
            values["hswish"] += pixels * conv.out_channels
    if layer.kind == "mbconv":
        values["block"] = 1e6
        if layer.residual:
            values["residual"] = layer.out_size**2 * layer.out_channels
    elif layer.kind == "pool":
        values.update(pool=1e6, pool_input=layer.in_size**2 * layer.in_channels)
    return {name: value * 1e-6 for name, value in values.items()}


def layer_factors(layer: LayerSpec, expands: np.ndarray) -> dict[str, float]:
    """Return the terms of a layer's correction: its position, its choices and its size.

    Args:
        layer: The layer.
        expands: The measured expand ratios; a block counts as the nearest.
    """
    place = layer.name
    terms = {}
    if place.startswith("stages."):
        _, stage, position = place.split(".")
        place = f"stage{stage}.{'first' if position == '0' else 'later'}"
        expand = expands[np.abs(expands - layer.mid_channels / layer.in_channels).argmin()]
        terms[f"{place}.kernel{layer.kernel}"] = 1.0
        terms[f"{place}.expand{expand:g}"] = 1.0
    terms[place] = 1.0
    terms[f"{place}.slope"] = math.log(layer.in_size / 14)
    terms[f"{place}.size{layer.in_size}"] = 1.0
    return terms


class FittedModel:
    """A latency model as arrays and a card.

    Attributes:
        arrays: Its parameters, by name.
        card: Source, licence, command, ranges and held-out error.
        name: Name of the measured device, from the card.
        unit: Unit of the measured values, from the card; ms where it has none.
        quantity: What was measured, from the card.
    """

    kind = ""

    def __init__(self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        self.arrays = dict(arrays)
        self.card = dict(card)
        self.name = card_text(card, "name", self.kind)
        self.unit = card_text(card, "unit", "ms")
        self.quantity = quantity_in(self.unit, card_text(card, "quantity", self.name))

    @property
    def error(self) -> str:
        """Held-out error, from the card."""
        return card_text(self.card, "error", "error not recorded")

    def serves(self, resolution: int) -> bool:
        """Whether the model predicts networks of this resolution."""
        raise NotImplementedError

    @property
    def measured_resolutions(self) -> tuple[int, ...]:
        """Resolutions of the measured networks, as far as they were recorded."""
        return ()

    def require_measured(self, backbone: Backbone) -> None:
        """Check that networks are of the measured backbone and width.

        Raises:
            TableError: They are of another.
        """
        name, width = self.card.get("backbone"), self.card.get("width_mult")
        if name != backbone.name or width != backbone.width_mult:
            raise TableError(
                f"the latency model {self.name} was measured on {name} of width multiplier "
                f"{width}, not on {backbone.name} of {backbone.width_mult:g}"
            )

    def save(self, path: str | Path) -> None:
        """Write the arrays to ``path`` (.npz, no pickle) and the card beside it (.json)."""
        write_model(path, self.arrays, self.card)


class LayerModel(FittedModel):
    """Latency of a layer from its shapes: a sum of counts, times a small correction.

    ``ms = sum(weight * feature) * exp(sum(factor * term))``, with the features and terms of
    :func:`layer_features` and :func:`layer_factors`; what was not measured has no term.
    """

    kind = "layers"

    def __init__(self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        super().__init__(arrays, card)
        a = self.arrays
        check_arrays(a, LAYER_ARRAYS)
        if a["weights"].min(initial=0) < 0:
            raise TableError(f"expected weights of at least 0, got {a['weights'].min():g}")
        self._weights = dict(zip(a["feature_names"].tolist(), a["weights"].tolist(), strict=True))
        self._factors = dict(zip(a["factor_names"].tolist(), a["factors"].tolist(), strict=True))

    def layer_ms(self, layer: LayerSpec) -> float:
        """Return the latency of a layer, ms.

        Raises:
            SpaceError: No kernel of this size was measured.
        """
        total = 0.0
        for name, value in layer_features(layer).items():
            if name not in self._weights:
                raise SpaceError(
                    f"the latency model {self.name} has no measurement like the "
                    f"layer {layer.name} with kernel {layer.kernel} and stride {layer.stride}"
                )
            total += self._weights[name] * value
        terms = layer_factors(layer, self.arrays["expands"])
        ratio = sum(self._factors.get(name, 0.0) * value for name, value in terms.items())
        return total * math.exp(min(max(ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))

    def cost(self, backbone: Backbone, classes: int = 1000) -> LayerSumCost:
        """Return the cost of networks of ``backbone``.

        Raises:
            TableError: They are farther than :data:`LAYERS_NEAR` from what was measured.
        """
        name = f"the latency model {self.name}"
        require_near(name, measured_width(self.card), backbone.width_mult, LAYERS_NEAR)
        return _LayerModelCost(self, backbone, classes)

    def serves(self, resolution: int) -> bool:
        """Whether the resolution is within the measured range."""
        low, high = self.arrays["resolution_range"].tolist()
        return low <= resolution <= high


class _LayerModelCost(LayerSumCost):
    def __init__(self, model: LayerModel, backbone: Backbone, classes: int) -> None:
        super().__init__(backbone, classes, model.layer_ms, model.name, "ms", model.error)
        self.low, self.high = model.arrays["resolution_range"].tolist()

    def cost_of(self, layer: LayerSpec, resolution: int) -> float:
        if not self.low <= resolution <= self.high:
            raise SpaceError(
                f"expected resolutions from {self.low} to {self.high} for the latency model "
                f"{self.name}, got {resolution}"
            )
        return super().cost_of(layer, resolution)


class NetworkModel(FittedModel):
    """Latency, or another measured cost, of networks of one backbone and width.

    A sum over blocks, times a correction that depends on the depths, the resolution and the sum:
    a GPU that waits for its host, or a timer that stops early, breaks the sum where networks are
    small. A :class:`~nas.cost.base.Cost` by itself.
    """

    kind = "network"

    def __init__(self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        super().__init__(arrays, card)
        a = self.arrays
        sizes = check_arrays(a, NETWORK_ARRAYS)
        for name in ("kernels", "expands", "depths", "resolutions"):
            if (np.diff(a[name]) <= 0).any():
                raise TableError(f"expected rising values in {name}")
        stages, points = sizes["stages"], sizes["points?"]
        if sizes["combinations"] != sizes["depths"] ** stages:
            raise TableError("expected log_ratio for all combinations of depths")
        if points == 1 or (points and not (np.diff(a["grid_ms"], axis=1) > 0).all()):
            raise TableError("expected a rising grid_ms of at least two points")
        if np.abs(a["log_ratio"]).max(initial=0) > MAX_LOG_RATIO:
            raise TableError(f"expected a log_ratio of at most {MAX_LOG_RATIO}")
        self._places = [
            {value: place for place, value in enumerate(a[name].tolist())}
            for name in ("kernels", "expands", "resolutions", "depths")
        ]
        self._table = BlockTable(stages, ("kernel", "expand"), self._block, self._fixed)

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the cost of each subnet in :attr:`unit`, float64 of shape [n].

        Raises:
            SpaceError: A choice or resolution that was not measured.
            TableError: A sum is not above 0, for a subnet unlike those that were measured.
        """
        total = self._table.sums(arrays)
        if total.min(initial=1) <= 0:
            raise TableError(
                f"the model {self.name}: expected {self.quantity} above 0 {self.unit}, got "
                f"{total.min():g} {self.unit} for a subnet that is like none that was measured"
            )
        if self.arrays["grid_ms"].shape[1] and len(total):
            total *= np.exp(self._log_ratio(arrays, total))
        return total

    def block_sums(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the sums over blocks before their correction, ms [n]."""
        return self._table.sums(arrays)

    def _log_ratio(self, arrays: SubnetArrays, total: np.ndarray) -> np.ndarray:
        a = self.arrays
        depths, r = np.asarray(arrays.depths), np.asarray(arrays.resolutions)
        if depths.ndim != 2 or depths.shape != (len(r), a["block_ms"].shape[0]):
            raise SpaceError(f"expected d of shape [n, stages], got {depths.shape}")
        code = np.zeros(len(r), dtype=np.intp)
        for stage in range(depths.shape[1]):
            code *= len(a["depths"])
            code += self._numbers(depths[:, stage], 3, "depths")
        place = self._numbers(r, 2, "resolutions")
        points = a["grid_ms"].shape[1]
        start, step = a["grid_ms"][:, 0], (a["grid_ms"][:, -1] - a["grid_ms"][:, 0]) / (points - 1)
        at = np.clip((total - start[place]) / step[place], 0, points - 1)
        low = np.minimum(at.astype(np.intp), points - 2)
        at -= low
        cell = (place * a["log_ratio"].shape[1] + code) * points + low
        flat = a["log_ratio"].reshape(-1)
        below = flat.take(cell).astype(np.float64)
        cell += 1
        return below + at * (flat.take(cell) - below)

    def _numbers(self, values: np.ndarray, which: int, what: str) -> np.ndarray:
        known = np.array(list(self._places[which]))
        codes = np.searchsorted(known, values).clip(0, len(known) - 1)
        if (known[codes] != values).any():
            self._unknown(what, which, values[known[codes] != values][0])
        return codes

    def _place(self, value: float, which: int, what: str) -> int:
        if value not in self._places[which]:
            self._unknown(what, which, value)
        return self._places[which][value]

    def _unknown(self, what: str, which: int, value: float) -> None:
        listed = ", ".join(f"{known:g}" for known in self._places[which])
        raise SpaceError(
            f"expected {what} among {listed}, which were measured for the latency model "
            f"{self.name}, got {value:g}"
        )

    def _block(
        self, stage: int, first: bool, block: Block, resolution: int, outer: tuple[int, ...]
    ) -> float:
        kernel, expand = block
        at = (
            self._place(kernel, 0, "kernel sizes"),
            self._place(expand, 1, "expand ratios"),
            self._place(resolution, 2, "resolutions"),
        )
        return float(self.arrays["block_ms"][(stage, 0 if first else 1, *at)])

    def _fixed(self, resolution: int, outer: tuple[int, ...]) -> float:
        return float(self.arrays["fixed_ms"][self._place(resolution, 2, "resolutions")])

    def cost(self, backbone: Backbone, classes: int = 1000) -> NetworkModel:
        """Return this model as the cost of networks of ``backbone``.

        The classifier's share is that of the measured networks, whatever ``classes`` is.

        Raises:
            TableError: It was measured on another backbone or width.
        """
        self.require_measured(backbone)
        return self

    def serves(self, resolution: int) -> bool:
        """Whether networks of this resolution were measured."""
        return resolution in self.measured_resolutions

    @property
    def measured_resolutions(self) -> tuple[int, ...]:
        """The resolutions of the measured networks."""
        return tuple(int(value) for value in self.arrays["resolutions"])
