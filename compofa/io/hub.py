"""Where published files are kept: torch hub's folder, found without importing torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from compofa.errors import CheckpointError


def published_path(name: str) -> Path:
    """Return the path of a published file, in ``checkpoints`` of torch hub's folder.

    Raises:
        CheckpointError: There is no home folder.
    """
    folder = _hub_folder()
    if folder.parts[:1] == ("~",):
        raise CheckpointError(
            f"expected a home folder to keep {name} in, got none: set HOME or TORCH_HOME"
        )
    return folder / "checkpoints" / name


def is_downloaded(name: str) -> bool:
    """Whether a published file is there; it is not for a user without a home folder."""
    try:
        return published_path(name).is_file()
    except CheckpointError:
        return False


def _hub_folder() -> Path:
    """Return what ``torch.hub.get_dir`` does; a folder set in torch is known once it is loaded."""
    if "torch" in sys.modules:
        import torch

        return Path(torch.hub.get_dir())
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))
    return Path(os.path.expanduser(home)) / "hub"
