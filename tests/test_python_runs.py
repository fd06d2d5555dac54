"""Runs from Python: data sets, transforms and callbacks of one's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from compofa.data import DATASETS, DatasetInfo, DatasetSource, DataSplits
from compofa.errors import ConfigError
from compofa.io.open import open_network
from compofa.training.config import TrainConfig
from compofa.training.context import Callback
from compofa.training.run import train


def halved(image, resolution):
    return torch.nn.functional.adaptive_avg_pool2d(image.float() / 510, resolution)


INFO = DatasetInfo(
    "stripes", "stripes", (8,), 8, "inception", train_transform=halved, eval_transform=halved,
    network="compofa-small",
)  # fmt: skip


def source(images: int, seed: int) -> DatasetSource:
    """Images that are bright on the left or on the right."""
    targets = torch.arange(images) % 2
    pixels = torch.randint(
        0, 60, (images, 3, 10, 10), generator=torch.Generator().manual_seed(seed)
    )
    for image, target in zip(pixels, targets.tolist(), strict=True):
        image[:, :, 5 * target : 5 * target + 5] += 180
    return DatasetSource(TensorDataset(pixels.to(torch.uint8), targets))


@pytest.fixture
def splits(monkeypatch) -> DataSplits:
    monkeypatch.setitem(DATASETS, "stripes", INFO)
    parts = (source(24, 1), source(8, 2), source(8, 3))
    return DataSplits("stripes", ("left", "right"), *parts, INFO.normalisation)


class Recorder(Callback):
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def on_start(self, run) -> None:
        self.calls.append(("start", run.folder.name))

    def on_step(self, run) -> None:
        self.calls.append(("step", run.state.tally.steps))

    def on_epoch(self, run, metrics) -> None:
        assert (run.folder / "last.pt").is_file()
        self.calls.append(("epoch", metrics["epoch"], "validation" in metrics))

    def on_finish(self, run, result) -> None:
        self.calls.append(("finish", result.best.name))


SETTINGS = {
    "task": "supernet", "net": "ofa-small", "dataset": "stripes", "width_mult": 0.1, "epochs": 2,
    "batch_size": 12, "validate_every": 2, "calibration_images": 8, "dynamic_batch_size": 2,
    "lr": 0.02,
}  # fmt: skip


def test_a_run_on_pytorch_data_sets(splits: DataSplits, tmp_path: Path) -> None:
    recorder = Recorder()
    result = train(
        TrainConfig(**SETTINGS), tmp_path, bar=False, splits=splits, callbacks=[recorder]
    )
    steps = [("step", 1), ("step", 2)]
    assert recorder.calls == [
        ("start", "supernet-1"), *steps, ("epoch", 0, False), *steps, ("epoch", 1, True),
        ("finish", "best.pt"),
    ]  # fmt: skip
    opened = open_network(result.best)
    assert opened.classes == ("left", "right") and opened.checkpoint.dataset == "stripes"
    again = train(TrainConfig(**SETTINGS), tmp_path, bar=False, splits=splits, resume=True)
    assert again.figures == result.figures


def test_other_data_are_refused(splits: DataSplits, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"splits.*'digits'.*'stripes'"):
        train(TrainConfig(), tmp_path, splits=splits)
    train(TrainConfig(**SETTINGS), tmp_path, bar=False, splits=splits)
    fewer = DataSplits(
        "stripes", splits.classes, splits.train.subset(np.arange(20)), splits.validation,
        splits.test, splits.normalisation,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="24 train images before, 20 now"):
        train(TrainConfig(**SETTINGS), tmp_path, bar=False, splits=fewer, resume=True)


def test_settings_follow_from_given_images(splits: DataSplits, tmp_path: Path) -> None:
    free = {name: value for name, value in SETTINGS.items() if name not in ("lr", "batch_size")}
    train(TrainConfig(**free), tmp_path, bar=False, splits=splits)
    assert open_network(tmp_path / "supernet-1" / "best.pt").image_size == 8
