"""``python -m compofa zoo``: the list of named networks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from compofa.errors import CheckpointError, ConfigError, SpaceError
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import macs, params
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.published import SPECIALISED, Specialised
from compofa.networks.zoo import NETWORKS, PUBLISHED, network_spec


class Row(NamedTuple):
    """A row of the list."""

    net_id: str
    images: str
    description: str
    top1: str
    target: str
    macs: str
    params: str
    size: str
    weights: str


HEADER = Row("id", "images", "description", "top-1", "target", "MACs", "params", "px", "weights")


def print_zoo(like: str = "") -> None:
    """Print the networks whose ids, targets or descriptions contain ``like``.

    Raises:
        ConfigError: There is none.
    """
    known = {name: row.description for name, row in NETWORKS.items()}
    supernets = [supernet_row(name) for name, text in known.items() if _matches(like, name, text)]
    networks = [
        specialised_row(row)
        for row in SPECIALISED.values()
        if _matches(like, row.net_id, row.folder, row.target)
    ]
    if not supernets and not networks:
        raise ConfigError(
            f"--like: expected text in the row of one of {len(NETWORKS)} supernets and "
            f"{len(SPECIALISED)} specialised networks, got {like!r}"
        )
    for title, rows in (
        (
            "Supernets, for ofa_net: sides of the images they are for; MACs and parameters of the "
            "largest network at px",
            supernets,
        ),
        ("Specialised networks, for ofa_specialized; top-1 and target as published", networks),
    ):
        if rows:
            print(f"{title}:\n")
            print("\n".join(_table([HEADER, *rows])) + "\n")


def supernet_row(net_id: str) -> Row:
    """Return the row of a supernet."""
    row = NETWORKS[net_id]
    spec = network_spec(net_id, 10 if "digits" in net_id else 1000)
    low, high = row.sizes or (224, 224)
    size = min(high, 224)
    layers = spec.layers_of(spec.space.largest.at(size))
    images = f"{low}-{high} px" if row.sizes else ""
    counts = (*_counts(layers), str(size))
    return Row(net_id, images, row.description, "", "", *counts, _weights(net_id))


def _weights(net_id: str) -> str:
    """Return where the weights of a supernet are."""
    from compofa.io.zoo import shipped_path

    if shipped := NETWORKS[net_id].shipped:
        return "included" if shipped_path(shipped) else "not in this installation"
    return _published(PUBLISHED[net_id]) if net_id in PUBLISHED else "train them"


def specialised_row(row: Specialised) -> Row:
    """Return the row of a specialised network."""
    network = row.network or _downloaded(row)
    counts = _counts(network.layers) if network else ("", "")
    size = str(network.resolution) if network else ""
    weights = _published(f"ofa_specialized/{row.folder}/init")
    return Row(row.net_id, "", "", f"{row.top1:.1f}", row.target, *counts, size, weights)


def _downloaded(row: Specialised) -> FixedNetwork | None:
    """Return the definition of a network if its configuration has been downloaded."""
    from compofa.io.formats.specialised import find_specialised

    folder = _local_path(f"ofa_specialized/{row.folder}")
    files = find_specialised(folder) if folder else None
    try:
        return files.network() if files else None
    except SpaceError:
        return None


def _counts(layers: tuple[LayerSpec, ...]) -> tuple[str, str]:
    return f"{macs(layers) / 1e6:.1f}M", f"{params(layers) / 1e6:.2f}M"


def _published(name: str) -> str:
    path = _local_path(name)
    return "downloaded" if path and path.is_file() else "download"


def _local_path(name: str) -> Path | None:
    """Return the path of a published file; ``None`` for a user without a home folder."""
    from compofa.io.download import published_path

    try:
        return published_path(name)
    except CheckpointError:
        return None


def _matches(like: str, *texts: str) -> bool:
    return any(like.lower() in text.lower() for text in texts)


def _table(rows: list[Row]) -> Iterator[str]:
    kept = [i for i in range(len(HEADER)) if any(row[i] for row in rows[1:])]
    widths = [max(len(row[i]) for row in rows) for i in kept]
    right = {HEADER.index(name) for name in ("top-1", "MACs", "params", "px")}
    for row in rows:
        cells = (
            row[i].rjust(width) if i in right else row[i].ljust(width)
            for i, width in zip(kept, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()
