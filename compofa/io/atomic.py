"""Writing files so that a reader sees the old content or the new, never half of either."""

import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from compofa.errors import CompofaError

_DRAFT = ".draft"  # ending of files and folders that are being written


def write_atomic(
    path: str | Path,
    writer: Callable[[BinaryIO], None],
    previous: str | Path | None = None,
) -> None:
    """Replace ``path`` with what ``writer`` writes, in one step.

    The content goes to a temporary file in the same folder, is flushed to the disk and then takes
    the place of ``path``. When anything fails, ``path`` stays as it was and the temporary file
    is removed. A process that is killed leaves the temporary file: :func:`remove_drafts`.

    A symbolic link stays, and the file it leads to is replaced; an existing file passes its mode
    on, and its owner where that is permitted. What :func:`is_stream` tells of is written to.

    Args:
        path: The file.
        writer: Writes its content.
        previous: A file in the same folder that gets what ``path`` held, if anything. Where the
            file system knows no hard links, there is a moment in which only this one is there.

    Raises:
        CompofaError: The folder cannot be written or the disk is full.
    """
    temporary = None
    try:
        if is_stream(path):
            _write_through(path, writer)
            return
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(_DRAFT, f".{target.name}.", target.parent)
        with os.fdopen(handle, "wb") as file:
            _take_after(target, file.fileno())
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(target, Path(previous))
        os.replace(temporary, target)
        temporary = None
        _flush_folder(target.parent)
    except OSError as error:
        raise CompofaError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def is_stream(path: str | Path) -> bool:
    """Whether ``path`` cannot be replaced, only written to.

    That is a device, a FIFO or a socket, and whatever this process's stdout or stderr is, be it
    ``/dev/stdout`` or the name of the file that it was redirected to.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return not plain or _standard(found) is not None


def _standard(found: os.stat_result) -> int | None:
    """Return the descriptor of stdout or stderr that is open on ``found``, if one is."""
    for descriptor in (1, 2):
        with suppress(OSError):  # a daemon may have closed it
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _write_through(path: str | Path, writer: Callable[[BinaryIO], None]) -> None:
    """Write to a stream, all at once: not every writer can do without seeking."""
    buffer = io.BytesIO()
    writer(buffer)
    standard = _standard(os.stat(path))
    handle = os.open(path, os.O_WRONLY) if standard is None else os.dup(standard)
    with os.fdopen(handle, "wb") as file:
        file.write(buffer.getbuffer())


def _take_after(target: Path, handle: int) -> None:
    """Give a new file the mode and owner of the one that it is to replace, if there is one."""
    try:
        found = target.stat()
    except FileNotFoundError:
        os.fchmod(handle, 0o666 & ~_umask())
        return
    with suppress(PermissionError):
        os.fchown(handle, found.st_uid, found.st_gid)
    os.fchmod(handle, stat.S_IMODE(found.st_mode) & 0o777)


def _keep(path: Path, previous: Path) -> None:
    """Let ``previous`` be what ``path`` is."""
    link = previous.with_name(f".{path.name}.link{_DRAFT}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except FileNotFoundError:  # nothing to keep
        return
    except OSError:  # a file system without hard links, or two of them
        shutil.move(path, previous)
        return
    os.replace(link, previous)
    link.unlink(missing_ok=True)  # it stays where both were one file already


def _flush_folder(folder: Path) -> None:
    """Let the new name survive a power cut, too, where the file system can flush folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def draft_folder(path: str | Path) -> Iterator[Path]:
    """Give an empty folder beside ``path``, for what is to be moved there; it is gone afterwards.

    A process that is killed leaves it: :func:`remove_drafts`.

    Raises:
        OSError: It cannot be made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(_DRAFT, f".{path.name}.", path.parent) as folder:
        yield Path(folder)


def remove_drafts(folder: str | Path, name: str | None = None) -> None:
    """Remove what processes that were killed while they wrote have left in ``folder``.

    What belongs to other users, and cannot be removed, stays.

    Args:
        folder: The folder; nobody else may be writing what is removed.
        name: The file or folder in it whose drafts are meant; by default those of all.

    Raises:
        CompofaError: The disk fails.
    """
    draft = re.compile(rf"\.{'.*' if name is None else re.escape(name)}\.\w+{re.escape(_DRAFT)}")
    try:
        with suppress(PermissionError):
            for entry in list(os.scandir(folder)):
                if draft.fullmatch(entry.name):
                    with suppress(PermissionError, FileNotFoundError):
                        if entry.is_dir(follow_symlinks=False):
                            shutil.rmtree(entry.path)
                        else:
                            os.unlink(entry.path)
    except OSError as error:
        raise CompofaError(f"cannot clean up {folder}: {error.strerror or error}") from error


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace ``path`` with ``text``, as :func:`write_atomic` does.

    It is written as UTF-8; bytes of file names that are not (lone surrogates) become escapes.
    """
    data = text.encode(errors="backslashreplace")
    write_atomic(path, lambda file: file.write(data) and None)


def require_writable(folder: str | Path) -> Path:
    """Make ``folder`` if need be, and prove that a file can be written in it.

    Raises:
        CompofaError: The folder cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CompofaError(
            f"cannot write to the output folder {folder}: {error.strerror or error}"
        ) from error
    return folder


def require_other(path: str | Path, *inputs: str | Path | None) -> None:
    """Check that what is to be written is none of the files that are read.

    Args:
        path: The file.
        inputs: What is read; those that are no files do not matter.

    Raises:
        CompofaError: It is one of ``inputs``, under that name, another or a link.
    """
    for source in () if is_stream(path) else filter(None, inputs):
        with suppress(OSError, ValueError):
            if os.path.samefile(path, source):
                raise CompofaError(f"expected an output apart from the input {source}, got {path}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
