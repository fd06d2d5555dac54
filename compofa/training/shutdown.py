"""Graceful shutdown: save and stop when the machine, the scheduler or the user asks for it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from compofa.errors import LoaderError, StoppedError

LOADER_ERRORS = (RuntimeError, EOFError, OSError, LoaderError)
"""Errors raised when loader workers are ended by the signal that is meant for the run."""
GRACE_S = 0.5
"""Seconds by which that signal may reach this process later than the loader workers."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent on preemption, by Ctrl-C, by a closed terminal, and by schedulers (Slurm's --signal)."""


class Stopping:
    """Whether training was requested to stop.

    Within :meth:`deferred`, as in a training step or while a file is written, a request only sets
    :attr:`requested`. Elsewhere, as in an evaluation of several minutes, it raises at once.

    Attributes:
        requested: Number of the signal that requested it; 0 for none.
        advice: How to continue, for the messages of errors.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.advice = "continue with --resume"
        self._deferring = False

    def request(self, number: int) -> None:
        """Request a stop, as signal ``number`` does.

        Raises:
            StoppedError: At once, unless deferred. A second Ctrl-C is never deferred.
        """
        repeated = self.requested == number == signal.SIGINT
        self.requested = self.requested or number
        if not self._deferring or repeated:
            raise self.error("")

    def error(self, hint: str) -> StoppedError:
        """Return the error that ends the run, also on ranks that received no signal themselves.

        Args:
            hint: End of the message: how to continue.
        """
        self.requested = self.requested or signal.SIGTERM
        name = signal.Signals(self.requested).name
        return StoppedError(f"stopped by {name}{hint}", 128 + self.requested)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer requests within the block, whose code checks :attr:`requested`."""
        with self._mode(True):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Do not defer requests within the block.

        Raises:
            StoppedError: A stop is requested, or was before the block.
        """
        if self.requested:
            raise self.error("")
        with self._mode(False):
            yield

    @contextmanager
    def _mode(self, deferring: bool) -> Iterator[None]:
        before, self._deferring = self._deferring, deferring
        try:
            yield
        except LOADER_ERRORS:
            time.sleep(GRACE_S)
            if self.requested:
                raise self.error(f"; {self.advice}") from None
            raise
        finally:
            self._deferring = before


class Saver:
    """Decides within an epoch when to save and when to stop.

    Args:
        write: Writes the checkpoint. All ranks call it after the same step.
        path: Path of the checkpoint.
        minutes: Minutes between checkpoints.
        stop: Requests to stop.
    """

    def __init__(
        self, write: Callable[[], None], path: Path, minutes: float, stop: Stopping
    ) -> None:
        self._write, self._path, self._seconds, self._stop = write, path, 60 * minutes, stop
        self._next = time.monotonic() + self._seconds

    @property
    def stopping(self) -> bool:
        """Whether this rank was requested to stop."""
        return self._stop.requested > 0

    def stop_save_flags(self) -> list[float]:
        """Return whether to stop and whether to save, as 1 or 0; ranks sum them and all comply."""
        return [float(self.stopping), float(time.monotonic() >= self._next)]

    def save(self, stopping: bool = False) -> None:
        """Save, on all ranks.

        Args:
            stopping: Whether to stop afterwards.

        Raises:
            StoppedError: ``stopping`` was given.
        """
        self._write()
        self._next = time.monotonic() + self._seconds
        if stopping:
            raise self._stop.error(f"; saved to {self._path}, {self._stop.advice}")


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing. Unlike SIG_DFL, also right for a signal that is already pending."""


@contextmanager
def on_signals() -> Iterator[Stopping]:
    """Turn :data:`SIGNALS` into requests within the block. Call it in the main thread.

    Signals that are ignored stay ignored, such as SIGHUP under nohup.
    """
    stopping = Stopping()
    before: dict[int, Any] = {}
    main = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != main:  # a loader worker, which ends with its parent
            return
        # A signal to the process group also ends the loader workers, for which torch's SIGCHLD
        # handler would raise an error anywhere in this process, even while it saves.
        before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, _ignore))
        stopping.request(number)

    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before |= {number: signal.signal(number, handle) for number in handled}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
