"""Ending a run early, with its state saved, when the machine, the scheduler or the user asks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from compofa.errors import LoaderError, StoppedError

LOST = (RuntimeError, EOFError, OSError, LoaderError)
"""What comes of data-loading processes that the same signal ended."""
GRACE_S = 0.5
"""Seconds that the signal may take longer to come here than to them."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What a preempted machine, Ctrl-C, a closed terminal and a scheduler (Slurm's --signal) send."""


class Stopping:
    """Whether training was asked to end.

    A training step and the writing of a file are finished first; elsewhere, in an evaluation of
    minutes say, the request ends what runs at once.

    Attributes:
        requested: Number of the signal that asked for it; 0 for none.
    """

    def __init__(self) -> None:
        self.requested = 0
        self._deferring = False

    def request(self, number: int) -> None:
        """Ask for the end, as signal ``number`` does.

        Raises:
            StoppedError: At once, unless something must be finished first. A second Ctrl-C does
                not wait for that.
        """
        insists = self.requested == number == signal.SIGINT
        self.requested = self.requested or number
        if not self._deferring or insists:
            raise self.error("")

    def error(self, where: str) -> StoppedError:
        """Return the error that ends the run; another worker may have been asked to.

        Args:
            where: What to do next.
        """
        self.requested = self.requested or signal.SIGTERM
        name = signal.Signals(self.requested).name
        return StoppedError(f"stopped by {name}{where}", 128 + self.requested)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Finish the block first: whoever runs it looks at :attr:`requested`."""
        with self._mode(True):
            yield

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Do not finish the block, within a deferred one.

        Raises:
            StoppedError: The end is, or was already, asked for.
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
        except LOST:
            time.sleep(GRACE_S)
            if self.requested:
                raise self.error(": go on with --resume") from None
            raise
        finally:
            self._deferring = before


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: SIG_DFL would not do where the signal has come and its handler not yet run."""


@contextmanager
def on_signals() -> Iterator[Stopping]:
    """Turn :data:`SIGNALS` into requests for a while; call it in the main thread.

    What is ignored at the beginning stays so, as SIGHUP under nohup.
    """
    stopping = Stopping()
    before: dict[int, Any] = {}
    main = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != main:  # a data-loading process: it ends when this one does
            return
        # A signal to all processes ends data-loading ones, too. Torch raises an error for those,
        # wherever this process may be, such as in saving.
        before.setdefault(signal.SIGCHLD, signal.signal(signal.SIGCHLD, _ignore))
        stopping.request(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before |= {number: signal.signal(number, handle) for number in heard}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
