"""Time of a run, estimated from its first steps."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

FIRST, LAST = 2, 6
"""Steps that are timed, from 1. The first one warms up."""


class Pace:
    """Logs once how long an epoch and the rest of a phase take.

    Args:
        steps: Steps per epoch.
        left: Steps of the phase from here on.
    """

    def __init__(self, steps: int, left: int) -> None:
        self._steps, self._left = steps, left
        self._times: list[float] = []

    def add(self, seconds: float) -> None:
        """Count a step.

        Args:
            seconds: Its time, with that of loading its images.
        """
        if len(self._times) == LAST:
            return
        self._times.append(seconds)
        if len(self._times) == LAST:
            timed = self._times[FIRST - 1 :]
            step = sum(timed) / len(timed)
            log.info(
                "about %s per epoch, %s to the end (%.2g s per step, validation not included)",
                duration(step * self._steps), duration(step * self._left), step,
            )  # fmt: skip


def duration(seconds: float) -> str:
    """Return a time to be read, such as ``40 s``, ``12 min``, ``2 h 05 min`` or ``3 d 4 h``."""
    if seconds < 100:
        return f"{seconds:.{int(seconds < 10)}f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"
