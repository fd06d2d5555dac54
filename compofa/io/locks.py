"""Exclusive locks on the outputs of a command, so that each has one writer at a time.

A lock is a POSIX record lock (``fcntl.lockf``) on a small file that names its holder: ``.lock`` in
a folder, or ``.NAME.lock`` beside a file. The kernel releases it when the process ends in any way,
so a lock file that a killed process left does not block others. Record locks belong to one process:
unlike with ``flock``, loader workers do not inherit and prolong them. For the same reason, threads
of one process do not exclude each other.

Across machines, locks work on NFS 4, NFS 3 with a lock daemon, and Lustre mounted with ``flock``,
but not on NFS mounted with ``nolock`` or ``local_lock``. On file systems without locks, a warning
is logged and the output is written without one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compofa.errors import BusyError, CompofaError
from compofa.io.atomic import is_stream, remove_drafts
from compofa.io.untrusted import parse_json

if TYPE_CHECKING:
    from compofa.distributed.backend import Backend

log = logging.getLogger(__name__)

_LOCKED = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_MAX_BYTES = 4096


@contextmanager
def exclusive(path: str | Path, folder: bool | None = False, wait: bool = False) -> Iterator[None]:
    """Lock ``path`` for writing within the block.

    Drafts of ``path`` that a killed process left are removed. Missing folders are created, and
    removed again if they stay empty. Devices and pipes are not locked.

    Args:
        path: The file or folder to write.
        folder: True for a folder in which the block may write any file, False for a file, ``None``
            for a file or folder that is replaced as a whole.
        wait: Whether to wait for another process that holds the lock.

    Raises:
        BusyError: Another process holds the lock. Nothing was changed.
        CompofaError: The lock cannot be created: the folder cannot be written, or the disk is full.
    """
    created: list[Path] = []
    handle = None
    try:
        try:
            target = Path(os.path.realpath(path))
            lock = target / ".lock" if folder else target.parent / f".{target.name}.lock"
            if folder is False and os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if folder or not is_stream(path):
                _make_folders(lock.parent, created)
                handle = _acquire(lock, path, wait)
        except OSError as error:
            what = "to the output folder " if folder else ""
            raise CompofaError(f"cannot write {what}{path}: {error.strerror or error}") from error
        if handle is not None:
            remove_drafts(lock.parent, None if folder else target.name)
        yield
    finally:
        if handle is not None:
            with suppress(OSError):  # the file has no further use
                lock.unlink()
            os.close(handle)
        for each in reversed(created):
            with suppress(OSError):  # not empty
                each.rmdir()


@contextmanager
def exclusive_by_main(backend: Backend, path: str | Path, folder: bool = False) -> Iterator[None]:
    """Hold :func:`exclusive` on rank 0 within a block that all ranks enter.

    Raises:
        BusyError: Another process holds the lock. Other ranks than 0 raise OtherWorkerError.
        CompofaError: The lock cannot be created.
    """
    with ExitStack() as stack:
        backend.from_main(lambda: stack.enter_context(exclusive(path, folder)))
        yield


def _make_folders(folder: Path, created: list[Path]) -> None:
    """Create a folder and its parents, and append those that were missing to ``created``."""
    if not folder.is_dir():
        if folder.parent != folder:
            _make_folders(folder.parent, created)
        with suppress(FileExistsError):  # created meanwhile, or opening the lock reports it
            folder.mkdir()
            created.append(folder)


def _acquire(lock: Path, path: str | Path, wait: bool) -> int | None:
    """Return a descriptor that holds the lock; ``None`` if the file system has no locks."""
    while True:
        with ExitStack() as stack:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            stack.callback(os.close, handle)
            try:
                _lock(handle, path, wait)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                lock.unlink(missing_ok=True)
                log.warning(
                    "%s: no locks on this file system (%s): other processes must not write it",
                    path, error.strerror,
                )  # fmt: skip
                return None
            if _is_at(handle, lock):  # else its previous holder just removed it
                stack.pop_all()
                _write_holder(handle)
                return handle


def _lock(handle: int, path: str | Path, wait: bool) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _LOCKED:
            raise
        if not wait:
            raise BusyError(
                f"{path} is being written by {read_holder(handle)}: wait for it, stop it, or "
                "choose another output"
            ) from None
        log.info("waiting for %s to write %s", read_holder(handle), path)
        fcntl.lockf(handle, fcntl.LOCK_EX)


def _is_at(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(lock))
    except FileNotFoundError:
        return False


def _write_holder(handle: int) -> None:
    """Write who holds the lock. It is held even if a full disk prevents that."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since})
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def read_holder(handle: int) -> str:
    """Return a description of the holder of an open lock file, for messages."""
    try:
        data = parse_json(os.pread(handle, _MAX_BYTES, 0))
        return f"process {data['pid']!s:.16} on {data['host']!s:.64} since {data['since']!s:.32}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
