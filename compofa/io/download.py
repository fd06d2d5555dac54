"""Published files: downloaded once, resumed when interrupted, checked, kept in torch's folder.

Beside a file ``NAME.sha256`` records its checksum when it is first seen, and every later use is
held to it. Until a download is whole it is ``NAME.part``, which the next attempt goes on with if
the server still has the file that ``NAME.part.json`` describes: by its ETag or the time of its last
change, one of which the server must give. What came is kept if it can be read as what it should be.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from compofa.errors import CheckpointError, CompofaError
from compofa.io.atomic import write_text_atomic
from compofa.io.untrusted import parse_json, printable, read_text
from compofa.io.web import (
    CHUNK,
    WINDOW_BYTES,
    ConnectionLostError,
    chunks,
    error_message,
    file_facts,
    is_unencrypted,
    join_url,
    open_url,
    redacted,
    validator_of,
)

BASE_URL = "https://raw.githubusercontent.com/han-cai/files/master/ofa"
"""Where Once-for-All's files are."""
ENVIRONMENT = "COMPOFA_DOWNLOADS"
"""Environment variable that names another place, such as a mirror."""
ATTEMPTS = 4
MAX_BYTES = 4 << 30
"""The largest file that is downloaded; the published ones are below 200 MB."""
CONFIG_BYTES = 4_000_000

log = logging.getLogger(__name__)

Check = Callable[[Path], Any]
"""Reads a file, and raises a CompofaError unless it is what it should be."""


def published_file(name: str, base_url: str | None = None, bar: bool = True) -> Path:
    """Return a published file, downloading it when it is not there.

    Args:
        name: Its path below the base, such as ``ofa_nets/ofa_mbv3_d234_e346_k357_w1.0``.
        base_url: Where to get it; by default :data:`ENVIRONMENT`'s value, or :data:`BASE_URL`.
        bar: Whether to show progress, on a terminal.

    Raises:
        CheckpointError: It cannot be had; the message says which URL and where to put the file.
    """
    base, path = base_url or os.environ.get(ENVIRONMENT) or BASE_URL, published_path(name)
    try:
        url = join_url(base, name)
    except OSError as error:
        raise CheckpointError(
            f"cannot download {name} ({ENVIRONMENT}: {error}): put that file at {path}"
        ) from error
    if name.endswith(".config"):
        return fetch(url, path, bar, _check_config, CONFIG_BYTES)
    return fetch(url, path, bar, _check_weights)


def _check_config(path: Path) -> None:
    from compofa.io.formats.net_config import read_json

    if not isinstance(read_json(path), dict):
        raise CheckpointError(f"{path}: expected a JSON object")


def _check_weights(path: Path) -> None:
    from compofa.io.tensors import read_safely

    read_safely(path)


def published_path(name: str) -> Path:
    """Return where a published file is kept: in ``checkpoints`` of torch hub's folder.

    Raises:
        CheckpointError: There is no such folder, for want of a home folder.
    """
    import torch

    folder = Path(torch.hub.get_dir())
    if folder.parts[:1] == ("~",):
        raise CheckpointError(
            f"expected a home folder to keep {name} in, got none: set HOME or TORCH_HOME"
        )
    return folder / "checkpoints" / name


def fetch(
    url: str, path: Path, bar: bool = True, check: Check | None = None, most: int = MAX_BYTES
) -> Path:
    """Download ``url`` to ``path`` unless that is there already.

    Args:
        url: Its address, https or http. A name and password in it are sent as such, and to no
            other host; errors show neither them nor a query.
        path: Where it is kept.
        bar: Whether to show progress, on a terminal.
        check: Reads the file; one that it refuses is not kept. Without it the server must say how
            long the file is.
        most: Bytes it may have.

    Raises:
        CheckpointError: It cannot be downloaded, or what is there has changed or is refused.
    """
    if not path.is_file():
        by_hand = f"put that file at {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f"{path.name}.part").open("ab") as part, _alone(part):
                if not path.is_file():  # another process may have been quicker
                    _download(url, part, bar, check, most)
                    _write_record(path, _checksum(Path(part.name)))
                    os.replace(part.name, path)
                    return path
        except ConnectionLostError as error:
            kept = path.with_name(f"{path.name}.part").is_file()
            again = "try again to go on from there" if kept else "try again"
            raise CheckpointError(
                f"cannot download {redacted(url)} ({error}): {again}, or {by_hand}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise CheckpointError(
                f"cannot download {redacted(url)} ({error_message(error)}): {by_hand}"
            ) from error
    check_file(path)
    if check is not None:
        with replaceable(path):
            check(path)
    return path


@contextlib.contextmanager
def replaceable(path: Path) -> Iterator[None]:
    """Say of a file that was downloaded, and cannot be used, how to download it again.

    Raises:
        CheckpointError: Using it raised a CompofaError.
    """
    try:
        yield
    except CompofaError as error:
        raise CheckpointError(
            f"{error}: delete {path} and {_record(path).name} to download it again"
        ) from error


def check_file(path: Path) -> None:
    """Hold a file to the checksum recorded beside it, or record it.

    Raises:
        CheckpointError: It has another one.
    """
    found, record = _checksum(path), _record(path)
    try:
        expected = record.read_text(encoding="utf-8", errors="replace").strip()[:64]
    except FileNotFoundError:  # a file that was put there by hand
        with contextlib.suppress(CompofaError):  # the folder may be for reading only
            _write_record(path, found)
        return
    except OSError as error:
        raise CheckpointError(f"cannot read {record}: {error.strerror or error}") from error
    if expected != found:
        raise CheckpointError(
            f"{path}: expected SHA-256 {printable(expected)} as in {record.name}, got {found}: "
            "delete both to download the file again"
        )


def _download(url: str, part: BinaryIO, bar: bool, check: Check | None, most: int) -> None:
    """Complete ``part``; attempts that add a good deal do not count as failed."""
    if is_unencrypted(url):
        log.warning("%s: over http, nothing verifies what comes", redacted(url))
    failed = 0
    while True:
        before = part.tell()
        try:
            ended = _attempt(url, part, bar, most)
            part.flush()
            os.fsync(part.fileno())
            _accept(part, check, ended)
            return
        except ConnectionLostError:
            failed = 0 if part.tell() >= before + WINDOW_BYTES else failed + 1
            if failed >= ATTEMPTS:
                raise
            time.sleep(0.1 * 2**failed)


def _accept(part: BinaryIO, check: Check | None, ended: bool) -> None:
    """Hold what came against ``check``; what is refused is dropped.

    Raises:
        ConnectionLostError: The file may be truncated: the server does not state its length.
        OSError: It is something else.
    """
    reason = None if ended else "the server does not say how long the file is"
    if check is not None:
        try:
            check(Path(part.name))
            return
        except CompofaError as error:
            said = str(error).removeprefix(f"{part.name}: ")
            reason = f"{reason}, and {said}" if reason else said
    if reason is not None:
        part.truncate(0)
        part.seek(0)
        raise OSError(reason) if ended else ConnectionLostError(reason)


def _attempt(url: str, part: BinaryIO, bar: bool, most: int) -> bool:
    """Go on with ``part``, or start over where that is not possible.

    Returns:
        Whether it is sure that what came is all.

    Raises:
        ConnectionLostError: Another attempt may succeed.
        OSError: None will.
    """
    from tqdm import tqdm

    start, known = part.seek(0, os.SEEK_END), _read_facts(part)
    validator = validator_of(known)
    start = start if validator and known.get("url") == redacted(url) else 0
    response = open_url(url, start, known.get(validator) if validator else None)
    with response:
        facts = {"url": redacted(url), **file_facts(response, start)}
        same = ("length", validator) if known.get("length") else (validator,)
        other = any(facts.get(key) != known.get(key) for key in same)
        if (response.status == 206 and other) or response.status == 416:
            part.truncate(0)
            _facts(part).unlink(missing_ok=True)
            raise ConnectionLostError("the file there is another one than before")
        total = facts["length"]
        if (total or 0) > most:
            raise OSError(f"expected at most {most:,} bytes, got {total:,}")
        start = start if response.status == 206 else 0
        part.truncate(start)
        part.seek(start)
        write_text_atomic(_facts(part), json.dumps(known if start else facts))
        with tqdm(
            desc=Path(part.name).stem, total=total, initial=start, disable=None if bar else True,
            unit="B", unit_scale=True, leave=False,
        ) as progress:  # fmt: skip
            for chunk in chunks(response):
                part.write(chunk)
                progress.update(len(chunk))
                if part.tell() > most:
                    part.truncate(0)
                    raise OSError(f"expected at most {most:,} bytes, got more")
    if total is not None and part.tell() != total:
        if part.tell() > total:
            part.truncate(0)
        raise ConnectionLostError(f"expected {total:,} bytes, got {part.tell():,}")
    return total is not None or response.chunked  # whose end is marked


@contextlib.contextmanager
def _alone(part: BinaryIO) -> Iterator[None]:
    """Let one process at a time work on a download; the others wait. Clear what is of no use."""
    fcntl.flock(part, fcntl.LOCK_EX)
    try:
        yield
    finally:
        path = Path(part.name)
        if not path.is_file() or not path.stat().st_size:
            path.unlink(missing_ok=True)
            _facts(part).unlink(missing_ok=True)
        fcntl.flock(part, fcntl.LOCK_UN)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _write_record(path: Path, checksum: str) -> None:
    """Write what ``sha256sum --check`` reads."""
    write_text_atomic(_record(path), f"{checksum}  {path.name}\n")


def _facts(part: BinaryIO) -> Path:
    return Path(f"{part.name}.json")


def _read_facts(part: BinaryIO) -> dict[str, Any]:
    try:
        facts = parse_json(read_text(_facts(part)))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
