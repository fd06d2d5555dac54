"""Importing torchvision, also beside a PyTorch that its compiled operators do not fit."""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from compofa.errors import DataError

_META = "torchvision._meta_registrations"


def import_torchvision() -> ModuleType:
    """Return torchvision, with its ``datasets`` and ``transforms.v2`` ready to use.

    torchvision's wheels are compiled against CUDA builds of PyTorch. Beside a CPU build their
    operators cannot be loaded, and the import fails where they are registered. Only then, that one
    module is replaced by an empty one: datasets, models, and transforms of PIL images and tensors
    do not need it. What else is wrong with torchvision stays visible.

    Raises:
        DataError: torchvision is not installed.
    """
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise DataError("torchvision is needed to read images: pip install torchvision")
        if _META not in sys.modules and not _operators_load(Path(spec.origin).parent):
            sys.modules[_META] = ModuleType(_META)
    torchvision = importlib.import_module("torchvision")
    importlib.import_module("torchvision.datasets")
    importlib.import_module("torchvision.transforms.v2")
    return torchvision


def _operators_load(folder: Path) -> bool:
    import torch

    details = (
        importlib.machinery.ExtensionFileLoader,
        importlib.machinery.EXTENSION_SUFFIXES,
    )
    spec = importlib.machinery.FileFinder(str(folder), details).find_spec("_C")
    if spec is None or spec.origin is None:
        return False
    try:
        torch.ops.load_library(spec.origin)
    except (ImportError, OSError):
        return False
    return True
