"""The rule that cards of exported networks state is the one that images go through."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from compofa.data import dataset_info, import_torchvision
from compofa.data.transforms import eval_images, input_rule, normalise


def follow(rule: dict, image: Image.Image) -> torch.Tensor:
    """Do what a rule says, as a program that has only the card would."""
    v2 = import_torchvision().transforms.v2.functional
    for step in rule["steps"]:
        name, side = step["operation"], step.get("size")
        if name == "centre_crop_to_aspect_ratio":
            short, most = min(image.size), step["at_most"]
            image = v2.center_crop(image, [min(each, most * short) for each in image.size[::-1]])
        elif name == "resize_shorter_side":
            image = v2.resize(image, [side], antialias=step["antialias"])
        elif name == "resize":
            image = v2.resize(image, side, antialias=step["antialias"])
        else:
            assert name == "centre_crop"
            image = v2.center_crop(image, side)
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()) * rule["scale"]
    mean, std = (torch.tensor(rule[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


@pytest.mark.parametrize(
    ("name", "size", "resolution"),
    [("imagenet", (300, 200), 128), ("imagefolder", (500, 40), 32), ("cifar10", (32, 32), 32)],
)
def test_a_program_with_the_card_prepares_the_same_images(name, size, resolution):
    info, generator = dataset_info(name), np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    raw = [image] if info.augmentation == "inception" else torch.from_numpy(
        np.asarray(image).transpose(2, 0, 1).copy()
    )[None]  # fmt: skip
    wanted = normalise(eval_images(raw, resolution, info), info.normalisation)[0]
    rule = json.loads(json.dumps(input_rule(info, info.normalisation, resolution)))
    torch.testing.assert_close(follow(rule, image), wanted)
