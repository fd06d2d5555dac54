"""Checkpoints, under the import that the README names; more in :mod:`compofa.io.checkpoint`."""

from compofa.io.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "load_weights", "save_checkpoint"]
