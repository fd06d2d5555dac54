"""Locks: no two processes write the same output, and a dead process blocks no other."""

import errno
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from calls import called
from test_trained import tiny_checkpoint

from compofa.cli import evaluate, tools, train
from compofa.errors import BusyError, CompofaError
from compofa.io.locks import exclusive
from nas.cli import demo, search
from nas.cli import tools as nas
from nas.cost.timing import Samples

ROOT = Path(__file__).parent.parent
HOLD = """
import os, sys, time
from pathlib import Path
from compofa.io.locks import exclusive
with exclusive(sys.argv[1], sys.argv[2] == "folder"):
    if sys.argv[3:]:
        Path(sys.argv[3]).touch()
        if os.fork() == 0:  # like a loader worker
            time.sleep(60)
            os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""

Held = Callable[..., subprocess.Popen]


@pytest.fixture
def held() -> Iterator[Held]:
    """Lets another process hold the lock on an output until its stdin is closed."""
    holders: list[subprocess.Popen] = []

    def hold(path: Path, folder: bool = False, *draft: Path) -> subprocess.Popen:
        words = [sys.executable, "-c", HOLD, path, "folder" if folder else "file", *draft]
        holder = subprocess.Popen(
            list(map(str, words)), env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        holders.append(holder)
        assert holder.stdout.readline() == "held\n"
        return holder

    yield hold
    for holder in holders:
        with holder, suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("folder", [False, True])
def test_a_second_writer_is_refused_immediately(held, tmp_path, folder):
    path = tmp_path / "out"
    other = held(path, folder)
    with pytest.raises(BusyError) as caught, exclusive(path, folder):
        pytest.fail("both write")
    told = str(caught.value)
    assert all(word in told for word in (str(path), str(other.pid), os.uname().nodename))
    assert "\n" not in told
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(BusyError), exclusive(tmp_path / "link", folder):
        pytest.fail("both write what is one")
    with exclusive(tmp_path / "other", folder):
        pass
    (tmp_path / "link").unlink()
    other.communicate()
    with exclusive(path, folder):
        pass
    assert names(tmp_path) == []


def test_locks_and_drafts_of_a_killed_process_are_removed(held, tmp_path):
    path, draft = tmp_path / "out.pt", tmp_path / ".out.pt.a1b2c3d4.draft"
    other = held(path, False, draft)  # with a child process that survives it
    others = tmp_path / ".out.pt.json.a1b2c3d4.draft"
    others.touch()  # a draft of another file, which may be in use
    left = tmp_path / ".out.pt.e5f6a7b8.draft"
    (left / "deep").mkdir(parents=True)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".out.pt.lock").exists() and draft.exists()
    with exclusive(path):
        assert names(tmp_path) == [".out.pt.json.a1b2c3d4.draft", ".out.pt.lock"]
    assert names(tmp_path) == [others.name]


def test_a_second_writer_can_wait(held, tmp_path):
    other = held(tmp_path / "cache")
    program = HOLD.replace('"folder")', '"folder", wait=True)')
    waiting = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "cache", "file"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    with waiting:
        time.sleep(0.3)
        assert waiting.poll() is None
        other.communicate()
        assert waiting.communicate(timeout=60)[0] == b"held\n" and waiting.returncode == 0
    assert names(tmp_path) == []


def test_empty_folders_are_removed(tmp_path):
    with exclusive(tmp_path / "a" / "b" / "run", folder=True):
        assert names(tmp_path / "a" / "b" / "run") == [".lock"]
    assert names(tmp_path) == []
    with exclusive(tmp_path / "a" / "b" / "file"):
        (tmp_path / "a" / "b" / "file").touch()
    assert names(tmp_path / "a" / "b") == ["file"]


def test_streams_are_not_locked(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader, writer = os.pipe()
    for path in (Path("/dev/null"), tmp_path / "pipe", Path(f"/dev/fd/{writer}")):
        with exclusive(path):
            assert names(tmp_path) == ["pipe"]
    os.close(reader)
    os.close(writer)


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / ".link.lock").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file" / "below", tmp_path / ("x" * 300), tmp_path / "link", "/"):
        with (
            pytest.raises(CompofaError, match=r"a directory|name|links"),
            exclusive(path),
        ):
            pytest.fail("it cannot be written")
    assert (tmp_path / "file").read_bytes() == b""


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with exclusive(tmp_path / "file"):
        assert names(tmp_path) == []
    assert "No locks available" in caplog.text


# --- every command that writes ---

DIGITS = "--net compofa-digits --calibration-images 20 --device cpu --quiet"
COMMANDS = {
    "train": (train, "--task teacher --device cpu --quiet --output out", True),
    "chain": (train, "--task progressive --device cpu --quiet --output out", True),
    "overwrite": (train, "--task progressive --device cpu --overwrite --output out", True),
    "eval": (evaluate, f"{DIGITS} --samples 1 --output out", False),
    "search": (search, "--compare none --output out", True),
    "demo": (demo, "--output out", True),
    "export": (tools, "export compofa-digits largest --to torchscript --output out", False),
    "convert": (tools, "convert tiny.pt out --to ofa", False),
    "subnet": (tools, "convert subnet.json out --to mmrazor", False),
    "predict": (nas, "predict --columns top1 --input in.csv --output out", False),
    "measure": (nas, "measure --output out --quiet", True),
    "collect": (nas, f"collect {DIGITS} --samples 2 --output out", False),
    "fit-accuracy": (nas, "fit-accuracy --input in.jsonl --output out", False),
    "fit-latency": (nas, "fit-latency --input in.csv --output out", False),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_locked_outputs(held, name, tmp_path, monkeypatch, capsys, few_digits):
    command, words, folder = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    if name == "convert":
        tiny_checkpoint(tmp_path / "tiny.pt")
    other = held(tmp_path / "out", folder)
    before = names(tmp_path)
    done = called(command.main, shlex.split(words), capsys)
    assert done.status == 1 and done.out == "", done
    line = done.err.splitlines()[-1]
    assert "out " in line and f"process {other.pid} " in line
    assert done.err.count("\n") == 1 and names(tmp_path) == before
    if folder:
        assert names(tmp_path / "out") == [".lock"]


def test_measurements_of_another_process_are_reused(held, tmp_path):
    identity = {"device": "cpu", "processor": "one"}
    path = Samples(tmp_path, identity).path
    other = held(path)

    def measured() -> None:
        with path.open("a") as file:
            file.write('{"key": "stem", "ms": 1.5}\n')
        other.communicate()

    later = threading.Timer(0.3, measured)
    later.start()
    with Samples.alone(tmp_path, identity) as samples:
        assert samples.latency_ms("stem") == 1.5
    later.join()
