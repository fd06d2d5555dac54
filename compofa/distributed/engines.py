"""Engines behind :class:`~compofa.distributed.backend.Backend`: torch.distributed and Horovod."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from compofa.distributed.backend import Backend
from compofa.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class TorchDistributed(Backend):
    """Workers that ``torchrun`` started: gloo between CPUs, NCCL between GPUs.

    Args:
        timeout: Seconds to wait for another worker.
        cuda: Whether the workers compute on GPUs.
    """

    name = "torch"

    def __init__(self, timeout: float, cuda: bool) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.goes_on = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        self._dist = dist
        if cuda:
            torch.cuda.set_device(self.device("cuda"))
        # torchrun may use one store for all its attempts (rendezvous "static", the default on one
        # machine): without a place for each, workers find the addresses of those that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        patience = timedelta(seconds=timeout)
        with self.or_lost():
            store, _, _ = next(dist.rendezvous("env://", timeout=patience))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=dist.PrefixStore(f"attempt-{attempt}", store),
                rank=self.rank,
                world_size=self.size,
                timeout=patience,
            )

    def gather(self, value: T) -> list[T]:
        """Return every worker's value."""
        values: list[Any] = [None] * self.size
        with self.or_lost():
            self._dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return worker 0's value."""
        values = [value]
        with self.or_lost():
            self._dist.broadcast_object_list(values, 0)
        return values[0]

    def sum_(self, values: Tensor) -> None:
        """Sum over all workers, in place."""
        with self.or_lost():
            self._dist.all_reduce(values)

    def lasting(self, call: Callable[[bool], T]) -> T:
        """Call once: torchrun starts all workers again when one has died (``--max-restarts``)."""
        return call(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)

    def close(self) -> None:
        """Leave the group, once all have what was sent last."""
        self.gather(None)
        self._dist.destroy_process_group()


class Horovod(Backend):
    """Workers that ``horovodrun`` or ``mpirun`` started.

    Args:
        timeout: Seconds to wait for another worker.
        cuda: Whether the workers compute on GPUs.
    """

    name = "horovod"

    def __init__(self, timeout: float, cuda: bool) -> None:
        seconds = max(1, round(timeout))
        os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", str(seconds))
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", str(seconds))
        os.environ.setdefault("HOROVOD_STALL_CHECK_TIME_SECONDS", str(min(60, seconds)))
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise ConfigError(
                f"--backend horovod: expected Horovod with PyTorch to be installed, got {error}: "
                "make horovod installs it, or start the workers with torchrun"
            ) from error
        self.goes_on = "HOROVOD_ELASTIC" in os.environ
        self._hvd = hvd
        self._state: Any = None
        with self.or_lost():
            hvd.init()
        if cuda:
            import torch

            torch.cuda.set_device(self.device("cuda"))

    @property
    def rank(self) -> int:
        """This worker; another number after an elastic job has lost workers."""
        return self._hvd.rank() if self._hvd.is_initialized() else -1

    @property
    def size(self) -> int:
        """Number of workers; see :attr:`rank`."""
        return self._hvd.size() if self._hvd.is_initialized() else 0

    @property
    def local_rank(self) -> int:
        """This worker among those on the same machine."""
        return self._hvd.local_rank()

    def gather(self, value: T) -> list[T]:
        """Return every worker's value."""
        with self.or_lost():
            return self._hvd.allgather_object(value, name="gather")

    def broadcast(self, value: T) -> T:
        """Return worker 0's value."""
        with self.or_lost():
            return self._hvd.broadcast_object(value, 0, name="broadcast")

    def sum_(self, values: Tensor) -> None:
        """Sum over all workers, in place."""
        with self.or_lost():
            self._hvd.allreduce_(values, op=self._hvd.Sum, name="sum")

    def lasting(self, call: Callable[[bool], T]) -> T:
        """Call again with those that are left, or with new ones, where the job is elastic.

        What the workers come back to is the run's last saved epoch, so a new worker needs nothing
        but to be told; Horovod's state object holds only whether there is one.
        """
        if not self.goes_on:
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

    def saved(self) -> None:
        """Let an elastic job take in workers that have come meanwhile."""
        if self._state is not None:
            self._state.begun = True
            with self.or_lost():
                self._state.commit()

    def close(self) -> None:
        """Leave the group."""
        self._hvd.shutdown()


ENGINES: Mapping[str, Callable[[float, bool], Backend]] = {
    "horovod": Horovod,
    "torch": TorchDistributed,
}
