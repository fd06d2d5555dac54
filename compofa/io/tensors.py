"""Files of tensors and plain data, written with a checksum, read safely in bounded memory.

Files written here hold the SHA-256 of their content. Those without one, such as files of other
programs, have the CRC-32 of their archive, which :mod:`compofa.io.unpickle` verifies.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
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
"""Key of the checksum over all other entries, as 64 hexadecimal digits."""

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
"""Errors raised by reading damaged and foreign files, as found by fuzzing."""

_DEPTH = 64  # of nested data; states of optimisers have 4
_GROWTH = 8  # bytes of content per byte of the file: tensors may share storage
_SLACK = 1 << 16
_LISTED = 8


def write_tensors(
    path: str | Path, data: Mapping[str, Any], previous: str | Path | None = None
) -> None:
    """Write ``data`` and its checksum with ``torch.save``, replacing ``path`` atomically.

    Args:
        path: File to write.
        data: Tensors and plain data, by name.
        previous: Path to keep the previous file at; see :func:`compofa.io.atomic.write_atomic`.

    Raises:
        CompofaError: The folder cannot be written or the disk is full.
        TypeError: ``data`` holds objects of other types.
    """
    buffer = io.BytesIO()  # on a full disk, torch.save itself fails with an internal error
    torch.save({**data, CHECKSUM: checksum(data)}, buffer)
    write_atomic(path, lambda file: file.write(buffer.getbuffer()) and None, previous)


def read_safely(path: str | Path) -> dict[str, Any]:
    """Read a mapping written by ``torch.save``: :func:`read_hashed` without the hash."""
    return read_hashed(path)[0]


def read_hashed(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a mapping written by ``torch.save`` without executing code from the file.

    Objects other than dense tensors and plain data become :class:`compofa.io.unpickle.Skipped`, and
    their types are logged. Content that does not match its checksum is refused, and so is content
    that would need far more memory than the size of the file, such as compressed archives and
    expanded tensors.

    Returns:
        The mapping, and the hash (:func:`short_hash`) of the bytes that it was read from, even if
        the file at ``path`` has been replaced since.

    Raises:
        CheckpointError: The file is missing, damaged, not a mapping, or was modified while it was
            read.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise CheckpointError(f"expected a checkpoint file at {path}, got {_kind(path)}")
    try:
        # Hash and content come from one open file, even if the path is replaced meanwhile.
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
        log.info("%s: skipped objects other than tensors and plain data: %s%s", path, listed, more)
    return data, digest


def _kind(path: Path) -> str:
    """Describe what is at ``path`` in place of a regular file."""
    if os.path.exists(path):
        return "a folder" if os.path.isdir(path) else "a device, pipe or socket"
    if not os.path.islink(path):
        return "nothing there"
    try:
        os.stat(path)
        return "a link that changed meanwhile"
    except OSError as error:
        return f"a symbolic link that cannot be followed ({error.strerror})"


def short_hash(file: BinaryIO) -> str:
    """Return the first 16 hexadecimal digits of a file's SHA-256 and rewind the file."""
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
    """Return the first line of an error's message, at most 120 characters."""
    text = str(error).strip().split("\n")[0]
    return (text or type(error).__name__)[:120]


def _check_content(data: dict[str, Any], most: int) -> None:
    """Verify the checksum of ``data`` and remove it.

    Raises:
        ValueError: It does not match, or the data would need more than ``most`` bytes.
        TypeError: There is a checksum, and an object of a type that none can be taken of.
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
    """Yield ``pieces``: bytes, and the sizes of tensors before their bytes are copied."""
    total = 0
    for piece in pieces:
        total += piece if isinstance(piece, int) else 0
        if total > most:
            raise ValueError("content of far more bytes than the file")
        yield piece


def _pieces(value: Any, strict: bool = False, values: bool = True, depth: int = 0) -> Iterator[Any]:
    """Serialise data unambiguously as pieces of bytes, each preceded by the size of its content.

    Args:
        value: Tensors, plain data, and mappings, lists and tuples of them.
        strict: Whether other types are errors; otherwise only the name of the type is serialised.
        values: Whether to include the values of tensors.
        depth: Nesting depth of ``value``.

    Raises:
        ValueError: The data is nested too deeply, or a tensor has no data.
        TypeError: ``strict``, and there is an object of another type.
    """
    if depth > _DEPTH:
        raise ValueError("data nested too deeply")
    kind, parts = type(value).__name__, ()
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError("a tensor without data")
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
