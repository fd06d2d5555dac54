"""The optimiser, its learning rate, and the number format that it may compute in."""

from __future__ import annotations

import math

import torch
from torch import nn


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine down to 0.

    Args:
        step: From 0 to ``total_steps`` - 1.
        total_steps: Steps of the phase, warm-up included.
        warmup_steps: Steps of warm-up; the first already has a rate above 0.
        peak: Rate at the end of the warm-up.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(network: nn.Module, weight_decay: float, momentum: float) -> torch.optim.SGD:
    """Build SGD with Nesterov momentum; biases and BN parameters are not decayed.

    Every parameter gets a gradient of zeros, so that weights which a step's subnets do not use
    follow their momentum as in the published runs.
    """
    decayed, plain = [], []
    for name, parameter in network.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        is_plain = name.endswith("bias") or ".bn." in name
        (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain}]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=momentum > 0)


def reduced_precision(device: torch.device) -> torch.dtype:
    """Return the number format of ``--amp``: bfloat16 where the device has it."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16
