"""Published files: downloaded once, resumed when interrupted, checked, kept in torch's folder.

Beside a file ``NAME.sha256`` records its checksum when it is first seen, and every later use is
held to it. Until a download is whole it is ``NAME.part``, which the next attempt goes on with if
the server still has the file that ``NAME.part.json`` describes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from compofa.errors import CheckpointError, CompofaError
from compofa.files import write_text_atomic
from compofa.plain import parse_json, read_text

BASE_URL = "https://raw.githubusercontent.com/han-cai/files/master/ofa"
"""Where Once-for-All's files are."""
ENVIRONMENT = "COMPOFA_DOWNLOADS"
"""Environment variable that names another place, such as a mirror."""
TIMEOUT_S, ATTEMPTS, CHUNK = 30.0, 4, 1 << 20


class _CutError(Exception):
    """The connection ended, or nothing came; another attempt may go on from there."""


def published_file(name: str, base_url: str | None = None, bar: bool = True) -> Path:
    """Return a published file, downloading it when it is not there.

    Args:
        name: Its path below the base, such as ``ofa_nets/ofa_mbv3_d234_e346_k357_w1.0``.
        base_url: Where to get it; by default :data:`ENVIRONMENT`'s value, or :data:`BASE_URL`.
        bar: Whether to show progress, on a terminal.

    Raises:
        CheckpointError: It cannot be had; the message says which URL and where to put the file.
    """
    base_url = base_url or os.environ.get(ENVIRONMENT) or BASE_URL
    url = f"{base_url.rstrip('/')}/{urllib.parse.quote(name)}"
    return fetch(url, published_path(name), bar)


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


def fetch(url: str, path: Path, bar: bool = True) -> Path:
    """Download ``url`` to ``path`` unless that is there already.

    Raises:
        CheckpointError: It cannot be downloaded, or what is there has changed.
    """
    if not path.is_file():
        by_hand = f"put that file at {path}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_name(f"{path.name}.part").open("ab") as part, _alone(part):
                if not path.is_file():  # another process may have been quicker
                    _download(url, part, bar)
                    _write_record(path, _checksum(Path(part.name)))
                    os.replace(part.name, path)
        except _CutError as error:
            raise CheckpointError(
                f"cannot download {url} ({error}): try again to go on from there, or {by_hand}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise CheckpointError(f"cannot download {url} ({_reason(error)}): {by_hand}") from error
    check_file(path)
    return path


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
            f"{path}: expected SHA-256 {expected} as in {record.name}, got {found}: delete both "
            "to download the file again"
        )


def _download(url: str, part: BinaryIO, bar: bool) -> None:
    """Complete ``part``; attempts that add something do not count as failed."""
    failed = 0
    while True:
        before = part.tell()
        try:
            _attempt(url, part, bar)
            part.flush()
            os.fsync(part.fileno())
            return
        except _CutError:
            failed = 0 if part.tell() > before else failed + 1
            if failed >= ATTEMPTS:
                raise
            time.sleep(0.1 * 2**failed)


def _attempt(url: str, part: BinaryIO, bar: bool) -> None:
    """Go on with ``part``, or start over where that is not possible.

    Raises:
        _CutError: Another attempt may do better.
        OSError: None will.
    """
    from tqdm import tqdm

    start, known = part.seek(0, os.SEEK_END), _read_facts(part)
    start = start if known else 0
    response = _open(url, start)
    with response:
        facts = _describe(response, start)
        if (response.status == 206 and facts != known) or response.status == 416:
            part.truncate(0)
            raise _CutError("the file there is another one than before")
        start = start if response.status == 206 else 0
        part.truncate(start)
        part.seek(start)
        write_text_atomic(_facts(part), json.dumps(facts))
        total = facts["length"]
        with tqdm(
            desc=Path(part.name).stem, total=total, initial=start, disable=None if bar else True,
            unit="B", unit_scale=True, leave=False,
        ) as progress:  # fmt: skip
            for chunk in _chunks(response):
                part.write(chunk)
                progress.update(len(chunk))
    if total is not None and part.tell() != total:
        if part.tell() > total:
            part.truncate(0)
        raise _CutError(f"expected {total:,} bytes, got {part.tell():,}")


def _open(url: str, start: int) -> Any:
    """Ask for a file from byte ``start`` on."""
    headers = {"User-Agent": "compofa", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        request = urllib.request.Request(url, headers=headers)
    except ValueError as error:
        raise OSError(f"not a URL: {error}") from None
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # it has no such bytes: what is here is not the start of it
            return error
        error.close()
        if error.code in (408, 429) or error.code >= 500:
            raise _CutError(f"HTTP status {error.code}") from error
        raise OSError(f"HTTP status {error.code}") from error
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise _CutError(_reason(error)) from error


def _describe(response: Any, start: int) -> dict[str, Any]:
    """Return what tells one file from another: its length, and its tag where there is one.

    Raises:
        OSError: The answer is not the file, or not the part of it that was asked for.
    """
    headers = response.headers
    facts: dict[str, Any] = {"etag": headers.get("ETag"), "length": None}
    if response.status == 416:
        return facts
    if response.status not in (200, 206) or headers.get_content_type() == "text/html":
        kind = headers.get_content_type()
        raise OSError(f"expected a file, got HTTP status {response.status} with {kind}")
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise OSError("expected the rest of the file, got another part of it")
        return facts | {"length": int(match[2])}
    length = headers.get("Content-Length", "")
    return facts | {"length": int(length) if length.isdecimal() else None}


def _chunks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _CutError(_reason(error)) from error
        if not chunk:
            return
        yield chunk


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


def _read_facts(part: BinaryIO) -> dict[str, Any] | None:
    try:
        facts = parse_json(read_text(_facts(part)))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _reason(error: BaseException) -> str:
    inner = getattr(error, "reason", None) or error
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return " ".join(str(text).split())[:160]
