"""Tables of subnets: CSV with one row per subnet; other columns are kept.

A subnet has the columns of its family's config format, such as ``ks``, ``e``, ``d`` and ``r``: the
numbers of a list are separated by spaces, with 0 past a stage's depth. Files ending in ``.gz`` are
gzipped.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compofa.errors import SpaceError, TableError, did_you_mean
from compofa.io.atomic import write_atomic
from compofa.networks.families import format_of
from compofa.space.arrays import SubnetArrays
from compofa.space.config import ConfigFormat, RowError
from compofa.space.search_space import SearchSpace

MAX_FILE_BYTES = 256 << 20
_NAMED = 5
_LARGEST = 1e9
"""The largest number of a subnet, so that integers stay exact."""


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
    """Read a CSV with one line per row.

    Raises:
        TableError: The file is missing, empty or malformed; the message names the line.
    """
    path, rows = Path(path), []
    try:
        reader = csv.reader(io.StringIO(_text(path), newline=""))
        header = next(reader, [])
        if header and header[0].lstrip().startswith(("{", "[", "<")):
            raise ValueError(f"expected the names of columns, got {header[0]!r:.30}")
        twice = [name for place, name in enumerate(header) if name in header[:place]]
        if twice:
            raise ValueError(f"expected different columns, got {twice[0]!r} twice")
        for row in filter(None, reader):
            if reader.line_num != len(rows) + 2:  # or line numbers would mislead
                raise ValueError("expected one line per row, got blank or broken ones before it")
            if len(row) > len(header):
                raise ValueError(f"expected {len(header)} fields, got more")
            rows.append(row + [""] * (len(header) - len(row)))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise TableError(f"cannot read the table {path}: {reason}") from error
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
    form = format_of(header)
    lists = [key for key, _ in form.keys]
    wanted = list(dict.fromkeys((*form.columns, *columns)))
    missing = [key for key in wanted if key not in header]
    if missing:
        hint = did_you_mean(missing[0], header).rstrip()
        raise TableError(
            f"{path}: expected columns {', '.join(wanted)}, missing {', '.join(missing)}"
            + (f" ({missing[0]}: {hint})" if hint else "")
        )
    if not rows:
        raise TableError(f"{path}: expected rows, got none")
    values: dict[str, list[list[float]]] = {key: [] for key in wanted}
    for line, row in enumerate(rows, 2):
        for key, numbers in values.items():
            try:
                text = row[header.index(key)]
                numbers.append(_row(key, text, numbers, key in lists))
            except ValueError as error:
                raise TableError(f"{path}, line {line}: {error}") from error
    whole = {key: np.array(numbers) for key, numbers in values.items()}
    integers = {
        key: table.astype(np.int64) if (table == np.rint(table)).all() else table
        for key, table in whole.items()
    }
    integers["r"] = integers["r"][:, 0]
    try:
        arrays = form.read_table(integers)
    except RowError as error:
        raise TableError(f"{path}, {lines([error.row])}: {error}") from error
    except SpaceError as error:
        raise TableError(f"{path}: {error}") from error
    return arrays, {name: whole[name][:, 0] for name in columns}


def without_repeats(arrays: SubnetArrays, values: np.ndarray) -> tuple[SubnetArrays, np.ndarray]:
    """Drop duplicate rows: of equal subnets with equal values [n], the first is kept."""
    held = [*arrays.blocks.values(), arrays.depths, arrays.outer, arrays.resolutions, values]
    rows = np.sort(np.unique(np.column_stack(held), axis=0, return_index=True)[1])
    return arrays[rows], values[rows]


def _text(path: Path) -> str:
    """Read a text file, gzipped by its ending, that is not too large, unpacked."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise TableError(f"{path}: expected a table of at most {MAX_FILE_BYTES} bytes, got more")
    return data.decode("utf-8-sig")


def _row(key: str, text: str, before: list[list[float]], many: bool) -> list[float]:
    try:
        numbers = [float(item) for item in text.split()]
    except ValueError:
        raise ValueError(f"{key}: expected numbers, got {text!r:.60}") from None
    wanted = len(before[0]) if before else max(1, len(numbers)) if many else 1
    if len(numbers) != wanted or not np.isfinite(numbers).all():
        raise ValueError(f"{key}: expected {wanted} finite number(s), got {text!r:.60}")
    if (many or key == "r") and max(map(abs, numbers), default=0) > _LARGEST:
        raise ValueError(f"{key}: expected numbers up to {_LARGEST:g}, got {text!r:.60}")
    return numbers


def require_members(
    arrays: SubnetArrays, space: SearchSpace, path: str | Path, rows: Sequence[int] | None = None
) -> SubnetArrays:
    """Check that every subnet is in ``space``, whatever its resolution.

    Args:
        arrays: The subnets.
        space: The space.
        path: For messages.
        rows: For messages, which rows of the table the subnets are, counted from 0; by default all.

    Returns:
        The subnets, with 0 past each stage's depth whatever stood there.

    Raises:
        TableError: Some are not; the message names the lines and says what is wrong with the
            first.
    """
    form, slots = space.config_format, space.slots
    shape = {name: len(space.stages) * slots for name in space.names}
    wanted = {**shape, "depth": len(space.stages), form.outer: len(space.outer)}
    held = {**arrays.blocks, "depth": arrays.depths, form.outer: arrays.outer}
    got = {name: values.shape[1] for name, values in held.items()}
    if got != wanted:
        shown = [", ".join(f"{name} {count}" for name, count in counts.items() if name)
                 for counts in (wanted, got)]  # fmt: skip
        raise TableError(
            f"{path}: expected numbers of blocks and stages as in {space.name} ({shown[0]}), "
            f"got {shown[1]}"
        )
    fits = space.restrict(resolutions=sorted({int(r) for r in arrays.resolutions}))
    try:
        return fits.arrays(fits.genes_of(arrays))
    except SpaceError:
        wrong = [
            (place, faults[0])
            for place, row in zip(
                range(len(arrays.depths)) if rows is None else rows, arrays, strict=True
            )
            if (faults := _faults(row, fits))
        ]
        raise TableError(
            f"{path}: not in space {space.name}: {lines([place for place, _ in wrong])}; "
            f"{lines([wrong[0][0]])}: {wrong[0][1]}"
        ) from None


def lines(rows: Sequence[int] | np.ndarray) -> str:
    """Name the lines of a table that rows, counted from 0, stand on: the first few of them."""
    named = ", ".join(str(row + 2) for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    return f"line{'s' if len(rows) > 1 else ''} {named}{more}"


def _faults(row: SubnetArrays, space: SearchSpace) -> list[str]:
    """Say what keeps a single subnet out of ``space``."""
    if not np.isin(row.depths, range(space.slots + 1)).all():
        depths = " ".join(map(str, row.depths[0].tolist()))
        return [f"depth: expected whole numbers from 0 to {space.slots}, got {depths}"]
    row = replace(row, depths=row.depths.astype(np.int64))
    return space.faults(next(space.subnets_of(row)))


def write_subnets(
    path: str | Path,
    arrays: SubnetArrays,
    form: ConfigFormat,
    columns: Mapping[str, Sequence[object]],
    first: Mapping[str, Sequence[object]] | None = None,
) -> None:
    """Write subnets and columns beside them as CSV, replacing ``path``; gzipped by its ending.

    Args:
        path: The file.
        arrays: The subnets.
        form: Their config format.
        columns: Values behind those of the subnets; ``None`` becomes an empty field.
        first: Values before them.
    """
    before = dict(first or {})
    written, keys = form.table(arrays), form.columns
    rows: list[Sequence[object]] = [[*before, *keys, *columns]]
    for row, numbers in enumerate(zip(*(written[key].tolist() for key in keys), strict=True)):
        *lists, r = numbers
        lists = [" ".join(map(str, values)) for values in lists]
        ahead = [_plain(values[row]) for values in before.values()]
        behind = [_plain(values[row]) for values in columns.values()]
        rows.append([*ahead, *lists, r, *behind])
    _write(path, rows)


def rounded(values: np.ndarray) -> list[float]:
    """Return values [n] for a table: four digits after the point, and six significant ones.

    Whole numbers stay whole.
    """
    if (values == np.rint(values)).all():
        return values.astype(np.int64).tolist()
    small = np.abs(values) < 10
    return [
        float(f"{value:.6g}") if below else round(value, 4)
        for value, below in zip(values.tolist(), small.tolist(), strict=True)
    ]


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
