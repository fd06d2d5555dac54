"""Latency of this machine in ONNX Runtime: whole networks, timed as they are exported.

ONNX Runtime fuses layers, so the sum of layers timed alone is biased. Instead, a spread-out sample
of the space is exported with random weights and timed, and a model is fitted to it, as for a device
of one's own (:mod:`nas.cost.sampling`). Samples are kept in the same cache as torch's, one file per
runtime and version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from compofa.errors import ConfigError
from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.cost import on_device
from nas.cost.counted import CountCost
from nas.cost.lookup import layer_key, write_tables
from nas.cost.measured import NETWORK_VISIT, network_key, space_layers, time_networks
from nas.cost.timing import Settings, machine

WARMUP, RUNS = 3, 20
"""Runs of a visit that are not timed, and the least number of those that are."""


def measure_onnx(
    backbone: Backbone,
    space: SearchSpace,
    classes: int,
    settings: Settings,
    folder: str | Path | None = None,
    progress: bool = True,
) -> CountCost:
    """Time a sample of a space in ONNX Runtime, except what is in the cache, and fit a model.

    Args:
        backbone: Widths and strides.
        space: The space, with its resolutions.
        classes: Outputs of the classifier.
        settings: How to time; ``networks`` is the size of the sample.
        folder: Folder of the caches; the user's cache folder by default.
        progress: Whether to show a progress bar.

    Returns:
        The cost, with its held-out error.
    """
    from nas.cost.fit_latency import fit_counts
    from nas.cost.sampling import spread_sample

    subnets = spread_sample(space, settings.networks, settings.seed)
    times = time_networks(subnets, backbone, classes, settings, folder, progress)
    model = fit_counts(space.arrays_of(subnets), times, backbone, classes, settings.device)
    setup = machine(settings)
    cost = model.cost(backbone, classes)
    cost.error = f"measured here in ONNX Runtime {setup['onnxruntime']}: {model.error}"
    return cost


def export_tables(cost: CountCost, folder: str | Path, space: SearchSpace) -> list[Path]:
    """Write lookup tables whose sums equal the cost, one YAML file per resolution."""
    rows = cost.model.card["rows"]
    first = cost.backbone.stem[0].name

    def entry(layer: LayerSpec, resolution: int) -> tuple[float, int]:
        constant = cost.model.constant_ms if layer.name == first else 0.0
        return cost.cost_of(layer, resolution) + constant, rows

    tables = {
        r: {layer_key(layer): entry(layer, r) for layer in layers}
        for r, layers in space_layers(cost.backbone, space, cost.classes).items()
    }
    return write_tables(folder, tables, cost.name, cost.error)


def timed_networks(
    subnets: Iterable[Subnet], backbone: Backbone, classes: int, settings: Settings
) -> dict[str, Callable[[], float]]:
    """Return a function that times each subnet in ONNX Runtime, ms, by its key."""
    provider = _provider(settings)

    def timed(subnet: Subnet) -> float:
        layers = layout(backbone, subnet, classes)
        return time_onnx(layers, subnet.resolution, settings, provider)

    return {network_key(backbone, subnet, classes): partial(timed, subnet) for subnet in subnets}


def time_onnx(
    layers: Sequence[LayerSpec], resolution: int, settings: Settings, provider: str
) -> float:
    """Export a network and return the least time of a run, ms."""
    from nas.cost.sampling import static_onnx

    content = static_onnx(layers, resolution, settings.batch, settings.seed)
    session = on_device.open_session(content, machine(settings)["threads"], provider)
    once = min(on_device.times_ms(session, WARMUP, 2))
    runs = int(np.clip(NETWORK_VISIT * settings.visit_ms / max(once, 1e-3), RUNS, 200))
    return min(on_device.times_ms(session, 0, runs))


def _provider(settings: Settings) -> str:
    """Return the execution provider of a device.

    Raises:
        ConfigError: ONNX Runtime has none for it here, or is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("timing in onnxruntime needs it: pip install 'compofa[export]'") from None
    kind = settings.torch_device.split(":")[0]
    wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind, kind)
    known = onnxruntime.get_available_providers()
    if wanted not in known:
        raise ConfigError(
            f"expected an ONNX Runtime with {wanted} for {settings.device}, got one with "
            f"{', '.join(known)}"
        )
    return wanted
