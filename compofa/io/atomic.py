"""Atomic file replacement: readers see either the old content or the new."""

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

_DRAFT = ".draft"  # suffix of temporary files and folders


def write_atomic(
    path: str | Path,
    writer: Callable[[BinaryIO], None],
    previous: str | Path | None = None,
) -> None:
    """Replace ``path`` atomically with the output of ``writer``.

    The content is written to a temporary file in the same folder, flushed to disk and renamed.
    After an error, ``path`` is unchanged and the temporary file is removed. A killed process leaves
    the temporary file; see :func:`remove_drafts`.

    For a symbolic link, its target is replaced. The mode of an existing file is preserved, and its
    owner if permitted. Streams (:func:`is_stream`) are written to directly.

    Args:
        path: The file to replace.
        writer: Called with the open binary file.
        previous: File in the same folder to keep the old content in. On file systems without hard
            links, ``path`` is briefly missing.

    Raises:
        CompofaError: The folder cannot be written, or the disk is full.
    """
    temporary = None
    try:
        if is_stream(path):
            _write_through(path, writer)
            return
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise IsADirectoryError(None, "is a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(_DRAFT, f".{target.name}.", target.parent)
        with os.fdopen(handle, "wb") as file:
            _copy_attributes(target, file.fileno())
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _link_previous(target, Path(previous))
        os.replace(temporary, target)
        temporary = None
        _flush_folder(target.parent)
    except OSError as error:
        raise CompofaError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def is_stream(path: str | Path) -> bool:
    """Return whether ``path`` can only be written to, not replaced.

    This holds for devices, FIFOs and sockets, and for the file behind stdout or stderr, whether
    given as ``/dev/stdout`` or by the name of a file that it is redirected to.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    replaceable = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return not replaceable or _standard(found) is not None


def _standard(found: os.stat_result) -> int | None:
    """Return the descriptor of stdout or stderr if it refers to the file ``found``, else None."""
    for descriptor in (1, 2):
        with suppress(OSError):  # a daemon may have closed it
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
    return None


def _write_through(path: str | Path, writer: Callable[[BinaryIO], None]) -> None:
    """Write to a stream from a buffer, since some writers need to seek."""
    buffer = io.BytesIO()
    writer(buffer)
    standard = _standard(os.stat(path))
    handle = os.open(path, os.O_WRONLY) if standard is None else os.dup(standard)
    with os.fdopen(handle, "wb") as file:
        file.write(buffer.getbuffer())


def _copy_attributes(target: Path, handle: int) -> None:
    """Copy mode and owner of ``target`` to an open file; the default mode if it does not exist."""
    try:
        found = target.stat()
    except FileNotFoundError:
        os.fchmod(handle, 0o666 & ~_umask())
        return
    with suppress(PermissionError):
        os.fchown(handle, found.st_uid, found.st_gid)
    os.fchmod(handle, stat.S_IMODE(found.st_mode) & 0o777)


def _link_previous(path: Path, previous: Path) -> None:
    """Make ``previous`` a hard link to ``path``, if that exists."""
    link = previous.with_name(f".{path.name}.link{_DRAFT}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except FileNotFoundError:  # no earlier version
        return
    except OSError:  # no hard links, or another file system
        shutil.move(path, previous)
        return
    os.replace(link, previous)
    link.unlink(missing_ok=True)  # still there if both were the same file


def _flush_folder(folder: Path) -> None:
    """Flush a rename to disk, on file systems that can flush folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def draft_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``, to assemble what will be moved to ``path``.

    A killed process leaves the folder; see :func:`remove_drafts`.

    Raises:
        OSError: The folder cannot be created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(_DRAFT, f".{path.name}.", path.parent) as folder:
        yield Path(folder)


def remove_drafts(folder: str | Path, name: str | None = None) -> None:
    """Remove temporary files and folders that killed processes left in ``folder``.

    Those that may not be removed, such as other users', are skipped.

    Args:
        folder: The folder. No other process may be writing the files concerned.
        name: File or folder whose drafts to remove; by default all drafts are.

    Raises:
        CompofaError: Reading or removing fails for another reason than permissions.
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
    """Replace ``path`` atomically with ``text`` as UTF-8; see :func:`write_atomic`.

    Lone surrogates, from file names that are not UTF-8, are written as escapes.

    Raises:
        CompofaError: The folder cannot be written, or the disk is full.
    """
    data = text.encode(errors="backslashreplace")
    write_atomic(path, lambda file: file.write(data) and None)


def require_writable(folder: str | Path) -> Path:
    """Create ``folder`` if needed, and check that files can be created in it.

    Raises:
        CompofaError: The folder cannot be created or written.
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
    """Check that an output is not one of the inputs.

    Args:
        path: The output.
        inputs: The inputs; those that do not exist are ignored.

    Raises:
        CompofaError: ``path`` and an input are the same file, by name or by link.
    """
    for source in () if is_stream(path) else filter(None, inputs):
        with suppress(OSError, ValueError):
            if os.path.samefile(path, source):
                raise CompofaError(f"expected an output apart from the input {source}, got {path}")


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
