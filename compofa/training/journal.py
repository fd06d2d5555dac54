"""Metrics of a run: ``metrics.jsonl``, TensorBoard event files, and the cost report."""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from compofa.errors import CompofaError
from compofa.io.atomic import write_atomic
from compofa.io.untrusted import parse_json, read_bytes
from compofa.training.loggers import Writer

log = logging.getLogger(__name__)

# Strubell et al., ACL 2019: average power usage effectiveness of a data centre, and pounds of CO2
# per kWh of the US grid.
PUE = 1.58
CO2_LBS_PER_KWH = 0.954

SUMMARY = "summary.json"
"""Written at the end of a phase: its presence marks the phase as completed."""
METRICS, DAMAGED = "metrics.jsonl", "metrics.damaged-{}.jsonl"
"""One line of JSON per epoch, and numbered copies of such files that were found damaged."""


class Journal:
    """Writes metrics to ``metrics.jsonl``, to TensorBoard event files and to other writers.

    Args:
        folder: Folder of the phase.
        first_epoch: Epoch to continue with; lines of this epoch and later are dropped.
        first_step: Steps before it, used if the line of the epoch before is missing.
        writers: Other writers.

    Raises:
        CompofaError: A file cannot be read or written.
    """

    def __init__(
        self, folder: Path, first_epoch: int, first_step: int = 0, writers: Sequence[Writer] = ()
    ) -> None:
        self.path = folder / METRICS
        kept = [line for line in _whole_lines(self.path) if line.epoch < first_epoch]
        text = b"".join(line.text + b"\n" for line in kept)
        write_atomic(self.path, lambda file: file.write(text) and None)
        if kept and kept[-1].epoch == first_epoch - 1:  # with the number of ranks at that time
            first_step = kept[-1].step
        self.writers = [_Events(folder / "tensorboard", first_step + 1), *writers]

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of one epoch: ``epoch``, ``step`` and (nested) numbers."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CompofaError(f"cannot write {self.path}: {error.strerror or error}") from error
        numbers = dict(_flat({k: v for k, v in metrics.items() if k not in ("epoch", "step")}))
        for writer in self.writers:
            writer.add(numbers, metrics["step"])

    def close(self) -> None:
        """Close the writers."""
        for writer in self.writers:
            writer.close()


class _Events:
    """A TensorBoard event file.

    TensorBoard's own writer uses a thread, which prints a traceback when the disk is full.

    Args:
        folder: Folder of the event files.
        purge_step: TensorBoard drops events of earlier files from this step on.

    Raises:
        CompofaError: The file cannot be written; so do all methods.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        self.path = folder / f"{name}.{time.monotonic_ns()}"
        with self._one_line():
            folder.mkdir(exist_ok=True)
            file = self.path.open("xb", buffering=0)
        self._writer = RecordWriter(file)
        try:
            self._write(step=purge_step, file_version="brain.Event:2")
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        except CompofaError:
            file.close()
            raise

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Add scalars."""
        for name, number in metrics.items():
            value = self._summary.Value(tag=name, simple_value=number)
            self._write(step=step, summary=self._summary(value=[value]))

    def close(self) -> None:
        """Close the file."""
        with self._one_line():
            self._writer.close()

    def _write(self, **what: Any) -> None:
        with self._one_line():
            event = self._event(wall_time=time.time(), **what)
            self._writer.write(event.SerializeToString())

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CompofaError(f"cannot write {self.path}: {error.strerror or error}") from error


def cost_report(
    seconds: float, device: str, price: float | None, power: float | None
) -> dict[str, Any]:
    """Return device hours, cost and CO2 emissions of a run.

    Args:
        seconds: Time on all devices.
        device: ``cpu``, ``cuda`` or ``mps``.
        price: Price per device hour; ``None`` to leave out the cost.
        power: Power per device in watts; ``None`` to leave out CO2. The overhead of a data centre
            is included (Strubell et al., ACL 2019: PUE 1.58, 0.954 lbs of CO2 per kWh).
    """
    hours = seconds / 3600
    report: dict[str, Any] = {("cpu" if device == "cpu" else "gpu") + "_hours": hours}
    if price is not None:
        report["cost"] = hours * price
    if power is not None:
        report["co2_lbs"] = hours * power / 1000 * PUE * CO2_LBS_PER_KWH
    return report


class _Line(NamedTuple):
    """A line of metrics: its epoch, the steps up to its end, and its text."""

    epoch: int
    step: int
    text: bytes


def _whole_lines(path: Path) -> list[_Line]:
    """Return the intact lines of a metrics file.

    An unfinished last line is dropped. If another line is damaged, a copy of the file is kept.
    """
    try:
        *texts, torn = read_bytes(path).split(b"\n") if path.exists() else [b""]
    except (OSError, ValueError) as error:
        raise CompofaError(f"{path}: expected lines of metrics, got {error}") from error
    found = [_read(text) for text in texts]
    damaged = [str(number) for number, line in enumerate(found, 1) if line is None]
    if damaged:
        copy = _back_up(path, b"\n".join([*texts, torn]))
        log.warning(
            "%s: expected the metrics of an epoch in line %s, got damaged ones; these are dropped, "
            "and a copy of the file is kept as %s", path, ", ".join(damaged), copy.name,
        )  # fmt: skip
    return [line for line in (*found, _read(torn)) if line is not None]


def _read(text: bytes) -> _Line | None:
    """Parse a line of metrics; ``None`` if it is damaged."""
    try:
        data = parse_json(text.decode())
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    line = _Line(data.get("epoch"), data.get("step"), text)
    counted = all(type(number) is int and 0 <= number < 2**60 for number in line[:2])
    return line if counted else None


def _back_up(path: Path, content: bytes) -> Path:
    """Write ``content`` to the first free name for damaged files."""
    copies = (path.with_name(DAMAGED.format(number)) for number in itertools.count(1))
    copy = next(name for name in copies if not name.exists())
    write_atomic(copy, lambda file: file.write(content) and None)
    return copy


def _flat(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat.append((prefix + name, float(value)))
    return flat
