"""Experiment trackers: what they get, when they are missing, and when they fail."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compofa.errors import CompofaError, ConfigError
from compofa.training import loggers
from compofa.training.config import TrainConfig
from compofa.training.journal import Journal
from compofa.training.loggers import LOGGED, open_loggers
from compofa.training.run import train
from compofa.training.run_folder import clear

TINY: dict[str, Any] = {
    "task": "teacher", "image_size": (8,), "batch_size": 90, "epochs": 1, "warmup_epochs": 0,
    "calibration_images": 30, "width_mult": 0.1, "heuristic": "2:3", "validate_every": 1,
}  # fmt: skip


class TrackerError(Exception):
    """What the fake packages raise."""


class Fake:
    """Both packages, in memory: the runs by their id, and what was called."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[str, float, int]]] = {}
        self.begun: list[dict[str, Any]] = []
        self.ended: list[str] = []
        self.broken = False

    def log(self, id_: str, name: str, value: float, step: int) -> None:
        if self.broken:
            raise TrackerError("no connection")
        self.runs[id_].append((name, value, step))

    def wandb(self) -> ModuleType:
        fake, module = self, ModuleType("wandb")

        class Run:
            def __init__(self, id: str, **more: Any) -> None:
                fake.begun.append({"id": id, **more})
                fake.runs.setdefault(id, [])
                self.id = id

            def define_metric(self, name: str, step_metric: str | None = None) -> None:
                fake.begun[-1][name] = step_metric

            def log(self, metrics: dict[str, float]) -> None:
                for name in metrics.keys() - {"step"}:
                    fake.log(self.id, name, metrics[name], metrics["step"])

            def finish(self) -> None:
                fake.ended.append(self.id)

        module.init = Run
        module.errors = ModuleType("errors")
        module.errors.Error = TrackerError
        return module

    def mlflow(self) -> ModuleType:
        fake, module = self, ModuleType("mlflow")

        class Client:
            def get_experiment_by_name(self, name: str) -> None:
                return None

            def create_experiment(self, name: str) -> str:
                return name

            def create_run(self, experiment: str, run_name: str) -> Any:
                run = ModuleType("run")
                run.info = ModuleType("info")
                run.info.run_id = f"{run_name} {len(fake.begun)}"
                fake.runs[run.info.run_id] = []
                fake.begun.append({"project": experiment, "name": run_name, "config": {}})
                return run

            def update_run(self, id_: str, status: str) -> None:
                assert id_ in fake.runs and status == "RUNNING"

            def log_param(self, id_: str, name: str, value: Any) -> None:
                fake.begun[-1]["config"][name] = value

            def log_metric(self, id_: str, name: str, value: float, step: int) -> None:
                fake.log(id_, name, value, step)

            def set_terminated(self, id_: str) -> None:
                fake.ended.append(id_)

        module.MlflowClient = Client
        module.exceptions = ModuleType("exceptions")
        module.exceptions.MlflowException = TrackerError
        return module


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    found = Fake()
    for name in loggers.LOGGERS:
        monkeypatch.setitem(sys.modules, name, getattr(found, name)())
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", *loggers._QUIET):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return found


def write(name: str, folder: Path, epoch: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    found = open_loggers(TrainConfig(**TINY, logger=name).resolved(), folder)
    journal = Journal(folder, epoch, 3 * epoch, found)
    journal.write({"epoch": epoch, "step": 3 * epoch + 3, "train": {"loss": 2.5}})
    journal.close()


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_resumed_run_continues_the_same_one(fake, tmp_path, name):
    write(name, tmp_path / "teacher")
    write(name, tmp_path / "teacher", epoch=1)
    (id_,) = fake.runs
    assert json.loads((tmp_path / "teacher" / LOGGED).read_text()) == {name: id_}
    assert fake.runs[id_] == [("train/loss", 2.5, 3), ("train/loss", 2.5, 6)]
    assert fake.begun[0]["config"]["batch_size"] == 90 and fake.begun[0]["project"] == "compofa"
    assert fake.begun[0]["name"] == f"{tmp_path.name}/teacher"
    assert fake.ended == [id_, id_]
    clear(tmp_path / "teacher")
    write(name, tmp_path / "teacher")
    assert len(fake.runs) == 2, "another run"


def test_nothing_is_sent_unless_the_user_says_so(fake, tmp_path, monkeypatch):
    write("wandb", tmp_path / "teacher")
    assert fake.begun[0]["mode"] == "offline" and fake.begun[0]["*"] == "step"
    monkeypatch.setenv("WANDB_MODE", "online")
    write("wandb", tmp_path / "other")
    assert fake.begun[1]["mode"] == "online"
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_training_goes_on_without_a_tracker_that_fails(fake, tmp_path, caplog, name):
    fake.broken = True
    write(name, tmp_path / "teacher")
    assert caplog.text.count(f"--logger {name}") == 1 and "no connection" in caplog.text
    assert (tmp_path / "teacher" / "metrics.jsonl").read_text().count("\n") == 1


def test_one_that_cannot_start_is_one_line(fake, tmp_path, monkeypatch):
    def refuse(**keywords: Any) -> None:
        raise TrackerError("no key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(CompofaError, match=r"--logger wandb.*no key") as caught:
        write("wandb", tmp_path / "teacher")
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_said_before_anything_is_written(few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    config = TrainConfig(**TINY, logger="mlflow")
    with pytest.raises(ConfigError, match=r"--logger.*mlflow.*pip install") as caught:
        train(config, tmp_path / "run", bar=False)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="wandb or mlflow"):
        TrainConfig(**TINY, logger="comet").resolved()


def test_a_run_logs_what_it_writes(few_digits, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: name)
    train(TrainConfig(**TINY, logger="wandb"), tmp_path / "run", bar=False)
    (logged,) = fake.runs.values()
    line = json.loads((tmp_path / "run/teacher/metrics.jsonl").read_text())
    found = {name: (value, step) for name, value, step in logged}
    assert found["train/loss"] == (line["train"]["loss"], 1)
    assert found["validation/largest/top1"] == (line["validation"]["largest"]["top1"], 1)
