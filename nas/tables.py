"""Tables of subnets: CSV with the columns ks, e, d and r, and whatever stands beside them.

``ks`` and ``e`` hold a number a block slot, 0 past a stage's depth, separated by spaces; ``d`` a
depth a stage. Subnets with elastic widths have ``w`` in place of ``ks``, all in the form of
:data:`compofa.space.config.WIDE`. Files ending in ``.gz`` are gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compofa.errors import SpaceError, TableError
from compofa.io.atomic import write_atomic
from compofa.space.arrays import SubnetArrays
from compofa.space.config import KERNEL, WIDE, WIDTHS
from compofa.space.config import columns as form_columns
from compofa.space.search_space import SearchSpace

KEYS = ("ks", "e", "d", "r")
MAX_FILE_BYTES = 256 << 20
WIDE_KEYS = ("d", "e", "w", "r")
_NAMED = 5
_LARGEST = 1e9
"""The largest number of a subnet, so that whole ones stay exact."""


class Table(NamedTuple):
    """A CSV as text, to which columns can be added.

    Attributes:
        path: Of its file, for errors.
        header: Names of the columns, all different.
        rows: Their fields, as many in each row.
    """

    path: Path
    header: list[str]
    rows: list[list[str]]


def read_csv(path: str | Path) -> Table:
    """Read a CSV with a line for each row.

    Raises:
        TableError: The file is missing, empty or malformed; the message names the line.
    """
    path, rows = Path(path), []
    try:
        reader = csv.reader(io.StringIO(_text(path), newline=""))
        header = next(reader, [])
        twice = [name for place, name in enumerate(header) if name in header[:place]]
        if twice:
            raise ValueError(f"expected different columns, got {twice[0]!r} twice")
        for row in filter(None, reader):
            if reader.line_num != len(rows) + 2:  # or line numbers would mislead
                raise ValueError("expected a line a row, got blank or broken ones before it")
            if len(row) > len(header):
                raise ValueError(f"expected {len(header)} fields, got more")
            rows.append(row + [""] * (len(header) - len(row)))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise TableError(f"cannot read the table {path}: {error}") from error
    except ValueError as error:
        raise TableError(f"{path}, line {reader.line_num}: {error}") from error
    return Table(path, header, rows)


def read_subnets(
    source: str | Path | Table, columns: Sequence[str] = ()
) -> tuple[SubnetArrays, dict[str, np.ndarray]]:
    """Read subnets and the numbers beside them, in the file's order.

    Args:
        source: The CSV, or what :func:`read_csv` read from it.
        columns: Further columns, each a finite number per row.

    Returns:
        The subnets, and each column as float64 of shape [n].

    Raises:
        TableError: The file is missing, empty, lacks a column, or a row is malformed; the
            message names the line.
    """
    path, header, rows = source if isinstance(source, Table) else read_csv(source)
    keys = WIDE_KEYS if "w" in header and "ks" not in header else KEYS
    wanted = list(dict.fromkeys((*keys, *columns)))
    missing = [key for key in wanted if key not in header]
    if missing:
        raise TableError(
            f"{path}: expected columns {', '.join(wanted)}, missing {', '.join(missing)}"
        )
    if not rows:
        raise TableError(f"{path}: expected rows, got none")
    values: dict[str, list[list[float]]] = {key: [] for key in wanted}
    for line, row in enumerate(rows, 2):
        for key, numbers in values.items():
            try:
                numbers.append(_row(key, row[header.index(key)], numbers))
            except ValueError as error:
                raise TableError(f"{path}, line {line}: {error}") from error
    whole = {key: np.array(numbers) for key, numbers in values.items()}
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


def without_repeats(arrays: SubnetArrays, values: np.ndarray) -> tuple[SubnetArrays, np.ndarray]:
    """Return the rows that say something new: of equal subnets with equal values [n] the first."""
    wide = np.column_stack([*arrays[:3], arrays.w, arrays.r, values])
    rows = np.sort(np.unique(wide, axis=0, return_index=True)[1])
    return SubnetArrays(*(array[rows] for array in arrays)), values[rows]


def _text(path: Path) -> str:
    """Read a text file, gzipped by its ending, that is not too large, unpacked."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise TableError(f"{path}: expected a table of at most {MAX_FILE_BYTES} bytes, got more")
    return data.decode("utf-8-sig")


def _wide(values: Mapping[str, np.ndarray], r: np.ndarray, path: Path) -> SubnetArrays:
    """Return the subnets of ``d``, ``e`` and ``w`` (:data:`~compofa.space.config.WIDE`)."""
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


def _row(key: str, text: str, before: list[list[float]]) -> list[float]:
    try:
        numbers = [float(item) for item in text.split()]
    except ValueError:
        raise ValueError(f"{key}: expected numbers, got {text!r:.60}") from None
    many = key in ("ks", "e", "d", "w")
    wanted = len(before[0]) if before else max(1, len(numbers)) if many else 1
    if len(numbers) != wanted or not np.isfinite(numbers).all():
        raise ValueError(f"{key}: expected {wanted} finite number(s), got {text!r:.60}")
    if (many or key == "r") and max(map(abs, numbers), default=0) > _LARGEST:
        raise ValueError(f"{key}: expected numbers up to {_LARGEST:g}, got {text!r:.60}")
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
    wide = arrays.w.shape[1] > 0
    written = arrays.in_form(arrays.ks.shape[1] // arrays.d.shape[1])
    keys = WIDE_KEYS if wide else KEYS
    rows: list[Sequence[object]] = [[*before, *keys, *columns]]
    for row, numbers in enumerate(zip(*(written[key].tolist() for key in keys), strict=True)):
        *lists, r = numbers
        lists = [" ".join(map(str, values)) for values in lists]
        ahead = [_plain(values[row]) for values in before.values()]
        behind = [_plain(values[row]) for values in columns.values()]
        rows.append([*ahead, *lists, r, *behind])
    _write(path, rows)


def write_columns(
    path: str | Path, table: Table, columns: Mapping[str, Sequence[object]]
) -> list[str]:
    """Write a table with columns added, replacing ``path``; gzipped by its ending.

    Args:
        path: The file; it may be the one that the table was read from.
        table: Its other columns stay as they are.
        columns: Values of new columns, behind the others; or, in its place, of one that is there.

    Returns:
        The columns that were there and have other values now.
    """
    header = list(dict.fromkeys((*table.header, *columns)))
    places = [header.index(name) for name in columns]
    rows: list[Sequence[object]] = [header]
    for fields, values in zip(table.rows, zip(*columns.values(), strict=True), strict=True):
        row: list[object] = [*fields, *[None] * (len(header) - len(fields))]
        for place, value in zip(places, values, strict=True):
            row[place] = _plain(value)
        rows.append(row)
    _write(path, rows)
    return [name for name in columns if name in table.header]


def _write(path: str | Path, rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    data = text.getvalue().encode(errors="backslashreplace")  # of names that are not UTF-8
    if Path(path).suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    write_atomic(path, lambda file: file.write(data) and None)


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value
