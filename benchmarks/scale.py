"""``python -m benchmarks.scale``: estimate the published ImageNet runs on many GPUs.

Computation is counted in multiply-accumulates (MACs) of the networks built by this library. The
speed of a GPU is derived from the published GPU hours, or given by ``--gmacs`` (``make bench``
prints the GMACs/s of a training step). ``docs/scale.md`` explains the tables.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from compofa.data import dataset_info
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import network_spec
from compofa.seeds import rng
from compofa.training.recipes import IMAGENET, REFERENCE_BATCH, Phase
from nas.cost.base import macs_cost

IMAGES = 1_281_167 - 10_000
"""Training images of ILSVRC2012 (Russakovsky et al., 2015) without those held out by default."""
BYTES_PER_IMAGE = 147_897_477_120 / 1_281_167
"""Size of the archive ILSVRC2012_img_train.tar per image."""
PUBLISHED_HOURS = {"compofa-elastic": 493.5, "ofa_mbv3_d234_e346_k357_w1.0": 978.3}
"""GPU hours of CompOFA and of Once-for-All (Sahni et al., ICLR 2021)."""
COMPOUND = (("teacher", 1), ("compound", 1), ("compound", 2))
PROGRESSIVE = (
    ("teacher", 1), ("kernel", 1), ("depth", 1), ("depth", 2), ("expand", 1), ("expand", 2),
)  # fmt: skip
TASKS = dict(zip(PUBLISHED_HOURS, (COMPOUND, PROGRESSIVE), strict=True))
SAMPLES = 4000
"""Subnets sampled to estimate mean MACs."""


@dataclass(frozen=True)
class Job:
    """A cluster of GPUs.

    Attributes:
        gpus: Number of GPUs, with one rank each.
        batch: Images per GPU and step.
        gbits: Bandwidth between neighbouring ranks, in Gbit/s.
    """

    gpus: int
    batch: int
    gbits: float

    @property
    def steps(self) -> int:
        """Steps per epoch."""
        return max(1, IMAGES // (self.batch * self.gpus))

    def allreduce_s(self, gradient_bytes: float) -> float:
        """Return the seconds of a ring all-reduce: each rank sends 2 (n - 1) / n of the bytes."""
        return 2 * (self.gpus - 1) / self.gpus * gradient_bytes / (self.gbits * 1e9 / 8)


def phases(net: str) -> list[Phase]:
    return [IMAGENET.phase(*task) for task in TASKS[net]]


@cache
def spec_of(net: str, largest_only: bool = False) -> NetworkSpec:
    spec = network_spec(net, 1000, resolutions=dataset_info("imagenet").train_resolutions)
    return spec.largest_only() if largest_only else spec


def mean_macs(net: str, phase: Phase | None) -> float:
    """Return the mean MACs of a forward pass over a phase's subnets and the steps' resolutions.

    Args:
        net: Network id.
        phase: Phase of training; ``None`` for the teacher.
    """
    spec = spec_of(net, phase is None or phase.largest_only)
    space = spec.space if phase is None else phase.within(spec.space)
    genes = space.sample_genes(rng(0, "scale"), SAMPLES)
    return float(macs_cost(spec.backbone, spec.classes)(space.arrays(genes)).mean())


@cache
def step_macs(net: str, phase: Phase) -> float:
    """Return the MACs per training image; a backward pass counts as two forward passes."""
    taught = phase.teacher == "checkpoint"
    return 3 * phase.subnets * mean_macs(net, phase) + taught * mean_macs(net, None)


def published_rate(net: str) -> float:
    """Return the MACs/s per GPU implied by the published hours, which include the teacher."""
    total = sum(phase.epochs * 1_281_167 * step_macs(net, phase) for phase in phases(net))
    return total / (PUBLISHED_HOURS[net] * 3600)


def gradient_bytes(net: str, largest_only: bool = False) -> int:
    """Return the bytes of all gradients in float32."""
    parameters = spec_of(net, largest_only).build().parameters()
    return 4 * sum(parameter.numel() for parameter in parameters)


def loading_rate(seconds: float, resolution: int = 176) -> tuple[float, float]:
    """Measure the loading speed of one CPU core: decoding, cropping and augmenting.

    The images are smoothed noise of 500 x 375 pixels, with about the mean file size of ImageNet.

    Returns:
        Images per second, and mean bytes per image.
    """
    import torch

    from compofa.data import FilesSource, train_loader

    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        names, sizes = [], []
        for index in range(32):
            small = rng(0, "photo", index).integers(0, 256, (94, 125, 3), dtype=np.uint8)
            photo, file = Image.fromarray(small).resize((500, 375)), io.BytesIO()
            photo.save(file, "JPEG", quality=90)
            (Path(folder) / f"{index}.jpg").write_bytes(file.getvalue())
            names.append(f"{index}.jpg".encode())
            sizes.append(len(file.getvalue()))
        source = FilesSource(folder, np.array(names), np.zeros(len(names), np.int64))
        images, started = 0, time.process_time()  # CPU time: independent of other processes
        for epoch in range(10**6):
            options = {"batch_size": 32, "resolutions": (resolution,), "seed": 0, "epoch": epoch}
            for batch in train_loader(source, dataset_info("imagenet"), **options):
                images += len(batch.targets)
            if time.process_time() - started > seconds:
                break
        return images / (time.process_time() - started), float(np.mean(sizes))


def rows(net: str, jobs: list[Job], rate: float, loaded: float) -> list[list[str]]:
    """Return the rows of the table, one per job and phase.

    Args:
        net: Network id.
        jobs: Clusters of GPUs.
        rate: MACs/s per GPU.
        loaded: Images/s loaded per CPU core.
    """
    table = []
    for job in jobs:
        for phase in phases(net):
            compute_s = job.batch * step_macs(net, phase) / rate
            allreduce_s = job.allreduce_s(gradient_bytes(net, phase.largest_only))
            step_s = compute_s + allreduce_s
            speed = job.gpus * job.batch / step_s
            total = job.gpus * job.batch
            epoch_s = job.steps * step_s
            table.append([
                f"{job.gpus}", f"{job.batch}", phase.folder,
                f"{phase.base_lr * total / REFERENCE_BATCH:.3g}", f"{job.steps}",
                f"{speed:,.0f}", f"{speed * BYTES_PER_IMAGE / 1e6:,.0f}",
                f"{speed / loaded:,.0f}",
                f"{1000 * compute_s:.0f}", f"{1000 * allreduce_s:.1f}",
                f"{100 * allreduce_s / step_s:.1f}",
                f"{epoch_s / 60:.2f}", f"{phase.epochs * epoch_s / 3600:.1f}",
            ])  # fmt: skip
    return table


HEAD = [
    "GPUs", "batch", "phase", "peak lr", "steps", "images/s", "MB/s", "cores", "compute ms",
    "comm ms", "comm %", "epoch min", "phase h",
]  # fmt: skip


def show(table: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [HEAD, *table]) for i in range(len(HEAD))]
    for row in [HEAD, *table]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scale", description=__doc__.split("\n")[0])
    parser.add_argument("--net", choices=tuple(TASKS), default="compofa-elastic")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 32, 256])
    parser.add_argument("--batch-size", type=int, default=256, help="images per GPU and step")
    parser.add_argument("--gbits", type=float, default=25, help="bandwidth between GPUs in Gbit/s")
    parser.add_argument(
        "--gmacs", type=float, help="GMACs/s per GPU; by default from the published GPU hours"
    )
    parser.add_argument(
        "--read", type=float, help="images/s loaded per CPU core; measured here by default"
    )
    args = parser.parse_args(argv)
    for net, hours in PUBLISHED_HOURS.items():
        work = [(p.folder, f"{step_macs(net, p) / 1e9:.2f}") for p in phases(net)]
        print(f"{net}: {hours} published GPU hours imply {published_rate(net) / 1e9:.0f} GMACs/s;")
        print(f"  GMACs per image: {', '.join(' '.join(pair) for pair in work)}")
    size = gradient_bytes(args.net)
    print(f"gradients of {args.net}: {size:,} bytes per step, half with --fp16-allreduce;")
    print(f"  of its teacher: {gradient_bytes(args.net, True):,} bytes")
    for gbits in (10, 25, 100, 400):
        times = (1000 * Job(n, 1, gbits).allreduce_s(size) for n in args.gpus)
        listed = ", ".join(f"{t:.1f} ms" for t in times)
        print(f"  ring all-reduce at {gbits} Gbit/s for {args.gpus} GPUs: {listed}")
    loaded = args.read
    if loaded is None:
        loaded, mean = loading_rate(5.0)
        print(f"one core of this machine loads {loaded:.0f} images/s of {mean / 1000:.0f} kB")
    rate = args.gmacs * 1e9 if args.gmacs else published_rate(args.net)
    jobs = [Job(gpus, args.batch_size, args.gbits) for gpus in args.gpus]
    print(f"\n{args.net}, {rate / 1e9:.0f} GMACs/s per GPU, {args.gbits:g} Gbit/s:")
    show(rows(args.net, jobs, rate, loaded))


if __name__ == "__main__":
    main()
