"""Checkpoints in the formats of other programs, read and written as whole files.

A file written for another program holds ``state_dict`` by that program's names, and beside it,
under ``compofa``, what a checkpoint of this library says beyond its weights: they come back whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from compofa.errors import CheckpointError
from compofa.io.checkpoint import (
    Checkpoint,
    as_data,
    from_data,
    save_checkpoint,
    weights_in,
)
from compofa.io.formats.names import from_ours, recognise, to_ours
from compofa.io.formats.specialised import (
    EXTRA,
    find_specialised,
    read_specialised,
    write_specialised,
)
from compofa.io.tensors import read_hashed, write_tensors
from compofa.networks.zoo import network_of


def read_any(path: str | Path, arch: str | None = None) -> tuple[str, Checkpoint]:
    """Read a checkpoint of any format, its weights exactly as the file has them.

    Args:
        path: The file, or the folder of a specialised network.
        arch: The network that another program's weights belong to; recognised when left out.

    Returns:
        The format, one of :data:`compofa.io.formats.names.FORMATS`, and the checkpoint.

    Raises:
        CheckpointError: The file cannot be read, its format is not known, or its weights belong to
            no network or to another one than ``arch``.
    """
    specialised = find_specialised(path)
    if specialised is not None:
        return "ofa", read_specialised(specialised)
    data, digest = read_hashed(path)
    if "format" in data:
        checkpoint = from_data(path, data, digest)
        checkpoint.build(str(path))
        return "compofa", checkpoint
    state = weights_in(path, data)
    kind = recognise(state)
    if kind is None:
        example = f"names such as {next(iter(state))}" if state else "an empty one"
        raise CheckpointError(
            f"{path}: expected weights of Once-for-All, CompOFA, MMRazor or this "
            f"library, got {example[:80]}"
        )
    extra = data.get(EXTRA)
    if isinstance(extra, Mapping) and arch is None:
        checkpoint = from_data(path, {**extra, "weights": state, "training": None})
        if not checkpoint.network.elastic:
            raise CheckpointError(f"{path}: expected net.config beside a specialised network")
        slots = checkpoint.network.space.slots
        checkpoint = replace(checkpoint, weights=to_ours(state, slots))
    else:
        weights = to_ours(state)
        checkpoint = Checkpoint(network_of(path, weights, arch), weights, dataset="imagenet")
    checkpoint.build(str(path))
    return kind, replace(checkpoint, digest=digest)


def save_as(path: str | Path, checkpoint: Checkpoint, to: str) -> None:
    """Write ``checkpoint`` in a format of :data:`compofa.io.formats.names.FORMATS`.

    A state to resume training from goes only into this library's own. A specialised network for
    Once-for-All is a folder.

    Raises:
        CheckpointError: It has weights whose names would not come back.
        CompofaError: The file cannot be written.
    """
    if to == "compofa":
        save_checkpoint(path, checkpoint)
        return
    if not checkpoint.network.elastic and to == "ofa":
        write_specialised(path, checkpoint)
        return
    slots = checkpoint.network.space.slots
    state: dict[str, Tensor] = from_ours(checkpoint.weights, slots, to)
    if list(to_ours(state, slots)) != list(checkpoint.weights):
        raise CheckpointError(f"{path}: expected a supernet's weights, got names that {to} lacks")
    extra: dict[str, Any] = as_data(replace(checkpoint, weights={}, training=None))
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_tensors(path, {"state_dict": state, EXTRA: extra})
