"""``python -m compofa predict``: the most probable classes of images."""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from compofa.cli.common import Parser
from compofa.cli.networks import (
    EXTREMES,
    NET_HELP,
    add_arch,
    add_calibration,
    add_normalisation,
    chosen_subnet,
    normalisation,
    specialise,
)
from compofa.errors import ConfigError, DataError
from compofa.io.locks import exclusive
from compofa.io.untrusted import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from compofa.io.open import OpenedNetwork
    from compofa.nn.static import StaticNetwork
    from compofa.predict import Classifier, Prediction
    from compofa.space.subnet import Subnet

HELP = "print the most probable classes of images"
DESCRIPTION = """\
Print the most probable classes of images, with their probabilities. Images are resized, cropped and
normalised as in the evaluation of the network. Unreadable images are named and skipped; if no image
can be read, the exit status is 1.

  python -m compofa predict runs/NAME/finetune/best.pt photo.jpg
  python -m compofa predict runs/NAME/PHASE/best.pt largest DIR --top 1
  python -m compofa predict photos.onnx 'holiday/**/*.jpg' --top 5

The BN of a supernet's subnet is calibrated as by export and evaluation: on the training images of
the checkpoint if they are where they were, else on those of --data-path.
"""
DATA = ("dataset", "data_path", "imagenet_path")
FILE = ("arch", "image_size", "mean", "std")
FEW = 100
"""Images below which calibration on them warns."""
log = logging.getLogger(__name__)
CALIBRATION = ("no_calibrate", "calibrate_on_images", *DATA)


def add_options(parser: Parser) -> None:
    """Add the arguments of the command."""
    parser.description = DESCRIPTION
    parser.usage = f"{parser.prog} NET [SUBNET] IMAGE [IMAGE ...] [option ...]"
    parser.add_argument(
        "net",
        metavar="NET",
        help=f"{NET_HELP}; or an ONNX file that export wrote, with its card beside it",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="[SUBNET] IMAGE",
        help='for a supernet first the subnet: {"ks", "e", "d", "r"} as JSON or a file with it, '
        "largest or smallest; then images, folders (searched recursively) and patterns",
    )
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes per image")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="CSV file to write: image, class_1, probability_1, class_2, ...",
    )
    add_arch(parser)
    data = add_calibration(parser)
    data.add_argument(
        "--calibrate-on-images",
        action="store_true",
        help="calibrate on the given images, where there are no training images; expects hundreds "
        "of images, of all classes",
    )
    add_normalisation(data)
    how = parser.add_argument_group("run")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="images per batch")
    how.add_argument("--workers", type=int, default=0, metavar="N", help="loader workers")
    how.add_argument("--device", help="cpu, cuda or mps (default: cuda if available)")
    how.add_argument("--quiet", action="store_true", help="no progress bar")


def predict(args: argparse.Namespace) -> None:
    """Run the command."""
    least = {"top": 1, "calibration_images": 1, "batch_size": 1, "workers": 0}
    faults = [
        f"--{name.replace('_', '-')}: expected at least {low}, got {getattr(args, name)}"
        for name, low in least.items()
        if getattr(args, name) < low
    ]
    if faults:
        raise ConfigError("; ".join(faults))
    with exclusive(args.output) if args.output else nullcontext():
        _predict(args)


def _predict(args: argparse.Namespace) -> None:
    """Predict the classes of all images, print them and write the table."""
    from tqdm import tqdm

    from compofa.io.atomic import is_stream, require_other
    from compofa.predict import write_predictions

    classifier, images, files = _classifier(args)
    if args.output:
        require_other(args.output, *files, *images)
    with tqdm(
        total=len(images), desc="images", unit="image", delay=1, leave=False, disable=args.quiet
    ) as bar:
        found = classifier.predict(
            images,
            args.top,
            batch_size=args.batch_size,
            workers=args.workers,
            progress=bar.update,
        )
    if args.output:
        write_predictions(args.output, found)
    out = sys.stderr if args.output and is_stream(args.output) else sys.stdout
    _print(found, out)
    if args.output:
        print(f"{len(found)} predictions written to {args.output}", file=out)
    if len(found) < len(images):
        print(f"{len(images) - len(found)} unreadable image(s) were skipped", file=out)


def _print(predictions: Sequence[Prediction], out: TextIO) -> None:
    for found in predictions:
        pairs = zip(found.classes, found.probabilities, strict=True)
        classes = ", ".join(f"{name} ({100 * probability:.1f} %)" for name, probability in pairs)
        print(printable(f"{found.image}: {classes}"), file=out)


def _classifier(args: argparse.Namespace) -> tuple[Classifier, list[str], tuple[Path | str, ...]]:
    """Return the network of the arguments, the images, and the files that were read."""
    import torch

    from compofa.io.open import open_network
    from compofa.predict import Classifier, find_images
    from compofa.training.device import check_device

    if Path(args.net).suffix.lower() == ".onnx":
        _require_default(args, "an ONNX file", *CALIBRATION, *FILE)
        if args.device not in (None, "cpu"):
            raise ConfigError("--device: expected cpu for an ONNX file")
        return Classifier.of_onnx(args.net), find_images(args.images), (args.net,)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(args.device)
    opened = open_network(args.net, arch=args.arch)
    norm = normalisation(opened.checkpoint, args)
    opened = replace(opened, checkpoint=replace(opened.checkpoint, mean=norm.mean, std=norm.std))
    words = list(args.images)
    if opened.spec.elastic:
        args.subnet = _subnet_of(args, words)
    else:
        _require_default(args, "a specialised network", *CALIBRATION)
        args.subnet = None
        if words[0] in EXTREMES or words[0].lstrip().startswith("{"):
            raise ConfigError(f"SUBNET: {args.net} is a specialised network, without subnets")
    subnet = chosen_subnet(args, opened.checkpoint)
    images = find_images(words)
    network = _network(args, opened, subnet, images)
    classifier = Classifier.of(network, opened.checkpoint, subnet.resolution)
    return classifier, images, (*opened.files, args.subnet or "")


def _require_default(args: argparse.Namespace, what: str, *names: str) -> None:
    """Refuse options that have no effect with ``what``."""
    given = [name for name in names if getattr(args, name)]
    if given:
        raise ConfigError(f"--{given[0].replace('_', '-')}: expected none with {what}")


def _subnet_of(args: argparse.Namespace, words: list[str]) -> str:
    """Take the subnet off the words after NET.

    Raises:
        ConfigError: The first of them is no subnet, or no images are left.
    """
    first = words.pop(0)
    is_json = first.lstrip().startswith("{") or Path(first).suffix.lower() == ".json"
    if first not in EXTREMES and not is_json:
        raise ConfigError(
            f"SUBNET: expected a subnet of the supernet {args.net} before the images: largest, "
            f"smallest, JSON or a .json file, got {first}"
        )
    if not words:
        raise ConfigError("IMAGE: expected images, folders or patterns after SUBNET, got none")
    return first


def _network(
    args: argparse.Namespace, opened: OpenedNetwork, subnet: Subnet, images: Sequence[str]
) -> StaticNetwork:
    """Return a specialised network, or a subnet that is calibrated as the options say."""
    from compofa.distributed.threads import cpu_threads, default_threads
    from compofa.nn.calibrate import calibrate
    from compofa.predict import ImageInput, calibration_images

    try:
        if not args.calibrate_on_images:
            return specialise(args, opened, subnet, args.device)[0]
    except DataError as error:
        raise DataError(
            f"{error}; the BN of a subnet is calibrated on training images: name them with "
            "--data-path, or calibrate on the images themselves with --calibrate-on-images"
        ) from None
    _require_default(args, "--calibrate-on-images", "no_calibrate", *DATA)
    image_input = ImageInput.of(opened.checkpoint, subnet.resolution)
    batches = calibration_images(image_input, images, args.calibration_images, args.seed)
    if (found := sum(len(batch) for batch in batches)) < FEW:
        log.warning(
            "BN is calibrated on %d images: expect poor predictions, unless there are hundreds of "
            "images, of all classes",
            found,
        )
    with cpu_threads(default_threads(subnet.resolution)):
        return calibrate(opened.network, batches, subnet).to(args.device)
