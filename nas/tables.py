"""Tables of subnets: CSV with the columns ks, e, d and r, and whatever stands beside them.

``ks`` and ``e`` hold a number a block slot, 0 past a stage's depth, separated by spaces; ``d`` a
depth a stage. Subnets with elastic widths have ``w`` in place of ``ks``, all in the form of
:data:`compofa.form.WIDE`. Files ending in ``.gz`` are gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.files import write_atomic
from compofa.form import KERNEL, WIDE, WIDTHS
from compofa.form import columns as form_columns
from compofa.space import SearchSpace
from compofa.subnet import SubnetArrays

KEYS = ("ks", "e", "d", "r")
MAX_FILE_BYTES = 256 << 20
WIDE_KEYS = ("d", "e", "w", "r")
_NAMED = 5
_LARGEST = 1e9
"""The largest number of a subnet, so that whole ones stay exact."""


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
    keys, values = KEYS, {}
    try:
        with io.StringIO(_text(path), newline="") as file:
            reader = csv.DictReader(file)
            if "w" in (reader.fieldnames or ()) and "ks" not in reader.fieldnames:
                keys = WIDE_KEYS
            values: dict[str, list[list[float]]] = {key: [] for key in (*keys, *columns)}
            missing = [key for key in values if key not in (reader.fieldnames or [])]
            if missing:
                raise TableError(
                    f"{path}: expected columns {', '.join(values)}, missing {', '.join(missing)}"
                )
            for row in reader:
                if reader.line_num != len(values["r"]) + 2:  # or line numbers would mislead
                    raise ValueError("expected a line a row, got blank or broken ones before it")
                if None in row:
                    raise ValueError(f"expected {len(reader.fieldnames or ())} fields, got more")
                for key, rows in values.items():
                    rows.append(_row(key, row[key], rows))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
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
    r = integers.pop("r")[:, 0]
    if keys == KEYS:
        arrays = SubnetArrays(*(integers[key] for key in KEYS[:3]), r)
    else:
        arrays = _wide(integers, r, path)
    return arrays, {name: whole[name][:, 0] for name in columns}


def _text(path: Path) -> str:
    """Read a text file, gzipped by its ending, that is not too large, unpacked."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise TableError(f"{path}: expected a table of at most {MAX_FILE_BYTES} bytes, got more")
    return data.decode("utf-8-sig")


def _wide(values: Mapping[str, np.ndarray], r: np.ndarray, path: Path) -> SubnetArrays:
    """Return the subnets that ``d``, ``e`` and ``w`` of :data:`compofa.form.WIDE` stand for."""
    slots = max(form.slots for form in WIDE)
    places = form_columns(WIDE, slots)
    shapes = {"d": len(WIDE), "e": len(places), "w": WIDTHS}
    got = {key: values[key].shape[1] for key in shapes}
    if got != shapes:
        raise TableError(f"{path}: expected {shapes} numbers in each row, got {got}")
    d = np.stack(
        [
            [form.blocks(number) for number in column]
            for form, column in zip(WIDE, values["d"].T.tolist(), strict=True)
        ],
        axis=1,
    )
    if d.min() < 0:
        row = int((d < 0).any(axis=1).argmax())
        numbers = " ".join(map(str, values["d"][row].tolist()))
        raise TableError(f"{path}, {lines([row])}: d: expected numbers from 0 to 2, got {numbers}")
    e = np.zeros((len(r), len(WIDE) * slots))
    e[:, places] = values["e"]
    e[:, 0] = 1
    kept = np.arange(slots) < d[:, :, None]
    kept = kept.reshape(len(r), -1)
    return SubnetArrays(kept * KERNEL, e * kept, d, r, values["w"])


def _row(key: str, text: str | None, before: list[list[float]]) -> list[float]:
    numbers = [float(item) for item in (text or "").split()]
    many = key in ("ks", "e", "d", "w")
    wanted = len(before[0]) if before else max(1, len(numbers)) if many else 1
    if len(numbers) != wanted or not np.isfinite(numbers).all():
        raise ValueError(f"{key}: expected {wanted} finite number(s), got {text!r}")
    if (many or key == "r") and max(map(abs, numbers), default=0) > _LARGEST:
        raise ValueError(f"{key}: expected numbers up to {_LARGEST:g}, got {text!r}")
    return numbers


def require_members(arrays: SubnetArrays, space: SearchSpace, path: str | Path) -> SubnetArrays:
    """Check that every subnet is in ``space``, whatever its resolution.

    Args:
        arrays: The subnets; a last stage that always is one block may be one slot without a depth.
        space: The space.
        path: For messages.

    Returns:
        The subnets, with 0 past each stage's depth whatever stood there.

    Raises:
        TableError: Some are not; the message names the lines and says what is wrong with the
            first.
    """
    arrays = _with_tail(arrays, space)
    if arrays.w.shape[1] != len(space.widths):
        raise TableError(
            f"{path}: expected {len(space.widths)} numbers in w, got {arrays.w.shape[1]}"
        )
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
        return fits.arrays(fits.genes_of(arrays))
    except SpaceError:
        wrong = [
            (place, faults[0])
            for place, row in enumerate(zip(*arrays, strict=True))
            if (faults := _faults(SubnetArrays(*(value[None] for value in row)), fits))
        ]
        raise TableError(
            f"{path}: not in space {space.name}: {lines([place for place, _ in wrong])}; "
            f"{lines([wrong[0][0]])}: {wrong[0][1]}"
        ) from None


def _with_tail(arrays: SubnetArrays, space: SearchSpace) -> SubnetArrays:
    """Give a last stage that is written as one block its further slots and its depth."""
    slots = len(space.stages) * space.slots
    if not space.tail or arrays.ks.shape[1] != slots - space.slots + 1:
        return arrays
    past = ((0, 0), (0, space.slots - 1))
    return arrays._replace(
        ks=np.pad(arrays.ks, past),
        e=np.pad(arrays.e, past),
        d=np.pad(arrays.d, ((0, 0), (0, 1)), constant_values=1),
    )


def lines(rows: Sequence[int]) -> str:
    """Name the lines of a table that rows, counted from 0, stand on: the first few of them."""
    named = ", ".join(str(row + 2) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"line{'s' if len(rows) > 1 else ''} {named}{more}"


def _faults(row: SubnetArrays, space: SearchSpace) -> list[str]:
    """Say what keeps a single subnet out of ``space``."""
    if not np.isin(row.d, range(space.slots + 1)).all():
        depths = " ".join(map(str, row.d[0].tolist()))
        return [f"d: expected whole numbers from 0 to {space.slots}, got {depths}"]
    row = row._replace(d=row.d.astype(np.int64))
    return space.why_not(next(space.subnets_of(row)))


def write_subnets(
    path: str | Path,
    arrays: SubnetArrays,
    columns: Mapping[str, Sequence[object]],
    first: Mapping[str, Sequence[object]] | None = None,
) -> None:
    """Write subnets and columns beside them as CSV, replacing ``path``; gzipped by its ending.

    Args:
        path: The file.
        arrays: The subnets.
        columns: Values behind ks, e, d and r; ``None`` becomes an empty field.
        first: Values before them.
    """
    before = dict(first or {})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    wide = arrays.w.shape[1] > 0
    written = arrays.in_form(arrays.ks.shape[1] // arrays.d.shape[1])
    keys = WIDE_KEYS if wide else KEYS
    writer.writerow([*before, *keys, *columns])
    for row, numbers in enumerate(zip(*(written[key].tolist() for key in keys), strict=True)):
        *lists, r = numbers
        lists = [" ".join(map(str, values)) for values in lists]
        ahead = [_plain(values[row]) for values in before.values()]
        behind = [_plain(values[row]) for values in columns.values()]
        writer.writerow([*ahead, *lists, r, *behind])
    data = text.getvalue().encode()
    if Path(path).suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    write_atomic(path, lambda file: file.write(data) and None)


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value
