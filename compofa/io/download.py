"""Published files: downloaded once into torch hub's folder, resumable, verified.

When a file is first used, its checksum is recorded in ``NAME.sha256`` beside it; every later use is
verified against it. A partial download is kept as ``NAME.part`` and resumed if the server still has
the file that ``NAME.part.json`` describes by its ETag or its time of last modification, one of
which the server must send. A download is kept only if it can be read as a file of its kind.
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
from compofa.io.hub import published_path
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
"""URL of Once-for-All's files."""
FOLDER_URLS = {
    "compofa_nets": "https://raw.githubusercontent.com/gatech-sysml/CompOFA/main/ofa/checkpoints",
}
"""URLs of folders of published files that are elsewhere; a mirror has all of them below one URL."""
ENVIRONMENT = "COMPOFA_DOWNLOADS"
"""Environment variable with another base URL, such as that of a mirror."""
ATTEMPTS = 4
MAX_BYTES = 4 << 30
"""Size limit of a download; the published files are below 200 MB."""
CONFIG_BYTES = 4_000_000

log = logging.getLogger(__name__)

Check = Callable[[Path], Any]
"""Reads a file and raises a CompofaError if it is not of the expected kind."""


def published_file(name: str, base_url: str | None = None, bar: bool = True) -> Path:
    """Return the path of a published file, downloading the file if it is not there.

    Args:
        name: Its path below the base URL, such as ``ofa_nets/ofa_mbv3_d234_e346_k357_w1.0``.
        base_url: Base URL; by default the value of :data:`ENVIRONMENT`, else :data:`BASE_URL`, or
            that of the folder in :data:`FOLDER_URLS`.
        bar: Whether to show a progress bar on a terminal.

    Raises:
        CheckpointError: The download fails; the message names the URL and where to put the file.
    """
    base, path = base_url or os.environ.get(ENVIRONMENT), published_path(name)
    folder, _, rest = name.partition("/")
    try:
        if base or folder not in FOLDER_URLS:
            url = join_url(base or BASE_URL, name)
        else:
            url = join_url(FOLDER_URLS[folder], rest)
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


def fetch(
    url: str, path: Path, bar: bool = True, check: Check | None = None, most: int = MAX_BYTES
) -> Path:
    """Download ``url`` to ``path`` unless the file exists.

    Args:
        url: An https or http URL. Credentials in it are sent to its own host only; error messages
            contain neither credentials nor the query.
        path: Path to keep the file at.
        bar: Whether to show a progress bar on a terminal.
        check: Reads a new download, which is discarded if this raises. Without it, the server must
            send the length of the file.
        most: Size limit in bytes.

    Raises:
        CheckpointError: The download fails or is refused, or an existing file does not match its
            checksum.
    """
    if not path.is_file():
        by_hand = f"put that file at {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f"{path.name}.part").open("ab") as part, _alone(part):
                if not path.is_file():  # another process may have downloaded it meanwhile
                    _download(url, part, bar, check, most)
                    _write_record(path, _checksum(Path(part.name)))
                    os.replace(part.name, path)
                    return path
        except ConnectionLostError as error:
            kept = path.with_name(f"{path.name}.part").is_file()
            again = "try again to continue from there" if kept else "try again"
            raise CheckpointError(
                f"cannot download {redacted(url)} ({error}): {again}, or {by_hand}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise CheckpointError(
                f"cannot download {redacted(url)} ({error_message(error)}): {by_hand}"
            ) from error
    check_file(path)
    return path


@contextlib.contextmanager
def replaceable(path: Path) -> Iterator[None]:
    """Add to errors about a downloaded file how to download it again.

    Raises:
        CheckpointError: The block raised a CompofaError.
    """
    try:
        yield
    except CompofaError as error:
        raise CheckpointError(
            f"{error}: delete {path} and {_record(path).name} to download it again"
        ) from error


def check_file(path: Path) -> None:
    """Verify a file against the checksum recorded beside it, or record its checksum.

    Raises:
        CheckpointError: The checksum does not match.
    """
    found, record = _checksum(path), _record(path)
    try:
        expected = record.read_text(encoding="utf-8", errors="replace").strip()[:64]
    except FileNotFoundError:  # the file was put there by hand
        with contextlib.suppress(CompofaError):  # the folder may be read-only
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
    """Complete ``part``; attempts that make progress do not count as failed."""
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
    """Check a download, and discard it if it is refused.

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
    """Resume ``part``, or restart it if the server cannot resume.

    Returns:
        Whether the download is known to be complete.

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
            raise ConnectionLostError("the file on the server has changed")
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
    return total is not None or response.chunked  # chunked transfers mark their end


@contextlib.contextmanager
def _alone(part: BinaryIO) -> Iterator[None]:
    """Lock a download for this process, and remove an empty ``part`` at the end."""
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
    """Write the checksum in the format of ``sha256sum --check``."""
    write_text_atomic(_record(path), f"{checksum}  {path.name}\n")


def _facts(part: BinaryIO) -> Path:
    return Path(f"{part.name}.json")


def _read_facts(part: BinaryIO) -> dict[str, Any]:
    try:
        facts = parse_json(read_text(_facts(part)))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
