"""What a run leaves behind beside its checkpoints: metrics, TensorBoard scalars, its cost."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compofa.errors import CompofaError
from compofa.files import write_text_atomic
from compofa.plain import parse_json, read_text

# Strubell et al., ACL 2019: average power usage effectiveness of a data centre, and pounds of
# CO2 for each kWh of the US grid.
PUE = 1.58
CO2_LBS_PER_KWH = 0.954

SUMMARY = "summary.json"
"""Written at the end of a run: its presence says that the run is complete."""


class Journal:
    """Appends to ``metrics.jsonl`` and to TensorBoard's event files.

    Args:
        folder: Where they go.
        first_epoch: Lines of this epoch and later are dropped: they are about to come again.
    """

    def __init__(self, folder: Path, first_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in _lines(self.path) if line.get("epoch", 0) < first_epoch]
        write_text_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        purge = kept[-1]["step"] + 1 if kept else 0
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one epoch's metrics; ``epoch`` and ``step`` say when, numbers are drawn."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CompofaError(f"cannot write {self.path}: {error.strerror or error}") from error
        for name, value in _flat(metrics):
            if name not in ("epoch", "step"):
                self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close TensorBoard's file."""
        self.writer.close()


def cost_report(
    seconds: float, device: str, price: float | None, power: float | None
) -> dict[str, Any]:
    """Turn training time into what the papers report.

    Args:
        seconds: Time on one device.
        device: ``cpu`` or ``cuda``.
        price: Price of an hour of it.
        power: Its power in watts. CO2 counts a data centre's overhead (Strubell et al., ACL
            2019: PUE 1.58, 0.954 lbs a kWh).
    """
    hours = seconds / 3600
    report: dict[str, Any] = {("gpu" if device.startswith("cuda") else "cpu") + "_hours": hours}
    if price is not None:
        report["cost"] = hours * price
    if power is not None:
        report["co2_lbs"] = hours * power / 1000 * PUE * CO2_LBS_PER_KWH
    return report


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics file; a cut-off last line is dropped."""
    lines = []
    try:
        texts = read_text(path).splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise CompofaError(f"{path}: expected lines of metrics, got {error}") from error
    for text in texts:
        try:
            line = parse_json(text)
        except ValueError:
            break
        if not (isinstance(line, dict) and {"epoch", "step"} <= line.keys()):
            break
        lines.append(line)
    return lines


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat.append((prefix + name, float(value)))
    return flat
