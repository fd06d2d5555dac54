"""What a search can minimise or limit, by name: devices, counts and one's own objectives.

An entry of :data:`DEVICES` is all that the library knows of a device; :func:`register` adds one.
Devices of this machine import torch only when they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compofa.errors import ConfigError, TableError, unknown_name
from compofa.networks.backbone import Backbone
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.kinds import LayerSpec
from compofa.networks.published import zoo_devices
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.cost.base import Cost, LayerMaxCost, LayerSumCost
from nas.cost.fitted import LAYERS_NEAR, LayerModel
from nas.cost.lookup import TableCost
from nas.cost.memory import float32_bytes, peak_elements
from nas.cost.models import LatencyModel, load_model
from nas.cost.objectives import LayersCost
from nas.model_file import MODELS, measured_width

if TYPE_CHECKING:
    from nas.cost.timing import Settings


@dataclass(frozen=True)
class Networks:
    """The networks that a cost is asked for, and how to time them where that is needed.

    Attributes:
        backbone: Widths and strides.
        classes: Outputs of the classifier.
        space: The space that their subnets are from.
        batch: Images per batch where this machine is timed; 0 for the device's default.
        cache: Folder of this machine's timings; by default the user's cache folder.
        progress: Whether to show a progress bar while timing.
        runtime: What runs them there, one of :data:`nas.cost.timing.RUNTIMES`.
    """

    backbone: Backbone = MOBILENET_V3
    classes: int = 1000
    space: SearchSpace | None = None
    batch: int = 0
    cache: str | Path | None = None
    progress: bool = True
    runtime: str = "torch"

    def require_space(self, device: str) -> SearchSpace:
        """Return the space.

        Raises:
            ConfigError: There is none.
        """
        if self.space is None:
            raise ConfigError(f"expected a space to measure on {device}, got none")
        return self.space


@dataclass(frozen=True)
class Device:
    """A device, count or objective.

    Attributes:
        name: Its name in commands and tables.
        unit: Unit of its cost.
        description: One line for listings.
        source: Where its numbers come from.
        resolutions: Resolutions that it serves; empty for all.
        budgets: Budgets of the published searches, in its unit; empty where there are none.
    """

    name: str
    unit: str = "ms"
    description: str = ""
    source: str = ""
    resolutions: tuple[int, ...] = ()
    budgets: tuple[float, ...] = field(default=(), kw_only=True)

    @property
    def error(self) -> str:
        """Error of its cost."""
        return "exact"

    @property
    def widths(self) -> str:
        """The width multipliers that it serves."""
        return "any width"

    def cost(self, networks: Networks) -> Cost:
        """Return the cost of networks.

        Raises:
            ConfigError: Something that it needs is missing.
            TableError: It does not serve them.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Objective(Device):
    """A number that follows from the layers of a network, such as MACs or energy.

    Attributes:
        function: From a network's layers to the number; with ``per_layer`` from one layer to its
            share of a sum, which is much faster in a search.
        per_layer: Which of the two it is.
        greatest: With ``per_layer``, whether a network has the greatest number of its layers, of at
            least 0, instead of their sum.
    """

    function: Callable[[tuple[LayerSpec, ...]], float] | Callable[[LayerSpec], float] = field(
        kw_only=True
    )
    per_layer: bool = False
    greatest: bool = False

    def cost(self, networks: Networks) -> Cost:
        """Return the cost of networks."""
        of, named = (networks.backbone, networks.classes), (self.function, self.name, self.unit)
        if self.per_layer:
            return (LayerMaxCost if self.greatest else LayerSumCost)(*of, *named)
        return LayersCost(*of, networks.require_space(self.name), *named)


@dataclass(frozen=True)
class FittedDevice(Device):
    """A device with a latency model that ships.

    Attributes:
        model: Stem of the model's file in ``nas/models``.
    """

    model: str = ""

    @property
    def error(self) -> str:
        """Held-out error, from the model's card."""
        return self.open().error

    @property
    def widths(self) -> str:
        """The width multipliers that the model serves."""
        model = self.open()
        width = measured_width(model.card) or 1.0
        if isinstance(model, LayerModel):
            return f"w{width / LAYERS_NEAR:g} to {width * LAYERS_NEAR:g}"
        return f"w{width:g}"

    def cost(self, networks: Networks) -> Cost:
        """Return the cost of networks."""
        return _model_cost(MODELS / f"{self.model}.npz", networks)

    def open(self) -> LatencyModel:
        """Return its model."""
        return load_model(MODELS / f"{self.model}.npz")


@dataclass(frozen=True)
class LocalDevice(Device):
    """A processor of this machine, which is timed.

    Attributes:
        torch_device: Where torch runs the layers, such as ``cuda``.
        batch: Images per batch by default.
    """

    torch_device: str = "cpu"
    batch: int = 1

    @property
    def error(self) -> str:
        """Error of its cost."""
        return "compared with end-to-end latency when it is timed"

    def settings(self, batch: int = 0, runtime: str = "torch") -> Settings:
        """Return how to time it.

        Args:
            batch: Images per batch; 0 for the device's default.
            runtime: One of :data:`nas.cost.timing.RUNTIMES`.
        """
        from nas.cost import measured

        how = {} if runtime == "torch" else {"runtime": runtime, "rounds": 3, "networks": 60}
        return measured.Settings(self.name, self.torch_device, batch or self.batch, **how)

    def cost(self, networks: Networks) -> Cost:
        """Time the space and return the latency of its subnets."""
        settings = self.settings(networks.batch, networks.runtime)
        of = (networks.backbone, networks.require_space(self.name), networks.classes)
        if settings.runtime == "onnxruntime":
            from nas.cost.measured_onnx import measure_onnx

            return measure_onnx(*of, settings, networks.cache, networks.progress)
        from nas.cost.measured import measure

        return measure(*of, settings, networks.cache, networks.progress)

    def time(self, subnets: Sequence[Subnet], networks: Networks) -> np.ndarray:
        """Return the end-to-end latency of each subnet, ms [n]."""
        from nas.cost.measured import time_networks

        return time_networks(
            subnets, networks.backbone, networks.classes,
            self.settings(networks.batch, networks.runtime), networks.cache, networks.progress,
        )  # fmt: skip


_NAS_PE = "NAS_PerformanceEstimation (Apache-2.0), OFA w1.0"
_HELP = "HELP (MIT), OFA w1.0"
_COARSE = tuple(range(160, 225, 16))
_FINE = tuple(range(128, 225, 4))


def _help_gpus(name: str, title: str, default: bool = True) -> list[Device]:
    """Return a GPU of HELP at its three batch sizes; by default the name alone is batch 64."""
    named = {f"{name}-b{batch}": batch for batch in (64, 32, 1)}
    if default:
        named = {name: 64, **named}
    return [
        FittedDevice(key, "ms", f"NVIDIA {title}, batch {batch}", _HELP, _FINE,
                     f"latency_{name}-b{batch}")
        for key, batch in named.items()
    ]  # fmt: skip


_UNSTATED = "batch size not published (64 in the program)"
_MEMORY = "counted by the rule of memory-optimized once-for-all"
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        FittedDevice("note10", "ms", "Samsung Note10 CPU",
                     "CompOFA (Apache-2.0), OFA w1.2 lookup tables", tuple(range(128, 225)),
                     "latency_note10", budgets=(15.0, 20.0, 25.0, 30.0)),
        FittedDevice("rtx2080ti", "ms", f"NVIDIA RTX 2080 Ti, {_UNSTATED}", _NAS_PE, _COARSE,
                     "latency_rtx2080ti"),
        FittedDevice("p40", "ms", f"NVIDIA P40, {_UNSTATED}", _NAS_PE, _COARSE, "latency_p40"),
        *_help_gpus("v100", "V100"),
        *_help_gpus("titan_rtx", "Titan RTX"),
        *_help_gpus("titan_xp", "Titan XP"),
        *_help_gpus("rtx2080ti", "RTX 2080 Ti", default=False),
        LocalDevice("gpu", "ms", "the CUDA GPU of this machine, batch 64", "measured here",
                    torch_device="cuda", batch=64),
        LocalDevice("cpu", "ms", "the CPU of this machine, batch 1", "measured here"),
        Objective("flops", "MACs", "multiply-accumulates of one image", "counted",
                  function=attrgetter("macs"), per_layer=True),
        Objective("params", "parameters", "learned parameters", "counted",
                  function=attrgetter("params"), per_layer=True),
        Objective("peak_memory", "bytes", "peak memory of one image in float32", _MEMORY,
                  function=float32_bytes, per_layer=True, greatest=True),
        Objective("peak_memory_int8", "bytes", "peak memory of one image in int8", _MEMORY,
                  function=peak_elements, per_layer=True, greatest=True),
    )
}  # fmt: skip
"""Devices by name."""

ALIASES = {"macs": "flops", "memory": "peak_memory", "memory_int8": "peak_memory_int8"}
"""Other names of :data:`DEVICES`."""


def find_device(name: str | Path) -> Device | None:
    """Return the device of a name or alias; ``None`` if there is none."""
    return DEVICES.get(ALIASES.get(str(name), str(name)))


def register(device: Device) -> None:
    """Add a device or objective, so that commands and :func:`load_cost` know it by its name.

    Raises:
        ConfigError: The name is taken.
    """
    if device.name in DEVICES:
        raise ConfigError(f"expected a new device name, got {device.name!r}, which is known")
    DEVICES[device.name] = device


def load_cost(
    device: str | Path,
    backbone: Backbone = MOBILENET_V3,
    classes: int = 1000,
    *,
    table: str | Path | None = None,
    space: SearchSpace | None = None,
    batch: int = 0,
    cache: str | Path | None = None,
    progress: bool = True,
    runtime: str = "torch",
) -> Cost:
    """Return the cost of networks on a device.

    Args:
        device: A name of :data:`DEVICES`, a folder of lookup tables, or the file (.npz) of a
            model that ``fit-latency`` wrote.
        backbone: Widths and strides of the networks.
        classes: Outputs of the classifier.
        table: Folder of lookup tables to use instead of the device's own cost.
        space: The space to time on a device of this machine; required there.
        batch: Images per batch on a device of this machine; 0 for its default.
        cache: Folder of this machine's timings.
        progress: Whether to show a progress bar while timing.
        runtime: What runs networks on a device of this machine, one of
            :data:`nas.cost.timing.RUNTIMES`.

    Raises:
        ConfigError: The device is unknown, or its batch size or runtime cannot be chosen.
        TableError: It was measured on another backbone or width, or its file cannot be used.
    """
    networks = Networks(backbone, classes, space, batch, cache, progress, runtime)
    entry = find_device(device)
    if batch and (table is not None or not isinstance(entry, LocalDevice)):
        raise ConfigError(
            f"expected no batch size for {table or device}, which is not timed here, got {batch}"
        )
    if runtime != "torch" and (table is not None or not isinstance(entry, LocalDevice)):
        raise ConfigError(
            f"expected no runtime for {table or device}, which is not timed here, got {runtime}"
        )
    if table is not None:
        cost = TableCost(table, backbone, classes)
        if entry is not None:
            cost.name = entry.name
        return cost
    if entry is not None:
        return entry.cost(networks)
    path = Path(device)
    if path.is_dir():
        return TableCost(path, backbone, classes)
    if not path.is_file():
        raise ConfigError(_unknown(str(device)))
    return _model_cost(path, networks)


def _unknown(name: str) -> str:
    """Return why a name is no device, with what there is for those that only the zoo knows."""
    searched = zoo_devices()
    rows = next((rows for known, rows in searched.items() if known.lower() == name.lower()), None)
    if rows:
        times = ", ".join(f"{row.value:g}" for row in sorted(rows, key=lambda row: row.value))
        return (
            f"no latency model of {name}, but {len(rows)} specialised networks were searched for "
            f"it, of {times} ms (python -m compofa zoo --like {name}): expected a device with a "
            "model (python -m nas devices), or your own measurements (python -m nas sample, then "
            "fit-latency)"
        )
    expected = f"expected a file, a folder of lookup tables or one of {', '.join(DEVICES)}"
    return unknown_name("device", name, [*DEVICES, *ALIASES, *searched], expected)


def _model_cost(path: Path, networks: Networks) -> Cost:
    """Return the cost of networks by the latency model of a file."""
    model = load_model(path)
    if isinstance(model, LayerModel) and networks.backbone.name != MOBILENET_V3.name:
        raise TableError(
            f"the latency model {model.name} was measured on {MOBILENET_V3.name}, not on "
            f"{networks.backbone.name}"
        )
    return model.cost(networks.backbone, networks.classes)
