"""Devices that a search can target, and the cost of networks on each.

This module needs NumPy alone; ``cpu`` and ``gpu`` import torch when they are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compofa.errors import ConfigError, TableError
from compofa.networks.backbone import Backbone
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.space.search_space import SearchSpace
from nas.cards import measured_width
from nas.cost.base import Cost, macs_cost, params_cost
from nas.cost.fitted import LAYERS_NEAR, MODELS, LayerModel, load_model
from nas.cost.lookup import TableCost


@dataclass(frozen=True)
class Device:
    """What is known of a device.

    Attributes:
        description: What was measured, in words.
        unit: Of its cost.
        source: Where the measurements come from.
        model: Name of the shipped model's file; empty where none is needed.
        width_mults: Width multipliers that it serves; empty for those near to what was measured.
        resolutions: Resolutions that it serves; empty for all.
    """

    description: str
    unit: str = "ms"
    source: str = ""
    model: str = ""
    width_mults: tuple[float, ...] = ()
    resolutions: tuple[int, ...] = ()

    @property
    def widths(self) -> str:
        """Which width multipliers it serves, in words."""
        if self.width_mults:
            return ", ".join(f"w{width:g}" for width in self.width_mults)
        if not self.model:
            return "any width"
        measured = measured_width(load_model(MODELS / f"{self.model}.npz").card) or 1.0
        return f"w{measured / LAYERS_NEAR:g} to {measured * LAYERS_NEAR:g}"

    @property
    def error(self) -> str:
        """How wrong its cost is, in words; from the card of a shipped model."""
        if self.model:
            return load_model(MODELS / f"{self.model}.npz").error
        return "exact" if self.unit != "ms" else "checked end to end when it is measured"


_NAS_PE = "NAS_PerformanceEstimation (Apache-2.0), OFA w1.0"
_HELP = "HELP (MIT), OFA w1.0"
_COARSE = tuple(range(160, 225, 16))
_FINE = tuple(range(128, 225, 4))


def _gpus() -> dict[str, Device]:
    devices = {
        "rtx2080ti": Device("NVIDIA RTX 2080 Ti, batch not stated (64 in the program)", "ms",
                            _NAS_PE, "latency_rtx2080ti", (1.0,), _COARSE),
        "p40": Device("NVIDIA P40, batch not stated (64 in the program)", "ms",
                      _NAS_PE, "latency_p40", (1.0,), _COARSE),
    }  # fmt: skip
    for name, title in (("v100", "V100"), ("titan_rtx", "Titan RTX"), ("titan_xp", "Titan XP"),
                        ("rtx2080ti", "RTX 2080 Ti")):  # fmt: skip
        for batch in (64, 32, 1):
            device = Device(f"NVIDIA {title}, batch {batch}", "ms", _HELP,
                            f"latency_{name}-b{batch}", (1.0,), _FINE)  # fmt: skip
            if batch == 64:
                devices.setdefault(name, device)
            devices[f"{name}-b{batch}"] = device
    return devices


DEVICES: dict[str, Device] = {
    "note10": Device("Samsung Note10 CPU", "ms", "CompOFA (Apache-2.0), OFA w1.2 lookup tables",
                     "latency_note10", (), tuple(range(128, 225))),
    **_gpus(),
    "gpu": Device("the CUDA GPU of this machine, batch 64", "ms", "measured here"),
    "cpu": Device("the CPU of this machine, batch 1", "ms", "measured here"),
    "flops": Device("multiply-accumulates of one image", "MACs", "counted"),
    "params": Device("learned parameters", "parameters", "counted"),
}  # fmt: skip
"""Devices by name."""


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
) -> Cost:
    """Return the cost of networks on a device.

    Args:
        device: A name of :data:`DEVICES`, a folder of lookup tables, or the file (.npz) of a
            model that ``fit-latency`` made.
        backbone: Widths and strides of the networks.
        classes: Outputs of the classifier.
        table: Folder of lookup tables to use in place of the device's model.
        space: What to measure for ``cpu`` and ``gpu``; needed there.
        batch: Images per batch for ``cpu`` and ``gpu``; 0 for 1 and 64. Others have their own.
        cache: Folder of this machine's measurements.
        progress: Whether to show a progress bar while measuring.

    Raises:
        ConfigError: The device is unknown, or has a batch size of its own.
        TableError: It was measured on another backbone or width, or its file cannot be used.
    """
    if batch and (table is not None or device not in ("cpu", "gpu")):
        raise ConfigError(
            f"expected no batch size for {table or device}, which is not timed here, got {batch}"
        )
    if table is not None:
        cost = TableCost(table, backbone, classes)
        if str(device) in DEVICES:
            cost.name = str(device)
        return cost
    if device == "flops":
        return macs_cost(backbone, classes)
    if device == "params":
        return params_cost(backbone, classes)
    if device in ("cpu", "gpu"):
        from nas.cost.measured import Settings, measure

        if space is None:
            raise ConfigError(f"expected a space to measure on {device}, got none")
        settings = Settings(device=str(device), batch=batch)
        return measure(backbone, space, classes, settings, cache, progress)
    if str(device) in DEVICES:
        path = MODELS / f"{DEVICES[str(device)].model}.npz"
    else:
        path = Path(device)
        if path.is_dir():
            return TableCost(path, backbone, classes)
        if not path.is_file():
            raise ConfigError(
                f"unknown device {str(device)!r}: expected a file, a folder of lookup tables or "
                f"one of {', '.join(DEVICES)}"
            )
    model = load_model(path)
    if isinstance(model, LayerModel) and backbone.name not in ("mobilenet_v3",):
        raise TableError(
            f"the latency model {model.name} was measured on mobilenet_v3, not on {backbone.name}"
        )
    return model.cost(backbone, classes)
