"""Fitted latency models: of layers (any width and resolution) and of whole networks (GPUs).

Both are plain arrays with a card that says what they were fitted on and how wrong they are on
networks held out; :mod:`nas.cost.fit` makes them. This module needs NumPy alone.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import CompofaError, SpaceError, TableError
from compofa.io.atomic import write_atomic, write_text_atomic
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.space.arrays import SubnetArrays
from nas.cards import card_text, measured_width, require_near
from nas.cost.base import LayerSumCost
from nas.cost.block_table import BlockTable
from nas.npz import read_npz

MODELS = Path(__file__).parent.parent / "models"
MAX_FILE_BYTES = 64 << 20
MAX_LOG_RATIO = 1.0
LAYERS_NEAR = 2.0
"""The largest ratio of a network's width to the measured one that a layer model answers for: with
whole stages left out, whose neighbours are up to twice as wide, its error was 4 to 9 %."""


def layer_features(layer: LayerSpec) -> dict[str, float]:
    """Return what a layer's latency is made of: work and traffic by kind, in millions.

    Every figure is a count from the layer's shapes, so a model on them serves any width and size.
    """
    pixels_in, pixels_out = layer.in_size**2, layer.out_size**2
    ci, co, mid = layer.in_channels, layer.out_channels, layer.mid_channels
    values: dict[str, float] = {}
    if layer.kind == "mbconv":
        values["block"] = 1e6
        values["pointwise_macs"] = pixels_out * mid * co
        values["pointwise_weights"] = mid * co
        kernel = f"depthwise{layer.kernel}"
        values[f"{kernel}_stride{layer.stride}_macs"] = pixels_out * mid * layer.kernel**2
        values[f"{kernel}_rows"] = layer.out_size * mid * 100.0
        if layer.expand:
            values["pointwise_macs"] += pixels_in * ci * mid
            values["pointwise_weights"] += ci * mid
            values["expand_output"] = pixels_in * mid
        if layer.residual:
            values["residual"] = pixels_out * co
        if layer.act == "hswish":
            values["hswish"] = (pixels_in * layer.expand + pixels_out) * mid
        if layer.se_channels:
            values["se_weights"] = 2 * mid * layer.se_channels
            values["se_output"] = pixels_out * mid
    elif layer.kind == "pool":
        values.update(pool=1e6, pool_input=pixels_in * ci)
    elif layer.kind == "conv" and layer.kernel > 1:
        values["stem_macs"] = pixels_out * ci * co * layer.kernel**2
    elif layer.kind == "conv":
        values["pointwise_macs"] = pixels_out * ci * co
        values["pointwise_weights"] = ci * co
        values["expand_output"] = values["hswish"] = pixels_out * co
    else:
        values.update(dense=1e6, dense_weights=ci * co)
    return {name: value * 1e-6 for name, value in values.items()}


def layer_factors(layer: LayerSpec, expands: np.ndarray) -> dict[str, float]:
    """Return the terms of a layer's correction: where it stands, its choices and its size.

    Args:
        layer: The layer.
        expands: Expand ratios that were measured; a block counts as the nearest.
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
    """Arrays and a card.

    Attributes:
        arrays: The parameters.
        card: Source, licence, command, ranges and held-out figures.
        name: Of what was measured, from the card.
    """

    kind = ""

    def __init__(self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        self.arrays = dict(arrays)
        self.card = dict(card)
        self.name = card_text(card, "name", self.kind)

    @property
    def error(self) -> str:
        """How wrong the model is, in words, from the card."""
        return card_text(self.card, "error", "error not recorded")

    def save(self, path: str | Path) -> None:
        """Write the arrays to ``path`` (.npz, no pickle) and the card beside it (.json)."""
        path = Path(path)
        write_atomic(path, lambda file: _write_npz(file, self.arrays))
        write_text_atomic(path.with_suffix(".json"), json.dumps(self.card, indent=2) + "\n")


class LayerModel(FittedModel):
    """Latency of a layer from its shapes: a sum of counts, times a small correction.

    ``ms = sum(weight * feature) * exp(sum(factor * term))``, with the features and terms of
    :func:`layer_features` and :func:`layer_factors`; what was not measured has no term.
    """

    kind = "layers"

    def __init__(self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        super().__init__(arrays, card)
        a = self.arrays
        _require(a, {"feature_names": 1, "factor_names": 1}, "U")
        _require(a, {"weights": 1, "factors": 1, "expands": 1, "resolution_range": 1})
        for names, values in (("feature_names", "weights"), ("factor_names", "factors")):
            if len(a[names]) != len(a[values]):
                raise TableError(f"expected as many {names} as {values}")
        if a["weights"].min(initial=0) < 0:
            raise TableError(f"expected weights of at least 0, got {a['weights'].min():g}")
        if len(a["expands"]) == 0 or len(a["resolution_range"]) != 2:
            raise TableError("expected expand ratios and a resolution range")
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
    """Latency of networks of one backbone and width, fitted on measured networks.

    A sum over blocks, times a correction that depends on the depths, the resolution and the sum:
    a GPU that waits for its host, or a timer that stops early, breaks the sum where networks are
    small. A :class:`~nas.cost.base.Cost` by itself.
    """

    kind = "network"
    unit = "ms"

    def __init__(self, arrays: Mapping[str, np.ndarray], card: Mapping[str, Any]) -> None:
        super().__init__(arrays, card)
        a = self.arrays
        _require(a, {"kernels": 1, "expands": 1, "depths": 1, "resolutions": 1, "block_ms": 5,
                     "fixed_ms": 1, "grid_ms": 2, "log_ratio": 3})  # fmt: skip
        counts = [len(a[name]) for name in ("kernels", "expands", "resolutions")]
        stages = a["block_ms"].shape[0]
        if a["block_ms"].shape[1:] != (2, *counts) or a["fixed_ms"].shape != (counts[2],):
            raise TableError("expected block_ms and fixed_ms that fit the choices")
        points = a["grid_ms"].shape[1]
        if a["grid_ms"].shape[0] != counts[2] or a["log_ratio"].shape != (
            counts[2], len(a["depths"]) ** stages, points
        ):  # fmt: skip
            raise TableError("expected log_ratio and grid_ms that fit the choices")
        if points == 1 or (points and not (np.diff(a["grid_ms"], axis=1) > 0).all()):
            raise TableError("expected a rising grid_ms of at least two points")
        if np.abs(a["log_ratio"]).max(initial=0) > MAX_LOG_RATIO:
            raise TableError(f"expected a log_ratio of at most {MAX_LOG_RATIO}")
        self._places = [
            {value: place for place, value in enumerate(a[name].tolist())}
            for name in ("kernels", "expands", "resolutions", "depths")
        ]
        self._table = BlockTable(stages, self._block, self._fixed)

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the latency of each subnet in ms, float64 of shape [n].

        Raises:
            SpaceError: A choice or resolution that was not measured.
            TableError: So far from what was measured that a sum is not above 0; single blocks may
                be negative.
        """
        total = self._table.sums(arrays)
        if total.min(initial=1) <= 0:
            raise TableError(
                f"the latency model {self.name}: expected latencies above 0 ms, got "
                f"{total.min():g} ms for a subnet that is like none that was measured"
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

    def _block(self, stage: int, first: bool, kernel: int, expand: float, resolution: int) -> float:
        at = (
            self._place(kernel, 0, "kernel sizes"),
            self._place(expand, 1, "expand ratios"),
            self._place(resolution, 2, "resolutions"),
        )
        return float(self.arrays["block_ms"][(stage, 0 if first else 1, *at)])

    def _fixed(self, resolution: int) -> float:
        return float(self.arrays["fixed_ms"][self._place(resolution, 2, "resolutions")])

    def cost(self, backbone: Backbone, classes: int = 1000) -> NetworkModel:
        """Return this model as the cost of networks of ``backbone``.

        The classifier's share is that of the measured networks, whatever ``classes`` is.

        Raises:
            TableError: It was measured on another backbone or width.
        """
        name, width = self.card.get("backbone"), self.card.get("width_mult")
        if name != backbone.name or width != backbone.width_mult:
            raise TableError(
                f"the latency model {self.name} was measured on {name} of width multiplier "
                f"{width}, not on {backbone.name} of {backbone.width_mult:g}"
            )
        return self


_KINDS = {model.kind: model for model in (LayerModel, NetworkModel)}


def load_model(path: str | Path) -> LayerModel | NetworkModel:
    """Read a model that :mod:`nas.cost.fit` wrote: ``path`` (.npz) and its card (.json).

    Raises:
        TableError: A file is missing, malformed or something else.
    """
    path = Path(path)
    expected = f"{path}: expected a latency model written by fit-latency"
    try:
        arrays = read_npz(path, MAX_FILE_BYTES)
        card = parse_json(read_text(path.with_suffix(".json")))
    except (OSError, ValueError) as error:
        raise TableError(f"{expected}, got: {error}") from error
    kind = card.get("kind") if isinstance(card, dict) else None
    if kind not in _KINDS:
        raise TableError(f"{expected}, got a card of kind {kind!r}")
    try:
        return _KINDS[kind](arrays, card)
    except CompofaError as error:
        raise TableError(f"{expected}, got: {error}") from error


def _require(
    arrays: Mapping[str, np.ndarray], wanted: Mapping[str, int], kinds: str = "fiu"
) -> None:
    """Check names, numbers of axes, kinds (NumPy's letters; numbers by default) and finiteness."""
    for name, axes in wanted.items():
        if name not in arrays or arrays[name].ndim != axes:
            raise TableError(f"expected the array {name} of {axes} axes")
        if arrays[name].dtype.kind not in kinds:
            what = "names" if kinds == "U" else "numbers"
            raise TableError(f"expected {what} in {name}, got {arrays[name].dtype}")
        if kinds != "U" and not np.isfinite(arrays[name]).all():
            raise TableError(f"expected finite values in {name}")
    for name in ("kernels", "expands", "depths", "resolutions"):
        if name in arrays and (len(arrays[name]) == 0 or (np.diff(arrays[name]) <= 0).any()):
            raise TableError(f"expected rising values in {name}")


def _write_npz(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as .npz with fixed time stamps, so that equal arrays give equal bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w") as part:
                np.lib.format.write_array(part, np.asarray(arrays[name]), allow_pickle=False)
