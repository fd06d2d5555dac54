"""The first of scikit-learn's digits in place of all of them, for tests that are over soon."""

import sklearn.datasets
from sklearn.utils import Bunch


def first_digits(count: int = 150) -> Bunch:
    """Of 150, 90 are to train on, 30 to validate on and 30 to test on."""
    data = sklearn.datasets.load_digits()
    return Bunch(images=data.images[:count], target=data.target[:count])


def shrink_digits(count: int = 150) -> None:
    """Let the data set have no more, in this process and until it ends."""
    few = first_digits(count)
    sklearn.datasets.load_digits = lambda: few
