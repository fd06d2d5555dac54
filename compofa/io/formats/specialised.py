"""Specialised networks in the formats of other programs: a configuration beside the weights.

Once-for-All publishes folders with ``net.config``, ``run.config`` (``image_size``) and ``init``
(the weights). The mobile networks of ProxylessNAS are a ``.json`` and a ``.pth`` of the same stem.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import field as attribute
from pathlib import Path
from typing import Any

from torch import Tensor

from compofa.errors import CheckpointError, CompofaError, SpaceError
from compofa.io.atomic import draft_folder, write_text_atomic
from compofa.io.checkpoint import Checkpoint, as_data, from_data, weights_in
from compofa.io.formats.names import from_ours, from_slots, in_slots, to_ours
from compofa.io.formats.net_config import from_net_config, is_net_config, read_json, to_net_config
from compofa.io.tensors import read_hashed, write_tensors
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.supernet_spec import MAX_RESOLUTION, field

CONFIG, RUN, INIT = "net.config", "run.config", "init"
EXTRA = "compofa"
"""Key of the metadata that this library adds to files in the formats of other programs."""
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation that ProxylessNAS normalises images of its networks with."""


@dataclass(frozen=True)
class SpecialisedFiles:
    """The files of a specialised network.

    Attributes:
        config: The configuration of its layers.
        weights: The weights.
        run: The file with the resolution, unless ``config`` has it.
        content: What ``config`` holds, if it has been read.
    """

    config: Path
    weights: Path
    run: Path | None = None
    content: Any = attribute(default=None, repr=False, compare=False)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of the files; the weights come first."""
        return (self.weights, self.config, *((self.run,) if self.run else ()))

    def network(self) -> FixedNetwork:
        """Read the definition.

        Raises:
            SpaceError: A file cannot be read or is not a valid configuration.
        """
        config = read_json(self.config) if self.content is None else self.content
        run = self.run and read_json(self.run)
        try:
            resolution = None if run is None else field(run, "image_size", int)
            if resolution is not None and not 1 <= resolution <= MAX_RESOLUTION:
                raise SpaceError(f"image_size: expected 1 to {MAX_RESOLUTION}, got {resolution}")
            return from_net_config(config, resolution)
        except SpaceError as error:
            raise SpaceError(f"{self.config}: not a specialised network: {error}") from None


def find_specialised(path: str | Path) -> SpecialisedFiles | None:
    """Return the files of the specialised network at ``path``, ``None`` if there is none.

    Args:
        path: A folder with ``net.config`` or one of the files in it, or one of a ``.json`` and a
            ``.pth`` of the same stem.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name in (CONFIG, RUN, INIT)) and (folder / CONFIG).is_file():
        return SpecialisedFiles(folder / CONFIG, folder / INIT, folder / RUN)
    if path.suffix not in (".json", ".pth") or not path.with_suffix(".json").is_file():
        return None
    config = path.with_suffix(".json")
    try:
        content = read_json(config)
    except SpaceError:
        return None  # another kind of .json
    if not is_net_config(content):
        return None
    return SpecialisedFiles(config, path.with_suffix(".pth"), content=content)


def read_specialised(files: SpecialisedFiles, network: FixedNetwork) -> Checkpoint:
    """Read the weights of a specialised network, by this library's names.

    Without metadata of this library, images are taken to be normalised with ImageNet's usual mean
    and standard deviation, or with 0.5 for both if the configuration itself has the resolution, as
    those of ProxylessNAS do.

    Args:
        files: Its files.
        network: Its definition.

    Raises:
        CheckpointError: The weights cannot be read, or the metadata is of another network.
    """
    data, digest = read_hashed(files.weights)
    state = to_ours(*in_slots(weights_in(files.weights, data), network.depths))
    extra = data.get(EXTRA)
    if isinstance(extra, Mapping):
        checkpoint = from_data(files.weights, {**extra, "weights": {}, "training": None})
        own = checkpoint.network
        if own.elastic or own.at(network.resolution) != network:
            raise CheckpointError(f"{files.weights}: expected weights of the network beside them")
        return replace(checkpoint, weights=state, digest=digest)
    norm = {} if files.run is not None else {"mean": HALF, "std": HALF}
    dataset = "imagenet" if network.classes == 1000 else "imagefolder"
    return Checkpoint(
        network, state, dataset=dataset, image_size=network.resolution, digest=digest, **norm
    )


def write_specialised(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a specialised network in OFA's format; ``folder`` appears only when complete.

    Raises:
        CheckpointError: ``folder`` holds other files.
        CompofaError: It cannot be written.
    """
    folder, network = Path(folder), checkpoint.network
    assert isinstance(network, FixedNetwork)
    if folder.exists() and not (
        folder.is_dir() and {CONFIG} >= {*os.listdir(folder)} - {RUN, INIT}
    ):
        raise CheckpointError(f"{folder}: expected a new folder to write {CONFIG} into")
    texts = {CONFIG: to_net_config(network), RUN: {"image_size": checkpoint.image_size}}
    state = from_slots(from_ours(checkpoint.weights, max(network.depths), "ofa"))
    tensors: dict[str, Tensor] = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    extra: dict[str, Any] = as_data(replace(checkpoint, weights={}, training=None))
    try:
        with draft_folder(folder) as draft:
            place = draft / "network"
            for name, content in texts.items():
                write_text_atomic(place / name, json.dumps(content, indent=4) + "\n")
            write_tensors(place / INIT, {"state_dict": tensors, EXTRA: extra})
            if folder.is_dir():
                for name in (INIT, RUN, CONFIG):
                    os.replace(place / name, os.path.realpath(folder / name))
            else:
                os.rename(place, folder)
    except OSError as error:
        raise CompofaError(f"cannot write {folder}: {error.strerror or error}") from error
