"""One writer at a time: a lock on what a command writes, held by its process and gone with it.

It is a POSIX record lock (``fcntl.lockf``) on a small file, ``.lock`` in a folder or ``.NAME.lock``
beside a file, which says who holds it. The kernel releases the lock when the process ends, however
it ends; a lock file that a killed process has left is taken over. Record locks belong to the
process: data-loading processes do not inherit one and so cannot keep it alive, as they would with
``flock``. For the same reason threads of one process do not exclude each other.

Between machines the lock holds as far as the file system passes it on: NFS 4, NFS 3 with its lock
daemon, Lustre mounted with ``flock``; not NFS mounted with ``nolock`` or ``local_lock``. Where a
file system has no locks at all, a warning says so and the output is written without one.
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

_TAKEN = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_MOST_BYTES = 4096


@contextmanager
def exclusive(path: str | Path, folder: bool | None = False, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes ``path`` within the block.

    Drafts that a killed process has left of it are removed. Folders that are missing are made, and
    removed again if nothing was written to them. Devices and pipes are not locked.

    Args:
        path: The file, or the folder, that is about to be written.
        folder: Whether it is a folder that the block may write any file of; ``None`` for a file or
            a folder that is replaced as a whole.
        wait: Whether to wait for another process that is writing it.

    Raises:
        BusyError: Another process is writing it; nothing was touched.
        CompofaError: The lock cannot be made: the folder cannot be written, or the disk is full.
    """
    made: list[Path] = []
    handle = None
    try:
        try:
            target = Path(os.path.realpath(path))
            lock = target / ".lock" if folder else target.parent / f".{target.name}.lock"
            if folder is False and os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if folder or not is_stream(path):
                _make_folders(lock.parent, made)
                handle = _acquire(lock, path, wait)
        except OSError as error:
            what = "to the output folder " if folder else ""
            raise CompofaError(f"cannot write {what}{path}: {error.strerror or error}") from error
        if handle is not None:
            remove_drafts(lock.parent, None if folder else target.name)
        yield
    finally:
        if handle is not None:
            with suppress(OSError):  # it holds nothing any more
                lock.unlink()
            os.close(handle)
        for each in reversed(made):
            with suppress(OSError):  # something was written to it
                each.rmdir()


@contextmanager
def exclusive_by_main(backend: Backend, path: str | Path, folder: bool = False) -> Iterator[None]:
    """Let worker 0 hold :func:`exclusive` within a block that all workers enter.

    Raises:
        BusyError: Another process is writing ``path``; an OtherWorkerError on all but worker 0.
        CompofaError: The lock cannot be made.
    """
    with ExitStack() as stack:
        backend.from_main(lambda: stack.enter_context(exclusive(path, folder)))
        yield


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it; those that were missing are appended to ``made``."""
    if not folder.is_dir():
        if folder.parent != folder:
            _make_folders(folder.parent, made)
        with suppress(FileExistsError):  # it was made meanwhile, or opening the lock says what is
            folder.mkdir()
            made.append(folder)


def _acquire(lock: Path, path: str | Path, wait: bool) -> int | None:
    """Return an open file that holds the lock; ``None`` where the file system has no locks."""
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
                    "%s: its file system has no locks (%s): let no other process write it",
                    path, error.strerror,
                )  # fmt: skip
                return None
            if _is_at(handle, lock):  # else its last holder has just removed it
                stack.pop_all()
                _sign(handle)
                return handle


def _lock(handle: int, path: str | Path, wait: bool) -> None:
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _TAKEN:
            raise
        if not wait:
            raise BusyError(
                f"{path} is being written by {holder(handle)}: wait for it, stop it, or choose "
                "another output"
            ) from None
        log.info("waiting for %s, which writes %s", holder(handle), path)
        fcntl.lockf(handle, fcntl.LOCK_EX)


def _is_at(handle: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(lock))
    except FileNotFoundError:
        return False


def _sign(handle: int) -> None:
    """Write who holds the lock; it is held, too, where a full disk does not take that."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    text = json.dumps({"pid": os.getpid(), "host": platform.node(), "since": since})
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode(), 0)


def holder(handle: int) -> str:
    """Say who holds the lock of an open lock file, as far as its holder has written that."""
    try:
        data = parse_json(os.pread(handle, _MOST_BYTES, 0))
        return f"process {data['pid']!s:.16} on {data['host']!s:.64} since {data['since']!s:.32}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
