"""Devices to train on."""

from __future__ import annotations

import torch

from compofa.errors import ConfigError


def _kind(device: str) -> str:
    """Return the type of a device; empty if there is no such type."""
    try:
        return torch.device(device).type
    except RuntimeError:
        return ""


def is_available(device: str) -> bool:
    """Return whether this machine has a device: ``cpu``, ``cuda``, ``cuda:1`` or ``mps``."""
    kind = _kind(device)
    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available())


def check_device(device: str, amp: bool = False, ranks: int = 1) -> None:
    """Check that a device can be trained on.

    Args:
        device: Value of ``--device``.
        amp: Whether to train in reduced precision.
        ranks: Number of ranks.

    Raises:
        ConfigError: It is unknown, or missing on this machine, or cannot be used so.
    """
    kind = _kind(device)
    if kind not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device: expected cpu, cuda or mps, got {device!r}")
    if not is_available(device):
        raise ConfigError(f"--device: got {device!r}, but PyTorch finds no {kind.upper()} device")
    if kind == "mps" and amp:
        raise ConfigError("--amp: expected --device cpu or cuda, got mps")
    if kind == "mps" and ranks > 1:
        raise ConfigError(f"--device: expected cpu or cuda for {ranks} ranks, got mps")


def sums_dtype(device: torch.device) -> torch.dtype:
    """Return the data type of sums on a device: float64, or float32 on MPS, which lacks float64."""
    return torch.float32 if device.type == "mps" else torch.float64
