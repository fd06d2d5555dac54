"""Networks that a phase is built from: the teacher, initial weights, the subnet to fine-tune."""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

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
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig
from compofa.training.transfer import is_one, normalisation_of, with_classes_of


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


def check_teacher(found: Checkpoint, name: str, splits: DataSplits) -> None:
    """Check that a teacher has the classes and the normalisation of its student.

    Weights without class names also lack a normalisation, and pass.

    Args:
        found: The teacher.
        name: What it is called in errors.
        splits: The data set, normalised as the student expects.

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
            f"{name}: expected a teacher with {first_difference(splits.classes, found.classes)}"
        )
    wanted, norm = splits.normalisation, found.normalisation
    if norm != wanted:
        raise CheckpointError(
            f"{name}: expected images normalised with mean {wanted.mean} and "
            f"deviation {wanted.std} as for the network that it teaches, got {norm.mean} and "
            f"{norm.std}"
        )


def first_difference(wanted: tuple[str, ...], found: tuple[str, ...]) -> str:
    """Describe how two lists of classes differ: ``class 2 of 3 to be 'cat', got 'dog' of 3``."""
    pairs = enumerate(zip_longest(wanted, found), 1)
    number, (one, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
    return f"class {number} of {len(wanted)} to be {one!r}, got {other!r} of {len(found)}"


def teacher_of(
    opened: OpenedNetwork, path: str, student: Network, config: TrainConfig, splits: DataSplits
) -> StaticNetwork:
    """Return the teacher: a specialised network, or the largest subnet of a supernet.

    A supernet's statistics of batch normalisation mix those of all its subnets, so the teacher's
    own are measured. The outputs of a teacher with the same classes in another order are reordered.

    Args:
        opened: The network.
        path: Its path, for errors.
        student: Definition of the network that learns from it.
        config: Resolved settings.
        splits: The data set, normalised as the student expects.

    Raises:
        CheckpointError: It has other classes or another normalisation.
    """
    if sorted(opened.classes) == sorted(splits.classes):
        opened = with_classes_of(opened, path, splits, config.seed)
    given = "--teacher-path " * (path == config.teacher_path)
    check_teacher(opened.checkpoint, f"{given}{path}", splits)
    net, spec = opened.network, opened.spec
    if spec.classes != student.classes:
        raise CheckpointError(
            f"{path}: expected a teacher with {student.classes} classes, got {spec.classes}"
        )
    if isinstance(net, Supernet):
        largest = net.spec.space.largest
        mixed = opened.described and not is_one(net.spec.space)
        at = largest.at(config.eval_size)
        net = calibrated(net, at, config, splits) if mixed else extract(net, largest)
    return net.eval().cpu()


def calibrated(
    net: Supernet, subnet: Subnet, config: TrainConfig, splits: DataSplits
) -> StaticNetwork:
    """Return a subnet with its own statistics of batch normalisation.

    Args:
        net: The supernet.
        subnet: The subnet, at the resolution to measure at.
        config: Resolved settings.
        splits: The data set, normalised as the network expects.
    """
    evaluator = Evaluator(
        splits,
        normalisation=splits.normalisation,
        calibration_images=config.calibration_images,
        batch_size=config.batch_size,
        workers=config.workers,
        seed=config.seed,
        device=config.device,
    )
    images = evaluator.calibration_batches(subnet.resolution)
    return calibrate(net.to(config.device), images, subnet)


def load_initial(net: Supernet, opened: OpenedNetwork, path: str) -> Checkpoint:
    """Load initial weights.

    Args:
        net: The network to train.
        opened: The network with the weights, which has its classes.
        path: Its path, for errors.

    Returns:
        Its checkpoint, without weights and training state.

    Raises:
        CheckpointError: The weights do not fit.
    """
    load_state(net, opened.checkpoint.weights, path)
    return replace(opened.checkpoint, weights={}, training=None)


def take_subnet(opened: OpenedNetwork, config: TrainConfig, splits: DataSplits) -> Checkpoint:
    """Return the subnet to fine-tune as a specialised network, with calibrated BN statistics.

    Args:
        opened: The network of ``--init-path``.
        config: Resolved settings.
        splits: The data set.

    Returns:
        A checkpoint with the classes of ``splits`` and the normalisation of ``opened``.

    Raises:
        ConfigError: ``--subnet`` is missing, or given for a network without subnets.
        SpaceError: The supernet has no such subnet.
        DataError: The network has no class names, and the numbered class folders of the data set
            are not in numerical order.
    """
    subnet = _subnet(opened.spec, config.subnet, config.eval_size)
    normalisation = normalisation_of(opened, config.init_path, splits)
    opened = with_classes_of(opened, config.init_path, splits, config.seed)
    network = opened.network
    if isinstance(network, Supernet):
        splits = replace(splits, normalisation=normalisation)
        network = calibrated(network, subnet, config, splits)
    spec = replace(FixedNetwork.of(opened.spec, subnet), dropout=config.dropout)
    weights = {name: value.cpu() for name, value in network.state_dict().items()}
    mean, std = normalisation.mean, normalisation.std
    return replace(
        opened.checkpoint,
        network=spec, weights=weights, mean=mean, std=std, training=None, digest="",
    )  # fmt: skip


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
        raise ConfigError(
            "--subnet: expected the subnet of the supernet to fine-tune: largest, smallest, JSON, "
            "or a file such as subnet_20.json"
        )
    if text in ("largest", "smallest"):
        return getattr(network.space, text).at(resolution)
    try:
        config = parse_json(text)
    except ValueError as error:
        raise ConfigError(f"--subnet: expected a subnet as JSON: {error}") from None
    subnet = subnet_from_config(config, resolution).at(resolution)
    network.space.free().require(subnet, resolution=False)
    return subnet
