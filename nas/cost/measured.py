"""Latency of this machine: the sum of its layers, each distinct one timed alone.

Layers are the static blocks that a subnet is extracted to. They are timed in rounds over all of
them, so that drift of the machine affects all alike. A line through the end-to-end times of a few
random subnets, timed in the same rounds, corrects for what a layer alone does not show (framework
overhead, caches); the error is measured on further subnets. All samples are appended to a file of
JSON lines, so that an interrupted run continues.

Torch is imported when something is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import TableError
from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.seeds import derive_seed, rng
from compofa.space.arrays import SubnetArrays
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.cost.base import LayerSumCost
from nas.cost.lookup import layer_key, write_tables
from nas.cost.timing import Samples, Settings, Stopwatch, cache_folder, machine

NETWORK_VISIT = 20
"""Time of a visit to a network, relative to a layer."""

LINE_ROUNDS = 10


def space_layers(
    backbone: Backbone, space: SearchSpace, classes: int
) -> dict[int, tuple[LayerSpec, ...]]:
    """Return the distinct layers of a space, by resolution."""
    found: dict[int, dict[str, LayerSpec]] = {}
    values = [
        sorted({value for stage in space.stages for value in stage.values(name)})
        for name in space.names
    ]
    for r, outer, *block in product(space.resolutions, _outer_pairs(space), *values):
        layers = found.setdefault(r, {})
        blocks = (tuple(block),) * 2
        subnet = Subnet(r, tuple(blocks[: max(s.depths)] for s in space.stages), outer)
        for layer in layout(backbone, subnet, classes):
            if layer.name.startswith("stages."):
                stage = space.stages[int(layer.name.split(".")[1])]
                pairs = zip(stage.choices, block, strict=True)
                if any(value not in choice.values for choice, value in pairs):
                    continue
            layers.setdefault(layer_key(layer), layer)
    return {r: tuple(layers.values()) for r, layers in found.items()}


def _outer_pairs(space: SearchSpace) -> list[tuple[int, ...]]:
    """Return outer choices in which every two neighbours have every pair of their values."""
    known = [choice.values for choice in space.outer]
    firsts = sorted({value for values in known[::2] for value in values})
    seconds = sorted({value for values in known[1::2] for value in values})
    return [
        tuple(
            wanted if wanted in values else values[0]
            for wanted, values in zip(cycle(pair), known, strict=False)
        )
        for pair in (product(firsts, seconds or [0]) if known else [(0, 0)])
    ]


class MachineCost(LayerSumCost):
    """Measured latency of this machine; a cost in ms.

    Attributes:
        identity: The machine, from :func:`nas.cost.timing.machine`.
        line: Intercept (ms) and slope of the correction.
        check: Measured and predicted latency of the subnets of the error, ms [n, 2].
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        samples: Samples,
        identity: Mapping[str, Any],
        name: str,
    ) -> None:
        super().__init__(
            backbone, classes, self._layer_ms, name, "ms", "not compared with end-to-end latency"
        )
        self.samples = samples
        self.identity = dict(identity)
        self.line = (0.0, 1.0)
        self.check = np.zeros((0, 2))

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the latency of each subnet for one batch in ms, float64 of shape [n].

        Raises:
            TableError: A layer was not measured.
        """
        return self.line[0] + self.line[1] * super().__call__(arrays)

    def _layer_ms(self, layer: LayerSpec) -> float:
        key = layer_key(layer)
        if not self.samples.count(key):
            raise TableError(
                f"the layer {key} was not measured on this machine: measure the space it is in"
            )
        return self.samples.latency_ms(key)

    def fit_line(self, arrays: SubnetArrays, measured_ms: np.ndarray) -> None:
        """Fit the correction to end-to-end latencies [n], by relative error."""
        self.line = (0.0, 1.0)
        sums = self(arrays)
        x = np.column_stack([np.ones_like(sums), sums]) / measured_ms[:, None]
        weight = np.ones_like(sums)
        for _ in range(LINE_ROUNDS):  # reweighted towards least absolute error, against outliers
            solved = np.linalg.lstsq(x * weight[:, None], weight, rcond=None)[0]
            weight = 1 / np.sqrt(np.maximum(np.abs(1 - x @ solved), 0.01))
        intercept, slope = solved
        # Networks too similar for a line, or a line below 0 for networks half as large.
        if not 0.2 < slope < 5 or intercept + slope * sums.min() / 2 <= 0:
            intercept, slope = 0.0, float(np.median(measured_ms / sums))
        self.line = (float(intercept), float(slope))

    def check_error(self, arrays: SubnetArrays, measured_ms: np.ndarray) -> float:
        """Set and return the error (mean, percent) on end-to-end latencies [n]."""
        predicted = self(arrays)
        self.check = np.column_stack([measured_ms, predicted])
        error = 100 * np.abs(predicted / measured_ms - 1)
        self.error = (
            f"measured here: {error.mean():.1f} % from end-to-end latency on {len(error)} random "
            f"subnets (at most {error.max():.1f} %)"
        )
        return float(error.mean())

    def export(self, folder: str | Path, space: SearchSpace) -> list[Path]:
        """Write lookup tables in the published format, one YAML file per resolution.

        Their sums equal this cost: the slope of the correction is in all entries, its intercept in
        that of the first layer (which is kept at 0 or above).
        """
        intercept, slope = self.line
        tables: dict[int, dict[str, tuple[float, int]]] = {}
        for r, layers in space_layers(self.backbone, space, self.classes).items():
            tables[r] = {}
            for layer in layers:
                key = layer_key(layer)
                mean = slope * self.samples.latency_ms(key)
                mean = max(mean + intercept, 0.0) if layer.name == "stem" else mean
                tables[r][key] = mean, self.samples.count(key)
        return write_tables(folder, tables, self.name, self.error)


def measure(
    backbone: Backbone,
    space: SearchSpace,
    classes: int = 1000,
    settings: Settings | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> MachineCost:
    """Time the layers of a space on this machine, except those in the cache.

    Args:
        backbone: Widths and strides.
        space: The space, with its resolutions.
        classes: Outputs of the classifier.
        settings: How to time.
        folder: Folder of the caches; :func:`cache_folder` by default.
        progress: Whether to show a progress bar.

    Returns:
        The cost, with its error on random subnets of the space.
    """
    settings = settings or Settings()
    identity = machine(settings)
    watch = Stopwatch(settings)
    draws = rng(settings.seed, "measured-subnets")
    subnets = [space.sample(draws) for _ in range(2 * settings.networks)]
    timed = _timed_layers(sum(space_layers(backbone, space, classes).values(), ()), watch)
    timed |= _timed_networks(subnets, backbone, classes, watch)
    with Samples.alone(folder or cache_folder(), identity) as samples:
        _rounds(timed, samples, settings, progress)
    cost = MachineCost(backbone, classes, samples, identity, settings.device)
    measured = np.array([samples.latency_ms(network_key(backbone, s, classes)) for s in subnets])
    half = settings.networks
    cost.fit_line(space.arrays_of(subnets[:half]), measured[:half])
    cost.check_error(space.arrays_of(subnets[half:]), measured[half:])
    return cost


def _timed_layers(layers: Iterable[LayerSpec], watch: Stopwatch) -> dict[str, Callable[[], float]]:
    """Return a function that times each distinct layer, by the layer's key."""
    from compofa.nn.blocks import build_layer

    def timed(layer: LayerSpec) -> float:
        shape = [watch.settings.batch, layer.in_channels, layer.in_size, layer.in_size]
        module = watch.ready(lambda: build_layer(layer))
        return watch.run(module, shape[:2] if layer.kind == "linear" else shape)

    return {layer_key(layer): partial(timed, layer) for layer in layers}


def _timed_networks(
    subnets: Iterable[Subnet], backbone: Backbone, classes: int, watch: Stopwatch
) -> dict[str, Callable[[], float]]:
    """Return a function that times each subnet, by its key."""
    from compofa.nn.static import StaticNetwork

    def timed(subnet: Subnet) -> float:
        module = watch.ready(lambda: StaticNetwork(layout(backbone, subnet, classes)))
        shape = [watch.settings.batch, 3, subnet.resolution, subnet.resolution]
        return watch.run(module, shape, NETWORK_VISIT * watch.settings.visit_ms)

    return {network_key(backbone, subnet, classes): partial(timed, subnet) for subnet in subnets}


def _rounds(
    timed: Mapping[str, Callable[[], float]], samples: Samples, settings: Settings, progress: bool
) -> None:
    """Time every key once per round, in a new order, unless the cache has the sample."""
    from tqdm import tqdm

    keys = list(timed)
    missing = sum(max(settings.rounds - samples.count(key), 0) for key in keys)
    with tqdm(total=missing, desc="timing", disable=not progress or not missing) as bar:
        for index in range(settings.rounds):
            for place in rng(settings.seed, "order", index).permutation(len(keys)):
                if samples.count(keys[place]) <= index:
                    samples.add(keys[place], timed[keys[place]]())
                    bar.update()


def network_key(backbone: Backbone, subnet: Subnet, classes: int) -> str:
    """Return the key of a whole network's samples in the cache."""
    text = json.dumps([backbone.name, backbone.width_mult, classes, subnet.to_config()])
    return f"network-{derive_seed(text):016x}"


def time_networks(
    subnets: Sequence[Subnet],
    backbone: Backbone,
    classes: int = 1000,
    settings: Settings | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
) -> np.ndarray:
    """Time networks end to end on this machine, ms [n]; arguments as for :func:`measure`."""
    settings = settings or Settings()
    if settings.runtime == "onnxruntime":
        from nas.cost.measured_onnx import timed_networks

        timed = timed_networks(subnets, backbone, classes, settings)
    else:
        timed = _timed_networks(subnets, backbone, classes, Stopwatch(settings))
    with Samples.alone(folder or cache_folder(), machine(settings)) as samples:
        _rounds(timed, samples, settings, progress)
    return np.array([samples.latency_ms(network_key(backbone, s, classes)) for s in subnets])
