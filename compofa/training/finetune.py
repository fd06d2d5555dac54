"""What ``--task finetune`` begins with: one subnet of a trained supernet, as a plain network."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import torch

from compofa.data import DataSplits, Normalisation
from compofa.data.imagenet import require_order
from compofa.errors import ConfigError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint
from compofa.networks.families import subnet_from_config
from compofa.networks.network_spec import FixedNetwork, Network
from compofa.networks.zoo import open_checkpoint
from compofa.nn.calibrate import calibrate
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet, initialise
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig

log = logging.getLogger(__name__)


def open_single(config: TrainConfig, splits: DataSplits) -> Checkpoint:
    """Take one network out of a checkpoint, ready to be trained on a data set by itself.

    A subnet's BN statistics are measured on training images first. The classifier is kept where
    the checkpoint's classes are those of the data set, or unknown and as many; otherwise a new
    one takes its place.

    Args:
        config: Resolved settings; ``init_path`` names the checkpoint, or a network of the zoo.
        splits: The data set.

    Returns:
        A checkpoint of a fixed network, normalised as the one it comes from.

    Raises:
        ConfigError: The subnet is missing, or given for a network that holds only one.
        SpaceError: The supernet holds no such subnet.
        CheckpointError: The file cannot be used.
        DataError: It does not name its classes, and numbered folders are in another order.
    """
    found = open_checkpoint(config.init_path)[1]
    subnet = chosen_subnet(found.network, config.subnet, config.eval_size)
    network = found.build()
    normalisation = Normalisation(found.mean, found.std)
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
    same = found.classes == splits.classes if found.classes else spec.classes == len(splits.classes)
    if same and not found.classes:
        require_order(splits.classes)
    if not same:
        log.info("a new classifier for %d classes: they are not those of %s",
                 len(splits.classes), config.init_path)  # fmt: skip
        spec = _with_classes(spec, network, len(splits.classes), config.seed)
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
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
        ConfigError: There is none where one is to be chosen, or the other way round.
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
    subnet = subnet_from_config(json.loads(text), resolution).at(resolution)
    network.space.free().require(subnet, resolution=False)
    return subnet


def _with_classes(
    spec: FixedNetwork, network: StaticNetwork, classes: int, seed: int
) -> FixedNetwork:
    """Give ``network`` a new classifier, and return the definition with it."""
    network.classifier = torch.nn.Linear(network.classifier.in_features, classes)
    initialise(network.classifier, seed)
    *body, last = spec.layers
    return replace(spec, layers=(*body, replace(last, out_channels=classes)))
