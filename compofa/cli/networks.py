"""Shared by commands on trained networks: NET, SUBNET, and the data to evaluate or calibrate on."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compofa.data.catalog import DATASETS, dataset_info
from compofa.errors import ConfigError, DataError, did_you_mean
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.zoo import NETWORKS
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet

if TYPE_CHECKING:
    from compofa.cli.common import Parser
    from compofa.data import DataSplits, Normalisation
    from compofa.io.checkpoint import Checkpoint
    from compofa.io.open import OpenedNetwork
    from compofa.nn.static import StaticNetwork

log = logging.getLogger(__name__)

NET_HELP = (
    "a checkpoint of this library, of Once-for-All, CompOFA or MMRazor; a specialised network: a "
    "folder with net.config, or a .json beside a .pth; or an id that python -m compofa zoo lists"
)
EXTREMES = ("largest", "smallest")


def add_arch(parser: Parser) -> None:
    """Add ``--arch``."""
    parser.add_argument(
        "--arch",
        metavar="ID",
        help="network of weights without a definition, or of a subnet (default: recognised): "
        f"{', '.join(NETWORKS)}",
    )


def add_calibration(parser: Parser) -> argparse._ArgumentGroup:
    """Add the options of :func:`specialise`, and return their group."""
    data = parser.add_argument_group("calibration (default: on the data set of the checkpoint)")
    data.add_argument(
        "--no-calibrate", action="store_true", help="keep the supernet's BN statistics"
    )
    data.add_argument("--dataset", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    data.add_argument("--data-path", metavar="DIR", help="folder of the data set")
    data.add_argument("--imagenet-path", metavar="DIR", help="folder of ImageNet: train/ and val/")
    data.add_argument("--image-size", type=int, metavar="R", help="resolution in pixels")
    data.add_argument(
        "--calibration-images",
        type=int,
        default=2000,
        metavar="N",
        help="training images for BN calibration",
    )
    data.add_argument("--seed", type=int, default=0, help="seed of the sampled images")
    return data


def add_normalisation(group: argparse._ArgumentGroup) -> None:
    """Add the options of :func:`normalisation`."""
    for name, text in (("mean", "mean"), ("std", "standard deviation")):
        group.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{text} that images are normalised with, one value or one per channel (default: "
            "the checkpoint's)",
        )


def read_subnet(text: str, space: SearchSpace, resolution: int, option: str = "--subnet") -> Subnet:
    """Read a subnet given as JSON or as a file with JSON.

    Args:
        text: Value of the option.
        space: Space that the subnet must be in.
        resolution: Resolution of a subnet that has none, in pixels.
        option: Name of the option, for error messages.

    Raises:
        ConfigError: ``text`` is neither JSON nor a readable file of it.
        SpaceError: The subnet is not in the space.
    """
    source = option
    if not text.lstrip().startswith("{"):
        source = text
        try:
            text = read_text(text)
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise ConfigError(
                f"{option}: {did_you_mean(source, EXTREMES)}expected JSON or a file with it, got "
                f"{source!r:.200}: {reason}"
            ) from None
    try:
        config = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"{source}: expected a subnet as JSON: {error}") from None
    subnet = space.from_config(config, resolution)
    space.require(subnet, resolution=False)
    return subnet


def chosen_subnet(
    args: argparse.Namespace, checkpoint: Checkpoint, option: str = "SUBNET"
) -> Subnet:
    """Return the subnet of ``args.subnet`` at the resolution of ``args.image_size``.

    Args:
        args: With ``net``, ``subnet`` and ``image_size``.
        checkpoint: The network.
        option: Name of the option, for error messages.

    Raises:
        ConfigError: It is missing for a supernet, or given for a specialised network.
        SpaceError: The subnet or the resolution is not in the space.
    """
    size = checkpoint.image_size if args.image_size is None else args.image_size
    checkpoint.network.check_resolution(size)
    if not checkpoint.network.elastic:
        if args.subnet is not None:
            raise ConfigError(f"{option}: {args.net} is a specialised network, without subnets")
        return checkpoint.network.at(size).subnet
    space = checkpoint.network.space.restrict(resolutions=(size,))
    if args.subnet is None:
        raise ConfigError(
            f"{option}: expected a subnet of the supernet {args.net}, largest or smallest, got none"
        )
    if args.subnet in EXTREMES:
        return getattr(space, args.subnet)
    subnet = read_subnet(args.subnet, space, size, option)
    subnet = subnet if args.image_size is None else subnet.at(size)
    checkpoint.network.check_resolution(subnet.resolution)
    return subnet


def specialise(
    args: argparse.Namespace, opened: OpenedNetwork, subnet: Subnet, device: str = "cpu"
) -> tuple[StaticNetwork, dict[str, Any] | None]:
    """Return a plain network and how its BN was calibrated; ``None`` if it was not.

    A subnet of a supernet is extracted, and calibrated as :class:`compofa.evaluate.Evaluator` does;
    a specialised network stays as it is.

    Args:
        args: With the options of :func:`add_calibration`.
        opened: The network.
        subnet: Its subnet.
        device: Device to calibrate on, and of the result.

    Raises:
        DataError: The training images cannot be found; see :func:`open_data`.
    """
    from compofa.distributed.threads import cpu_threads, default_threads
    from compofa.evaluate import Evaluator
    from compofa.nn.calibrate import calibrate
    from compofa.nn.extract import extract
    from compofa.nn.supernet import Supernet

    supernet = opened.network.to(device)
    if not isinstance(supernet, Supernet):
        return supernet, None
    if args.no_calibrate:
        return extract(supernet, subnet), None
    evaluator = Evaluator(
        open_data(opened.checkpoint, args),
        normalisation=opened.normalisation,
        calibration_images=args.calibration_images,
        seed=args.seed,
        device=device,
    )
    with cpu_threads(default_threads(subnet.resolution)):
        network = calibrate(supernet, evaluator.calibration_batches(subnet.resolution), subnet)
    used = {"dataset": evaluator.splits.name, "images": evaluator.calibration_images}
    return network, {**used, "seed": args.seed}


def open_data(checkpoint: Checkpoint, args: argparse.Namespace) -> DataSplits:
    """Load the data set of the options or of the checkpoint, and check its classes.

    Images that the network was trained on are recognised at any path: a data set that holds some is
    split as it was in training. In any other data set without parts, all images are test images.

    Raises:
        ConfigError: Two folders are given.
        DataError: The data set cannot be found, has classes that the network lacks, or its test or
            validation part holds images that the network was trained on.
    """
    from compofa.data import load_dataset
    from compofa.data.datasets import match_classes
    from compofa.data.imagenet import by_wnid, is_imagenet

    name, path = args.dataset or checkpoint.dataset, args.data_path
    if args.imagenet_path:
        if path is not None:
            raise ConfigError("--imagenet-path: expected none beside --data-path")
        name, path = args.dataset or "imagenet", args.imagenet_path
    elif path is None and name == checkpoint.dataset:
        path = checkpoint.data_path or None
    same_name = name == checkpoint.dataset
    same_path = same_name and path and Path(path).resolve() == Path(checkpoint.data_path).resolve()
    as_then = same_path or (same_name and not dataset_info(name).needs_path)
    by_position = bool(same_path) and checkpoint.data is None
    splits = load_dataset(
        name,
        path,
        seed=checkpoint.data_seed,
        validation_images=checkpoint.validation_images if as_then else None,
        evaluation_only=not by_position,
        known=checkpoint.data,
        by_position=by_position,
    )
    if is_imagenet(checkpoint.classes, checkpoint.network.classes):
        splits = by_wnid(splits)
    if checkpoint.classes:
        splits = match_classes(splits, checkpoint.classes)
    elif len(splits.classes) != checkpoint.network.classes:
        raise DataError(
            f"expected the network's {checkpoint.network.classes} classes, got "
            f"{len(splits.classes)} in {name}"
        )
    _check_images(checkpoint, splits, str(path or name), by_position)
    return splits


def _check_images(
    checkpoint: Checkpoint, splits: DataSplits, where: str, by_position: bool
) -> None:
    """Check that no test or validation image was trained on, and log which images are used.

    Raises:
        DataError: The test or the validation part holds images that the network was trained on.
    """
    from compofa.data.identity import identify_part
    from compofa.data.sources import FilesSource

    known, test = checkpoint.data, len(splits.test)
    for part in ("test", "validation"):
        source = getattr(splits, part)
        seen = known.seen_in(source) if known else 0
        if known and seen and identify_part(source) != getattr(known, part):
            raise DataError(
                f"expected {part} images that the network was not trained on, got {seen} or more "
                f"that it was among {len(source)} in {where}"
            )
    present = len({*splits.test.targets.tolist()})
    if present < len(splits.classes):
        log.info(
            "%s has %d of the network's %d classes", where, present, len(splits.classes)
        )  # fmt: skip
    files = isinstance(splits.test, FilesSource)
    if known and files != bool(known.trained) and identify_part(splits.train) != known.train:
        log.warning(
            "%s and the training data are of different kinds, files or arrays: its test or "
            "validation images may have been trained on", where,
        )  # fmt: skip
    elif not files:
        return
    elif by_position:
        log.info(
            "the checkpoint is of an earlier version, without the names of its images: %s is split "
            "as in training, provided that no file was added or removed since",
            where,
        )
    elif known is None:
        log.info(
            "the checkpoint does not say which images it was trained on: %d images of %s are used "
            "as test images",
            test, where,
        )  # fmt: skip
    elif known.seen_in(splits.train):
        log.info("%s is the training data: %d images of it were held out for testing", where, test)
    else:
        log.info(
            "%s has no images of the training data: %d of its images are test images", where, test
        )


def normalisation(checkpoint: Checkpoint, args: argparse.Namespace) -> Normalisation:
    """Return the normalisation of the options, by default that of the checkpoint.

    Raises:
        DataError: There are not one or three values, or one is out of range.
    """
    from compofa.data import Normalisation

    found = []
    for given, own in ((args.mean, checkpoint.mean), (args.std, checkpoint.std)):
        values = tuple(own if given is None else given)
        found.append(values * 3 if len(values) == 1 else values)
    return Normalisation(*found)
