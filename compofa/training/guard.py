"""Numbers that go wrong: a step whose loss or gradient is not finite must leave no trace."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StepGuard:
    """Undoes what a step's forward passes did, and tells whether its gradients may be used.

    The forward passes of a step have already moved BN's running statistics when its gradients turn
    out to be NaN or infinite; so the statistics are copied before each step.

    Args:
        network: What is trained, on its device; its parameters and buffers stay the same objects.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parameters = list(network.parameters())
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for buffer in network.buffers():
            kinds.setdefault(buffer.dtype, []).append(buffer)
        self._live = list(kinds.values())
        self._kept = [[torch.empty_like(buffer) for buffer in live] for live in self._live]

    @torch.no_grad()
    def remember(self) -> None:
        """Copy the running statistics: a step begins."""
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(kept, live)  # all at once: hundreds of small tensors

    @torch.no_grad()
    def mark(self, loss: Tensor) -> None:
        """Make a gradient NaN if the loss, or a running statistic, is not a finite number.

        Gradients are averaged over workers afterwards, and NaN spreads: all workers come to the
        same decision without talking, although each has a loss and statistics of its own.

        Args:
            loss: Of the whole step, a scalar.
        """
        wrong = loss * 0
        for live in self._live:
            if live[0].is_floating_point():
                wrong = wrong + _norm(live) * 0
        self.parameters[0].grad += wrong

    @torch.no_grad()
    def passes(self) -> bool:
        """Whether every gradient is a finite number. On a GPU, this waits for the step."""
        return bool(_norm([parameter.grad for parameter in self.parameters]).isfinite())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the running statistics back: the step is skipped."""
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(live, kept)


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together; above 1e19 it is infinite in float32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
