"""Transforms of one's own in training and evaluation."""

import numpy as np
import pytest
import torch
from test_torch_datasets import Pictures

from compofa.data import (
    DATASETS,
    DatasetInfo,
    calibration_loader,
    eval_loader,
    import_torchvision,
    train_loader,
)
from compofa.data.torch_datasets import DatasetSource
from compofa.errors import ConfigError, DataError
from compofa.training.config import TrainConfig


def noisy(image, resolution):
    v2 = import_torchvision().transforms.v2
    resized = v2.functional.resize(v2.functional.to_image(image), [resolution, resolution])
    return resized.float() / 255 + torch.rand(1)


def plain(image, resolution):
    return torch.full((3, resolution, resolution), 7, dtype=torch.uint8)


INFO = DatasetInfo(
    "shades", "six shades", (8,), 8, "inception", train_transform=noisy, eval_transform=plain
)
SOURCE = DatasetSource(Pictures("pil"))


def training_images(workers=0, first_step=0):
    loader = train_loader(
        SOURCE, INFO, batch_size=2, resolutions=(8,), seed=3, epoch=0, workers=workers,
        first_step=first_step,
    )  # fmt: skip
    return [batch.images for batch in loader]


def test_training_images_depend_on_the_seed_alone():
    images = training_images()
    assert len({float(image[0, 0, 0, 0]) for image in images}) == 3
    for again in (training_images(workers=2), images[:1] + training_images(first_step=1)):
        for one, other in zip(images, again, strict=True):
            assert torch.equal(one, other)


def test_evaluation_and_calibration_have_their_own():
    mean, std = np.array(INFO.normalisation.mean), np.array(INFO.normalisation.std)
    wanted = torch.from_numpy((7 / 255 - mean) / std).float().view(1, 3, 1, 1)
    options = {"resolution": 8, "batch_size": 4}
    for batch in eval_loader(SOURCE, INFO, **options):
        torch.testing.assert_close(batch.images, wanted.expand_as(batch.images))
    for batch in calibration_loader(SOURCE, INFO, seed=0, n_images=4, **options):
        torch.testing.assert_close(batch.images, wanted.expand_as(batch.images))


@pytest.mark.parametrize(
    "wrong", [lambda i, r: i, lambda i, r: torch.zeros(3, r, r).double(), lambda i, r: None]
)
def test_other_results_are_refused(wrong):
    info = DatasetInfo("shades", "", (8,), 8, "inception", eval_transform=wrong)
    with pytest.raises(DataError, match=r"shades: .*\[3, 8, 8\]"):
        list(eval_loader(SOURCE, info, resolution=8, batch_size=2))


@pytest.mark.parametrize("name", ["auto_augment", "crop_scale", "color_jitter"])
def test_settings_that_would_not_be_used_are_refused(monkeypatch, name):
    monkeypatch.setitem(DATASETS, "shades", INFO)
    value = {"auto_augment": "randaugment"}.get(name, 0.5)
    config = TrainConfig(dataset="shades", net="compofa-small", **{name: value})
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}.*own"):
        config.resolved()
