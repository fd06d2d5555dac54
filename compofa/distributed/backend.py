"""The interface to the ranks that train one network together, and the single-process case.

The training loop calls a :class:`Backend` and never asks which one it is. There are three: a single
process (below), torch.distributed (:mod:`compofa.distributed.torchrun`) and Horovod
(:mod:`compofa.distributed.horovod`). :func:`compofa.distributed.launch.process_group` picks one.

**One all-reduce per step.** A step accumulates the gradients of several subnets, and most weights
are used by only some of them. Hooks that send each gradient as soon as it is ready (Horovod's
``DistributedOptimizer``, torch's ``DistributedDataParallel``) would send it once per subnet, or
would need to know which backward pass touches it last. Gradients are therefore averaged after all
backward passes of a step, as one flat buffer of all weights including unused ones. Every rank sends
the same bytes in the same order whichever subnets it sampled, sums are bit-identical on all ranks,
and nothing depends on timing. The cost is the lost overlap with the last backward pass: a few
milliseconds per step for the 31 MB of a MobileNetV3 (docs/scale.md). Each rank's gradient is
weighted by its number of images, which travels in the same buffer, so the result is the gradient of
the mean over all images even if some images were unreadable.

**Rank 0 reads and broadcasts** (:meth:`Backend.from_main`). Weights, optimiser state and the
progress of a resumed run are read by one process and sent unchanged. Horovod's
``broadcast_optimizer_state`` is not used: it takes a dummy step, which applies weight decay. Only
float32, float64 and (with compression) float16 tensors are reduced, which both libraries support;
all else is gathered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from compofa.errors import CompofaError, ConfigError, OtherWorkerError, WorkerError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

TIMEOUT_S = 600
"""Default timeout of collectives, in seconds: longer than saving, or one measurement, may take."""


class Backend(ABC):
    """A group of ranks, seen from one of them.

    A subclass implements the abstract methods. Training and evaluation take any instance; a row in
    :data:`compofa.distributed.launch.BACKENDS` makes it available as ``--backend``.

    Attributes:
        name: Value of ``--backend``.
        command: Command line of the launcher, for error messages.
        rank: Rank of this process, from 0. Rank 0 reads and writes the files of a run.
        size: Number of ranks.
        local_rank: Rank among the processes on the same machine, from 0.
        restarts: Whether the launcher continues the job by itself after a rank died.
    """

    name: str
    command: str = ""
    rank: int
    size: int
    local_rank: int
    restarts: bool = False

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> bool:
        """Return whether the launcher of this backend started the process of ``environment``."""
        return False

    # --- implemented by subclasses ---

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """Return the ``value`` of every rank, in rank order, on every rank.

        Raises:
            WorkerError: Another rank died or timed out. All collectives below raise it too.
        """

    @abstractmethod
    def broadcast(self, value: T) -> T:
        """Return the ``value`` of rank 0."""

    @abstractmethod
    def all_reduce(self, values: Tensor) -> None:
        """Replace ``values`` with their sum over all ranks, in place, bit-identical on each rank.

        Args:
            values: float16, float32 or float64, of the same shape on every rank.
        """

    def run_elastic(self, call: Callable[[bool], T]) -> T:
        """Return ``call(restarted)``; ``restarted`` is True if the job continues after a death.

        A backend that continues with the remaining ranks calls it again.
        """
        return call(False)

    def commit(self) -> None:  # noqa: B027, a no-op for most backends
        """Declare all progress so far saved to the files of the run. Every rank calls this."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group. Ranks that exit without it count as dead."""

    # --- built on the above ---

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reads and writes the files of a run."""
        return self.rank == 0

    def from_main(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0 only, and return its result on every rank.

        Raises:
            CompofaError: ``make`` raised it on rank 0; other ranks raise
                :class:`~compofa.errors.OtherWorkerError`.
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

    def local_main_first(self, make: Callable[[], T]) -> T:
        """Call ``make`` on every rank, on local rank 0 of each machine before the others.

        For work that fills a machine's files, such as a download.

        Raises:
            CompofaError: ``make`` raised it on the lowest failing rank; other ranks raise
                :class:`~compofa.errors.OtherWorkerError`.
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
        """Check that all ranks have the same ``value``.

        Args:
            what: Name of the value, for the message.
            value: Any comparable value.

        Raises:
            ConfigError: Values differ. Other ranks than 0 raise
                :class:`~compofa.errors.OtherWorkerError`.
        """
        values = self.gather(value)
        if any(other != value for other in values):
            failure = ConfigError(f"expected the same {what} on all ranks, got {values}")
            self._raise_first(failure, [True])

    def _raise_first(self, failure: CompofaError | None, failed: list[bool]) -> None:
        """Raise on all ranks if any failed; only the lowest failing rank reports its error."""
        if any(failed):
            raise failure if failure and failed.index(True) == self.rank else OtherWorkerError

    def sum(self, values: Iterable[float]) -> list[float]:
        """Return elementwise sums over all ranks, added in rank order."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def average_gradients(
        self,
        parameters: Iterable[nn.Parameter],
        weight: float,
        half: bool = False,
        extras: list[float] | None = None,
    ) -> float:
        """Replace every gradient with the weighted mean over all ranks.

        Args:
            parameters: The same on every rank, each with a gradient.
            weight: Weight of this rank in [0, 1]: fraction of its batch that could be read.
            half: Whether to send float16: half the bytes, 11 significant bits. Sums beyond its
                range become infinite.
            extras: Further numbers to sum over all ranks in the same message, in place.

        Returns:
            Sum of the weights over all ranks. If it is 0, the gradients are unchanged.
        """
        if self.size == 1:
            return weight
        import torch

        gradients = [parameter.grad for parameter in parameters]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        extras = [] if extras is None else extras
        # The weight is divided by the size so that sums stay in the range of float16.
        scalars = flat.new_tensor([weight / self.size, *extras])
        if half:  # 11 bits are too few for the scalars
            sent = (flat * scalars[0]).half()
            self.all_reduce(sent)
            self.all_reduce(scalars)
        else:
            sent = torch.cat([flat * scalars[0], scalars])
            self.all_reduce(sent)
            sent, scalars = sent[: len(flat)], sent[len(flat) :]
        total, *extras[:] = scalars.tolist()
        if total > 0:
            _scatter(sent.to(flat.dtype) / total, gradients)
        return total * self.size

    def average_buffers(self, network: nn.Module) -> None:
        """Replace float buffers (BN running statistics) with their means over all ranks."""
        if self.size == 1:
            return
        import torch

        buffers = [b for b in network.buffers() if b.is_floating_point()]
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        self.all_reduce(flat)
        _scatter(flat / self.size, buffers)

    def device(self, kind: str) -> str:
        """Return the device of this rank: the GPU indexed by its local rank.

        Args:
            kind: ``cpu`` or ``cuda``; a single process may also name a GPU, such as ``cuda:1``.

        Raises:
            ConfigError: The machine has fewer GPUs than local ranks, or ``kind`` names one GPU for
                several ranks.
        """
        if self.size == 1 or kind == "cpu":
            return kind
        import torch

        if kind != "cuda":
            raise ConfigError(f"device: expected cpu or cuda for several ranks, got {kind!r}")
        count = torch.cuda.device_count()
        if count == 1:  # some launchers make one GPU visible per rank
            return "cuda:0"
        if self.local_rank >= count:
            raise ConfigError(
                f"expected one GPU per local rank, got {count} GPUs for local rank "
                f"{self.local_rank}: start fewer worker processes, or compute on the CPU"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Raise the library's errors about unreachable ranks as :class:`WorkerError`."""
        try:
            yield
        except RuntimeError as error:
            first = str(error).strip().split("\n")[0][:200]
            raise WorkerError(
                f"rank {self.rank} of {self.size}: another rank died or timed out ({first}): "
                "resume the run"
            ) from error


class SingleProcess(Backend):
    """The only rank."""

    name = "none"
    rank, size, local_rank = 0, 1, 0

    def gather(self, value: T) -> list[T]:
        """Return a list of the one value."""
        return [value]

    def broadcast(self, value: T) -> T:
        """Return ``value``."""
        return value

    def all_reduce(self, values: Tensor) -> None:
        """Do nothing: the sum over one rank is its own values."""

    def close(self) -> None:
        """Do nothing: there is no group to leave."""


def _scatter(flat: Tensor, into: Iterable[Tensor]) -> None:
    start = 0
    for tensor in into:
        tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
        start += tensor.numel()
