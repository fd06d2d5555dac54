"""Settings from files: the names and types of the options, and what a run wrote."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from compofa.cli.train import given_settings, main
from compofa.errors import ConfigError
from compofa.training.config import TrainConfig
from compofa.training.config_file import read_config_file

SETTINGS: dict[str, Any] = {
    "task": "teacher", "epochs": 1, "image_size": [8], "batch_size": 45, "width_mult": 0.1,
    "calibration_images": 30, "lr": 0.01, "warmup_epochs": 0, "heuristic": "2:3", "seed": 3,
    "scale_lr": False, "device": "cpu",
}  # fmt: skip


def toml(settings: dict[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


WRITERS = {"toml": toml, "yaml": yaml.safe_dump, "yml": yaml.safe_dump, "json": json.dumps}


def write(folder: Path, text: str, ending: str = "toml") -> Path:
    path = folder / f"run.{ending}"
    path.write_text(text)
    return path


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_settings(tmp_path, ending):
    found = read_config_file(write(tmp_path, WRITERS[ending](SETTINGS), ending))
    assert found == {**SETTINGS, "image_size": (8,)}
    assert TrainConfig(**found).resolved().batch_size == 45


def test_the_command_line_replaces_the_file(tmp_path):
    path = write(tmp_path, toml({**SETTINGS, "name": "mine"}))
    args, given = given_settings(["--config", str(path), "--seed", "0", "--image-size", "8,12"])
    assert given == {**SETTINGS, "image_size": (8, 12), "seed": 0} and args.name == "mine"
    args, given = given_settings(["--config", str(path), "--name", "other"])
    assert args.name == "other" and "name" not in given


def test_hyphens_numbers_and_nothing(tmp_path):
    text = "batch-size: 45\nlr: 1e-3\nmomentum: 0\nnet: null\nimage_size: 16\ndata_path: ~/x\n"
    found = read_config_file(write(tmp_path, text, "yaml"))
    home = str(Path("~/x").expanduser())
    assert found == {
        "batch_size": 45, "lr": 0.001, "momentum": 0.0, "net": None, "image_size": (16,),
        "data_path": home,
    }  # fmt: skip
    assert isinstance(found["momentum"], float)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch = 3", ["'epoch'", "did you mean epochs", "batch_size"]),
        ("learning = 3\nepochs = '2'", ["'learning'", "epochs: expected an integer", "'2'"]),
        ("epochs = 2.5", ["epochs", "integer", "2.5"]),
        ("epochs = true", ["epochs", "integer", "True"]),
        ("lr = nan", ["lr", "finite", "nan"]),
        ("lr = '0.1'", ["lr", "number", "'0.1'"]),
        ("scale_lr = 1", ["scale_lr", "true or false", "1"]),
        ("image_size = ['8']", ["image_size", "integers", "'8'"]),
        ("image_size = []", ["image_size", "integers"]),
        ("net = 3", ["net", "text", "3"]),
        ("[training]\nepochs = 3", ["'training'"]),
        ("batch_size = 3\nbatch-size = 3", ["batch_size", "twice"]),
        ("epochs = \nlr = 1", ["malformed TOML", "line 1"]),
        ("a = " + "[" * 5000, ["run.toml"]),
    ],
)
def test_bad_settings_are_one_line(tmp_path, text, expected):
    with pytest.raises(ConfigError) as caught:
        read_config_file(write(tmp_path, text))
    assert "\n" not in str(caught.value)
    for part in ["run.toml", *expected]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("run.txt", "epochs = 3", ".toml"),
        ("none.toml", None, "No such file"),
        ("run.json", "[1]", "list"),
        ("run.json", "{", "JSON"),
        ("run.yaml", "a: &x 1\nb: *x", "anchor"),
        ("run.yaml", "!!python/object:os.system {}", "tag"),
    ],
)
def test_bad_files_are_one_line(tmp_path, name, text, expected):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(expected)) as caught:
        read_config_file(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_bounds_are_those_of_the_options(tmp_path, capsys):
    path = write(tmp_path, toml({**SETTINGS, "epochs": 0, "momentum": 2}))
    assert main(["--config", str(path), "--output", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--epochs" in error and "--momentum" in error


def test_without_a_reader_of_toml_it_is_said(tmp_path, monkeypatch):
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name in ("tomllib", "tomli"):
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="tomli") as caught:
        read_config_file(write(tmp_path, "epochs = 3"))
    assert "\n" not in str(caught.value)


def test_what_a_run_writes_reproduces_it(few_digits, tmp_path, monkeypatch, capsys):
    from compofa.io.checkpoint import load_checkpoint

    monkeypatch.chdir(tmp_path)
    write(tmp_path, toml({**SETTINGS, "name": "first"}))
    assert main(["--config", "run.toml", "--quiet"]) == 0, capsys.readouterr().err
    written = Path("runs/first/teacher/config.json")
    assert read_config_file(written).keys() == {field.name for field in fields(TrainConfig)}
    assert main(["--config", str(written), "--name", "again", "--quiet"]) == 0
    assert written.read_text() == Path("runs/again/teacher/config.json").read_text()
    one, other = (load_checkpoint(f"runs/{name}/teacher/last.pt") for name in ("first", "again"))
    assert all((value == other.weights[name]).all() for name, value in one.weights.items())
