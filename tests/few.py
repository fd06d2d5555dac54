"""The first of scikit-learn's digits in place of all of them, for tests that are over soon."""

from dataclasses import replace

import numpy as np
import sklearn.datasets
from sklearn.utils import Bunch

from compofa.space.arrays import SubnetArrays
from compofa.space.choice import Choice
from compofa.space.stage_space import StageSpace
from compofa.training.context import Callback


def first_digits(count: int = 150) -> Bunch:
    """Of 150, 90 are to train on, 30 to validate on and 30 to test on."""
    data = sklearn.datasets.load_digits()
    return Bunch(images=data.images[:count], target=data.target[:count])


def shrink_digits(count: int = 150) -> None:
    """Let the data set have no more, in this process and until it ends."""
    few = first_digits(count)
    sklearn.datasets.load_digits = lambda: few


def changed(arrays: SubnetArrays, **values: np.ndarray) -> SubnetArrays:
    """Return arrays with others in place of some: of block choices or attributes, by name."""
    blocks = {name: values.pop(name, array) for name, array in arrays.blocks.items()}
    return replace(arrays, blocks=blocks, **values)


def stage(depths, kernels, expands, coupling=None) -> StageSpace:
    """Return the choices of a stage of inverted blocks."""
    return StageSpace(depths, (Choice("kernel", kernels), Choice("expand", expands)), coupling)


def same(first: SubnetArrays, second: SubnetArrays) -> bool:
    """Whether two arrays hold the same subnets."""
    pairs = [(first.blocks[name], second.blocks[name]) for name in first.blocks]
    pairs += [(first.depths, second.depths), (first.resolutions, second.resolutions)]
    return all(np.array_equal(a, b) for a, b in [*pairs, (first.outer, second.outer)])


def inverted(kernels: np.ndarray, expands: np.ndarray, depths: np.ndarray, r: np.ndarray):
    """Return arrays of subnets of inverted blocks."""
    blocks = {"kernel": np.asarray(kernels), "expand": np.asarray(expands)}
    return SubnetArrays(blocks, depths, r, np.zeros((len(r), 0), dtype=np.int64))


def floats(arrays: SubnetArrays) -> SubnetArrays:
    """Return the same subnets with every number as a float."""
    return SubnetArrays(
        {name: values.astype(float) for name, values in arrays.blocks.items()},
        *(values.astype(float) for values in (arrays.depths, arrays.resolutions, arrays.outer)),
    )


class AfterEpoch(Callback):
    """Calls a function with the number of epochs done after each."""

    def __init__(self, call) -> None:
        self.call = call

    def on_epoch(self, run, metrics) -> None:
        self.call(metrics["epoch"] + 1)
