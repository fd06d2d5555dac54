"""Importing torchvision, even if its compiled operators do not match the installed PyTorch."""

import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from compofa.errors import DataError

_META = "torchvision._meta_registrations"


def import_torchvision() -> ModuleType:
    """Return torchvision, with ``datasets`` and ``transforms.v2`` imported.

    torchvision's wheels are compiled against CUDA builds of PyTorch. With a CPU build their
    operators cannot be loaded, and the import fails in the module that registers them. Only in that
    case, that module is replaced by an empty one, which data sets, models and transforms do not
    need. Other errors of torchvision are not hidden.

    Raises:
        DataError: torchvision is not installed.
    """
    if "torchvision" not in sys.modules:
        spec = importlib.util.find_spec("torchvision")
        if spec is None or spec.origin is None:
            raise DataError("reading images needs torchvision: pip install torchvision")
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
