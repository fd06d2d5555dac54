"""``python -m compofa``: export, convert, predict with and list networks."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compofa.cli import predict
from compofa.cli.common import Parser, run
from compofa.cli.networks import (
    NET_HELP,
    add_arch,
    add_calibration,
    chosen_subnet,
    read_subnet,
    specialise,
)
from compofa.data.catalog import DATASETS
from compofa.errors import ConfigError
from compofa.io.atomic import is_stream
from compofa.io.formats.names import FORMATS
from compofa.io.locks import exclusive
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.backbone import Backbone
from compofa.networks.families import BACKBONES, format_of
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.zoo import network_spec
from compofa.space.subnet import Subnet

if TYPE_CHECKING:
    from compofa.io.checkpoint import Checkpoint
    from compofa.io.open import OpenedNetwork

PROG = "python -m compofa"
EXPORT = """\
Export a subnet for other programs. BN is calibrated on training images, the exported network is
loaded again and compared with PyTorch, and its card, OUTPUT.json, says how images are prepared,
what the classes are called, and how large the network is.

  python -m compofa export compofa-digits largest --to onnx --fold-bn
  python -m compofa export runs/NAME/PHASE/best.pt subnet.json --to pt2
"""
EXPORTS = ("onnx", "torchscript", "pt2", "safetensors")


def parser() -> Parser:
    """Build the command's parser."""
    p = Parser(prog=PROG)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str, call: Callable[[argparse.Namespace], None]) -> Parser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(call=call)
        return sub

    sub = add(
        "export",
        "export a subnet for other programs",
        _export,
    )
    sub.description = EXPORT
    sub.add_argument("net", metavar="NET", help=NET_HELP)
    sub.add_argument(
        "subnet",
        nargs="?",
        metavar="SUBNET",
        help='subnet of a supernet: {"ks", "e", "d", "r"} (ResNet50D: {"d", "e", "w", "r"}) as '
        "JSON or a file with it, largest or smallest",
    )
    sub.add_argument(
        "--to", required=True, choices=EXPORTS, metavar="FORMAT", help=", ".join(EXPORTS)
    )
    sub.add_argument(
        "--output", metavar="FILE", help="file to write (default: NET with the format's suffix)"
    )
    sub.add_argument("--fold-bn", action="store_true", help="fold BN into the convolutions")
    add_arch(sub)
    add_calibration(sub)

    predict.add_options(add("predict", predict.HELP, predict.predict))

    sub = add(
        "convert",
        "convert a network or a subnet to the format of another program; the format of IN is "
        "recognised",
        _convert,
    )
    sub.add_argument(
        "input",
        metavar="IN",
        help=f"{NET_HELP}, or a subnet as YAML (MMRazor's) or JSON",
    )
    sub.add_argument(
        "output",
        metavar="OUT",
        help="file to write; a folder for a specialised network in OFA's format",
    )
    sub.add_argument(
        "--to", required=True, choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS)
    )
    add_arch(sub)

    sub = add(
        "zoo",
        "list the named networks, with the published top-1 and latency of specialised networks, "
        "and whether their weights are on this machine",
        _zoo,
    )
    sub.add_argument("--like", default="", metavar="TEXT", help="list only those that match TEXT")
    return p


def _export(args: argparse.Namespace) -> None:
    from compofa.io.atomic import require_other
    from compofa.io.export import SUFFIXES, card_path, require_packages
    from compofa.io.open import open_network

    require_packages(args.to)
    if args.calibration_images < 1:
        raise ConfigError(
            f"--calibration-images: expected at least 1, got {args.calibration_images}"
        )
    for chatty in ("onnx_ir", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    opened = open_network(args.net, arch=args.arch)
    subnet = chosen_subnet(args, opened.checkpoint)
    source = Path(args.net)
    stem = source.stem if source.is_file() else source.name  # ids may contain dots
    output = Path(args.output or stem + SUFFIXES[args.to])
    data = (args.data_path, args.imagenet_path, opened.checkpoint.data_path)
    for file in (output,) if is_stream(output) else (output, card_path(output)):
        require_other(file, *opened.files, args.subnet, *data)
    with exclusive(output):
        _export_subnet(args, opened, subnet, output)


def _export_subnet(
    args: argparse.Namespace, opened: OpenedNetwork, subnet: Subnet, output: Path
) -> None:
    """Export a subnet to ``output``."""
    from compofa.data.transforms import input_rule
    from compofa.io.export import card_path, export, onnx_latency_ms, subnet_card

    network, calibration = specialise(args, opened, subnet)
    checkpoint = opened.checkpoint
    info = DATASETS.get(checkpoint.dataset)  # one of one's own may not be registered here
    card = {
        **subnet_card(checkpoint.network, subnet),
        "classes": list(checkpoint.classes),
        "normalisation": {"mean": list(checkpoint.mean), "std": list(checkpoint.std)},
        "input": info and input_rule(info, checkpoint.normalisation, subnet.resolution),
        "source": args.net,
        "checkpoint": checkpoint.digest,
        "dataset": checkpoint.dataset,
        "calibration": calibration,
        "figures": _figures(checkpoint, subnet),
    }
    difference = export(network, output, args.to, card, fold=args.fold_bn)
    latency = ""
    if args.to == "onnx" and not is_stream(output):
        latency = f"; {onnx_latency_ms(output):.3g} ms per image in ONNX Runtime on this CPU"
    where = "no card" if is_stream(output) else f"card in {card_path(output)}"
    _print_result(
        output,
        f"{output}: {subnet}, {card['params']:,} parameters, {card['macs']:,} MACs; "
        f"maximal difference from PyTorch {difference:.2g}{latency}; {where}",
    )


def _figures(checkpoint: Checkpoint, subnet: Subnet) -> dict[str, Any]:
    """Return the measured accuracies of ``subnet`` in the checkpoint, per part of the data set."""
    if not checkpoint.network.elastic:
        return dict(checkpoint.figures)
    space = checkpoint.network.space
    ours = [
        name
        for name in ("largest", "smallest")
        if getattr(space, name).at(checkpoint.image_size) == subnet
    ]
    return {
        part: measured[name]
        for part, measured in checkpoint.figures.items()
        if isinstance(measured, dict)
        for name in ours
        if name in measured
    }


def _convert(args: argparse.Namespace) -> None:
    with exclusive(args.output, folder=None):
        _convert_file(args)


def _convert_file(args: argparse.Namespace) -> None:
    from compofa.io.atomic import require_other
    from compofa.io.convert import save_as
    from compofa.io.formats.specialised import find_specialised
    from compofa.io.open import open_network

    subnets = (".yaml", ".yml", ".json")
    if Path(args.input).suffix.lower() in subnets and find_specialised(args.input) is None:
        _convert_subnet(args)
        return
    opened = open_network(args.input, arch=args.arch)
    require_other(args.output, *opened.files, args.input)
    save_as(args.output, opened.checkpoint, args.to)
    count = len(opened.checkpoint.weights)
    _print_result(args.output, f"{args.output}: {count} weights, from {opened.format} to {args.to}")


def _convert_subnet(args: argparse.Namespace) -> None:
    from compofa.io.atomic import require_other, write_text_atomic
    from compofa.io.formats import mmrazor

    require_other(args.output, args.input)
    table = _family(args.input) if args.arch is None else network_spec(args.arch).backbone
    if Path(args.input).suffix.lower() == ".json":
        subnet = read_subnet(args.input, table.free_space(), 224, "IN")
    else:
        subnet = mmrazor.read_subnet(args.input, table)
    ours = json.dumps(subnet.to_config()) + "\n"
    write_text_atomic(args.output, mmrazor.dump(subnet, table) if args.to == "mmrazor" else ours)
    _print_result(args.output, f"{args.output}: {subnet}")


def _family(path: str) -> Backbone:
    """Return the first backbone whose subnets are written as in a file."""
    try:
        config = parse_json(read_text(path))
    except (OSError, ValueError):  # MMRazor's YAML, or a fault that reading the subnet reports
        return MOBILENET_V3
    form = format_of(config if isinstance(config, dict) else {})
    return next(table for table in BACKBONES.values() if table.config_format == form)


def _print_result(output: str | Path, text: str) -> None:
    """Print ``text``, on stderr if the output may be stdout."""
    print(text, file=sys.stderr if is_stream(output) else sys.stdout)


def _zoo(args: argparse.Namespace) -> None:
    from compofa.cli.zoo import print_zoo

    print_zoo(args.like)


def _main(argv: Sequence[str] | None) -> None:
    args = parser().parse_args(argv)
    args.call(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(_main, argv, PROG)
