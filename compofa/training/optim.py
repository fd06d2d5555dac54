"""Optimiser, learning rate schedule, reduced precision, and steps with non-finite gradients."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor, nn

from compofa.training.optimizers import OPTIMIZERS


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


def make_optimizer(
    network: nn.Module, weight_decay: float, momentum: float | None, name: str = "sgd"
) -> torch.optim.Optimizer:
    """Build an optimiser, without weight decay for biases and BN parameters.

    All gradients are allocated as zeros, and an optimiser never sees ``None``: for weights that no
    subnet of a step uses, zero is the gradient of the step's loss. As in the published runs they
    therefore follow their momentum and are decayed. The same holds for AdamW, whose first moment
    fades within tens of steps and whose second within thousands. A weight that has been unused for
    long then moves by at most (1 - beta1) / sqrt(1 - beta2) = 3.2 times the learning rate (Kingma
    and Ba, ICLR 2015, section 2.1), as one in use for which gradients are sparse. Skipping unused
    weights instead would treat the channels and kernels of a tensor unlike the tensor: its unused
    parts have zero gradients in any case.

    Args:
        network: Network to train, on its device.
        weight_decay: Weight decay; decoupled from the gradient with ``adamw``.
        momentum: Momentum, for an optimiser that has one.
        name: A key of :data:`compofa.training.optimizers.OPTIMIZERS`.
    """
    kind = OPTIMIZERS[name]
    decayed, undecayed = [], []
    for label, parameter in network.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        (undecayed if label.endswith("bias") or ".bn." in label else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    settings = dict(kind.settings)
    if kind.momentum is not None:
        settings["momentum"] = momentum
    if not momentum:
        settings.pop("nesterov", None)
    build = getattr(torch.optim, kind.build) if isinstance(kind.build, str) else kind.build
    return build(groups, lr=0.0, **settings)


def check_state(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimiser's state is what its steps need, by comparing it with that of a step.

    Raises:
        ValueError: A weight's state lacks a tensor, has one too many, or one of another shape.
    """
    probe = nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    accepted = inspect.signature(type(optimizer)).parameters
    settings = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    twin = type(optimizer)([probe], **settings)
    twin.step()
    expected = twin.state[probe]
    for parameter, kept in optimizer.state.items():
        if kept.keys() != expected.keys():
            raise ValueError(f"optimiser: expected {sorted(expected)}, got {sorted(kept)}")
        for name, value in expected.items():
            shape = parameter.shape if value.ndim else value.shape
            if kept[name].shape != shape:
                raise ValueError(f"{name} of another shape")


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
    def passes(self, max_norm: float = 0.0) -> bool:
        """Whether all gradients are finite. Synchronises with the GPU.

        Args:
            max_norm: If they are, scale them such that their L2 norm is at most this; 0 for no
                limit.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        norm = float(_norm(gradients))
        if not math.isfinite(norm):
            return False
        if 0 < max_norm < norm:
            torch._foreach_mul_(gradients, max_norm / norm)
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the running statistics of a skipped step."""
        for kept, live in zip(self._kept, self._live, strict=True):
            torch._foreach_copy_(live, kept)


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the L2 norm of all tensors together; infinite in float32 above 1e19."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
