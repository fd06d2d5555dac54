"""Common to all commands: numbers, paths, closed or full outputs, a failing system."""

import argparse
import errno
import logging
import os
import pwd
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from calls import called

from compofa.cli import evaluate, tools, train
from compofa.cli.common import Parser, join_ranks, run
from compofa.data import loaders
from compofa.distributed.backend import SingleProcess
from compofa.distributed.launch import BACKENDS
from compofa.errors import CompofaError, ConfigError, DataError
from compofa.io.download import published_path
from compofa.training.config import TrainConfig
from nas.cli import demo, search
from nas.cli import tools as nas
from nas.cost.timing import cache_folder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def warnings_raise_again() -> Iterator[None]:
    yield
    logging.captureWarnings(False)


def parsers() -> Iterator[Parser]:
    """The parsers of all commands and subcommands."""
    for module in (train, evaluate, search, nas, tools):
        top = module.parser()
        yield top
        for action in top._actions:
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices.values()


def options(kind: type | None) -> list[tuple[Parser, str]]:
    """All options of a type, with their parsers."""
    return [
        (parser, action.option_strings[0])
        for parser in parsers()
        for action in parser._actions
        if action.type is kind and action.option_strings and action.nargs != 0
    ]


# --- numbers and paths ---


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "-NaN"])
def test_no_option_takes_a_number_that_is_not_finite(text, capsys):
    found = options(float)
    assert len(found) > 15 and "--price" in {name for _, name in found}
    for parser, name in found:
        with pytest.raises(SystemExit) as end:
            parser.parse_args([f"{name}={text}"])
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.count("\n") == 1
        assert name in told and "finite" in told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["price", "power", "lr", "width_mult", "save_minutes"])
def test_settings_from_python_are_validated_too(name, value):
    with pytest.raises(CompofaError, match=name.replace("_", ".")):
        TrainConfig(**{name: value}).resolved()


def test_every_path_may_begin_with_the_home_folder(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [each for each in options(None) if "=" not in each[1]]
    assert {"--output", "--data-path", "--net", "--init-path"} <= {name for _, name in found}
    for parser, name in found:
        action = parser._option_string_actions[name]
        if action.choices is None and isinstance(action, argparse._StoreAction):
            assert parser._get_values(action, ["~/a_b"]) in (f"{tmp_path}/a_b", [f"{tmp_path}/a_b"])
    words = ["convert", "--to=ofa", "--", "~/in.pt", "--under_score.pt"]
    args = tools.parser().parse_args(words)
    assert (args.input, args.output) == (f"{tmp_path}/in.pt", "--under_score.pt")
    args = train.parser().parse_args(["--name=--a_b", "--data_path=~/x_y", "--subnet", '{"~": 1}'])
    assert (args.name, args.data_path) == ("--a_b", f"{tmp_path}/x_y")
    assert args.subnet == '{"~": 1}'
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--no_such_option", "1"])
    assert "--no_such_option" in capsys.readouterr().err, "as it was typed"


def test_without_a_home_folder_tilde_is_refused(monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--output=~/runs"])
    assert "HOME" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        cache_folder()
    with pytest.raises(CompofaError, match="TORCH_HOME"):
        published_path("ofa_nets/x")
    assert called(tools.main, ["zoo", "--like", "note10"], capsys).status == 0


def test_the_next_command_can_be_pasted(tmp_path, monkeypatch, capsys, few_digits):
    monkeypatch.chdir(tmp_path)
    words = "--task teacher --epochs 1 --image-size 8 --batch-size 45 --width-mult 0.1 --quiet"
    more = ["--calibration-images", "30", "--device", "cpu", "--output", "two words; $HOME"]
    done = called(train.main, [*words.split(), *more], capsys)
    assert done.status == 0, done.err
    command = shlex.split(done.out.rpartition("next: ")[2])
    assert command[:3] == ["python", "eval_sampled_config.py", "--net"]
    assert Path(command[3]).is_file() and len(command) == 4


# --- closed or full outputs ---


def start(*words: str, stdout: int | None = None, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", *words], cwd=ROOT, text=True, stdout=stdout,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


@pytest.mark.parametrize("words", [("nas", "devices"), ("nas", "predict", "--help")])
def test_a_closed_pipe_ends_a_command_silently(words):
    reader, writer = os.pipe()
    os.close(reader)
    with start(*words, stdout=writer, PYTHONUNBUFFERED="") as process:
        os.close(writer)
        assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


@pytest.mark.parametrize("words", [("nas", "devices"), ("nas", "predict", "--help")])
def test_a_full_disk_behind_the_output_is_one_line(words):
    with (
        open("/dev/full", "w") as full,
        start(*words, stdout=full.fileno(), PYTHONUNBUFFERED="") as process,
    ):
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and told.count("\n") == 1
    assert told.startswith("python -m nas: error: ") and "No space left" in told


def test_unprintable_names_are_printed_as_escapes(tmp_path):
    with start(
        "compofa", "convert", "--help", stdout=subprocess.PIPE, PYTHONIOENCODING="ascii"
    ) as p:
        assert p.communicate(timeout=60) != ("", "")
    assert p.returncode == 0
    program = "from compofa.cli.common import run\nrun(lambda argv: print('a\\udcff…'), [], 'x')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.stdout == "a\\udcff\\u2026\n"


# --- missing permissions and resources ---


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOSPC, errno.ENAMETOOLONG])
def test_errors_of_the_system_are_one_line(number, capsys):
    def fail(argv: object) -> None:
        raise OSError(number, os.strerror(number), "some/file")

    assert run(fail, [], "command") == 1
    assert capsys.readouterr().err == f"command: error: some/file: {os.strerror(number)}\n"


LONG = "x" * 300
COMMANDS = {
    "train": (train, "--task teacher --quiet --device cpu --output"),
    "data": (train, "--task teacher --device cpu --dataset imagefolder --data-path"),
    "teacher": (train, "--task compound --device cpu --teacher-path"),
    "finetune": (train, "--task finetune --device cpu --init-path"),
    "eval": (evaluate, "--output"),
    "net": (evaluate, "--net"),
    "subnet": (evaluate, "--subnet"),
    "search": (search, "--output"),
    "table": (search, "--latency-table"),
    "device": (search, "--target-hardware"),
    "predictor": (search, "--accuracy-predictor"),
    "demo": (demo, "--output"),
    "export": (tools, "export compofa-digits largest --to pt2 --output"),
    "export net": (tools, "export --to pt2"),
    "convert": (tools, "convert compofa-digits --to ofa"),
    "predict": (nas, "predict --columns top1 --output out --input"),
    "measure": (nas, "measure --output"),
    "collect": (nas, "collect --net compofa-digits --device cpu --output"),
    "fit": (nas, "fit-accuracy --output out --input"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_is_too_long_is_one_line(name, tmp_path, monkeypatch, capsys):
    command, words = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    done = called(command.main, [*words.split(), LONG], capsys)
    assert done.status == 1 and done.err.count("\n") == 1, done
    assert "error: " in done.err
    assert list(tmp_path.iterdir()) == []


def test_loader_workers_that_cannot_be_started_are_one_line(monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (59, before[1]))
    try:
        loaders._require_processes(3)
        with pytest.raises(DataError, match=r"60 open files.* 59"):
            loaders._require_processes(4)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

    def refuse() -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(loaders.multiprocessing, "Lock", refuse)
    with pytest.raises(DataError, match="Read-only file system"):
        loaders._require_processes(1)


# --- launchers ---


@pytest.mark.parametrize(
    ("environment", "warned"),
    [
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({}, False),
    ],
)
def test_separate_tasks_of_slurm_are_warned_about(environment, warned, monkeypatch, caplog):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = train.parser().parse_args(["--device", "cpu"])
    with caplog.at_level(logging.WARNING), join_ranks(args):
        assert ("Slurm" in caplog.text) == warned
    caplog.clear()
    args.backend = "none"
    with caplog.at_level(logging.WARNING), join_ranks(args):
        assert caplog.text == "", "that is what was asked for"


class Pair(SingleProcess):
    name = "pair"
    closed = False

    def __init__(self, timeout: float, cuda: bool) -> None:
        self.timeout = timeout

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> bool:
        return "PAIR_RANK" in environment

    def close(self) -> None:
        self.closed = True


def test_a_backend_of_the_table_is_detected_joined_and_left(monkeypatch):
    monkeypatch.setitem(BACKENDS, Pair.name, Pair)
    args = train.parser().parse_args(["--device", "cpu", "--collective-timeout", "7"])
    with join_ranks(args) as backend:
        assert type(backend) is SingleProcess
    monkeypatch.setenv("PAIR_RANK", "0")
    with join_ranks(args) as backend:
        assert type(backend) is Pair and backend.timeout == 7 and not backend.closed
    assert backend.closed
    with pytest.raises(DataError), join_ranks(args) as backend:
        raise DataError("lost")
    assert not backend.closed, "other ranks must see this one as dead"
    args.backend = "none"
    with pytest.raises(ConfigError, match="pair"), join_ranks(args):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_process_ends_when_its_launcher_is_killed():
    worker = (
        "import sys, time\nfrom compofa.cli.common import _die_with_launcher\n"
        "_die_with_launcher()\nprint('ready', flush=True)\ntime.sleep(60)\n"
    )
    launcher = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {worker!r}])\n"
        "child.wait()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"},
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        assert process.stdout.read() == "", "the pipe ends with the worker, which held it, too"
        assert time.monotonic() - killed < 30
