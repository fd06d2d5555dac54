"""Evaluation records: one JSON line a measurement, written once, read by all that comes after."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compofa.errors import DataError
from compofa.files import write_text_atomic
from compofa.plain import parse_json, read_text
from compofa.subnet import Subnet


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

    def to_json(self) -> dict[str, Any]:
        """Return the record as one JSON object, the subnet in the field's form."""
        return {
            **self.subnet.to_config(),
            **{k: v for k, v in asdict(self).items() if k != "subnet"},
        }

    @classmethod
    def from_json(cls, data: Any) -> EvalRecord:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: A field is missing or of another type.
        """
        try:
            return cls(
                subnet=Subnet.from_config(data),
                **{name: kind(data[name]) for name, kind in _FIELDS.items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"not an evaluation record: {error}") from error


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
    """Read the records of ``path``; a last line that was cut off is left out.

    Raises:
        DataError: The file is missing, or a line before the last is not a record.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read records from {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(EvalRecord.from_json(parse_json(line)))
        except (ValueError, DataError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: {error}") from error
    return records


def trim_records(path: str | Path, records: Iterable[EvalRecord]) -> None:
    """Rewrite ``path`` with ``records`` if it ends in a line that was cut off."""
    text = "".join(json.dumps(record.to_json()) + "\n" for record in records)
    if Path(path).read_text() != text:
        write_text_atomic(path, text)


def write_csv(path: str | Path, records: Iterable[EvalRecord]) -> None:
    """Write records as a table, lists such as ``e`` space-separated, replacing ``path``."""
    text = io.StringIO()
    rows = [record.to_json() for record in records]
    wide = any("w" in row for row in rows)
    columns = [*(("d", "e", "w") if wide else ("ks", "e", "d")), "r", *_FIELDS]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        lists = {key: " ".join(map(str, v)) for key, v in row.items() if isinstance(v, list)}
        writer.writerow({**row, **lists}[column] for column in columns)
    write_text_atomic(path, text.getvalue())
