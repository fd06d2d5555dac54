"""Where the weights of named networks are: shipped with the library, or downloaded once."""

from __future__ import annotations

from pathlib import Path

from compofa.errors import CheckpointError
from compofa.io.download import published_file, published_path, replaceable
from compofa.io.formats.specialised import CONFIG, INIT, RUN, SpecialisedFiles
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.published import Specialised
from compofa.networks.zoo import NETWORKS, PUBLISHED, entry

_PACKAGE = Path(__file__).resolve().parent.parent
CHECKPOINT_FOLDERS = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")
"""Folders of the shipped weights: of an installation, and of a clone."""


def shipped_path(name: str) -> Path | None:
    """Return the path of a shipped file, ``None`` where this installation lacks it."""
    paths = (folder / name for folder in CHECKPOINT_FOLDERS)
    return next(filter(Path.is_file, paths), None)


def supernet_path(net_id: str) -> Path:
    """Return the file with the weights of a named supernet, downloading it if it is published.

    Raises:
        SpaceError: The id is unknown.
        CheckpointError: There are no weights, the download fails, or this installation lacks them.
    """
    row = entry(net_id)
    if net_id in PUBLISHED:
        return published_file(PUBLISHED[net_id])
    if not row.shipped:
        named = ", ".join(name for name in NETWORKS if NETWORKS[name].shipped or name in PUBLISHED)
        raise CheckpointError(
            f"no weights ship for {net_id}: expected one of {named}, or a file of weights for "
            "compofa.load_weights"
        )
    path = shipped_path(row.shipped)
    if path is None:
        raise CheckpointError(
            f"this installation lacks {row.shipped}: expected it in {CHECKPOINT_FOLDERS[-1]}"
        )
    return path


def published_id(path: Path) -> str | None:
    """Return the id of the supernet whose published weights are kept at ``path``, if any."""
    named = (net_id for net_id, name in PUBLISHED.items() if Path(name).name == path.name)
    for net_id in named:
        kept = published_path(PUBLISHED[net_id])
        if kept.is_file() and path.is_file() and kept.samefile(path):
            return net_id
    return None


def specialised_files(row: Specialised, weights: bool = True) -> SpecialisedFiles:
    """Return the files of a specialised network of Once-for-All, downloading those needed.

    Args:
        row: Its row in the table.
        weights: Whether to download the weights.

    Raises:
        CheckpointError: A download fails.
    """
    needed = {CONFIG: row.network is None, RUN: row.network is None, INIT: weights}
    names = {name: f"ofa_specialized/{row.folder}/{name}" for name in needed}
    config, run, init = (
        published_file(names[name]) if need else published_path(names[name])
        for name, need in needed.items()
    )
    return SpecialisedFiles(config, init, run)


def specialised_definition(row: Specialised, files: SpecialisedFiles) -> FixedNetwork:
    """Return the definition of a specialised network: that of the table, or the downloaded one.

    Raises:
        CheckpointError: The downloaded configuration is not valid.
    """
    with replaceable(files.config):
        return row.network or files.network()
