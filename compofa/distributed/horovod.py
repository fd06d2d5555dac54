"""The backend of ``horovodrun`` and ``mpirun``: Horovod."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from compofa.distributed.backend import Backend
from compofa.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_VARIABLES = ("HOROVOD_RANK", "HOROVOD_ELASTIC", "OMPI_COMM_WORLD_RANK")


class Horovod(Backend):
    """Ranks started by ``horovodrun`` or ``mpirun``.

    Args:
        timeout: Timeout of collectives, in seconds.
        cuda: Whether the ranks compute on GPUs.

    Raises:
        ConfigError: Horovod is not installed.
        WorkerError: The other ranks cannot be reached.
    """

    name = "horovod"
    command = "horovodrun -np 4 python … (or mpirun, if Horovod was built with MPI)"

    def __init__(self, timeout: float, cuda: bool) -> None:
        seconds = max(1, round(timeout))
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(seconds))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(seconds))
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(min(60, seconds)))
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise ConfigError(
                f"backend horovod: expected Horovod built for PyTorch, got {error}: "
                "install it with make horovod, or use torchrun"
            ) from error
        self.restarts = "HOROVOD_ELASTIC" in os.environ
        self._hvd = hvd
        self._state: Any = None
        with self.translate_errors():
            hvd.init()
        if cuda:
            import torch

            torch.cuda.set_device(self.device("cuda"))

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> bool:
        """Return whether ``horovodrun`` or ``mpirun`` started the process of ``environment``."""
        return any(name in environment for name in _VARIABLES)

    @property
    def rank(self) -> int:
        """Rank of this process; it may change when an elastic job loses ranks."""
        return self._hvd.rank() if self._hvd.is_initialized() else -1

    @property
    def size(self) -> int:
        """Number of ranks; it may change when an elastic job loses or gains ranks."""
        return self._hvd.size() if self._hvd.is_initialized() else 0

    @property
    def local_rank(self) -> int:
        """Rank among the processes on the same machine."""
        return self._hvd.local_rank()

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every rank."""
        with self.translate_errors():
            return self._hvd.allgather_object(value, name="gather")

    def broadcast(self, value: T) -> T:
        """Return the ``value`` of rank 0."""
        with self.translate_errors():
            return self._hvd.broadcast_object(value, 0, name="broadcast")

    def all_reduce(self, values: Tensor) -> None:
        """Sum over all ranks, in place."""
        with self.translate_errors():
            self._hvd.allreduce_(values, op=self._hvd.Sum, name="sum")

    def run_elastic(self, call: Callable[[bool], T]) -> T:
        """Call again with the remaining ranks, or with new ones, if the job is elastic.

        Ranks resume from the last saved epoch of the run, so Horovod's state object holds only
        whether there is one.
        """
        if not self.restarts:
            return call(False)
        import horovod.torch.elastic as elastic

        self._state = elastic.TorchState(begun=False)

        @elastic.run
        def attempt(state: Any) -> T:
            try:
                return call(state.begun)
            except WorkerError as error:
                raise error.__cause__ or error from None

        return attempt(self._state)

    def commit(self) -> None:
        """Let an elastic job admit ranks that joined in the meantime."""
        if self._state is not None:
            self._state.begun = True
            with self.translate_errors():
                self._state.commit()

    def close(self) -> None:
        """Leave the group."""
        self._hvd.shutdown()
