"""Optimiser, learning rate schedule, reduced precision, and steps with non-finite gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine annealing to 0.

    Args:
        step: Number of the step, from 0 to ``total_steps`` - 1.
        total_steps: Steps of the phase, warm-up included.
        warmup_steps: Steps of warm-up; the rate of the first is above 0.
        peak: Learning rate after the warm-up.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(network: nn.Module, weight_decay: float, momentum: float) -> torch.optim.SGD:
    """Build SGD with Nesterov momentum, without weight decay for biases and BN parameters.

    All gradients are allocated as zeros, so that weights which no subnet of a step uses follow
    their momentum, as in the published runs.
    """
    decayed, undecayed = [], []
    for name, parameter in network.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        (undecayed if name.endswith("bias") or ".bn." in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0)


def reduced_precision(device: torch.device) -> torch.dtype:
    """Return the data type of ``--amp``: bfloat16, or float16 on GPUs without it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


class StepGuard:
    """Detects non-finite losses and gradients, and undoes the forward passes of such a step.

    When gradients turn out to be non-finite, the forward passes have already updated the running
    statistics of BN, which are therefore copied before each step.

    Args:
        network: Network to train, on its device. Its parameters and buffers must not be replaced.
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
        """Copy the running statistics before a step."""
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(kept, live)  # one call for hundreds of small tensors

    @torch.no_grad()
    def mark(self, loss: Tensor) -> None:
        """Make a gradient NaN if the loss or a running statistic is non-finite.

        Since gradients are averaged over ranks afterwards and NaN propagates, all ranks then make
        the same decision without further communication.

        Args:
            loss: Loss of the step, a scalar.
        """
        wrong = loss * 0
        for live in self._live:
            if live[0].is_floating_point():
                wrong = wrong + _norm(live) * 0
        self.parameters[0].grad += wrong

    @torch.no_grad()
    def passes(self) -> bool:
        """Whether all gradients are finite. Synchronises with the GPU."""
        return bool(_norm([parameter.grad for parameter in self.parameters]).isfinite())

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the running statistics of a skipped step."""
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(live, kept)


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors together; infinite in float32 above 1e19."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
