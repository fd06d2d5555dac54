"""Checkpoints written in the formats of other programs.

A file written for another program holds ``state_dict`` by that program's names and, under
:data:`compofa.io.formats.specialised.EXTRA`, the rest of the checkpoint, so that reading it again
restores everything.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from compofa.errors import CheckpointError
from compofa.io.checkpoint import Checkpoint, as_data, save_checkpoint
from compofa.io.formats.names import from_ours, to_ours
from compofa.io.formats.specialised import EXTRA, write_specialised
from compofa.io.tensors import write_tensors


def save_as(path: str | Path, checkpoint: Checkpoint, to: str) -> None:
    """Write ``checkpoint`` in a format of :data:`compofa.io.formats.names.FORMATS`.

    Only this library's own format keeps the training state. A specialised network in OFA's format
    is a folder.

    Raises:
        CheckpointError: The format has no names for some of the weights.
        CompofaError: The file cannot be written.
    """
    if to == "compofa":
        save_checkpoint(path, checkpoint)
        return
    if not checkpoint.network.elastic and to == "ofa":
        write_specialised(path, checkpoint)
        return
    slots = checkpoint.network.space.slots
    state = from_ours(checkpoint.weights, slots, to)
    if list(to_ours(state, slots)) != list(checkpoint.weights):
        raise CheckpointError(f"{path}: expected a supernet's weights, got names that {to} lacks")
    extra = as_data(replace(checkpoint, weights={}, training=None))
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_tensors(path, {"state_dict": state, EXTRA: extra})
