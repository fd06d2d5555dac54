"""Networks that a phase is built from: the teacher, initial weights, the subnet to fine-tune."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from compofa.data import DataSplits
from compofa.data.imagenet import require_order
from compofa.errors import CheckpointError, ConfigError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint
from compofa.io.open import OpenedNetwork, open_network
from compofa.io.untrusted import parse_json
from compofa.io.weights import load_state
from compofa.networks.families import subnet_from_config
from compofa.networks.network_spec import FixedNetwork, Network
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn.calibrate import calibrate
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet, initialise
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig

log = logging.getLogger(__name__)


def open_source(source: str, student: Network | None, teaches: bool) -> OpenedNetwork:
    """Open a network that a phase is built from.

    Args:
        source: What :func:`compofa.io.open.open_network` takes.
        student: Definition of the network to train, used for weights that come without one;
            ``None`` to recognise them.
        teaches: Whether it is the teacher, which without a definition is the largest network of
            the student's backbone.

    Raises:
        CompofaError: It cannot be opened.
    """
    if not isinstance(student, NetworkSpec):
        return open_network(source)
    if teaches:
        fixed = {choice.name: (max(choice.values),) for choice in student.backbone.choices[:-1]}
        largest = student.backbone.free_space().restrict(**fixed)
        student = replace(student, space=largest, kernel_transform=False)
    return open_network(source, arch=student)


def check_fits(found: Checkpoint, option: str, path: str, splits: DataSplits) -> None:
    """Check that a network has the classes and the normalisation of a data set.

    Weights without class names also lack a normalisation, and pass.

    Args:
        found: The network.
        option: Option that names it, for errors.
        path: Its path, for errors.
        splits: The data set.

    Raises:
        CheckpointError: Classes, their order or the normalisation differ.
        DataError: The network has no class names, and the numbered class folders of the data set
            are not in numerical order.
    """
    if not found.classes:
        require_order(splits.classes)
        return
    if found.classes != splits.classes:
        raise CheckpointError(
            f"{option} {path}: expected {first_difference(splits.classes, found.classes)}"
        )
    wanted, norm = splits.normalisation, found.normalisation
    if norm != wanted:
        raise CheckpointError(
            f"{option} {path}: expected images normalised with mean {wanted.mean} and deviation "
            f"{wanted.std}, got {norm.mean} and {norm.std}"
        )


def first_difference(wanted: tuple[str, ...], found: tuple[str, ...]) -> str:
    """Describe how two lists of classes differ: ``class 2 of 3 to be 'cat', got 'dog' of 3``."""
    pairs = enumerate(zip_longest(wanted, found), 1)
    number, (one, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return f"class {number} of {len(wanted)} to be {one!r}, got {other!r} of {len(found)}"


def teacher_of(
    opened: OpenedNetwork, path: str, student: Network, splits: DataSplits
) -> StaticNetwork:
    """Return the teacher: a specialised network, or the largest subnet of a supernet.

    Args:
        opened: The network.
        path: Its path, for errors.
        student: Definition of the network that learns from it.
        splits: The data set, normalised as the student expects.

    Raises:
        CheckpointError: It has other classes or another normalisation.
    """
    check_fits(opened.checkpoint, "--teacher-path", path, splits)
    net = opened.network
    if net.classifier.out_features != student.classes:
        raise CheckpointError(
            f"{path}: expected a teacher with {student.classes} classes, "
            f"got {net.classifier.out_features}"
        )
    return (extract(net, net.spec.space.largest) if isinstance(net, Supernet) else net).eval().cpu()


def load_initial(net: Supernet, opened: OpenedNetwork, path: str, splits: DataSplits) -> Checkpoint:
    """Load initial weights.

    Args:
        net: The network to train.
        opened: The network with the weights.
        path: Its path, for errors.
        splits: The data set.

    Returns:
        Its checkpoint, without weights and training state.

    Raises:
        CheckpointError: The weights do not fit, or are for other classes or another normalisation.
    """
    found = opened.checkpoint
    check_fits(found, "--init-path", path, splits)
    load_state(net, found.weights, path)
    return replace(found, weights={}, training=None)


def take_subnet(opened: OpenedNetwork, config: TrainConfig, splits: DataSplits) -> Checkpoint:
    """Return the subnet to fine-tune as a specialised network, with calibrated BN statistics.

    The classifier is kept if the network has the classes of the data set, or unnamed classes of
    the same number; otherwise it is initialised anew.

    Args:
        opened: The network of ``--init-path``.
        config: Resolved settings.
        splits: The data set.

    Returns:
        A checkpoint with the normalisation of ``opened``.

    Raises:
        ConfigError: ``--subnet`` is missing, or given for a network without subnets.
        SpaceError: The supernet has no such subnet.
        DataError: The network has no class names, and the numbered class folders of the data set
            are not in numerical order.
    """
    found = opened.checkpoint
    subnet = _subnet(found.network, config.subnet, config.eval_size)
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
        log.info("new classifier for %d classes, which are not those of %s",
                 len(splits.classes), config.init_path)  # fmt: skip
        spec, classifier = _with_classes(spec, len(splits.classes), config.seed)
        weights |= classifier
    return replace(
        found, network=spec, weights=weights, classes=splits.classes, training=None, digest=""
    )


def _subnet(network: Network, text: str | None, resolution: int) -> Subnet:
    """Return the subnet of ``--subnet`` at a resolution in pixels.

    Args:
        network: Definition of the network.
        text: The subnet as JSON, ``largest`` or ``smallest``; ``None`` for a specialised network.
        resolution: Resolution.

    Raises:
        ConfigError: ``text`` is missing for a supernet, given for a specialised network, or not
            JSON.
        SpaceError: The network has no such subnet.
    """
    network.check_resolution(resolution)
    if not network.elastic:
        if text is not None:
            raise ConfigError("--subnet: expected none for a specialised network")
        return network.subnet.at(resolution)
    if text is None:
        raise ConfigError("--subnet: expected the subnet of the supernet to fine-tune")
    if text in ("largest", "smallest"):
        return getattr(network.space, text).at(resolution)
    try:
        config = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"--subnet: expected a subnet as JSON: {error}") from None
    subnet = subnet_from_config(config, resolution).at(resolution)
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
