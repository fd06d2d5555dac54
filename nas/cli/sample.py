"""``python -m nas sample``: the subnets to measure on a device, ready to be copied to it."""

from __future__ import annotations

import argparse
from pathlib import Path

from compofa.cli.common import Parser, say
from compofa.errors import ConfigError
from compofa.networks.zoo import NETWORKS
from nas.cli.networks import add_timed_network, timed_network
from nas.search import pipeline

TEXT = "write subnets of a network as ONNX files to measure on a device"
DESCRIPTION = """\
Write subnets of a network as ONNX files, a table to fill in, and a script that fills it in on the
device. Architectures need no weights: latency depends on shapes alone. From nothing to a search:

  python -m nas sample --net compofa --samples 60 --export onnx phone
  (copy the folder phone to the device; there: pip install onnxruntime)
  python phone/measure.py
  (copy phone/latency.csv back)
  python -m nas fit-latency --input phone/latency.csv --output phone.npz
  python run_NAS.py --target-hardware phone.npz

An interrupted command continues: files that are there are kept.
"""
FORMATS = ("onnx", "tflite-ready")


def add_sample_options(sub: Parser) -> None:
    """Add the options of the command."""
    sub.description = DESCRIPTION
    sub.add_argument("output", metavar="DIR", help="folder to write")
    add_timed_network(sub)
    sub.add_argument(
        "--samples", type=int, default=60, metavar="N", help="number of subnets, at least 50"
    )
    sub.add_argument(
        "--export",
        choices=FORMATS,
        default="onnx",
        help="onnx: for ONNX Runtime; tflite-ready: the same static files, and a script that "
        "converts them with onnx2tf and runs TFLite's benchmark_model through adb",
    )
    sub.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per batch")
    sub.add_argument("--seed", type=int, default=0, help="random seed of subnets and weights")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def sample(args: argparse.Namespace) -> None:
    """Draw the subnets and write the folder.

    Raises:
        CompofaError: An option is not usable, or the folder holds another sample.
    """
    from tqdm import tqdm

    from compofa.io.export import require_packages
    from nas.cost.sampling import DeviceFolder, spread_sample

    require_packages("onnx")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size: expected at least 1, got {args.batch_size}")
    network = timed_network(args)
    subnets = spread_sample(network.space, args.samples, args.seed)
    name = args.net if args.net in NETWORKS else pipeline.network_name(args.net)
    folder = DeviceFolder(Path(args.output), network, name, args.batch_size)
    names = folder.start(subnets, tflite=args.export == "tflite-ready")
    megabytes = folder.expected_bytes(subnets) / 1e6
    sizes = " ".join(map(str, network.space.resolutions))
    print(
        f"{len(subnets)} subnets of {name} at {sizes} px, about {megabytes:,.0f} MB: {args.output}"
    )
    pairs = list(zip(names, subnets, strict=True))
    for file, subnet in tqdm(pairs, desc="exporting", disable=args.quiet):
        folder.export(file, subnet, args.seed)
    script = "to_tflite.sh" if args.export == "tflite-ready" else "measure.py"
    print(f"next, on the device: {script} in {args.output} (its first lines say how)")
    say(f"then: python -m nas fit-latency --input {folder.table} --output device.npz")
