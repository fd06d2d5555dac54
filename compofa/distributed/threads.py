"""How many CPU threads torch computes with, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

SMALL_IMAGES = 64
"""Up to this side in pixels one thread is the default: layers are too small to share. A second
thread gains a third on two free cores and costs several times as much when one is busy."""


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with ``count`` threads inside, and with as many as before afterwards.

    Args:
        count: Threads; ``None`` changes nothing.
    """
    import torch  # commands read the defaults above without it

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def usual_threads(resolution: int, wanted: int | None = None) -> int | None:
    """Return ``wanted``, or 1 for small images, or ``None`` for torch's own choice."""
    if wanted is not None:
        return wanted
    return 1 if resolution <= SMALL_IMAGES else None
