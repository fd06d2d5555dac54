"""Workers that train one network together: alone, by Horovod or by ``torch.distributed``.

The training loop speaks to a :class:`Backend` and never asks which. Three engines stand behind it:
no other worker, Horovod (``horovodrun``, ``mpirun``) and torch.distributed (``torchrun``).

**One all-reduce a step.** A step sums the gradients of several subnets, each backward pass adding
to the same buffers, and most weights are used by some of the subnets only. Hooks that send a
gradient as soon as it is there (Horovod's ``DistributedOptimizer``, torch's
``DistributedDataParallel``) would send it once a subnet, or have to be told which backward pass is
the last to touch it. So gradients are averaged after all of a step's backward passes, as one flat
buffer of every weight, unused ones included: every worker sends the same bytes in the same order
whatever it drew, sums come out with the same bits everywhere, and nothing depends on timing. What
is given up is the overlap with the last backward pass: for the 31 MB of a MobileNetV3 a few
milliseconds a step (docs/scale.md). Each worker's gradient is weighted with its number of images,
which travels in the same buffer, so that the result is the gradient of the mean over all images
even where some were broken.

**Worker 0 reads and decides, the others are told** (:meth:`Backend.from_main`): weights, the
optimiser's state and the progress of a resumed run are read by one process and sent as they are.
Nothing is taken from an optimiser that has not stepped yet, where ``broadcast_optimizer_state``
takes a dummy step that moves weights with decay. Only float32, float64 and (with compression)
float16 are reduced, which both engines can; everything else is gathered.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from compofa.errors import CompofaError, ConfigError, OtherWorkerError, WorkerError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

TIMEOUT_S = 600
"""Seconds to wait for another worker: longer than saving, and than one measurement, may take."""


class Backend(ABC):
    """A group of workers, and this one's place in it.

    Attributes:
        name: As ``--backend`` says it.
        rank: This worker, from 0. Worker 0 is the one that reads and writes the run's files.
        size: Number of workers.
        local_rank: This worker among those on the same machine, from 0.
        goes_on: Whether the launcher goes on by itself after a worker's death.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    goes_on: bool = False

    # --- what an engine brings ---

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """Return every worker's ``value`` in the order of ranks, on every worker.

        Raises:
            WorkerError: Another worker was lost, as in all that follows.
        """

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """Return worker 0's ``value``."""

    @abstractmethod
    def sum_(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all workers, the same bits on each."""

    def lasting(self, call: Callable[[bool], T]) -> T:
        """Return ``call(again)``; ``again`` says that this job was at it before a worker died.

        An engine that goes on with the workers that are left calls it once more.
        """
        return call(False)

    def saved(self) -> None:  # noqa: B027, most engines need not
        """Take note that the run's files now hold all that was done. Every worker calls this."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; without it, other workers take this one for dead."""

    # --- what is made of it ---

    @property
    def is_main(self) -> bool:
        """Whether this worker reads and writes the run's files."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Return what ``make`` returns on worker 0; it is not called on the others.

        Raises:
            CompofaError: It raised one: on worker 0 that, on the others :class:`OtherWorkerError`.
        """
        if self.size == 1:
            return make()
        value = failure = None
        if self.is_main:
            try:
                value = make()
            except CompofaError as error:
                failure = error
        value, failed = self.broadcast((value, failure is not None))
        self._raise_first(failure, [failed])
        return value

    def in_turn(self, make: Callable[[], T]) -> T:
        """Return what ``make`` returns here; each machine's first worker calls it before others.

        For what ends up in a machine's files, such as a download.

        Raises:
            CompofaError: It raised one: on the first such worker that, else an
                :class:`OtherWorkerError`.
        """
        if self.size == 1:
            return make()
        value = failure = None
        for first in (True, False):
            if (self.local_rank == 0) is first:
                try:
                    value = make()
                except CompofaError as error:
                    failure = error
            self._raise_first(failure, self.gather(failure is not None))
        return value

    def require_same(self, what: str, value: object) -> None:
        """Check that all workers have the same ``value``.

        Raises:
            ConfigError: They differ; an :class:`OtherWorkerError` on all but worker 0.
        """
        values = self.gather(value)
        if any(other != value for other in values):
            failure = ConfigError(f"expected the same {what} on all workers, got {values}")
            self._raise_first(failure, [True])

    def _raise_first(self, failure: CompofaError | None, failed: list[bool]) -> None:
        """Raise on all workers if one of them failed; the first of those says why."""
        if any(failed):
            raise failure if failure and failed.index(True) == self.rank else OtherWorkerError

    def sum(self, values: Iterable[float]) -> list[float]:
        """Return the sums of numbers over all workers, added in the order of ranks."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def average_gradients(
        self,
        parameters: Iterable[nn.Parameter],
        weight: float,
        half: bool = False,
        notes: list[float] | None = None,
    ) -> float:
        """Replace every parameter's gradient by the weighted mean over all workers.

        Args:
            parameters: The same on every worker, each with a gradient.
            weight: Of this worker: its share of the images that it should have had, 0 to 1.
            half: Whether to send float16: half the bytes, 11 bits of each number. Sums that leave
                its range become infinite.
            notes: Numbers to sum over all workers on the way; the sums take their place.

        Returns:
            The sum of the weights; where it is 0 the gradients are left alone.
        """
        if self.size == 1:
            return weight
        import torch

        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        notes = [] if notes is None else notes
        told = flat.new_tensor([weight / self.size, *notes])  # a share, so that sums stay in range
        if half:  # 11 bits are too few for the shares
            sent = (flat * told[0]).half()
            self.sum_(sent)
            self.sum_(told)
        else:
            sent = torch.cat([flat * told[0], told])
            self.sum_(sent)
            sent, told = sent[: len(flat)], sent[len(flat) :]
        total, *notes[:] = told.tolist()
        if total > 0:
            _scatter(sent.to(flat.dtype) / total, gradients)
        return total * self.size

    def average_buffers(self, network: nn.Module) -> None:
        """Replace the network's float buffers, BN's running statistics, by their means."""
        if self.size == 1:
            return
        import torch

        buffers = [b for b in network.buffers() if b.is_floating_point()]
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        self.sum_(flat)
        _scatter(flat / self.size, buffers)

    def device(self, kind: str) -> str:
        """Return this worker's device: of several GPUs the one with the number of its local rank.

        Args:
            kind: ``cpu``, ``cuda``, or, for a single worker, such as ``cuda:1``.

        Raises:
            ConfigError: There are fewer GPUs than workers, or all workers would share one.
        """
        if self.size == 1 or kind == "cpu":
            return kind
        import torch

        if kind != "cuda":
            raise ConfigError(f"--device: expected cpu or cuda with several workers, got {kind!r}")
        count = torch.cuda.device_count()
        if count == 1:  # its own, where the launcher shows each worker one
            return "cuda:0"
        if self.local_rank >= count:
            raise ConfigError(
                f"expected a GPU for each worker of a machine, got {count} for worker "
                f"{self.local_rank} (counted from 0): start fewer workers, or give --device cpu"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def or_lost(self) -> Iterator[None]:
        """Turn what engines raise when a worker is gone into one line."""
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0][:200]
            raise WorkerError(
                f"worker {self.rank} of {self.size}: another worker was lost, or did not answer "
                f"within --collective-timeout ({first}); go on with --resume"
            ) from error


class Alone(Backend):
    """No other worker."""

    name = "none"
    rank, size, local_rank = 0, 1, 0

    def gather(self, value: T) -> list[T]:
        """Return the one value."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return the value."""
        return value

    def sum_(self, values: Tensor) -> None:
        """Leave them as they are."""

    def close(self) -> None:
        """There is no group."""


BACKENDS = ("none", "horovod", "torch")
_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_HOROVODRUN = ("HOROVOD_RANK", "HOROVOD_ELASTIC", "OMPI_COMM_WORLD_RANK")
_STARTED_BY = {
    "horovod": "horovodrun -np 4 python … (or mpirun, where Horovod was built with MPI)",
    "torch": "torchrun --nproc-per-node 4 …",
}


def launcher(environment: Mapping[str, str]) -> str:
    """Return the engine whose launcher started this process, as its environment says."""
    if any(name in environment for name in _HOROVODRUN):
        return "horovod"
    return "torch" if all(name in environment for name in _TORCHRUN) else "none"


@contextmanager
def workers(
    wanted: str | None = None, timeout: float = TIMEOUT_S, cuda: bool = False
) -> Iterator[Backend]:
    """Join the other workers, for a while.

    Args:
        wanted: Engine to insist on; by default the one whose launcher started this process.
        timeout: Seconds to wait for another worker in whatever all do together.
        cuda: Whether to compute on GPUs.

    Raises:
        ConfigError: The engine is unknown, not installed, or did not start this process.
    """
    found = launcher(os.environ)
    name = wanted or found
    if name not in BACKENDS:
        raise ConfigError(f"--backend: expected {', '.join(BACKENDS)}, got {name!r}")
    if not timeout > 0:
        raise ConfigError(f"--collective-timeout: expected seconds above 0, got {timeout:g}")
    if name != found:
        if name == "none":
            raise ConfigError(
                f"--backend none: expected a process of its own, got one that {found}'s launcher "
                "started, of several that would write the same files"
            )
        raise ConfigError(
            f"--backend {name}: expected to be started by its launcher, {_STARTED_BY[name]}; "
            + (f"got {found}'s" if found != "none" else "got none")
        )
    if name == "none":
        yield Alone()
        return
    from compofa.distributed import engines

    backend = engines.ENGINES[name](timeout, cuda)
    yield backend
    backend.close()  # not after a failure: the others must find this worker gone


def _scatter(flat: Tensor, into: Iterable[Tensor]) -> None:
    start = 0
    for tensor in into:
        tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
