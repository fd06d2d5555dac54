"""Which resolutions a network is searched at by default: those that its models serve."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from compofa.errors import ConfigError
from compofa.networks.backbone import Backbone
from nas.cost.devices import FittedDevice, find_device, load_cost
from nas.cost.lookup import table_files
from nas.cost.models import LatencyModel, load_model

log = logging.getLogger(__name__)


def default_resolutions(
    device: str | Path,
    backbone: Backbone,
    usual: Sequence[int],
    anchors: Sequence[int] = (),
    table: str | Path | None = None,
) -> tuple[int, ...]:
    """Return the resolutions that both a device and an accuracy model serve; others are logged.

    Args:
        device: As for :func:`nas.cost.devices.load_cost`.
        backbone: Backbone of the network to search.
        usual: The resolutions to search where both serve all.
        anchors: Measured resolutions of the accuracy model, rising; it serves those between them.
            Empty for no limit.
        table: Folder of lookup tables used instead of the device's own cost.

    Raises:
        ConfigError: There is none.
        TableError: The device's file or folder cannot be used, or not for ``backbone``.
    """
    entry = find_device(device)
    if table is None and (
        isinstance(entry, FittedDevice) or (not entry and Path(device).is_file())
    ):
        load_cost(device, backbone)  # of another backbone, its resolutions mean nothing

    def inside(sizes: Sequence[int]) -> tuple[int, ...]:
        return tuple(r for r in sizes if not len(anchors) or anchors[0] <= r <= anchors[-1])

    on_device = served_resolutions(device, inside(usual) or tuple(map(int, anchors)), table)
    sizes = inside(on_device)
    if not sizes:
        raise ConfigError(
            f"expected a resolution that device and accuracy predictor both serve: "
            f"{table or device} was measured at {' '.join(map(str, on_device))} pixels, the "
            f"predictor at {anchors[0]} to {anchors[-1]}"
        )
    if sizes != tuple(usual):
        also = " and the accuracy predictor" if len(anchors) else ""
        log.info(
            "resolutions %s, which %s%s serve%s",
            " ".join(map(str, sizes)), table or device, also, "" if also else "s",
        )  # fmt: skip
    return sizes


def served_resolutions(
    device: str | Path, usual: Sequence[int], table: str | Path | None = None
) -> tuple[int, ...]:
    """Return the resolutions to search by default on a device.

    Args:
        device: As for :func:`nas.cost.devices.load_cost`.
        usual: The resolutions to search where the device serves all.
        table: Folder of lookup tables used instead of the device's own cost.

    Returns:
        Those of ``usual`` that were measured on the device; where there are none, all that were
        measured. ``usual`` where the device has no limits, or cannot be opened at all.

    Raises:
        TableError: Its file or folder cannot be used.
    """
    entry, path = find_device(device), Path(table or device)
    if table is not None or (entry is None and path.is_dir()):
        return _kept(usual, tuple(sorted(table_files(path))))
    if isinstance(entry, FittedDevice):
        return _of_model(entry.open(), usual)
    if entry is None and path.is_file():
        return _of_model(load_model(path), usual)
    return tuple(usual)


def _of_model(model: LatencyModel, usual: Sequence[int]) -> tuple[int, ...]:
    measured = model.measured_resolutions
    return _kept(usual, measured or tuple(filter(model.serves, usual)))


def _kept(usual: Sequence[int], measured: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in usual if size in measured) or measured or tuple(usual)
