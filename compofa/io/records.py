"""Evaluation records: one JSON line a measurement, written once, read by all that comes after."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compofa.errors import DataError, SpaceError
from compofa.io.atomic import write_text_atomic
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.families import config_formats, format_of, subnet_from_config
from compofa.space.subnet import Subnet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalRecord:
    """What one evaluation measured, and under which conditions.

    Attributes:
        subnet: The network.
        top1: Share of images whose class is the first guess, in percent.
        top5: Share of images whose class is among the first five guesses, in percent; with five
            classes or fewer always 100.
        images: Images evaluated.
        macs: Multiply-accumulates for one image.
        params: Learned parameters.
        net: Name of the network or path of the checkpoint.
        dataset: Name of the data set.
        part: ``train``, ``validation`` or ``test``.
        calibration_images: Training images that BN statistics were measured on.
        seed: Seed of the choice of subnets and calibration images.
        checkpoint: First 16 hexadecimal digits of the checkpoint's SHA-256.
        device: Device that ran it.
    """

    subnet: Subnet
    top1: float
    top5: float
    images: int
    macs: int
    params: int
    net: str
    dataset: str
    part: str
    calibration_images: int
    seed: int
    checkpoint: str
    device: str

    def __post_init__(self) -> None:
        """Check the figures.

        Raises:
            DataError: Accuracies outside 0 to 100 %, top-5 below top-1, or counts below 1
                (calibration images: 0).
        """
        if not 0 <= self.top1 <= self.top5 <= 100:  # NaN is not
            raise DataError(
                "expected top-1 and top-5 from 0 to 100 %, the second no less than the first, got "
                f"{self.top1} and {self.top5}"
            )
        counts = (self.images, self.macs, self.params, self.calibration_images + 1)
        if min(counts) < 1:
            raise DataError(
                f"expected images, MACs and parameters of at least 1 and calibration images of at "
                f"least 0, got {self.images}, {self.macs}, {self.params}, {self.calibration_images}"
            )

    @property
    def conditions(self) -> tuple[object, ...]:
        """What was measured on what: equal of records that are one measurement, written twice."""
        return (self.subnet, self.checkpoint, self.dataset, self.part, self.images,
                self.calibration_images, self.seed)  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the record as one JSON object, the subnet in the field's form."""
        return {
            **self.subnet.to_config(),
            **{k: v for k, v in asdict(self).items() if k != "subnet"},
        }

    @classmethod
    def from_json(cls, data: Any) -> EvalRecord:
        """Read what :meth:`to_json` wrote; numbers may be text, as in a table.

        Raises:
            DataError: A field is missing, of another type or out of its range.
        """
        try:
            return cls(
                subnet=subnet_from_config(data),
                **{name: _value(name, kind, data[name]) for name, kind in _FIELDS.items()},
            )
        except (KeyError, DataError, SpaceError) as error:
            raise DataError(f"not an evaluation record: {error}") from error


def _value(name: str, kind: type, value: Any) -> Any:
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is not str and isinstance(value, int | float | str) and not isinstance(value, bool):
            number = kind(value)
            if isinstance(value, str) or number == value:
                return number
    except (ValueError, OverflowError):  # no number, infinite, or one that a float cannot hold
        pass
    what = {str: "text", int: "a whole number", float: "a number"}[kind]
    raise DataError(f"{name}: expected {what}, got {value!r:.40}")


_FIELDS: dict[str, type] = {
    "top1": float,
    "top5": float,
    "images": int,
    "macs": int,
    "params": int,
    "net": str,
    "dataset": str,
    "part": str,
    "calibration_images": int,
    "seed": int,
    "checkpoint": str,
    "device": str,
}


def append_record(path: str | Path, record: EvalRecord) -> None:
    """Append one JSON line to ``path``."""
    line = json.dumps(record.to_json()) + "\n"
    try:
        with Path(path).open("a") as file:
            file.write(line)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_records(path: str | Path) -> list[EvalRecord]:
    """Read the records of ``path``, each measurement once.

    A last line that was cut off is left out, and so is what two programs wrote twice: of records
    of the same :attr:`EvalRecord.conditions`, the first is kept.

    Raises:
        DataError: The file is missing, or a line is neither a record nor the beginning of one at
            the end of the file.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read records from {path}: {error}") from error
    records: dict[tuple[object, ...], EvalRecord] = {}
    count = 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = EvalRecord.from_json(_parsed(line))
        except DataError as error:
            if number == len(lines) and not text.endswith("\n") and _begun(line):
                break
            raise DataError(f"{path}, line {number}: {error}") from error
        records.setdefault(record.conditions, record)
        count += 1
    if again := count - len(records):
        log.warning(
            "%s: %d record(s) of measurements that it has already are left out", path, again
        )
    return list(records.values())


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise DataError(f"not an evaluation record: {error}") from error


def _begun(line: str) -> bool:
    """Whether ``line`` may be the beginning of a record: of the first list of its subnet."""
    starts = [f'{{"{form.columns[0]}": [' for form in config_formats()]
    return any(line[: len(start)] == start[: len(line)] for start in starts)


def trim_records(path: str | Path, records: Iterable[EvalRecord]) -> None:
    """Rewrite ``path`` with ``records`` if it holds anything else, such as half a line."""
    text = "".join(json.dumps(record.to_json()) + "\n" for record in records)
    if Path(path).read_text() != text:
        write_text_atomic(path, text)


def write_csv(path: str | Path, records: Iterable[EvalRecord]) -> None:
    """Write records as a table, lists such as ``e`` space-separated, replacing ``path``."""
    text = io.StringIO()
    rows = [record.to_json() for record in records]
    columns = [*format_of({key for row in rows for key in row}).columns, *_FIELDS]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        lists = {key: " ".join(map(str, v)) for key, v in row.items() if isinstance(v, list)}
        writer.writerow({**row, **lists}[column] for column in columns)
    write_text_atomic(path, text.getvalue())
