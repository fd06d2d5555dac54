"""Runs that are killed, at many moments, and go on: what they end with is the same to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_resume import assert_equal
from test_storage import small_disk

from compofa.errors import StoppedError
from compofa.io.checkpoint import load_checkpoint
from compofa.training.shutdown import SIGNALS, Stopping, on_signals

ROOT = Path(__file__).parent.parent
KILL = signal.SIGKILL
TEACHER = [
    "--task", "teacher", "--epochs", "2", "--image-size", "8", "--batch-size", "20", "--lr", "0.05",
    "--width-mult", "0.1", "--heuristic", "2:3", "--calibration-images", "12",
    "--warmup-epochs", "1", "--device", "cpu", "--save-minutes", "0", "--quiet",
]  # fmt: skip
"""60 images, two epochs of three steps, each of them saved."""
LONG_S = 30
"""A preempted machine's notice is 30 seconds; these steps take milliseconds."""


class End(NamedTuple):
    status: int
    seconds: float
    late: float | None
    said: str


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., End]]:
    """Runs in processes of their own, forked from a warm one."""
    server = subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "mortal.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip

    def call(folder: Path, *argv: str, log: Path | None = None, **die: Any) -> End:
        log = log or folder.with_suffix(".log")
        order = {"argv": [*argv, "--output", str(folder)], "log": str(log), "die": die}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        return End(**json.loads(server.stdout.readline()), said=log.read_text())

    with server:
        yield call
    assert server.returncode == 0


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> tuple[Path, float]:
    """The folder of a run that nothing happened to, and its seconds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    end = run(folder, *TEACHER)
    assert end.status == 0, end.said
    return folder, end.seconds


def assert_same(folder: Path, other: Path) -> None:
    """Compare what two runs left, all their phases."""
    phases = sorted(path.name for path in other.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == phases
    for phase in phases:
        for name in ("last.pt", "best.pt"):
            mine, theirs = (load_checkpoint(f / phase / name) for f in (folder, other))
            for checkpoint in (mine, theirs):  # which may differ
                (checkpoint.training or {"config": {}})["config"].pop("save_minutes", None)
            assert_equal(vars(mine), vars(theirs), f"{phase}/{name}")
        lines = []
        for place in (folder, other):
            text = (place / phase / "metrics.jsonl").read_text()
            lines.append([json.loads(line) for line in text.splitlines()])
            for line in lines[-1]:
                del line["train"]["images_per_s"]
        assert lines[0] == lines[1]
        assert (folder / phase / "summary.json").exists()
        assert not list((folder / phase).glob(".*")), "drafts of the killed"


LIVES = {
    "before the first save": [("data", 1), ("settings", 1), ("begun", 1), ("step", 1)],
    "in the first saves": [
        ("half a checkpoint", 1), ("checkpoint written", 1), ("previous linked", 1),
        ("previous kept", 1),
    ],
    "in steps": [("step", 3), ("step taken", 1), ("within the optimiser", 40), ("step", 2)],
    "in later saves": [
        ("checkpoint in place", 2), ("half a checkpoint", 2), ("previous kept", 1),
        ("checkpoint written", 2),
    ],
    "at the ends of epochs": [
        ("metrics", 1), ("validation", 1), ("best in place", 1), ("metrics", 1), ("summary", 1),
    ],
}  # fmt: skip
"""Where runs are killed, one after another: 21 moments."""


@pytest.mark.parametrize("moments", LIVES.values(), ids=LIVES.keys())
def test_killed_at_every_kind_of_moment(run, whole, tmp_path, moments):
    folder = tmp_path / "run"
    for at, count in moments:
        end = run(folder, *TEACHER, "--resume", "auto", at=at, count=count, signal=KILL)
        assert end.status == -KILL, (at, end.said)
    end = run(folder, *TEACHER, "--resume", "auto")
    assert end.status == 0, end.said
    assert_same(folder, whole[0])


def test_killed_again_and_again_whenever(run, whole, tmp_path):
    folder, limit, killed = tmp_path / "run-0", whole[1], 0
    for number, share in enumerate(np.random.default_rng(0).uniform(0.1, 0.9, 5), 1):
        end = run(folder, *TEACHER, "--resume", "auto", after=share * limit, signal=KILL)
        assert end.status in (-KILL, 0), end.said
        killed += end.status == -KILL
        if end.status == 0 and not killed:  # the machine is quicker now: again, sooner
            folder, limit = tmp_path / f"run-{number}", limit / 3
    assert killed
    end = run(folder, *TEACHER, "--resume", "auto")
    assert end.status == 0, end.said
    assert_same(folder, whole[0])


# --- asked to stop ---


@pytest.mark.parametrize(
    ("number", "at", "count"),
    [
        (signal.SIGTERM, "step", 2),
        (signal.SIGTERM, "half a checkpoint", 1),
        (signal.SIGTERM, "validation", 1),
        (signal.SIGINT, "step", 5),
        (signal.SIGUSR1, "step", 4),
        (signal.SIGHUP, "half a checkpoint", 1),
    ],
)
def test_asked_to_stop(run, whole, tmp_path, number, at, count):
    folder = tmp_path / "run"
    rare = [word if word != "0" else "1000" for word in TEACHER]  # no other save in the epoch
    end = run(folder, *rare, at=at, count=count, signal=int(number))
    assert end.status == 128 + number, end.said
    last = folder / "teacher" / "last.pt"
    line = end.said.splitlines()[-1]
    assert line.startswith("train_ofa_net.py: ") and "Traceback" not in end.said
    assert all(word in line for word in (number.name, str(last), "--resume"))
    assert end.late < LONG_S
    assert not (folder / "teacher" / "summary.json").exists()
    steps = load_checkpoint(last).training["trainer"]["tally"]["steps"]
    assert steps == {"step": count % 3, "half a checkpoint": 1, "validation": 3}[at]
    end = run(folder, *rare, "--resume")
    assert end.status == 0, end.said
    assert_same(folder, whole[0])


def test_asked_to_stop_before_anything_is_saved(run, whole, tmp_path):
    folder = tmp_path / "run"
    end = run(folder, *TEACHER, at="data", count=1, signal=int(signal.SIGTERM))
    assert end.status == 143 and end.said.count("\n") == 1 and "SIGTERM" in end.said
    assert not folder.exists()
    end = run(folder, *TEACHER, at="begun", count=1, signal=int(signal.SIGTERM))
    assert end.status == 143 and (folder / "teacher").exists(), end.said
    end = run(folder, *TEACHER, "--resume")
    assert end.status == 0, end.said
    assert_same(folder, whole[0])


@pytest.mark.parametrize(("at", "count"), [("step", 2), ("half a checkpoint", 2)])
def test_a_signal_to_all_processes_of_a_run(run, whole, tmp_path, at, count):
    """A machine that shuts down signals the loader workers as well: they die at once."""
    folder = tmp_path / "run"
    argv = [*TEACHER, "--workers", "1"]
    end = run(folder, *argv, at="step", count=2, group=True, signal=int(signal.SIGTERM))
    assert end.status == 143 and "Traceback" not in end.said, end.said
    end = run(folder, *argv, "--resume", "auto")
    assert end.status == 0, end.said
    for name in ("last.pt", "best.pt"):
        mine, theirs = (load_checkpoint(f / "teacher" / name) for f in (folder, whole[0]))
        assert_equal(mine.weights, theirs.weights)


def test_what_is_finished_first_and_what_is_not():
    stop = Stopping()
    with stop.deferred():
        stop.request(signal.SIGINT)
        stop.request(signal.SIGTERM)  # a launcher passes both on
        with pytest.raises(StoppedError, match="SIGINT") as caught, stop.at_once():
            pytest.fail("the end was asked for")
        assert caught.value.status == 130
        with pytest.raises(StoppedError):
            stop.request(signal.SIGINT)  # a user insists
    with pytest.raises(StoppedError, match="SIGTERM"):
        Stopping().request(signal.SIGTERM)
    stop = Stopping()
    with pytest.raises(StoppedError, match="--resume"), stop.deferred():
        stop.request(signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")
    with pytest.raises(RuntimeError, match="of its own"), Stopping().deferred():
        raise RuntimeError("something of its own")


def test_what_was_ignored_stays_ignored_and_loaders_leave_it_to_their_run():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with on_signals() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == 0
            if (child := os.fork()) == 0:
                os.kill(os.getpid(), signal.SIGUSR2)
                os._exit(stop.requested)
            assert os.waitpid(child, 0)[1] == 0
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.requested == signal.SIGUSR2
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


# --- full disks, several phases, damaged files ---


@pytest.mark.parametrize("size", ["4k", "8k", "700k", "1300k"])
def test_a_full_disk_ends_a_run_in_one_line(run, whole, tmp_path, size):
    with small_disk(tmp_path / "disk", size) as disk:
        end = run(disk / "run", *TEACHER, log=tmp_path / "log")
        assert end.status == 1 and "Traceback" not in end.said, end.said
        assert end.said.endswith("No space left on device\n")
        shutil.copytree(disk / "run", tmp_path / "run")
    end = run(tmp_path / "run", *TEACHER, "--resume")
    assert end.status == 0, end.said
    assert_same(tmp_path / "run", whole[0])


def test_a_chain_is_killed_in_two_of_its_phases(run, tmp_path):
    argv = ["--task", "progressive", *TEACHER[2:]]
    argv[argv.index("--heuristic") + 1] = "none"
    argv[argv.index("--save-minutes") + 1] = "1000"
    argv += ["--dynamic-batch-size", "1"]
    argv[argv.index("--epochs") + 1] = "1"
    argv[argv.index("--batch-size") + 1] = "60"
    end = run(tmp_path / "whole", *argv)
    assert end.status == 0, end.said
    folder = tmp_path / "run"
    for at, count in (("validation", 3), ("checkpoint written", 2)):
        end = run(folder, *argv, "--resume", "auto", at=at, count=count, signal=KILL)
        assert end.status == -KILL, end.said
    end = run(folder, *argv, "--resume")
    assert end.status == 0, end.said
    assert_same(folder, tmp_path / "whole")


@pytest.mark.parametrize("damage", ["cut", "lost", "one byte"])
def test_a_damaged_last_file_falls_back_to_the_one_before(run, whole, tmp_path, damage):
    folder = tmp_path / "run"
    run(folder, *TEACHER, at="step", count=6, signal=KILL)
    last, previous = (folder / "teacher" / name for name in ("last.pt", "previous.pt"))
    good = previous.read_bytes()
    content = bytearray(last.read_bytes())
    if damage == "lost":
        last.unlink()
    else:
        content[len(content) // 2] ^= 1
        last.write_bytes(content[:1000] if damage == "cut" else bytes(content))
    shutil.copytree(folder, tmp_path / "again")
    end = run(folder, *TEACHER, "--resume", at="step", count=1, signal=KILL)
    assert str(previous) in end.said
    assert last.read_bytes() == good, "the damaged file must not become the one before"
    end = run(tmp_path / "again", *TEACHER, "--resume")
    assert end.status == 0, end.said
    assert_same(tmp_path / "again", whole[0])
