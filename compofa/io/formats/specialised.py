"""Files of specialised networks of other programs: a configuration, and weights beside it.

Once-for-All publishes folders of ``net.config``, ``run.config`` (``image_size``) and ``init`` (the
weights); the mobile networks of ProxylessNAS are a ``.json`` beside a ``.pth`` of the same stem.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compofa.errors import CheckpointError, CompofaError, SpaceError
from compofa.io.atomic import draft_folder, write_text_atomic
from compofa.io.checkpoint import (
    Checkpoint,
    as_data,
    from_data,
    weights_in,
)
from compofa.io.formats.names import from_ours, from_slots, in_slots, to_ours
from compofa.io.formats.net_config import from_net_config, is_net_config, read_json, to_net_config
from compofa.io.tensors import read_hashed, write_tensors
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.supernet_spec import MAX_RESOLUTION, field

CONFIG, RUN, INIT = "net.config", "run.config", "init"
EXTRA = "compofa"
"""Key of what this library adds to another program's file."""
HALF = (0.5, 0.5, 0.5)
"""Mean and standard deviation that images of the mobile networks are normalised with."""


@dataclass(frozen=True)
class SpecialisedFiles:
    """Where a specialised network is.

    Attributes:
        config: Its layers.
        weights: Its weights.
        run: Its resolution, where ``config`` does not hold it.
    """

    config: Path
    weights: Path
    run: Path | None = None

    def network(self) -> FixedNetwork:
        """Read the definition.

        Raises:
            SpaceError: A file cannot be read or is not what it should be.
        """
        config, run = read_json(self.config), self.run and read_json(self.run)
        try:
            resolution = None if run is None else field(run, "image_size", int)
            if resolution is not None and not 1 <= resolution <= MAX_RESOLUTION:
                raise SpaceError(f"image_size: expected 1 to {MAX_RESOLUTION}, got {resolution}")
            return from_net_config(config, resolution)
        except SpaceError as error:
            raise SpaceError(f"{self.config}: not a specialised network: {error}") from None


def find_specialised(path: str | Path) -> SpecialisedFiles | None:
    """Return the files of the network that ``path`` belongs to, if it is a specialised one.

    Args:
        path: A folder with ``net.config``, a file in it, a configuration with ``.pth`` beside it,
            or the latter.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name in (CONFIG, RUN, INIT)) and (folder / CONFIG).is_file():
        return SpecialisedFiles(folder / CONFIG, folder / INIT, folder / RUN)
    if path.suffix not in (".json", ".pth") or not path.with_suffix(".json").is_file():
        return None
    config = path.with_suffix(".json")
    try:
        known = is_net_config(read_json(config))
    except SpaceError:
        return None  # a .json of something else
    return SpecialisedFiles(config, path.with_suffix(".pth")) if known else None


def files_of(path: str | Path) -> list[Path]:
    """Return every file that is read for the network at ``path``, of any format."""
    found = find_specialised(path)
    files = [found.config, found.weights, found.run] if found else [Path(path)]
    return [file for file in files if file is not None]


def read_specialised(files: SpecialisedFiles, network: FixedNetwork | None = None) -> Checkpoint:
    """Read a specialised network, its weights exactly as the file has them.

    Images are taken to be normalised as ImageNet's usually are, or to mean and deviation 0.5 for a
    configuration that holds its own resolution: those are of the mobile networks.

    Args:
        files: Where it is.
        network: Its definition, where that need not be read.

    Raises:
        SpaceError: The configuration is not one.
        CheckpointError: The weights cannot be read or are those of another network.
    """
    network = network or files.network()
    data, digest = read_hashed(files.weights)
    state = to_ours(*in_slots(weights_in(files.weights, data), network.depths))
    extra = data.get(EXTRA)
    if isinstance(extra, Mapping):
        checkpoint = from_data(files.weights, {**extra, "weights": {}, "training": None})
        own = checkpoint.network
        if own.elastic or own.at(network.resolution) != network:
            raise CheckpointError(f"{files.weights}: expected weights of the network beside them")
        checkpoint = replace(checkpoint, weights=state)
    else:
        norm = {} if files.run is not None else {"mean": HALF, "std": HALF}
        dataset = "imagenet" if network.classes == 1000 else "imagefolder"
        checkpoint = Checkpoint(
            network, state, dataset=dataset, image_size=network.resolution, **norm
        )
    checkpoint.build(str(files.weights))
    return replace(checkpoint, digest=digest)


def write_specialised(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write a specialised network as Once-for-All publishes it; ``folder`` appears whole.

    Raises:
        CheckpointError: There is something else at ``folder``.
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
