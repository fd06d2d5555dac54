"""Evaluation records: append-only files with one JSON line per measurement."""

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
    """Result and conditions of one evaluation.

    Attributes:
        subnet: The evaluated subnet.
        top1: Top-1 accuracy in percent.
        top5: Top-5 accuracy in percent; 100 for five classes or fewer.
        images: Number of images evaluated.
        macs: Multiply-accumulates per image.
        params: Number of parameters.
        net: Name of the network, or path of its checkpoint.
        dataset: Name of the data set.
        part: ``train``, ``validation`` or ``test``.
        calibration_images: Number of training images for BN calibration.
        seed: Seed of the sampled subnets and calibration images.
        checkpoint: First 16 hexadecimal digits of the SHA-256 of the checkpoint.
        device: Device of the evaluation.

    Raises:
        DataError: Accuracies are outside [0, 100] or top-5 is below top-1; or ``images``, ``macs``
        or
            ``params`` is below 1, or ``calibration_images`` below 0.
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
        if not 0 <= self.top1 <= self.top5 <= 100:  # or NaN
            raise DataError(
                "expected top-1 and top-5 from 0 to 100 %, with top-5 not below top-1, got "
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
        """Key of the measurement; records with equal keys are duplicates."""
        return (self.subnet, self.checkpoint, self.dataset, self.part, self.images,
                self.calibration_images, self.seed)  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-compatible data, the subnet in OFA's config format."""
        return {
            **self.subnet.to_config(),
            **{k: v for k, v in asdict(self).items() if k != "subnet"},
        }

    @classmethod
    def from_json(cls, data: Any) -> EvalRecord:
        """Return a record from the output of :meth:`to_json`; numbers may be strings, as in a CSV.

        Raises:
            DataError: A field is missing, has another type or is out of range.
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
    except (ValueError, OverflowError):  # not a number, infinite, or out of the range of float
        pass
    what = {str: "text", int: "an integer", float: "a number"}[kind]
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
    """Append a record to ``path`` as one JSON line.

    Raises:
        DataError: The file cannot be written.
    """
    line = json.dumps(record.to_json()) + "\n"
    try:
        with Path(path).open("a") as file:
            file.write(line)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_records(path: str | Path) -> list[EvalRecord]:
    """Return the records in ``path``, without duplicates.

    An incomplete last line, of an interrupted program, is ignored. Of records with the same
    :attr:`EvalRecord.conditions`, the first is kept.

    Raises:
        DataError: The file is missing, or a line is not a record.
    """
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read records from {path}: {error}") from error
    records: dict[tuple[object, ...], EvalRecord] = {}
    duplicates = 0
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = EvalRecord.from_json(_parsed(line))
        except DataError as error:
            if number == len(lines) and not text.endswith("\n") and _is_incomplete(line):
                break
            raise DataError(f"{path}, line {number}: {error}") from error
        if records.setdefault(record.conditions, record) is not record:
            duplicates += 1
    if duplicates:
        log.warning("%s: ignoring %d duplicate record(s)", path, duplicates)
    return list(records.values())


def _parsed(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise DataError(f"not an evaluation record: {error}") from error


def _is_incomplete(line: str) -> bool:
    """Return whether ``line`` may be a truncated record: one that begins as one does."""
    starts = [f'{{"{form.columns[0]}": [' for form in config_formats()]
    return any(line[: len(start)] == start[: len(line)] for start in starts)


def trim_records(path: str | Path, records: Iterable[EvalRecord]) -> None:
    """Rewrite ``path`` with ``records`` if it has other content, such as an incomplete line."""
    text = "".join(json.dumps(record.to_json()) + "\n" for record in records)
    if Path(path).read_text() != text:
        write_text_atomic(path, text)


def write_csv(path: str | Path, records: Iterable[EvalRecord]) -> None:
    """Write records as CSV, with lists such as ``e`` separated by spaces, replacing ``path``."""
    text = io.StringIO()
    rows = [record.to_json() for record in records]
    columns = [*format_of({key for row in rows for key in row}).columns, *_FIELDS]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        lists = {key: " ".join(map(str, v)) for key, v in row.items() if isinstance(v, list)}
        writer.writerow({**row, **lists}[column] for column in columns)
    write_text_atomic(path, text.getvalue())
