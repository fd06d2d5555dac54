"""The first of scikit-learn's digits in place of all of them, for tests that are over soon."""

from dataclasses import replace

import numpy as np
import sklearn.datasets
from sklearn.utils import Bunch

from compofa.space.arrays import SubnetArrays


def first_digits(count: int = 150) -> Bunch:
    """Of 150, 90 are to train on, 30 to validate on and 30 to test on."""
    data = sklearn.datasets.load_digits()
    return Bunch(images=data.images[:count], target=data.target[:count])


def shrink_digits(count: int = 150) -> None:
    """Let the data set have no more, in this process and until it ends."""
    few = first_digits(count)
    sklearn.datasets.load_digits = lambda: few


def as_floats(arrays: SubnetArrays) -> SubnetArrays:
    """Return the same numbers as float64."""
    blocks = {name: values.astype(float) for name, values in arrays.blocks.items()}
    others = arrays.depths, arrays.resolutions, arrays.outer
    return SubnetArrays(blocks, *(values.astype(float) for values in others))


def equal(one: SubnetArrays, other: SubnetArrays) -> bool:
    """Whether two are the same choices and numbers, in the same order."""
    return [*one.blocks] == [*other.blocks] and all(
        np.array_equal(*pair)
        for pair in (
            *zip(one.blocks.values(), other.blocks.values(), strict=True),
            (one.depths, other.depths),
            (one.resolutions, other.resolutions),
            (one.outer, other.outer),
        )
    )


def changed(arrays: SubnetArrays, **values: np.ndarray) -> SubnetArrays:
    """Return arrays with others in place of some: of block choices or attributes, by name."""
    blocks = {name: values.pop(name, array) for name, array in arrays.blocks.items()}
    return replace(arrays, blocks=blocks, **values)
