"""A run continues with its own settings, and every command that it prints works when pasted."""

import json
import lzma
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Outcome, called

from compofa.cli import evaluate
from compofa.cli.train import main
from compofa.io.checkpoint import load_checkpoint
from compofa.training.config import TrainConfig
from compofa.training.pace import Pace, duration
from compofa.training.plan import default_output
from compofa.training.recipes import CHAINS, RECIPES, SMALL_IMAGES, Recipe
from compofa.training.trainer import Trainer

TINY = shlex.split(
    "--epochs 2 --image-size 8 --batch-size 45 --calibration-images 30 --width-mult 0.1 "
    "--warmup-epochs 0 --lr 0.01 --device cpu --quiet"
)
"""Two steps per epoch."""
SHALLOW = ["--heuristic", "2:3"]
CHAIN = ["--task", "progressive", *TINY, "--dynamic-batch-size", "1", "--epochs", "1"]


@pytest.fixture(scope="module", autouse=True)
def quick(few_digits: None) -> Iterator[None]:
    teacher, *others = SMALL_IMAGES.phases
    cheap = Recipe(
        (replace(teacher, epochs=1, warmup_epochs=0), *others), quick=True, free_network="ofa-small"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", cheap)
        patch.setitem(CHAINS, "progressive", ("kernel", 1))
        yield


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Outcome]:
    """The command in an empty folder, as a function of its words; ``err`` has what it logs, too."""
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")

    def outcome(*argv: str) -> Outcome:
        caplog.clear()
        done = called(main, argv, capsys)
        return done._replace(err="\n".join([*caplog.messages, done.err]))

    return outcome


@contextmanager
def stopped_in(task: str, step: int) -> Iterator[None]:
    """Have a run receive SIGTERM in a step of a phase, counted over its epochs."""
    real = Trainer.train_step

    def train_step(trainer: Trainer, images: Any, targets: Any, now: int) -> Any:
        if trainer.phase.task == task and now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(trainer, images, targets, now)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        yield


def command(text: str, after: str) -> list[str]:
    """Return the words of a printed command of this library, without ``python SCRIPT``."""
    line = next(line for line in text.splitlines() if after in line)
    words = shlex.split(line[line.index(after) + len(after) :].split("; or ")[0])
    assert words[0] == "python" and words[1].endswith(".py")
    return words[2:]


def settings(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "config.json").read_text())["config"]


def weights(path: str) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(path).weights)


def assert_equal(one: str, other: str) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


# --- a run is enough ---


def test_the_folder_is_enough_and_the_result_is_the_same(call):
    argv = ["--task", "teacher", *TINY, *SHALLOW, "--weight-decay", "0.001"]
    assert call(*argv, "--name", "whole").status == 0
    with stopped_in("teacher", 2):
        stopped = call(*argv, "--name", "mine")
    assert stopped.status == 143
    again = command(stopped.err, "continue with: ")
    assert again == ["--task", "teacher", "--resume", "--output", "runs/mine"]
    done = call("--resume", "--name", "mine", "--quiet")
    assert done.status == 0, done.err
    assert "other settings" not in done.err
    assert_equal("runs/mine/teacher/last.pt", "runs/whole/teacher/last.pt")
    result = command(done.out, "next: ")
    assert evaluate.main([*result, "--calibration-images", "30", "--quiet"]) == 0
    assert call(*again).status == 0, "a completed run returns at once"


@pytest.fixture
def finished(call, tmp_path: Path) -> Path:
    assert call("--task", "teacher", *TINY, *SHALLOW, "--name", "mine").status == 0
    return tmp_path / "runs" / "mine" / "teacher"


def test_more_epochs_and_what_the_machine_decides(call, finished):
    words = "--resume --name mine --quiet --epochs 4 --workers 1 --save-minutes 5 --price 2"
    done = call(*words.split())
    assert done.status == 0, done.err
    line = next(line for line in done.err.splitlines() if "other settings" in line)
    for part in ("epochs: 2 then, 4 now", "workers: 0 then, 1 now", "price: None then, 2.0 now"):
        assert part in line
    lines = [json.loads(text) for text in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2, 3]
    rates = [line["train"]["lr"] for line in lines]
    assert rates[2] > rates[1] and rates[3] < rates[2], "the cosine of the new total"
    assert settings("runs/mine/teacher")["epochs"] == 4
    refused = call("--resume", "--name", "mine", "--epochs", "3")
    assert refused.status == 1 and refused.err.strip().count("\n") == 0
    assert "epochs: 4 then" in refused.err and "4 are done" in refused.err


def test_what_may_not_change_is_named_with_both_values(call, finished):
    before = {path: path.read_bytes() for path in finished.glob("*.*")}
    done = call("--resume", "--name", "mine", "--seed", "7", "--lr", "0.5", "--batch-size", "45")
    assert done.status == 1 and done.err.strip().count("\n") == 0
    assert "seed: 0 then, 7 now" in done.err and "lr: 0.01 then, 0.5 now" in done.err
    assert "batch_size" not in done.err
    assert before == {path: path.read_bytes() for path in finished.glob("*.*")}


def test_the_same_command_with_resume_continues(call, finished):
    again = ["--task", "teacher", *TINY, *SHALLOW, "--name", "mine"]
    refused = call(*again)
    assert refused.status == 1 and "--resume" in refused.err and "--name" in refused.err
    done = call(*again, "--resume")
    assert done.status == 0 and "other settings" not in done.err
    assert call(*again, "--resume", "auto").status == 0


def test_several_runs_are_listed(call, finished):
    done = call("--task", "supernet", *TINY, "--name", "mine")
    assert done.status == 0, done.err
    assert call("--resume", "--name", "mine").err.strip().count("\n") == 0
    for folder in ("teacher", "supernet-1"):
        Path("runs/mine", folder, "summary.json").unlink()
    done = call("--resume", "--name", "mine")
    assert done.status == 1 and done.err.strip().count("\n") == 0
    for part in ("runs/mine", "unfinished", "--task teacher", "--task supernet --phase 1"):
        assert part in done.err
    assert call("--resume", "--name", "mine", "--task", "teacher").status == 0
    assert call("--resume", "--name", "mine").status == 0, "one is left"
    assert Path("runs/mine/supernet-1/summary.json").exists()


@pytest.mark.parametrize("lost", ["missing", "damaged"])
def test_without_its_settings_file_those_of_the_checkpoint_count(call, finished, lost):
    (finished / "summary.json").unlink()
    (finished / "config.json").unlink()
    if lost == "damaged":
        (finished / "config.json").write_text('{"config": ')
    assert call("--resume", "--name", "mine", "--quiet").status == 0
    assert settings("runs/mine/teacher")["width_mult"] == 0.1


def test_a_run_of_the_first_version_continues_with_its_settings(call, tmp_path):
    first = Path(__file__).parent / "golden" / "v0.1"
    folder = tmp_path / "old" / "supernet-1"
    folder.mkdir(parents=True)
    (folder / "last.pt").write_bytes(lzma.decompress((first / "resumable.pt.xz").read_bytes()))
    shutil.copy(first / "config.json", folder)
    done = call("--resume", "--output", "old", "--quiet")
    assert done.status == 0, done.err
    now, then = (
        json.loads((path / "config.json").read_text())["config"] for path in (folder, first)
    )
    assert {name: now[name] for name in then} == then


# --- runs of several phases ---


def test_a_chain_continues_to_its_end(call):
    with stopped_in("kernel", 1):
        stopped = call(*CHAIN, "--output", "x")
    assert stopped.status == 143
    words = command(stopped.err, "continue with: ")
    assert words == ["--task", "progressive", "--resume", "--output", "x"]
    assert json.loads(Path("x/teacher/config.json").read_text())["run"]["task"] == "progressive"
    done = call("--resume", "--output", "x", "--epochs", "2", "--quiet")
    assert done.status == 0, done.err
    epochs = [settings(f"x/{name}")["epochs"] for name in ("teacher", "kernel-1")]
    assert epochs == [1, 2], "what others build on stays"
    assert call(*words, "--quiet").status == 0


def test_a_teacher_that_is_trained_first_leads_on_to_the_task(call):
    argv = ["--task", "compound", *TINY, "--dynamic-batch-size", "1"]
    with stopped_in("teacher", 1):
        stopped = call(*argv, "--output", "x")
    words = command(stopped.err, "continue with: ")
    assert words[:4] == ["--task", "compound", "--phase", "1"]
    done = call("--resume", "--output", "x", "--quiet")
    assert done.status == 0, done.err
    assert settings("x/teacher")["epochs"] == 1 and settings("x/compound-1")["epochs"] == 2


def test_the_command_for_an_unfinished_teacher(call, monkeypatch):
    """It was started with settings that the command does not repeat."""
    slow = replace(RECIPES["digits"], quick=False)
    monkeypatch.setitem(RECIPES, "digits", slow)
    with stopped_in("teacher", 2):
        assert call("--task", "teacher", *TINY, *SHALLOW, "--output", "x").status == 143
    refused = call("--task", "compound", *TINY, "--output", "x")
    assert refused.status == 1 and refused.err.strip().count("\n") == 0
    done = call(*command(refused.err, "make it with: "), "--quiet")
    assert done.status == 0, done.err
    assert settings("x/teacher")["heuristic"] == "2:3"


# --- after divergence ---


@pytest.mark.parametrize("task", ["progressive", "finetune"])
def test_both_ways_on_after_divergence(call, monkeypatch, task):
    argv = {
        "progressive": CHAIN,
        "finetune": [
            "--task", "finetune", "--init-path", "start/teacher/best.pt", "--subnet", "largest",
            *(word for word in TINY if word not in ("--width-mult", "0.1")),
        ],
    }[task]  # fmt: skip
    if task == "finetune":
        assert call("--task", "teacher", *TINY, *SHALLOW, "--output", "start").status == 0
    where = "kernel" if task == "progressive" else task
    real = Trainer.train_step
    with monkeypatch.context() as patch:

        def spoiled(trainer: Trainer, images: torch.Tensor, targets: Any, step: int) -> Any:
            wrong = trainer.phase.task == where and step > 0
            return real(trainer, images * float("nan") if wrong else images, targets, step)

        patch.setattr(Trainer, "train_step", spoiled)
        failed = call(*argv, "--output", "x", "--max-skipped", "1")
    assert failed.status == 1
    more = command(failed.err, "continue with: ")
    lower = command(failed.err, "start again with: ")
    assert "--max-skipped" in more and "0.001" in lower
    done = call(*lower, "--quiet")
    assert done.status == 0, done.err
    assert call(*more, "--quiet").status == 0


# --- early stopping ---


def test_patience_survives_a_stop(call, monkeypatch):
    top1 = {0: 50.0, 1: 60.0}  # by epoch: the second is the best
    real = Trainer.validate

    def validate(trainer: Trainer) -> dict[str, dict[str, float]]:
        figures = real(trainer)
        figures["largest"]["top1"] = top1.get(trainer.state.epoch, 55.0)
        return figures

    monkeypatch.setattr(Trainer, "validate", validate)
    argv = ["--task", "teacher", *TINY, *SHALLOW, "--validate-every", "1", "--epochs", "9"]
    done = call(*argv, "--patience", "3", "--name", "whole")
    assert done.status == 0 and "per epoch" in done.err and "stopped early" in done.err
    lines = Path("runs/whole/teacher/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 + 3
    with stopped_in("teacher", 7):
        assert call(*argv, "--patience", "3", "--name", "mine").status == 143
    assert call("--resume", "--name", "mine", "--quiet").status == 0
    assert_equal("runs/mine/teacher/last.pt", "runs/whole/teacher/last.pt")
    assert len(Path("runs/mine/teacher/metrics.jsonl").read_text().splitlines()) == 5
    assert call("--resume", "--name", "mine", "--quiet").status == 0, "it is over"
    longer = call("--resume", "--name", "mine", "--quiet", "--patience", "4")
    assert longer.status == 0 and "patience: 3 then, 4 now" in longer.err
    assert len(Path("runs/mine/teacher/metrics.jsonl").read_text().splitlines()) == 6


# --- what is said of the time, and names ---


def test_the_time_is_estimated_once_and_without_the_first_step(caplog):
    caplog.set_level("INFO")
    pace = Pace(steps=100, left=1000)
    for seconds in (50, *[1.2] * 20):
        pace.add(seconds)
    assert caplog.messages == [
        "about 2 min per epoch, 20 min to the end (1.2 s per step, validation not included)"
    ]


@pytest.mark.parametrize(
    ("data", "name"), [("my photos", "my photos"), ("x/../birds/", "birds"), ("cats.tar", "cats")]
)
def test_a_run_on_images_is_named_after_their_folder(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)
    for folder in ("my photos", "x", "birds"):
        Path(folder).mkdir()
    config = TrainConfig(dataset="imagefolder", data_path=data, net="compofa-small")
    new, old = Path(f"runs/{name}-compofa-small"), Path("runs/imagefolder-compofa-small")
    assert default_output(config) == default_output(config, resume=True) == new
    old.mkdir(parents=True)
    assert default_output(config, resume=True) == old and default_output(config) == new
    new.mkdir()
    assert default_output(config, resume=True) == new
    assert default_output(replace(config, dataset="imagenet")).name == "imagenet-compofa-small"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (99, "99 s"), (720, "12 min"), (7500, "2 h 05 min"), (273600, "3 d 4 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
