"""Files of tensors and plain data: written with a checksum, read in bounds and running no code.

What is written here carries the SHA-256 of its content; files without one, such as those of other
programs, have the CRC-32 of their archive, which :mod:`compofa.io.unpickle` compares.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from compofa.errors import CheckpointError
from compofa.io.atomic import write_atomic
from compofa.io.unpickle import skipped_names, unpickle

log = logging.getLogger(__name__)

CHECKSUM = "compofa-sha256"
"""Key of the checksum of all that stands beside it, as 64 hexadecimal digits."""

_UNREADABLE = (
    struct.error,
    zipfile.BadZipFile,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
)
"""What reading damaged and foreign files raises, as found by damaging some."""

_DEPTH = 64  # of nested data; optimisers' states have 4
_GROWTH = 8  # bytes of content a byte of a file: tensors may share what they are made from
_SLACK = 1 << 16
_LISTED = 8


def write_tensors(
    path: str | Path, data: Mapping[str, Any], previous: str | Path | None = None
) -> None:
    """Write what ``torch.save`` makes of ``data`` and its checksum, replacing ``path`` in one step.

    Args:
        path: The file.
        data: Tensors and plain data, by name.
        previous: Where to keep what ``path`` held; see :func:`compofa.io.atomic.write_atomic`.

    Raises:
        CompofaError: The folder cannot be written or the disk is full.
        TypeError: ``data`` holds something else.
    """
    buffer = io.BytesIO()  # on a full disk torch.save itself ends with an internal error
    torch.save({**data, CHECKSUM: checksum(data)}, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()) and None, previous)


def read_safely(path: str | Path) -> dict[str, Any]:
    """Read a mapping that ``torch.save`` wrote; :func:`read_hashed` without the hash."""
    return read_hashed(path)[0]


def read_hashed(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a mapping that ``torch.save`` wrote, running nothing that is in it.

    Objects other than dense tensors and plain data are :class:`compofa.io.unpickle.Skipped`; a line
    of the log names their types. Content that does not agree with its checksum is refused, and so
    is what would need far more memory than the file is long: compressed archives, tensors that
    repeat a few numbers.

    Returns:
        The mapping, and the hash (:func:`short_hash`) of the very bytes that it was read from,
        whatever is at ``path`` by now.

    Raises:
        CheckpointError: The file is missing, damaged, not a mapping, or was written to while it
            was read.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"expected a checkpoint file at {path}, got {_kind(path)}")
    try:
        # One open file throughout: another that takes its name meanwhile is another file.
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            digest = short_hash(file)
            data = unpickle(file)
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise CheckpointError(f"{path}: expected a finished file, got one being written to")
        if isinstance(data, dict):
            _check_content(data, _GROWTH * before.st_size + _SLACK)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: expected a file of tensors and plain data written by torch.save, "
            f"got one that cannot be read safely ({first_line(error)})"
        ) from error
    if not isinstance(data, dict):
        kind = type(data).__name__
        names = ascii(next(iter(skipped_names(data)), kind))[1:-1]
        raise CheckpointError(f"{path}: expected a mapping, got {names[:80]}")
    if names := sorted(skipped_names(data)):
        listed = ", ".join(ascii(name)[1:-1][:60] for name in names[:_LISTED])
        more = ", …" * (len(names) > _LISTED)
        log.info("%s: skipped what is no tensor or plain data: %s%s", path, listed, more)
    return data, digest


def _kind(path: Path) -> str:
    """Say what is at ``path``, which is no file."""
    try:
        return "a folder" if stat.S_ISDIR(os.stat(path).st_mode) else "a device, pipe or socket"
    except OSError as error:
        if os.path.islink(path):
            return f"a symbolic link that cannot be followed ({error.strerror})"
        return "nothing there" if isinstance(error, FileNotFoundError) else f"{error.strerror}"


def short_hash(file: BinaryIO) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a file, and go to its start."""
    digest = hashlib.sha256()
    file.seek(0)
    while part := file.read(1 << 20):
        digest.update(part)
    file.seek(0)
    return digest.hexdigest()[:16]


def checksum(data: Mapping[str, Any]) -> str:
    """Return the SHA-256 of names, types, shapes and values of tensors and plain data.

    Raises:
        TypeError: ``data`` holds something else.
    """
    return _hash(_pieces(data, strict=True))


def first_line(error: BaseException) -> str:
    """Return what ``error`` says, short enough to be quoted."""
    text = str(error).strip().split("\n")[0]
    return (text or type(error).__name__)[:120]


def _check_content(data: dict[str, Any], most: int) -> None:
    """Hold ``data`` against its checksum, which is taken out.

    Raises:
        ValueError: They do not agree, or the data would need more than ``most`` bytes.
        TypeError: There is a checksum, and something that it cannot be of.
    """
    wanted = data.pop(CHECKSUM, None)
    if wanted is None:
        for _ in _bounded(_pieces(data, values=False), most):
            pass
    elif _hash(_pieces(data, strict=True), most) != wanted:
        raise ValueError("damaged: the content does not match its checksum")


def _hash(pieces: Iterator[Any], most: int | None = None) -> str:
    digest = hashlib.sha256()
    for piece in pieces if most is None else _bounded(pieces, most):
        if not isinstance(piece, int):
            digest.update(piece)
    return digest.hexdigest()


def _bounded(pieces: Iterator[Any], most: int) -> Iterator[Any]:
    """Pass ``pieces`` on: bytes, and the sizes of tensors before their bytes are made."""
    total = 0
    for piece in pieces:
        total += piece if isinstance(piece, int) else 0
        if total > most:
            raise ValueError("content of far more bytes than the file has")
        yield piece


def _pieces(value: Any, strict: bool = False, values: bool = True, depth: int = 0) -> Iterator[Any]:
    """Take data apart into bytes that no other data gives, each after the size it stands for.

    Args:
        value: Tensors, plain data, and mappings, lists and tuples of them.
        strict: Whether anything else is an error; otherwise its type stands for it.
        values: Whether the bytes of tensors are wanted.
        depth: How deep in the data ``value`` is.

    Raises:
        ValueError: The data is nested too deeply, or a tensor has no data.
        TypeError: There is something else.
    """
    if depth > _DEPTH:
        raise ValueError("data nested too deeply")
    kind, parts = type(value).__name__, ()
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError("a tensor without numbers")
        plain = value.layout is torch.strided and not value.is_quantized
        if strict and not plain:
            raise TypeError(f"expected dense tensors, got {value.layout}, {value.dtype}")
        yield value.numel() * value.element_size() if plain else 1
        content = f"{value.dtype} {list(value.shape)}".encode()
        kind = "tensor"
        if plain and values:
            numbers = value.detach().cpu().contiguous().reshape(-1)
            parts = (memoryview(numbers.view(torch.uint8).numpy()),)
    elif isinstance(value, Mapping):
        content = b"%d" % len(value)
        kind = "mapping"
        parts = (item for pair in value.items() for item in pair)
    elif isinstance(value, list | tuple):
        content = b"%d" % len(value)
        kind = "list" if isinstance(value, list) else "tuple"
        parts = iter(value)
    elif isinstance(value, str | bytes):
        content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    elif value is None or isinstance(value, float | bool):
        content = repr(value).encode()
    elif isinstance(value, int):
        content = f"{value:x}".encode()  # of any length; decimal digits are limited
    elif strict:
        raise TypeError(f"expected tensors and plain data, got {kind}")
    else:
        content = b""
    yield len(content) + 1
    yield f"{kind} {len(content)}:".encode()
    yield content
    for part in parts:
        if isinstance(part, memoryview):
            yield part
        else:
            yield from _pieces(part, strict, values, depth + 1)
