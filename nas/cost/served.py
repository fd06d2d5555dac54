"""Which resolutions a device can be searched at, from its model or tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nas.cost.devices import FittedDevice, find_device
from nas.cost.lookup import table_files
from nas.cost.models import LatencyModel, load_model


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
