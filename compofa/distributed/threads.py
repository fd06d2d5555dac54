"""The number of CPU threads that torch computes with, within a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SMALL_IMAGES = 64
"""Largest image side, in pixels, for which one thread is the default: such layers are too small to
split. A second thread is a third faster on two idle cores, and several times slower if one is
busy."""


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Set the number of torch threads within a block and restore it afterwards.

    Args:
        count: Number of threads; ``None`` leaves it unchanged.
    """
    import torch  # late: commands read the defaults above without torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_threads(resolution: int, wanted: int | None = None) -> int | None:
    """Return ``wanted`` if given, else 1 for small images, else ``None`` (torch's default).

    Args:
        resolution: Image side in pixels.
        wanted: Number of threads that the user asked for.
    """
    if wanted is not None:
        return wanted
    return 1 if resolution <= SMALL_IMAGES else None
