"""What ``--task finetune`` begins with: one subnet of a trained supernet, as a plain network."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from compofa.data import DataSplits
from compofa.data.imagenet import require_order
from compofa.errors import ConfigError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint
from compofa.io.open import OpenedNetwork
from compofa.io.untrusted import parse_json
from compofa.networks.network_spec import FixedNetwork, Network
from compofa.nn.calibrate import calibrate
from compofa.nn.supernet import Supernet, initialise
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig

log = logging.getLogger(__name__)


def open_single(opened: OpenedNetwork, config: TrainConfig, splits: DataSplits) -> Checkpoint:
    """Take one network out of a checkpoint, ready to be trained on a data set by itself.

    A subnet's BN statistics are measured on training images first. The classifier is kept where
    the checkpoint's classes are those of the data set, or unknown and as many; otherwise a new
    one takes its place.

    Args:
        opened: The network that ``init_path`` names.
        config: Resolved settings.
        splits: The data set.

    Returns:
        A checkpoint of a fixed network, normalised as the one it comes from.

    Raises:
        ConfigError: The subnet is missing, or given for a network that holds only one.
        SpaceError: The supernet holds no such subnet.
        DataError: It does not name its classes, and numbered folders are in another order.
    """
    found = opened.checkpoint
    subnet = chosen_subnet(found.network, config.subnet, config.eval_size)
    network, normalisation = opened.network, opened.normalisation
    if isinstance(network, Supernet):
        evaluator = Evaluator(
            replace(splits, normalisation=normalisation),
            normalisation=normalisation,
            calibration_images=config.calibration_images,
            batch_size=config.batch_size,
            workers=config.workers,
            seed=config.seed,
            device=config.device,
        )
        images = evaluator.calibration_batches(subnet.resolution)
        network = calibrate(network.to(config.device), images, subnet)
    spec = replace(FixedNetwork.of(found.network, subnet), dropout=config.dropout)
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    same = found.classes == splits.classes if found.classes else spec.classes == len(splits.classes)
    if same and not found.classes:
        require_order(splits.classes)
    if not same:
        log.info("a new classifier for %d classes: they are not those of %s",
                 len(splits.classes), config.init_path)  # fmt: skip
        spec, classifier = _with_classes(spec, len(splits.classes), config.seed)
        weights |= classifier
    return replace(
        found, network=spec, weights=weights, classes=splits.classes, training=None, digest=""
    )


def chosen_subnet(network: Network, text: str | None, resolution: int) -> Subnet:
    """Return the subnet that ``--subnet`` names, at a resolution.

    Args:
        network: What it is taken from.
        text: Its JSON form, ``largest`` or ``smallest``; ``None`` for a network that is one.
        resolution: Side of its images in pixels.

    Raises:
        ConfigError: There is none where one is to be chosen, or the other way round, or ``text``
            is not JSON.
        SpaceError: The network holds no such subnet.
    """
    network.check_resolution(resolution)
    if not network.elastic:
        if text is not None:
            raise ConfigError("--subnet: expected none, since the checkpoint holds one network")
        return network.subnet.at(resolution)
    if text is None:
        raise ConfigError("--subnet: expected which of the supernet's networks to fine-tune")
    if text in ("largest", "smallest"):
        return getattr(network.space, text).at(resolution)
    try:
        config = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"--subnet: expected a subnet as JSON: {error}") from None
    subnet = Subnet.from_config(config, resolution).at(resolution)
    network.space.free().require(subnet, resolution=False)
    return subnet


def _with_classes(
    spec: FixedNetwork, classes: int, seed: int
) -> tuple[FixedNetwork, dict[str, Tensor]]:
    """Return the definition with another number of classes, and weights of a new classifier."""
    *body, last = spec.layers
    classifier = torch.nn.Linear(last.in_channels, classes)
    initialise(classifier, seed)
    weights = {f"{last.name}.{name}": value for name, value in classifier.state_dict().items()}
    return replace(spec, layers=(*body, replace(last, out_channels=classes))), weights
