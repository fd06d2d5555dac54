"""``eval_sampled_config.py``: evaluate subnets of a trained supernet, or a specialised network."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from compofa.cli.common import Parser, run
from compofa.cli.networks import (
    NET_HELP,
    add_normalisation,
    chosen_subnet,
    normalisation,
    open_data,
)
from compofa.data.catalog import DATASETS
from compofa.errors import ConfigError
from compofa.io.locks import exclusive
from compofa.io.untrusted import printable
from compofa.networks.zoo import NETWORKS, warn_of_size
from compofa.seeds import rng
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet

if TYPE_CHECKING:
    from compofa.details.outcomes import Observer
    from compofa.evaluate import Evaluator
    from compofa.io.checkpoint import Checkpoint
    from compofa.io.records import EvalRecord

log = logging.getLogger(__name__)

PROG = "eval_sampled_config.py"
DESCRIPTION = """\
Evaluate subnets of a supernet: each is extracted, its BN is calibrated on training images, and its
top-1 and top-5 accuracy are measured. Without options, random subnets of the digits network that
ships with the project are evaluated. A specialised network keeps its BN statistics.

  eval_sampled_config.py
  eval_sampled_config.py --net runs/NAME/PHASE/best.pt --all
  eval_sampled_config.py --net compofa.pt --imagenet-path DIR --samples 5
  eval_sampled_config.py --net ID --imagenet-path DIR
  eval_sampled_config.py --net runs/NAME/PHASE/best.pt --subnet subnet_20.json
"""


def parser() -> Parser:
    """Build the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    p.add_argument(
        "--net",
        default="compofa-digits",
        metavar="FILE|ID",
        help=NET_HELP,
    )
    p.add_argument(
        "--arch",
        metavar="ID",
        help="network of weights without a definition (default: recognised): "
        f"{', '.join(NETWORKS)}",
    )
    which = p.add_argument_group(
        "subnets of a supernet (at most one of these)"
    ).add_mutually_exclusive_group()
    which.add_argument(
        "--samples", type=int, metavar="N", help="N distinct random subnets (default: 10)"
    )
    which.add_argument("--all", action="store_true", help="all subnets of a small space")
    which.add_argument(
        "--subnet",
        metavar="JSON",
        help='one subnet: {"ks", "e", "d", "r"} (ResNet50D: {"d", "e", "w", "r"}) as JSON or a '
        "file with it, largest or smallest",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="seed for drawing subnets and calibration images"
    )
    data = p.add_argument_group("data (default: the data set of the checkpoint)")
    data.add_argument("--dataset", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    data.add_argument("--data-path", metavar="DIR", help="folder or tar file of the data set")
    data.add_argument("--imagenet-path", metavar="DIR", help="folder of ImageNet: train/ and val/")
    data.add_argument(
        "--part", choices=("test", "validation"), default="test", help="images to evaluate on"
    )
    data.add_argument("--image-size", type=int, metavar="R", help="resolution in pixels")
    data.add_argument(
        "--calibration-images",
        type=int,
        metavar="N",
        help="training images for BN (default: 2000; none for a specialised network)",
    )
    add_normalisation(data)
    how = p.add_argument_group("run")
    how.add_argument("--batch-size", type=int, default=256, metavar="N", help="images per batch")
    how.add_argument("--workers", type=int, default=0, metavar="N", help="loader workers")
    how.add_argument("--device", help="cpu, cuda or mps (default: cuda if available)")
    how.add_argument("--output", default="results.csv", metavar="FILE", help="CSV file to write")
    how.add_argument(
        "--details",
        metavar="DIR",
        help="also write, for one network or subnet, accuracy per class, the confusion matrix, "
        "predictions per image and a page of examples (right, wrong, uncertain) to this folder",
    )
    how.add_argument("--quiet", action="store_true", help="no progress bar")
    return p


def choose_subnets(
    space: SearchSpace, samples: int, seed: int, everything: bool = False
) -> list[Subnet]:
    """Return all subnets of a space, or distinct random ones.

    Raises:
        ConfigError: ``samples`` is not positive.
    """
    if everything or samples >= space.size:
        return list(space.enumerate())
    if samples < 1:
        raise ConfigError(f"--samples: expected at least 1, got {samples}")
    generator = rng(seed, "samples")
    chosen: dict[Subnet, None] = {}
    while len(chosen) < samples:
        chosen[space.sample(generator)] = None
    return list(chosen)


def subnets_to_measure(checkpoint: Checkpoint, args: argparse.Namespace) -> list[Subnet]:
    """Return the subnets that the options select, at the resolution to evaluate.

    Raises:
        ConfigError: An option is invalid, or the network is a specialised one without subnets.
        SpaceError: A subnet or a resolution is not in the space.
    """
    network = checkpoint.network
    resolution = checkpoint.image_size if args.image_size is None else args.image_size
    network.check_resolution(resolution)
    if not network.elastic:
        options = {"--samples": args.samples, "--all": args.all or None, "--subnet": args.subnet}
        given = [option for option, value in options.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]}: {args.net} is a specialised network without subnets")
        return [network.at(resolution).subnet]
    if args.subnet is not None:
        return [chosen_subnet(args, checkpoint, "--subnet")]
    space = network.space.restrict(resolutions=(resolution,))
    samples = 10 if args.samples is None else args.samples
    return choose_subnets(space, samples, args.seed, args.all)


def check_numbers(args: argparse.Namespace) -> None:
    """Check the options that are numbers.

    Raises:
        ConfigError: Some are out of range; all of them are listed.
    """
    least = {"samples": 1, "calibration_images": 1, "batch_size": 1, "workers": 0}
    faults = [
        f"--{name.replace('_', '-')}: expected at least {low}, got {value}"
        for name, low in least.items()
        if (value := getattr(args, name)) is not None and value < low
    ]
    if faults:
        raise ConfigError("; ".join(faults))


def print_table(records: Iterable[EvalRecord], names: Iterable[str] | None = None) -> None:
    """Print records as a table; ``names`` is its first column."""
    records = list(records)
    labels = [*names] if names is not None else [str(i + 1) for i in range(len(records))]
    wide, label = (max(map(len, column), default=0) for column in (
        [str(record.subnet) for record in records], labels
    ))  # fmt: skip
    print(
        f"{'':{label}}  {'subnet':{wide}}  {'params':>10}  {'MACs':>12}  {'top-1':>7}  {'top-5':>7}"
    )
    for name, record in zip(labels, records, strict=True):
        print(
            f"{name:{label}}  {record.subnet!s:{wide}}  {record.params:>10,}  {record.macs:>12,}"
            f"  {record.top1:>6.2f}%  {record.top5:>6.2f}%"
        )


def _main(argv: Sequence[str] | None) -> None:
    args = parser().parse_args(argv)
    check_numbers(args)
    with exclusive(args.output), ExitStack() as stack:
        if args.details:
            stack.enter_context(exclusive(args.details, folder=True))
        _evaluate(args)


def _evaluate(args: argparse.Namespace) -> None:
    """Evaluate the selected subnets, write the table and print it."""
    import torch
    from tqdm import tqdm

    from compofa.details.outcomes import Observer
    from compofa.evaluate import Evaluator
    from compofa.io.atomic import is_stream, require_other
    from compofa.io.open import open_network
    from compofa.io.records import write_csv
    from compofa.nn.calibrate import calibrate
    from compofa.training.device import check_device

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    opened = open_network(args.net, arch=args.arch)
    subnets = subnets_to_measure(opened.checkpoint, args)
    if args.details and len(subnets) != 1:
        raise ConfigError(
            f"--details: expected one subnet, such as --subnet largest, got {len(subnets)}"
        )
    elastic = opened.spec.elastic
    if text := warn_of_size(opened.spec, subnets[0].resolution, printable(args.net)):
        log.warning("%s", text)
    splits = open_data(opened.checkpoint, args)
    network = opened.network.to(device)
    calibration = (
        (2000 if elastic else 0) if args.calibration_images is None else args.calibration_images
    )
    evaluator = Evaluator(
        splits,
        args.part,
        normalisation=normalisation(opened.checkpoint, args),
        calibration_images=calibration,
        batch_size=args.batch_size,
        workers=args.workers,
        seed=args.seed,
        device=device,
    )
    if calibration and not elastic:
        network = calibrate(network, evaluator.calibration_batches(subnets[0].resolution))
    data = (args.data_path, args.imagenet_path, opened.checkpoint.data_path)
    require_other(args.output, *opened.files, args.subnet, *data)
    if args.details:
        require_other(args.details, *data)
    records: list[EvalRecord] = []
    observer = Observer() if args.details else None
    for subnet in tqdm(subnets, desc="subnets", unit="net", disable=args.quiet, leave=False):
        records.append(evaluator.measure(network, subnet, args.net, opened.digest, observer))
        if len(records) == len(subnets) or not is_stream(args.output):
            write_csv(args.output, records)
    print_table(records)
    top1 = [record.top1 for record in records]
    what = f"{len(records)} subnet(s) of {opened.spec.space.name}" if elastic else args.net
    print(
        f"{printable(what)} on {records[0].images} {args.part} images of "
        f"{splits.name}: top-1 {min(top1):.2f} to {max(top1):.2f} %; written to {args.output}"
    )
    if evaluator.broken.paths:
        print(f"{len(evaluator.broken.paths)} broken image(s) were skipped")
    if observer is not None:
        _write_details(args, opened.checkpoint, evaluator, observer)


def _write_details(
    args: argparse.Namespace, checkpoint: Checkpoint, evaluator: Evaluator, observer: Observer
) -> None:
    """Write the folder of ``--details`` and print which classes are confused most often."""
    from compofa.data.imagenet import is_imagenet
    from compofa.details.folder import PAGE, write_details
    from compofa.predict import class_names

    splits, outcomes = evaluator.splits, evaluator.outcomes(observer)
    classes = splits.classes
    if not checkpoint.classes and is_imagenet((), len(classes)):
        classes = class_names((), len(classes))
    title = f"{args.net} on {len(outcomes)} {args.part} images of {splits.name}"
    write_details(args.details, outcomes, classes, evaluator.source, args.part, title)
    for true, predicted, images in outcomes.confused_pairs(len(classes))[:3]:
        print(printable(f"{classes[true]} predicted as {classes[predicted]}: {images} image(s)"))
    print(f"details in {args.details}: open {Path(args.details) / PAGE}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(_main, argv, PROG)
