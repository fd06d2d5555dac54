"""Data sets, transforms and loaders for training and evaluation.

Most names are imported on first use: importing this package, say for the table of data sets,
imports neither torch nor torchvision.
"""

import importlib
from typing import Any

from compofa.data.catalog import (
    DATASETS,
    DatasetInfo,
    Normalisation,
    dataset_info,
    register_dataset,
)
from compofa.data.readers import RawDataset

_LAZY = {
    "BrokenImages": "decoding",
    "UnreadableImageError": "decoding",
    "ImageSource": "sources",
    "MemorySource": "sources",
    "FilesSource": "sources",
    "DatasetSource": "torch_datasets",
    "DataSplits": "datasets",
    "load_dataset": "datasets",
    "SampleKey": "sampling",
    "TrainBatches": "sampling",
    "resolution_at": "sampling",
    "steps_per_epoch": "sampling",
    "Batch": "loaders",
    "train_loader": "loaders",
    "eval_loader": "loaders",
    "calibration_loader": "loaders",
    "import_torchvision": "torchvision_shim",
}

__all__ = [
    "DATASETS", "DatasetInfo", "Normalisation", "RawDataset", "dataset_info", "register_dataset",
    *_LAZY,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
