"""Loader workers that exhaust shared memory, die, or cannot send a batch: errors, no hangs."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from compofa.cli.common import run
from compofa.data import dataset_info, eval_loader, load_dataset, loaders, train_loader
from compofa.data.sources import MemorySource
from compofa.errors import DataError, LoaderError
from compofa.evaluate import Evaluator

DIGITS = dataset_info("digits")
PID = os.getpid()


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError("waited for ever")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(100)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def source(kind: type[MemorySource] = MemorySource) -> MemorySource:
    return kind(np.zeros((40, 3, 8, 8), np.uint8), np.arange(40) % 10)


def evaluation(images: MemorySource, workers: int = 1, **options):
    return eval_loader(images, DIGITS, resolution=16, batch_size=10, workers=workers, **options)


# --- shared memory ---


@pytest.mark.parametrize(
    ("batches_free", "ahead"), [(0, None), (2, None), (3, 1), (4, 1), (5, 2), (None, 2)]
)
def test_prefetching_fits_into_shared_memory(monkeypatch, batches_free, ahead) -> None:
    batch = 3 * 3 * 16**2 * 4  # 3 images of 16 pixels, the largest resolution
    free = None if batches_free is None else batches_free * batch
    monkeypatch.setattr(loaders, "_free_shared_memory", lambda: free)
    options = {"batch_size": 3, "resolutions": (8, 16), "seed": 0, "epoch": 0}
    if ahead is None:
        with pytest.raises(DataError, match=r"/dev/shm.*--shm-size") as got:
            train_loader(source(), DIGITS, workers=2, **options)
        assert "\n" not in str(got.value)
        with pytest.raises(DataError, match="/dev/shm"):
            eval_loader(source(), DIGITS, resolution=16, batch_size=3, workers=2)
    else:
        assert train_loader(source(), DIGITS, workers=2, **options).loader.prefetch_factor == ahead
    assert len(list(train_loader(source(), DIGITS, workers=0, **options))) == 13


def test_memory_is_counted_for_existing_batches_only(monkeypatch) -> None:
    free = 40 * 3 * 16**2 * 4  # for all images, in 4 batches
    monkeypatch.setattr(loaders, "_free_shared_memory", lambda: free)
    assert evaluation(source(), workers=2).loader.prefetch_factor == 2


def test_kept_batches_are_not_in_shared_memory() -> None:
    evaluator = Evaluator(load_dataset("digits"), workers=1, batch_size=100)
    assert not any(t.is_shared() for batch in evaluator.evaluation_batches(8) for t in batch)


@pytest.fixture
def little_shared_memory(tmp_path: Path):
    """Runs Python with a small /dev/shm; skips if it cannot be mounted."""
    if not sys.platform.startswith("linux") or not shutil.which("unshare"):
        pytest.skip("no namespaces of mounts here")
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm && "
    if subprocess.run(
        ["unshare", "-m", "sh", "-c", mount + "true"], capture_output=True
    ).returncode:
        pytest.skip("a small /dev/shm needs root")

    def python(code: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "code.py").write_text(textwrap.dedent(code))
        command = ["unshare", "-m", "sh", "-c", f'{mount}exec "$0" code.py', sys.executable]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=tmp_path)

    return python


def test_a_command_reports_too_little_shared_memory(little_shared_memory, tmp_path: Path) -> None:
    done = little_shared_memory("""
        import sys
        from compofa.cli import evaluate
        sys.exit(evaluate.main(["--quiet", "--samples", "2", "--workers", "2", "--device", "cpu"]))
    """)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "/dev/shm" in done.stderr and not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_shared_memory_that_others_fill_ends_the_run(little_shared_memory, context: str) -> None:
    done = little_shared_memory(f"""
        import logging
        from compofa.data import dataset_info, eval_loader, load_dataset, loaders
        from compofa.errors import LoaderError

        def main():
            loaders._free_shared_memory = lambda: None
            loader = eval_loader(
                load_dataset("digits").train, dataset_info("digits"), resolution=32,
                batch_size=300, workers=2, context={context!r},
            )
            try:
                list(loader)
            except LoaderError as error:
                print(error)

        if __name__ == "__main__":
            main()
    """)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.count("\n") == 1 and "shar" in done.stdout


# --- workers that die ---


class Deadly(MemorySource):
    """Kills the loader worker that reads from it."""

    def load_all(self, indices):
        if os.getpid() != PID:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load_all(indices)


class Unsendable(MemorySource):
    """Returns objects that cannot be pickled."""

    def load_all(self, indices):
        images, kept, _ = super().load_all(indices)
        return images, kept, (lambda: None,)


def test_a_killed_worker_ends_the_run() -> None:
    with pytest.raises((LoaderError, RuntimeError), match="worker") as caught:
        list(evaluation(source(Deadly), context="fork"))
    assert "\n" not in str(caught.value)


def test_a_batch_that_cannot_be_sent_ends_the_run(capfd) -> None:
    with pytest.raises((LoaderError, RuntimeError), match="worker"):
        list(evaluation(source(Unsendable), context="fork"))
    assert "Traceback" not in capfd.readouterr().err


def test_an_error_in_a_worker_keeps_its_traceback() -> None:
    class Faulty(MemorySource):
        def load_all(self, indices):
            raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="Original Traceback"):
        list(evaluation(source(Faulty), context="fork"))


def test_processes_that_cannot_be_started_are_one_line(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", refuse)
    with pytest.raises(LoaderError, match=r"workers.*Too many open files"):
        iter(evaluation(source()))


def test_a_worker_killed_during_a_command_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lose(_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")

    def err(_: object) -> None:
        raise RuntimeError("something else")

    assert run(lose, [], "prog") == 1
    assert capsys.readouterr().err.endswith(
        "error: DataLoader worker (pid 7) is killed by signal: Killed. more\n"
    )
    with pytest.raises(RuntimeError, match="something else"):
        run(err, [], "prog")
