"""Data sets of PyTorch as sources of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from compofa.data.torch_datasets import DatasetSource
from compofa.errors import DataError


class Pictures(Dataset):
    """Six images of one shade each, made as ``kind`` says."""

    def __init__(self, kind, targets=True):
        self.kind = kind
        if targets:
            self.targets = [0, 1, 2, 0, 1, 2]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index >= 6:
            raise IndexError
        pixels = np.full((5, 4, 3), 40 * index, dtype=np.uint8)
        made = {
            "array": lambda: pixels,
            "grey array": lambda: pixels[..., 0],
            "pil": lambda: Image.fromarray(pixels),
            "grey": lambda: Image.fromarray(pixels[..., 0]),
            "tensor": lambda: torch.from_numpy(pixels.transpose(2, 0, 1)),
            "grey tensor": lambda: torch.from_numpy(pixels[..., :1].transpose(2, 0, 1)),
            "float": lambda: torch.from_numpy(pixels.transpose(2, 0, 1)) / 255,
            "four": lambda: torch.zeros(4, 5, 4, dtype=torch.uint8),
        }
        return made[self.kind](), index % 3


@pytest.mark.parametrize("kind", ["array", "grey array", "pil", "grey", "tensor", "grey tensor"])
def test_images_become_rgb(kind):
    source = DatasetSource(Pictures(kind))
    assert source.targets.tolist() == [0, 1, 2, 0, 1, 2] and len(source) == 6
    part = source.subset(np.array([5, 1])).subset(np.array([1]))
    assert part.targets.tolist() == [1]
    images, kept, broken = part.load_all(np.array([0]))
    assert np.asarray(images[0]).max() == np.asarray(images[0]).min() == 40
    assert kept == [0] and broken == ()


@pytest.mark.parametrize("kind", ["float", "four"])
def test_other_images_are_refused(kind):
    with pytest.raises(DataError, match="uint8"):
        DatasetSource(Pictures(kind)).load(0)


def test_classes_are_asked_for_where_they_are_not_listed():
    assert DatasetSource(Pictures("pil", targets=False)).targets.tolist() == [0, 1, 2, 0, 1, 2]
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([1, 0])
    assert DatasetSource(TensorDataset(images, labels)).targets.tolist() == [1, 0]


@pytest.mark.parametrize("targets", [[0, 1], [0.5] * 6, [-1] * 6])
def test_wrong_targets_are_refused(targets):
    with pytest.raises(DataError, match="targets"):
        DatasetSource(Pictures("pil"), targets)


def test_streams_are_refused():
    with pytest.raises(DataError, match="map-style"):
        DatasetSource(iter([]))
