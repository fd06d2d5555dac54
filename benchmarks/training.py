"""Speed of training steps, as ratios of alternating timings in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn

from compofa.data import import_torchvision
from compofa.networks.layout import layout, macs
from compofa.networks.zoo import ofa_net
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.training.losses import distillation_loss
from compofa.training.optim import make_optimizer

Step = Callable[[], None]


def time_alternating(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Time each step once per round, and return the medians in seconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def compound_step(net: Supernet, images: torch.Tensor, targets: torch.Tensor) -> tuple[Step, int]:
    """Return a step of the published compound recipe (teacher + 4 subnets) and its forward MACs.

    The four subnets are the same in every round.
    """
    space, spec = net.spec.space, net.spec
    subnets = [space.sample(rng(0, "bench", index)) for index in range(4)]
    teacher = extract(net, space.largest).eval()
    optimizer = make_optimizer(net, 3e-5, 0.9)
    layers = {}  # kept between steps, as in the trainer

    def step() -> None:
        with torch.no_grad():
            soft = teacher(images)
        for subnet in subnets:
            distillation_loss(net.bind(subnet, layers)(images), targets, soft).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def cost(subnet: object) -> int:
        return macs(layout(spec.backbone, subnet.at(images.shape[-1]), spec.classes))

    # A training pass counts as three forward passes, the teacher's as one.
    return step, 3 * sum(map(cost, subnets)) + cost(space.largest)


def plain_step(
    network: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    run: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Step:
    """Return a training step with cross entropy; ``run`` replaces the forward of ``network``."""
    optimizer = make_optimizer(network, 3e-5, 0.9)
    run = run or network

    def step() -> None:
        logits = run(images)
        nn.functional.cross_entropy(logits, targets, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def conv_macs(network: nn.Module, images: torch.Tensor) -> int:
    """Return the forward MACs per image of convolutions and linear layers, counted with hooks."""
    total = SimpleNamespace(macs=0)

    def count(module: nn.Module, args: object, output: torch.Tensor) -> None:
        weight = module.weight
        pixels = output[0].numel() // weight.shape[0]
        total.macs += pixels * weight.numel()

    hooks = [
        module.register_forward_hook(count)
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        network.eval()(images[:1])
    for hook in hooks:
        hook.remove()
    network.train()
    return total.macs


def run(resolution: int = 128, batch: int = 16, rounds: int = 5) -> list[dict[str, object]]:
    """Measure the steps and return the rows of the table.

    Args:
        resolution: Image side in pixels.
        batch: Images per step.
        rounds: Timings per step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, resolution, resolution, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(1000, (batch,), generator=generator).to(device)
    net = ofa_net("compofa").to(device).train()
    other = import_torchvision().models.mobilenet_v3_large()
    other = other.to(device, memory_format=torch.channels_last).train()
    middle = net.spec.space.sample(rng(0, "bench"))
    static = extract(net, middle).to(memory_format=torch.channels_last).train()
    layers = {}

    def subnet(images: torch.Tensor) -> torch.Tensor:
        return net.bind(middle, layers)(images)

    compound, compound_macs = compound_step(net, images, targets)
    plain_macs = 3 * conv_macs(other, images)
    seconds = time_alternating(
        {
            "compound": compound,
            "torchvision": plain_step(other, images, targets),
            "supernet": plain_step(net, images, targets, subnet),
            "static": plain_step(static, images, targets),
        },
        rounds,
    )

    def row(step: str, name: str, macs_per_image: int | None, base: str) -> dict[str, object]:
        rate = None if macs_per_image is None else macs_per_image * batch / seconds[name] / 1e9
        return {
            "step": step,
            "images/s": batch / seconds[name],
            "GMACs/s": rate,
            "time ratio": seconds[name] / seconds[base],
        }

    fixed = 3 * macs(layout(net.spec.backbone, middle.at(resolution), 1000))
    where = f"r={resolution} b={batch} {device}"
    return [
        row(
            f"compound step, teacher + 4 subnets ({where})",
            "compound",
            compound_macs,
            "torchvision",
        ),
        row(
            "  relative to torchvision mobilenet_v3_large", "torchvision", plain_macs, "torchvision"
        ),
        row(f"supernet step with one subnet ({where})", "supernet", fixed, "static"),
        row("  relative to its extracted network", "static", fixed, "static"),
    ]
