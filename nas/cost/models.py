"""Opening of the files of latency models, whatever their kind."""

from __future__ import annotations

from pathlib import Path

from compofa.errors import CompofaError, TableError
from nas.cost.counted import CountModel
from nas.cost.fitted import LayerModel, NetworkModel
from nas.model_file import read_model

LatencyModel = LayerModel | NetworkModel | CountModel
KINDS = {model.kind: model for model in (LayerModel, NetworkModel, CountModel)}


def load_model(path: str | Path) -> LatencyModel:
    """Read a latency model: ``path`` (.npz) and its card (.json).

    Raises:
        TableError: A file is missing, malformed or something else.
    """
    expected = "a latency model written by fit-latency"
    arrays, card = read_model(path, expected)
    kind = card.get("kind")
    if kind not in KINDS:
        raise TableError(f"{path}: expected {expected}, got a card of kind {kind!r:.40}")
    try:
        return KINDS[kind](arrays, card)
    except CompofaError as error:
        raise TableError(f"{path}: expected {expected}, got: {error}") from error
