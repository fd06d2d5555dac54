"""Which backend to use: the table of backends, and joining the ranks that a launcher started."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from compofa.distributed.backend import TIMEOUT_S, Backend, SingleProcess
from compofa.distributed.horovod import Horovod
from compofa.distributed.torchrun import TorchDistributed
from compofa.errors import ConfigError

BACKENDS: dict[str, type[Backend]] = {
    backend.name: backend for backend in (SingleProcess, Horovod, TorchDistributed)
}


def detect_backend(environment: Mapping[str, str]) -> str:
    """Return the name of the backend whose launcher set ``environment``, or ``none``."""
    for name, backend in BACKENDS.items():
        if backend.launched(environment):
            return name
    return SingleProcess.name


@contextmanager
def process_group(
    name: str | None = None, timeout: float = TIMEOUT_S, cuda: bool = False
) -> Iterator[Backend]:
    """Join the ranks that a launcher started, and leave them when the block ends without error.

    Args:
        name: Key of :data:`BACKENDS`; by default :func:`detect_backend` of this process.
        timeout: Timeout of collectives, in seconds.
        cuda: Whether the ranks compute on GPUs.

    Raises:
        ConfigError: The backend is unknown, not installed, or did not start this process.
    """
    found = detect_backend(os.environ)
    name = name or found
    if name not in BACKENDS:
        raise ConfigError(f"backend: expected {', '.join(BACKENDS)}, got {name!r}")
    if not timeout > 0:
        raise ConfigError(f"timeout of collectives: expected seconds above 0, got {timeout:g}")
    single = SingleProcess.name
    if name != found:
        if name == single:
            raise ConfigError(
                f"backend {single}: expected a process started directly, got one started by "
                f"{found}'s launcher, whose ranks would all write the same files"
            )
        raise ConfigError(
            f"backend {name}: expected to be started with {BACKENDS[name].command}; "
            + (f"got {found}'s launcher" if found != single else "got no launcher")
        )
    if name == single:
        yield SingleProcess()
        return
    backend = BACKENDS[name](timeout, cuda)
    yield backend
    backend.close()  # not after an error: other ranks must see this one as dead
