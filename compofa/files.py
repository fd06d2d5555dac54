"""Writing files so that a reader sees the old content or the new, never half of either."""

import os
import re
import shutil
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

    Args:
        path: The file.
        writer: Writes its content.
        previous: A file in the same folder that gets what ``path`` held, if anything. Where the
            file system knows no hard links, there is a moment in which only this one is there.

    Raises:
        CompofaError: The folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(_DRAFT, f".{path.name}.", path.parent)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(path, Path(previous))
        os.replace(temporary, path)
        temporary = None
        _flush_folder(path.parent)
    except OSError as error:
        raise CompofaError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """Let ``previous`` be what ``path`` is."""
    link = path.with_name(f".{path.name}.link{_DRAFT}")
    try:
        link.unlink(missing_ok=True)
        os.link(path, link)
    except FileNotFoundError:  # nothing to keep
        return
    except OSError:  # a file system without hard links
        os.replace(path, previous)
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
    """Replace ``path`` with ``text`` (UTF-8), as :func:`write_atomic` does."""
    write_atomic(path, lambda file: file.write(text.encode()) and None)


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


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
