"""What each worker has of its own within an epoch: its counts, and BN's running statistics.

Both come together at the end of an epoch: counts are summed, statistics averaged. A save within the
epoch holds what they would come to and, beside it, each worker's own, which it leaves alone: no bit
of a run depends on when it was saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from compofa.distributed.backend import Backend
from compofa.training.tally import Tally


@contextmanager
def together(
    backend: Backend, net: nn.Module, tally: Tally
) -> Iterator[tuple[Tally, list[dict[str, Any]]]]:
    """Average BN's statistics within the block; all workers enter it, and leave as they were.

    Args:
        backend: The workers.
        net: This worker's network.
        tally: What this worker has counted.

    Yields:
        What all workers have counted, and each one's own state for :func:`put_back`, in the order
        of ranks; of a worker that is alone none, since the network has it.
    """
    if backend.size == 1:
        yield tally, []
        return
    buffers = {name: b.detach().to("cpu", copy=True) for name, b in net.named_buffers()}
    own = {"tally": asdict(tally), "buffers": buffers}
    states = backend.gather(own)
    backend.average_buffers(net)
    try:
        yield total([Tally(**state["tally"]) for state in states]), states
    finally:
        put_back(net, own)


@torch.no_grad()
def put_back(net: nn.Module, state: Mapping[str, Any]) -> Tally:
    """Give ``net`` the buffers of a worker's own state, and return what it had counted.

    Raises:
        KeyError: A buffer is missing.
        ValueError: One has another shape.
    """
    for name, buffer in net.named_buffers():
        kept = state["buffers"][name]
        if kept.shape != buffer.shape:
            raise ValueError(f"{name} of another shape")
        buffer.copy_(kept)
    return Tally(**state["tally"])


def total(tallies: Sequence[Tally]) -> Tally:
    """Return what all workers have counted, in the order of their ranks; the time is worker 0's."""
    names = ("taken", "images", "loss", "right", "answers")
    sums = {name: sum(getattr(tally, name) for tally in tallies) for name in names}
    return replace(tallies[0], **sums)
