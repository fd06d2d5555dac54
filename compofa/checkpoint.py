"""Checkpoints: written atomically, read without running code, with all that evaluation needs.

A file of this library is what ``torch.save`` makes of a mapping with ``format``, ``version``,
``network`` (the supernet's definition), ``weights`` and what :class:`Checkpoint` lists. Files of
Once-for-All and CompOFA hold ``state_dict``, ``state_dict_ema`` or the weights themselves;
:func:`load_weights` reads both kinds.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compofa.errors import CheckpointError, SpaceError
from compofa.files import write_atomic
from compofa.network import NetworkSpec
from compofa.supernet import Supernet
from compofa.weights import load_state

FORMAT = "compofa-checkpoint"
VERSION = 1

_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    UnicodeError,
    MemoryError,
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained supernet and what is needed to use it.

    Attributes:
        network: The supernet's definition.
        weights: Its state dict.
        classes: Names of the classes, in the order of the outputs.
        mean: Mean that images are normalised with, one a channel.
        std: Standard deviation that images are normalised with, one a channel.
        dataset: Name of the data set it was trained on.
        data_path: Folder that the data set was read from; empty for embedded data.
        data_seed: Seed that the validation images were held out with.
        validation_images: How many were; ``None`` for the data set's usual number.
        image_size: Resolution to evaluate at, in pixels.
        figures: Measured figures, such as ``{"largest": {"top1": 98.2}}``; JSON data.
        training: State to resume from; ``None`` in a file meant for use only.
    """

    network: NetworkSpec
    weights: Mapping[str, Tensor]
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    dataset: str = ""
    data_path: str = ""
    data_seed: int = 0
    validation_images: int | None = None
    image_size: int = 224
    figures: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None

    def build(self) -> Supernet:
        """Build the supernet with these weights, in evaluation mode.

        Raises:
            CheckpointError: The weights do not fit the definition.
        """
        net = Supernet(self.network)
        load_state(net, self.weights, "checkpoint")
        return net.eval()


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write ``checkpoint``, replacing ``path`` in one step.

    Raises:
        CompofaError: The folder cannot be written or the disk is full.
    """
    data = {
        "format": FORMAT,
        "version": VERSION,
        "network": checkpoint.network.to_json(),
        "weights": {
            name: value.detach().cpu().contiguous() for name, value in checkpoint.weights.items()
        },
        "classes": list(checkpoint.classes),
        "mean": list(checkpoint.mean),
        "std": list(checkpoint.std),
        "dataset": checkpoint.dataset,
        "data_path": checkpoint.data_path,
        "data_seed": checkpoint.data_seed,
        "validation_images": checkpoint.validation_images,
        "image_size": checkpoint.image_size,
        "figures": dict(checkpoint.figures),
        "training": checkpoint.training,
    }
    write_atomic(path, lambda file: torch.save(data, file))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a file that :func:`save_checkpoint` wrote.

    Raises:
        CheckpointError: The file is missing, damaged, foreign or of a newer version.
    """
    data = read_safely(path)
    if data.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected a checkpoint of this library, got a file without its mark; "
            "weights of other programs are loaded with compofa.checkpoint.load_weights"
        )
    if data.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: expected format version {VERSION}, got {data.get('version')!r}"
        )
    try:
        network = NetworkSpec.from_json(data["network"])
        weights = {str(name): value for name, value in data["weights"].items()}
        training, figures = data["training"], data["figures"]
        held = data["validation_images"]
        if training is not None and not isinstance(training, Mapping):
            raise TypeError("training state is not a mapping")
        mean, std = (tuple(float(value) for value in data[key]) for key in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"normalisation {mean}, {std}")
        return Checkpoint(
            network=network,
            weights=weights,
            classes=tuple(str(name) for name in data["classes"]),
            mean=mean,
            std=std,
            dataset=str(data["dataset"]),
            data_path=str(data["data_path"]),
            data_seed=int(data["data_seed"]),
            validation_images=None if held is None else int(held),
            image_size=int(data["image_size"]),
            figures=dict(figures),
            training=training,
        )
    except (KeyError, TypeError, ValueError, AttributeError, SpaceError) as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {_first_line(error)}") from error


def load_weights(net: Supernet, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load weights into ``net``: this library's, Once-for-All's or CompOFA's.

    Args:
        net: The supernet; it changes only when everything fits.
        source: A file or a state dict. Kernel matrices may be there or not: lacking ones are
            the identity, and those of a fixed-kernel network are applied to its kernels.

    Raises:
        CheckpointError: The file cannot be read, or weights are missing, extra or misshapen;
            all are listed.
    """
    if isinstance(source, Mapping):
        load_state(net, source)
        return
    data = read_safely(source)
    for key in ("weights", "state_dict", "state_dict_ema"):
        if isinstance(data.get(key), Mapping):
            data = data[key]
            break
    load_state(net, data, str(source))


def read_safely(path: str | Path) -> dict[str, Any]:
    """Read a mapping that ``torch.save`` wrote, refusing anything that would run code.

    Raises:
        CheckpointError: The file is missing, damaged, not a mapping or holds more than tensors
            and plain data.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing there"
        raise CheckpointError(f"expected a checkpoint file at {path}, got {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{path}: expected a file of tensors and plain data written by torch.save, "
            f"got one that cannot be read safely ({_first_line(error)})"
        ) from error
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path}: expected a mapping, got {type(data).__name__}")
    return dict(data)


def file_hash(path: str | Path) -> str:
    """Return the first 16 hexadecimal digits of the file's SHA-256."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().split("\n")[0]
    return (text or type(error).__name__)[:120]
