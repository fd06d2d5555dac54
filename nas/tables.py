"""Tables of subnets: CSV with the columns ks, e, d and r, and whatever stands beside them.

``ks`` and ``e`` hold a number a block slot, 0 past a stage's depth, separated by spaces; ``d`` a
depth a stage. Files ending in ``.gz`` are gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.files import write_text_atomic
from compofa.space import SearchSpace
from compofa.subnet import SubnetArrays

KEYS = ("ks", "e", "d", "r")
_NAMED = 5


def read_subnets(
    path: str | Path, columns: Sequence[str] = ()
) -> tuple[SubnetArrays, dict[str, np.ndarray]]:
    """Read subnets and the numbers beside them, in the file's order.

    Args:
        path: The CSV.
        columns: Further columns, each a finite number a row.

    Returns:
        The subnets, and each column as float64 of shape [n].

    Raises:
        TableError: The file is missing, empty, lacks a column, or a row is malformed; the
            message names the line.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    values: dict[str, list[list[float]]] = {key: [] for key in (*KEYS, *columns)}
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [key for key in values if key not in (reader.fieldnames or [])]
            if missing:
                raise TableError(
                    f"{path}: expected columns {', '.join(values)}, missing {', '.join(missing)}"
                )
            for row in reader:
                for key, rows in values.items():
                    rows.append(_row(key, row[key], rows))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"cannot read the table {path}: {error}") from error
    except ValueError as error:
        raise TableError(f"{path}, line {reader.line_num}: {error}") from error
    if not values["r"]:
        raise TableError(f"{path}: expected rows, got none")
    whole = {key: np.array(rows) for key, rows in values.items()}
    integers = {
        key: table.astype(np.int64) if (table == np.rint(table)).all() else table
        for key, table in whole.items()
    }
    arrays = SubnetArrays(*(integers[key] for key in KEYS[:3]), integers["r"][:, 0])
    return arrays, {name: whole[name][:, 0] for name in columns}


def _row(key: str, text: str | None, before: list[list[float]]) -> list[float]:
    numbers = [float(item) for item in (text or "").split()]
    wanted = len(before[0]) if before else 1 if key not in KEYS[:3] else max(1, len(numbers))
    if len(numbers) != wanted or not np.isfinite(numbers).all():
        raise ValueError(f"{key}: expected {wanted} finite number(s), got {text!r}")
    return numbers


def require_members(arrays: SubnetArrays, space: SearchSpace, path: str | Path) -> None:
    """Check that every subnet is in ``space``, whatever its resolution.

    Raises:
        TableError: Some are not; the message names the lines and says what is wrong with the
            first.
    """
    if (
        arrays.d.shape[1] != len(space.stages)
        or arrays.ks.shape[1] != arrays.e.shape[1]
        or (arrays.ks.shape[1] != len(space.stages) * space.slots)
    ):
        raise TableError(
            f"{path}: expected {len(space.stages) * space.slots} numbers in ks and e and "
            f"{len(space.stages)} in d, got {arrays.ks.shape[1]}, {arrays.e.shape[1]} and "
            f"{arrays.d.shape[1]}"
        )
    fits = space.restrict(resolutions=sorted({int(r) for r in arrays.r}))
    try:
        fits.genes_of(arrays)
    except SpaceError:
        wrong = [
            (line, faults[0])
            for line, subnet in enumerate(space.subnets_of(arrays), 2)
            if (faults := fits.why_not(subnet))
        ]
        lines = ", ".join(str(line) for line, _ in wrong[:_NAMED])
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise TableError(
            f"{path}: not in space {space.name}: line(s) {lines}{more}; line {wrong[0][0]}: "
            f"{wrong[0][1]}"
        ) from None


def write_subnets(
    path: str | Path,
    arrays: SubnetArrays,
    columns: Mapping[str, Sequence[object]],
    first: Mapping[str, Sequence[object]] | None = None,
) -> None:
    """Write subnets and columns beside them as CSV, replacing ``path``.

    Args:
        path: The file.
        arrays: The subnets.
        columns: Values behind ks, e, d and r; ``None`` becomes an empty field.
        first: Values before them.
    """
    before = dict(first or {})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*before, *KEYS, *columns])
    for row, (ks, e, d, r) in enumerate(zip(*(a.tolist() for a in arrays), strict=True)):
        lists = [" ".join(map(str, values)) for values in (ks, e, d)]
        ahead = [_plain(values[row]) for values in before.values()]
        behind = [_plain(values[row]) for values in columns.values()]
        writer.writerow([*ahead, *lists, r, *behind])
    write_text_atomic(path, text.getvalue())


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value
