"""Writing files so that a reader sees the old content or the new, never half of either."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from compofa.errors import CompofaError


def write_atomic(path: str | Path, writer: Callable[[BinaryIO], None]) -> None:
    """Replace ``path`` with what ``writer`` writes, in one step.

    The content goes to a temporary file in the same folder, is flushed to the disk and then takes
    the place of ``path``. When anything fails, ``path`` stays as it was and the temporary file
    is removed.

    Raises:
        CompofaError: The folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise CompofaError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace ``path`` with ``text`` (UTF-8), as :func:`write_atomic` does."""
    write_atomic(path, lambda file: file.write(text.encode()) and None)


def require_writable(folder: str | Path, create: bool = True) -> Path:
    """Prove that a file can be written in ``folder``.

    Args:
        folder: The folder.
        create: Make it if need be; otherwise the nearest folder above that exists is tried, so
            that nothing is left behind when the inputs turn out to be wrong.

    Raises:
        CompofaError: The folder cannot be made or written.
    """
    folder = Path(folder)
    try:
        if create:
            folder.mkdir(parents=True, exist_ok=True)
        probed = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=probed):
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
