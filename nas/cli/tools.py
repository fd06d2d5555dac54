"""``python -m nas``: devices, predictions, measurements and fits."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compofa.cli.common import (
    Parser,
    add_backend_options,
    int_list,
    join_ranks,
    log_on_main,
    run,
    say,
)
from compofa.errors import ConfigError
from compofa.io.locks import exclusive
from compofa.networks.published import zoo_devices
from compofa.space.arrays import arrays_of
from nas.cli import latency, sample
from nas.cli.networks import add_network
from nas.cli.predict import add_predict_options, predict
from nas.cost.devices import DEVICES
from nas.search import pipeline
from nas.tables import read_csv, read_subnets, without_repeats

if TYPE_CHECKING:
    from compofa.io.records import EvalRecord
    from compofa.space.subnet import Subnet

PROG = "python -m nas"
DESCRIPTION = """\
Devices, predictions for tables of subnets, measurements and fits. For example:

  python -m nas estimate --net compofa --columns top1,latency:note10 --input in.csv --output out.csv
  python -m nas collect --net compofa-digits --samples 100 --output records.jsonl
  python -m nas fit-accuracy --input records.jsonl --output predictor.npz
  python -m nas measure --net compofa --output tables
  python -m nas sample --net compofa --samples 60 --export onnx phone
  python -m nas fit-latency --input phone/latency.csv --output phone.npz
"""


def parser() -> Parser:
    """Build the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str,
        text: str,
        call: Callable[[argparse.Namespace], None],
        aliases: Sequence[str] = (),
    ) -> Parser:
        about = text[0].upper() + text[1:] + "."
        sub = commands.add_parser(name, help=text, description=about, aliases=aliases)
        sub.set_defaults(call=call)
        return sub

    add("devices", "list the devices with the source and the error of each", _devices)

    sub = add("estimate", "add accuracy or costs to a table of subnets", predict, ["predict"])
    add_predict_options(sub)

    sub = add("sample", sample.TEXT, sample.sample)
    sample.add_sample_options(sub)

    sub = add("measure", latency.MEASURE, latency.measure)
    latency.add_measure_options(sub)

    sub = add(
        "collect", "measure the accuracy of random subnets of a checkpoint; resumable", _collect
    )
    sub.add_argument(
        "--net",
        required=True,
        metavar="FILE|ID",
        help="a checkpoint, or a network whose weights ship",
    )
    sub.add_argument(
        "--samples", type=int, default=100, metavar="N", help="total number of subnets"
    )
    sub.add_argument(
        "--space",
        choices=("own", "free"),
        default="own",
        help="the checkpoint's own space, or the same choices without coupling",
    )
    sub.add_argument(
        "--resolutions",
        type=int_list,
        nargs="+",
        metavar="R",
        help="input resolutions (default: those of training)",
    )
    sub.add_argument(
        "--part", choices=("validation", "test"), default="validation", help="images to evaluate on"
    )
    sub.add_argument("--data-path", metavar="DIR", help="folder of the data set")
    sub.add_argument(
        "--calibration-images",
        type=int,
        default=2000,
        metavar="N",
        help="training images for BN calibration",
    )
    sub.add_argument("--batch-size", type=int, default=256, metavar="N", help="images per batch")
    sub.add_argument("--workers", type=int, default=0, metavar="N", help="loader workers")
    sub.add_argument("--device", help="cpu, cuda or mps (default: cuda if available)")
    add_backend_options(sub)
    sub.add_argument(
        "--seed", type=int, default=0, help="random seed of subnets and calibration images"
    )
    sub.add_argument("--output", required=True, metavar="JSONL", help="file to append records to")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")

    sub = add("fit-accuracy", "fit an accuracy predictor to records or a table", _fit_accuracy)
    _add_fit(
        sub,
        "JSON lines written by collect, or CSV with ks, e, d, r, top1 and, so that no prediction "
        "reaches 100 %%, images",
        "predictor (.npz)",
    )
    sub.add_argument("--name", default="custom", help="name of the model")

    sub = add("fit-latency", latency.FIT, latency.fit_latency)
    latency.add_fit_options(sub)
    add_network(sub, None, " (default: what network.json beside the table says, or compofa)")
    return p


def _add_fit(sub: Parser, source: str, result: str) -> None:
    sub.add_argument("--input", required=True, metavar="FILE", help=source)
    sub.add_argument("--output", required=True, metavar="FILE", help=f"{result} to write")
    sub.add_argument("--seed", type=int, default=0, help="random seed")


def _devices(args: argparse.Namespace) -> None:
    for name, device in DEVICES.items():
        r = device.resolutions
        where = f"r {r[0]} to {r[-1]}" if r else "any resolution"
        print(f"{name:14} {device.description} [{device.unit}; {device.widths}; {where}]")
        print(f"{'':14} {device.source}; {device.error}")
    others = [name for name in zoo_devices() if name not in DEVICES]
    say(
        f"no latency model, but specialised networks (python -m compofa zoo --like NAME): "
        f"{', '.join(others)}"
    )


def _collect(args: argparse.Namespace) -> None:
    import torch

    from compofa.cli.evaluate import open_data
    from compofa.evaluate import Evaluator
    from compofa.io.open import open_network
    from compofa.training.device import check_device
    from nas.accuracy.collect import collect, draw_subnets
    from nas.search.from_checkpoint import Trained, search_resolutions

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def opened() -> tuple[Trained, list[Subnet], Evaluator]:
        check_device(args.device)
        if args.samples < 1:
            raise ConfigError(f"--samples: expected at least 1, got {args.samples}")
        found = open_network(args.net)
        wanted = sorted({r for group in args.resolutions or [] for r in group})
        trained = Trained(
            pipeline.network_name(args.net),
            found,
            search_resolutions(found.checkpoint, wanted),
        )
        space = trained.space if args.space == "own" else trained.free_space or trained.space
        data = argparse.Namespace(dataset=None, data_path=args.data_path, imagenet_path=None)
        evaluator = Evaluator(
            open_data(found.checkpoint, data),
            args.part,
            normalisation=found.normalisation,
            calibration_images=args.calibration_images,
            batch_size=args.batch_size,
            workers=args.workers,
            seed=args.seed,
            device=ranks.device(args.device),
        )
        return trained, draw_subnets(space, args.samples, args.seed), evaluator

    def attempt(again: bool) -> list[EvalRecord]:
        log_on_main(ranks)
        trained, subnets, evaluator = ranks.local_main_first(opened)
        return collect(
            trained.opened, args.net, subnets, evaluator, args.output,
            bar=not args.quiet, backend=ranks,
        )  # fmt: skip

    with join_ranks(args) as ranks:
        records = ranks.run_elastic(attempt)
        if not ranks.is_main:
            return
    top1 = [record.top1 for record in records]
    print(f"{len(records)} records, top-1 {min(top1):.2f} to {max(top1):.2f} %: {args.output}")


def _fit_accuracy(args: argparse.Namespace) -> None:
    from compofa.io.records import read_records
    from nas.accuracy.fit import fit_accuracy

    source = Path(args.input)
    latency.require_model(args.output, source)
    if ".csv" in source.suffixes:
        table = read_csv(source)
        counted = "images" in table.header
        arrays, columns = read_subnets(table, ["top1", *["images"] * counted])
        arrays, top1 = without_repeats(arrays, columns["top1"])
        images = int(columns["images"].min()) if counted else None
    else:
        records = read_records(source)
        if not records:
            raise ConfigError(f"--input: expected records in {source}, got none")
        nets = {(record.checkpoint, len(record.subnet.stages)): record.net for record in records}
        if len(nets) > 1:
            raise ConfigError(
                f"--input: expected records of one network in {source}, got {len(nets)}: "
                f"{', '.join(nets.values())}"
            )
        slots = max(max(record.subnet.depths) for record in records)  # the largest is among them
        subnets = [record.subnet for record in records]
        arrays = arrays_of(subnets, subnets[0].format.names, slots)
        top1 = np.array([record.top1 for record in records])
        images = min(record.images for record in records)
    card = {"source": source.name}
    model = fit_accuracy(arrays, top1, name=args.name, card=card, seed=args.seed, images=images)
    model.save(args.output)
    print(f"{args.name}: {model.error}; written to {args.output}")


def _main(argv: Sequence[str] | None) -> None:
    args = parser().parse_args(argv)
    if args.command in (
        "devices",
        "collect",
    ):  # the first writes nothing, the second has many ranks
        args.call(args)
        return
    with exclusive(args.output, folder=args.command in ("measure", "sample")):
        args.call(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(_main, argv, PROG)
