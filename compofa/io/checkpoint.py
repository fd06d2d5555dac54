"""Checkpoints: a trained network with everything that evaluation needs, in one file.

A checkpoint is written with ``torch.save`` as a mapping with ``format``, ``version``, ``network``
(the definition), ``weights``, the other fields of :class:`Checkpoint` and a checksum (see
:mod:`compofa.io.tensors`; the files of earlier versions have none). Files of other programs are a
state dict, or a mapping that holds one under one of several keys; :func:`load_weights` reads both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from compofa.data.catalog import Normalisation
from compofa.data.identity import DataIdentity
from compofa.errors import CheckpointError, DataError, SpaceError, UnregisteredError
from compofa.io.formats.names import unwrap
from compofa.io.tensors import first_line, read_hashed, read_safely, short_hash, write_tensors
from compofa.io.unpickle import Skipped, skipped_names
from compofa.io.weights import load_state
from compofa.networks.layout import params
from compofa.networks.network_spec import Network, network_from_json
from compofa.networks.supernet_spec import NetworkSpec, field
from compofa.nn.build import build
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.space.subnet import numbers

log = logging.getLogger(__name__)

FORMAT = "compofa-checkpoint"
VERSION = 1
KEYS = (
    "weights", "state_dict", "state_dict_ema", "model_state_dict", "model", "net", "network",
    "module", "student", "params", "model_ema", "ema_state_dict", "ema", "ema_model", "params_ema",
)  # fmt: skip
"""Keys under which programs nest a state dict; of several, the first in this order is used."""
_SMALL = 50_000_000  # parameters of a network that is built whatever the size of its weights


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        network: The definition of a supernet or of a specialised network.
        weights: Its state dict.
        classes: Names of the classes, in the order of the logits.
        mean: Mean that images are normalised with, per channel.
        std: Standard deviation that images are normalised with, per channel.
        dataset: Name of the data set that it was trained on.
        data_path: Absolute path of the data set; empty for data sets that come with a package.
        data: Identity of the images, to recognise them at any path; ``None`` in files of earlier
            versions and of other programs.
        resolutions: Resolutions that it was trained at, in pixels; empty in files of earlier
            versions and of other programs.
        data_seed: Seed of the split into training and validation images.
        validation_images: Number of validation images; ``None`` for the data set's default.
        image_size: Resolution to evaluate at, in pixels.
        figures: Measured accuracies as JSON data, such as ``{"largest": {"top1": 98.2}}``.
        training: Training state to resume from; ``None`` in a file meant for inference.
        digest: Hash (:func:`file_hash`) of the file that it was read from; empty without a file.
    """

    network: Network
    weights: Mapping[str, Tensor]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dataset: str = ""
    data_path: str = ""
    data_seed: int = 0
    validation_images: int | None = None
    image_size: int = 224
    figures: Mapping[str, Any] = attribute(default_factory=dict)
    training: Mapping[str, Any] | None = None
    digest: str = attribute(default="", compare=False)
    data: DataIdentity | None = None
    resolutions: tuple[int, ...] = ()

    @property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation that images are normalised with."""
        return Normalisation(self.mean, self.std)

    def slim(self) -> Checkpoint:
        """Return the checkpoint without training state and with weights in half precision.

        One-dimensional tensors (BN, biases) keep their precision.
        """
        weights = {k: v.half() if v.ndim > 1 else v for k, v in self.weights.items()}
        return replace(self, weights=weights, training=None, digest="")

    def build(self, source: str = "checkpoint") -> Supernet | StaticNetwork:
        """Build the network with these weights, in evaluation mode.

        Args:
            source: Name of the weights in error messages.

        Raises:
            CheckpointError: The weights do not fit the definition.
        """
        net = build(self.network)
        load_state(net, self.weights, source)
        return net.eval()


def save_checkpoint(
    path: str | Path, checkpoint: Checkpoint, previous: str | Path | None = None
) -> None:
    """Write ``checkpoint``, replacing ``path`` atomically.

    Args:
        path: File to write.
        checkpoint: Its content.
        previous: Path to keep the previous file at.

    Raises:
        CompofaError: The folder cannot be written or the disk is full.
    """
    write_tensors(path, as_data(checkpoint), previous)


def as_data(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the mapping of tensors and plain data that a checkpoint file holds."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "network": checkpoint.network.to_json(),
        "weights": {
            name: value.detach().cpu().contiguous() for name, value in checkpoint.weights.items()
        },
        "classes": list(checkpoint.classes),
        "mean": [float(value) for value in checkpoint.mean],
        "std": [float(value) for value in checkpoint.std],
        "dataset": checkpoint.dataset,
        "data_path": checkpoint.data_path,
        "data_seed": checkpoint.data_seed,
        "validation_images": checkpoint.validation_images,
        "image_size": checkpoint.image_size,
        "figures": _json(checkpoint.figures),
        "training": checkpoint.training,
        **({"data": checkpoint.data.to_json()} if checkpoint.data else {}),
        **({"resolutions": list(checkpoint.resolutions)} if checkpoint.resolutions else {}),
    }


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file that :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: The file is missing, damaged, foreign or of a newer version.
    """
    return from_data(path, *read_hashed(path))


def from_data(path: str | Path, data: Mapping[str, Any], digest: str = "") -> Checkpoint:
    """Return the checkpoint of a mapping that :func:`as_data` made; every value is checked.

    Args:
        path: The file, for error messages.
        data: The mapping.
        digest: Hash of the file.

    Raises:
        CheckpointError: A field is missing, of another type or out of range, or the file is of a
            newer version.
    """
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of this library, got another file; "
            "for those of other programs use compofa.open_network or compofa.load_weights"
        )
    try:
        if skipped := skipped_names(data):
            raise TypeError(f"expected tensors and plain data, got {ascii(min(skipped))[1:-1]}")
        version = field(data, "version", int)
        if version != VERSION:
            raise CheckpointError(f"{path}: expected format version {VERSION}, got {version}")
        network = network_from_json(field(data, "network", dict))
        _check_size(network, field(data, "weights", dict))
        names = field(data, "classes", list)
        if any(type(name) is not str for name in names) or len(names) not in (0, network.classes):
            raise SpaceError(f"classes: expected {network.classes} names, got {len(names)} values")
        mean, std = (
            tuple(map(float, numbers(key, field(data, key, list)))) for key in ("mean", "std")
        )
        Normalisation(mean, std)
        trained = field(data, "resolutions", list) if "resolutions" in data else []
        if any(type(size) is not int for size in trained):
            raise SpaceError("resolutions: expected whole numbers, got others")
        for resolution in (field(data, "image_size", int), *trained):
            network.check_resolution(resolution)
        return Checkpoint(
            network=network,
            weights=field(data, "weights", dict),
            classes=tuple(names),
            mean=mean,
            std=std,
            dataset=field(data, "dataset", str),
            data_path=field(data, "data_path", str),
            data_seed=field(data, "data_seed", int),
            validation_images=field(data, "validation_images", int, NoneType),
            image_size=data["image_size"],
            figures=_json(field(data, "figures", dict)),
            training=field(data, "training", dict, NoneType),
            digest=digest,
            data=DataIdentity.from_json(data["data"]) if "data" in data else None,
            resolutions=tuple(trained),
        )
    except UnregisteredError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (TypeError, ValueError, RecursionError, DataError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {first_line(error)}") from error


def _check_size(network: Network, weights: Mapping[str, Any]) -> None:
    """Check that the weights are about as large as the network, before it is allocated.

    Raises:
        SpaceError: They are far smaller.
    """
    largest = network.space.largest if isinstance(network, NetworkSpec) else None
    claimed = params(network.layers_of(largest) if largest else network.layers)
    held = sum(value.numel() for value in weights.values() if isinstance(value, Tensor))
    if claimed > max(_SMALL, 2 * held):
        raise SpaceError(f"expected weights for {claimed:,} parameters, got {held:,}")


def load_weights(net: Supernet | StaticNetwork, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load weights of this library, of Once-for-All, CompOFA or MMRazor into ``net``.

    Args:
        net: The network; left unchanged unless all weights fit.
        source: A file or its content; see :func:`weights_in`. Kernel matrices that are missing
            become the identity; those that a fixed-kernel network has no use for are applied to
            its kernels.

    Raises:
        CheckpointError: The file cannot be read, or weights are missing, extra or misshapen;
            all are listed.
    """
    name, data = (
        ("state dict", source) if isinstance(source, Mapping) else (source, read_safely(source))
    )
    load_state(net, weights_in(name, data), str(name))


def weights_in(path: str | Path, data: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the state dict nested in what was read from ``path``.

    The mappings around it (:data:`KEYS`) and prefixes of its names
    (:func:`compofa.io.formats.names.unwrap`) are removed. What is left out, such as moving averages
    of the same weights, is logged.

    Raises:
        CheckpointError: There is none.
    """
    while found := [key for key in KEYS if isinstance(data.get(key), Mapping) and data[key]]:
        if len(found) > 1:
            log.info("%s: uses %s, not %s", path, found[0], ", ".join(found[1:]))
        data = data[found[0]]
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = value.name if isinstance(value, Skipped) else type(value).__name__
            entry = f"{ascii(name)[:60]}: {ascii(kind)[1:-1][:60]}"
            raise CheckpointError(
                f"{path}: expected a mapping from names to dense tensors, got {entry}"
            )
    state, beside = unwrap(data)
    if beside:
        log.info("%s: ignores %d tensors such as %s", path, len(beside), ascii(beside[0])[:60])
    return state


def file_hash(path: str | Path) -> str:
    """Return the first 16 hexadecimal digits of the file's SHA-256.

    The hash of a file that was loaded is :attr:`Checkpoint.digest`.
    """
    with open(path, "rb") as file:
        return short_hash(file)


def _json(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``figures`` as plain JSON data, with Python's numbers in place of NumPy's.

    Raises:
        TypeError: A value is not JSON data.
    """
    return json.loads(json.dumps(dict(figures)))
