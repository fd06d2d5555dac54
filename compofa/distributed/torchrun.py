"""The backend of ``torchrun``: torch.distributed, with gloo between CPUs and NCCL between GPUs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from compofa.distributed.backend import Backend

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class TorchDistributed(Backend):
    """Ranks started by ``torchrun``.

    Args:
        timeout: Timeout of collectives, in seconds.
        cuda: Whether the ranks compute on GPUs.

    Raises:
        WorkerError: The other ranks cannot be reached.
    """

    name = "torch"
    command = "torchrun --nproc-per-node 4 …"

    def __init__(self, timeout: float, cuda: bool) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        self._attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        self._dist = dist
        if cuda:
            torch.cuda.set_device(self.device("cuda"))
        limit = timedelta(seconds=timeout)
        with self.translate_errors():
            store, _, _ = next(dist.rendezvous("env://", timeout=limit))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                # torchrun may reuse one store for all attempts (the "static" rendezvous, default on
                # one machine). Without a prefix, ranks would find the addresses of dead ones.
                store=dist.PrefixStore(f"attempt-{self._attempt}", store),
                rank=self.rank,
                world_size=self.size,
                timeout=limit,
            )

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> bool:
        """Return whether ``torchrun`` started the process of ``environment``."""
        return all(name in environment for name in _VARIABLES)

    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every rank."""
        values: list[Any] = [None] * self.size
        with self.translate_errors():
            self._dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the ``value`` of rank 0."""
        values = [value]
        with self.translate_errors():
            self._dist.broadcast_object_list(values, 0)
        return values[0]

    def all_reduce(self, values: Tensor) -> None:
        """Sum over all ranks, in place."""
        with self.translate_errors():
            self._dist.all_reduce(values)

    def run_elastic(self, call: Callable[[bool], T]) -> T:
        """Call once: after a death, torchrun restarts all processes (``--max-restarts``)."""
        return call(self._attempt > 0)

    def close(self) -> None:
        """Leave the group once all ranks have received the last messages."""
        self.gather(None)
        self._dist.destroy_process_group()
