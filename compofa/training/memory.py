"""Memory that training needs, estimated from the layers, and memory that is free.

The estimate counts what a step keeps for its backward pass. It was compared with the peak memory of
real steps on a CPU; see :data:`ERROR`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import params

ERROR = 0.15
"""Largest relative error of :meth:`Need.step` in 13 float32 measurements on a CPU: nine networks of
three families at 32 to 224 pixels, 0.45 to 2.5 GB; 0.06 without ``ofa_resnet50`` (0.13)."""
FIXED = 100_000_000
"""Bytes that a step takes whatever its size: buffers of the libraries."""
SINGLE_PASS = 64
"""Largest image side at which all calibration images pass at once; see
:meth:`compofa.evaluate.Evaluator.calibration_batches`."""
_FLOAT = 4


@dataclass(frozen=True)
class Need:
    """What a network needs per image, and independent of images, in bytes.

    Attributes:
        kept: Activations per image that the backward pass needs.
        largest: The largest activation per image.
        between: The largest input and output of a layer together, per image.
        image: An image.
        weights: Learned parameters.
        resolution: Side of the images in pixels.
    """

    kept: int
    largest: int
    between: int
    image: int
    weights: int
    resolution: int

    @classmethod
    def of(cls, layers: tuple[LayerSpec, ...]) -> Need:
        """Return the need of a network with these layers, at their resolution, in float32."""
        kept = largest = 0
        for layer in layers:
            for conv in layer.convs:
                elements = conv.size**2 * conv.out_channels
                if conv.name == "se.expand":  # the gated feature map
                    elements = layer.out_size**2 * conv.out_channels
                # Its output for BN, BN's output; some activations in place copy their input.
                kept += elements * (1 + conv.norm + (conv.act in ("hswish", "relu6")))
                largest = max(largest, elements)
            if not layer.convs:
                kept += 3 * layer.out_size**2 * layer.out_channels  # output and 64-bit indices
        between = max(
            layer.in_size**2 * layer.in_channels + layer.out_size**2 * layer.out_channels
            for layer in layers
        )
        side = layers[0].in_size
        counts = (kept, largest, between, 3 * side**2, params(layers))
        return cls(*(_FLOAT * count for count in counts), side)

    def step(self, batch: int, teacher: bool = False, workers: int = 0, amp: bool = False) -> int:
        """Return the bytes of a training step.

        Weights, gradients and momentum, with their copies in layers that are reordered for the
        processor, the activations of one subnet (gradients of subnets are summed one by one), two
        gradients of activations, and the loaded batches.

        Args:
            batch: Images per step.
            teacher: Whether there is a teacher of the same size.
            workers: Loader workers, which prefetch two batches each.
            amp: Whether activations are in half precision.
        """
        images = batch * (self.kept + 3 * self.largest) * (0.6 if amp else 1)
        loaded = batch * self.image * (2 + 2 * workers)
        return int(images + loaded + (4 + teacher) * self.weights) + FIXED

    def validation(self, batch: int, calibration: int) -> int:
        """Return the bytes of BN calibration, which keeps a layer's input for all images.

        Args:
            batch: Images per batch.
            calibration: Calibration images.
        """
        at_once = calibration if self.resolution <= SINGLE_PASS else batch
        kept = calibration * (self.between + self.image)
        return int(kept + 3 * at_once * self.largest + 5 * self.weights) + FIXED


def free_bytes(device: str, root: Path = Path("/")) -> int | None:
    """Return the memory that is free on a device, in bytes.

    Args:
        device: ``cpu``, or a CUDA device, whose own memory counts.
        root: Root of the file system, where Linux describes the machine's memory and the limits of
            control groups (containers).

    Returns:
        The bytes; ``None`` if the system does not say.
    """
    if device.startswith("cuda"):
        import torch  # late: the settings of a run are read without torch

        return torch.cuda.mem_get_info(device)[0] if torch.cuda.is_available() else None
    found = [*_available(root / "proc/meminfo"), *_group_limits(root)]
    return max(0, min(found)) if found else None


def _available(meminfo: Path) -> Iterator[int]:
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            yield 1024 * int(line.split()[1])


def _group_limits(root: Path) -> Iterator[int]:
    """Yield what is left of the limit of each control group of this process, version 1 or 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            limit, used = (_read(folder / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
                yield int(limit) - int(used) + int(stat.get(names[2], 0))  # a cache that shrinks
            if folder == top:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def readable(count: float) -> str:
    """Return a number of bytes as ``1.2 GB`` or ``350 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
