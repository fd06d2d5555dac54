"""What all tests share. Nothing heavy is imported here: collecting a few tests must stay quick."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read by torch, OpenBLAS and OpenMP when they load, here and in the processes that tests start:
# the nets are too small for many threads to pay, and with few the figures are the same everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# Under nohup it is ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REFERENCE_DATA = "COMPOFA_REFERENCE_DATA"


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of published measurements, weights and images; skips where there is none."""
    folder = os.environ.get(REFERENCE_DATA)
    if not folder:
        pytest.skip(f"{REFERENCE_DATA} is not set: no published data to compare with")
    if not Path(folder).is_dir():
        pytest.skip(f"{REFERENCE_DATA} is {folder}, which is not a folder")
    return Path(folder)


@pytest.fixture(scope="module")
def few_digits() -> Iterator[None]:
    """The data set digits is its first 150: 90 to train on, 30 to validate on, 30 to test on."""
    import sklearn.datasets
    from few import first_digits

    few = first_digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", lambda: few)
        yield
