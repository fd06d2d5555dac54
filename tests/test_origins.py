"""What a run begins with and goes on with: the same files, classes and images, or none of it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import Outcome, called
from PIL import Image

from compofa.cli import tools
from compofa.cli.train import main
from compofa.data import DataSplits, MemorySource, Normalisation, load_dataset
from compofa.data.identity import identify
from compofa.errors import DataError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compofa.io.open import open_network
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.zoo import network_spec
from compofa.nn.build import build
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.training.config import TrainConfig
from compofa.training.recipes import RECIPES, SMALL_IMAGES, Recipe
from compofa.training.sources import check_teacher, take_subnet
from compofa.training.trainer import Trainer

CLASSES = ("ant", "bee", "cat")
QUICK = [
    "--net", "compofa-small", "--width-mult", "0.1", "--image-size", "8", "--batch-size", "32",
    "--epochs", "2", "--quiet", "--calibration-images", "20", "--validate-every", "1",
    "--device", "cpu", "--lr", "0.05", "--warmup-epochs", "0",
]  # fmt: skip
FOLDER = [*QUICK, "--dataset", "imagefolder"]


def photos(folder: Path, each: int = 24, classes: tuple[str, ...] = CLASSES) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng(name, i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


@pytest.fixture(autouse=True)
def here(few_digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    return lambda *words: called(main, [str(word) for word in words], capsys)


def stop_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Let the next run end as by an error when it has trained so many epochs."""
    real = Trainer.train_epoch

    def train(trainer: Trainer, epoch: int, *rest: object) -> object:
        if epoch == epochs:
            monkeypatch.undo()
            raise DataError("stopped by the test")
        return real(trainer, epoch, *rest)

    monkeypatch.setattr(Trainer, "train_epoch", train)


def refused(done: Outcome, *parts: str) -> None:
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done.err
    for part in parts:
        assert part in done.err


def cut(call, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """Begin a run and end it after its first epoch."""
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        assert "stopped by the test" in call(*words).err


# --- resumed with the same data ---


def test_a_run_continues_with_its_data_wherever_they_are(here, call, monkeypatch):
    words = ["--task", "teacher", *FOLDER]
    photos(here / "data")
    assert call(*words, "--data-path", "data", "--output", "whole").status == 0
    cut(call, monkeypatch, *words, "--data-path", "data", "--output", "run")
    found = load_checkpoint("run/teacher/last.pt")
    assert found.data_path == str(here / "data") and found.data.train.images > 40
    os.renames("data", "moved/data")
    done = call(*words, "--data-path", "moved/data/", "--output", "run", "--resume")
    assert done.status == 0, done.err
    mine, other = (load_checkpoint(f"{run}/teacher/last.pt") for run in ("run", "whole"))
    assert all(torch.equal(value, other.weights[name]) for name, value in mine.weights.items())
    assert mine.data == other.data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rename", ["'bee'", "'cat'"]),
        ("fewer", ["train images"]),
        ("class", ["'dog'", "images"]),
        ("content", ["train images"]),
    ],
)
def test_a_run_continues_with_no_other_data(here, call, monkeypatch, change, said):
    words = ["--task", "teacher", *FOLDER, "--data-path", "data"]
    photos(here / "data")
    cut(call, monkeypatch, *words)
    before = Path("runs/imagefolder-compofa-small/teacher/last.pt").read_bytes()
    if change == "rename":
        Path("data/bee").rename("data/wasp")
    elif change == "class":
        photos(here / "data", classes=("dog",))
    for image in Path("data/ant").glob("00*"):
        if change == "fewer":
            image.unlink()
        elif change == "content":
            image.write_bytes(image.read_bytes() + b"\0")
    refused(call(*words, "--resume"), "resume", "data", *said)
    assert Path("runs/imagefolder-compofa-small/teacher/last.pt").read_bytes() == before


def test_a_run_of_an_earlier_version_continues_with_its_split(here, call, monkeypatch):
    words = ["--task", "teacher", *FOLDER, "--data-path", "data"]
    photos(here / "data")
    real = load_dataset
    with monkeypatch.context() as patch:
        patch.setattr("compofa.training.start.load_dataset",
                      lambda *a, **k: real(*a, **{**k, "by_position": True}))  # fmt: skip
        cut(call, monkeypatch, *words)
    last = Path("runs/imagefolder-compofa-small/teacher/last.pt")
    found = load_checkpoint(last)
    training = {name: value for name, value in found.training.items() if name != "origins"}
    save_checkpoint(last, replace(found, data=None, training={**training, "teacher": ""}))
    splits = []
    monkeypatch.setattr("compofa.training.start.load_dataset",
                        lambda *a, **k: splits.append(real(*a, **k)) or splits[-1])  # fmt: skip
    assert call(*words, "--resume").status == 0
    then = real("imagefolder", "data", by_position=True)
    assert splits[0].train.paths.tolist() == then.train.paths.tolist()
    assert load_checkpoint(last).data is None


# --- the teacher and the weights begun with ---


@pytest.fixture
def teacher(here: Path, call) -> Path:
    assert call("--task", "teacher", *QUICK, "--output", "first").status == 0
    return here / "first" / "teacher" / "best.pt"


def test_a_run_that_was_moved_continues(here, call, monkeypatch, teacher):
    for output in ("whole", "a/run"):
        shutil.copytree("first", output)
    words = ["--task", "compound", *QUICK, "--dynamic-batch-size", "1"]
    assert call(*words, "--output", "whole").status == 0
    cut(call, monkeypatch, *words, "--output", "a/run")
    origins = load_checkpoint("a/run/compound-1/last.pt").training["origins"]
    assert {path for path, _ in origins.values()} == {"teacher/best.pt"}
    shutil.move("a", "b")
    (here / "c").mkdir()
    monkeypatch.chdir(here / "c")
    done = call(*words, "--output", "../b/run", "--resume")
    assert done.status == 0, done.err
    paths = (here / f"{run}/compound-1/last.pt" for run in ("whole", "b/run"))
    mine, other = (load_checkpoint(path).weights for path in paths)
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


def test_a_teacher_may_have_moved_but_not_changed(here, call, monkeypatch, teacher):
    words = ["--task", "compound", *QUICK, "--dynamic-batch-size", "1", "--output", "run"]
    path = "first/teacher/best.pt"
    cut(call, monkeypatch, *words, "--teacher-path", path)
    origins = load_checkpoint("run/compound-1/last.pt").training["origins"]
    assert origins["teacher"] == origins["start"] and origins["teacher"][0] == str(teacher)
    (here / "c").mkdir()
    monkeypatch.chdir(here / "c")
    words[-1] = "../run"
    again = call(*words, "--teacher-path", path, "--resume")  # the same words from elsewhere
    assert again.status == 0, again.err
    monkeypatch.chdir(here)
    words[-1] = "run"
    shutil.rmtree("run/compound-1")
    cut(call, monkeypatch, *words, "--teacher-path", path)
    shutil.copy(teacher, "kept.pt")
    found = load_checkpoint(teacher)
    save_checkpoint(teacher, replace(found, figures={"another": 1}))
    refused(call(*words, "--resume"), "--teacher-path: ", str(teacher))
    for option in ("--teacher-path", "--init-path"):
        refused(call(*words, option, path.replace("best", "last"), "--resume"), f"{option}: ")
    teacher.unlink()
    refused(call(*words, "--resume"), str(teacher), "--teacher-path")
    done = call(*words, "--teacher-path", "kept.pt", "--init-path", "kept.pt", "--resume")
    assert done.status == 0, done.err


def test_paths_that_are_new_on_resume_are_refused(here, call, monkeypatch, teacher):
    words = ["--task", "supernet", *QUICK, "--dynamic-batch-size", "1"]
    cut(call, monkeypatch, *words)
    done = call(*words, "--init-path", teacher, "--resume")
    refused(done, "init_path: None")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"classes": tuple("abcdefghij")}, "'0', got 'a'"), ({"mean": (0.1,) * 3}, "mean (0.305")],
)
def test_a_teacher_of_other_classes_or_inputs_is_refused(here, call, teacher, change, said):
    save_checkpoint("odd.pt", replace(load_checkpoint(teacher), **change))
    words = ["--task", "compound", *QUICK, "--teacher-path", "odd.pt", "--init-path", teacher]
    refused(call(*words, "--output", "run"), "--teacher-path odd.pt", said)
    assert not Path("run").exists()


@pytest.mark.parametrize("to", ["ofa", "mmrazor"])
def test_converted_checkpoints_teach_and_begin(here, call, capsys, teacher, to):
    """By the definition in the file: theirs is a network of another width than any named one."""
    assert called(tools.main, ["convert", str(teacher), "net.pth", "--to", to], capsys).status == 0
    words = ["--task", "compound", *QUICK, "--dynamic-batch-size", "1", "--epochs", "1"]
    for output, path in (("run-theirs", "net.pth"), ("run-ours", teacher)):
        done = call(*words, "--teacher-path", path, "--output", output)
        assert done.status == 0, done.err
    weights = [load_checkpoint(p / "compound-1/last.pt").weights for p in here.glob("run-*")]
    assert len(weights) == 2
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    found = load_checkpoint(teacher)
    save_checkpoint("odd.pt", replace(found, classes=tuple("x123456789")))
    assert called(tools.main, ["convert", "odd.pt", "odd.pth", "--to", to], capsys).status == 0
    refused(call(*words, "--teacher-path", "odd.pth", "--output", "x"), "'x'")


def test_without_distillation_no_teacher_is_needed(here, call, teacher):
    words = ["--task", "compound", "--phase", "2", *QUICK, "--dynamic-batch-size", "1",
             "--epochs", "1", "--kd-ratio", "0", "--init-path", teacher]  # fmt: skip
    done = call(*words, "--output", "run")
    assert done.status == 0, done.err
    assert [path.name for path in Path("run").iterdir()] == ["compound-2"]
    assert [*load_checkpoint("run/compound-2/last.pt").training["origins"]] == ["start"]
    refused(call(*words, "--teacher-path", teacher, "--output", "x"), "--kd-ratio 0")


@pytest.mark.parametrize(
    ("task", "words", "option"),
    [
        ("teacher", ["--teacher-path", "x.pt"], "--teacher-path"),
        ("teacher", ["--kd-ratio", "0.5"], "--kd-ratio"),
        ("teacher", ["--kd-type", "mse"], "--kd-type"),
        ("teacher", ["--dynamic-batch-size", "2"], "--dynamic-batch-size"),
        ("supernet", ["--teacher-path", "x.pt"], "--teacher-path"),
        ("compound", ["--subnet", "largest"], "--subnet"),
        ("progressive", ["--subnet", "largest"], "--subnet"),
    ],
)
def test_options_that_a_task_does_not_use_are_refused(here, call, task, words, option):
    net = QUICK[2:]
    refused(call("--task", task, *net, *words), f"{option}: ", f"--task {task}")
    assert [*here.iterdir()] == []


def test_a_teacher_trained_first_takes_the_options_that_it_uses(here, call, monkeypatch):
    teacher, *others = SMALL_IMAGES.phases
    cheap = Recipe((replace(teacher, epochs=1, warmup_epochs=0), *others), quick=True)
    monkeypatch.setitem(RECIPES, "digits", cheap)
    words = ["--task", "compound", *QUICK, "--kd-ratio", "0.5", "--kd-type", "mse"]
    assert call(*words, "--dynamic-batch-size", "2", "--output", "run").status == 0
    first = json.loads(Path("run/teacher/config.json").read_text())["config"]
    assert (first["kd_ratio"], first["kd_type"], first["dynamic_batch_size"]) == (1.0, "ce", 1)


def test_what_earlier_versions_let_a_task_take(here):
    config = TrainConfig(task="teacher").resolved()
    assert config.changes_since({**config.to_json(), "kd_ratio": 0.5}) == []
    changes = config.changes_since({**config.to_json(), "dynamic_batch_size": 4})
    assert len(changes) == 1 and changes[0].startswith("dynamic_batch_size: 4 ")


def test_weights_that_have_seen_the_held_out_images_are_named(here, call, caplog):
    photos(here / "data")
    words = [*FOLDER, "--data-path", "data", "--output", "run", "--epochs", "1"]
    assert call("--task", "teacher", *words, "--seed", "1").status == 0
    assert call("--task", "compound", *words, "--dynamic-batch-size", "1").status == 0
    assert "validation images were trained on" in caplog.text
    first, then = (load_checkpoint(f"run/{n}/best.pt").data for n in ("teacher", "compound-1"))
    assert first.trained < then.trained


@pytest.mark.parametrize(("task", "known"), [("compound", False), ("finetune", False),
                                             ("finetune", True)])  # fmt: skip
def test_weights_that_do_not_say_what_they_have_seen_are_named(here, call, caplog, task, known):
    """What an earlier version trained had its images divided otherwise."""
    splits = load_dataset("imagefolder", photos(here / "data"))
    spec = network_spec("compofa-small", 3, width_mult=0.1, resolutions=(8,))
    norm = splits.normalisation
    start = Checkpoint(
        spec, Supernet(spec).state_dict(), CLASSES, norm.mean, norm.std, dataset="imagefolder",
        data_path=str(here / "data"), image_size=8, data=identify(splits, 0) if known else None,
    )  # fmt: skip
    save_checkpoint("start.pt", start)
    words = [*FOLDER, "--epochs", "1", "--dynamic-batch-size", "1", "--kd-ratio", "0"]
    if task == "finetune":
        words = [*FOLDER[4:], "--epochs", "1", "--subnet", "largest"]
    data = ["--data-path", "data", "--output", "run"]
    assert call("--task", task, *words, *data, "--init-path", "start.pt").status == 0
    assert ("test and validation images" in caplog.text) == (not known)


@pytest.mark.parametrize("digits", [1, 3])
def test_imagenets_numbers_as_text_do_not_permute_outputs_without_names(here, digits):
    classes = tuple(sorted(f"{number:0{digits}}" for number in range(1000)))
    few = MemorySource(np.zeros((2, 3, 8, 8), np.uint8), np.arange(2))
    norm = Normalisation((0.5,) * 3, (0.5,) * 3)
    splits = DataSplits("imagenet", classes, few, few, few, norm)
    spec = network_spec("compofa-small", 1000, width_mult=0.1, resolutions=(8,))
    fixed = FixedNetwork.of(spec, spec.space.smallest)
    save_checkpoint(here / "net.pt", Checkpoint(fixed, build(fixed).state_dict()))
    config = TrainConfig(
        task="finetune", init_path=str(here / "net.pt"), dataset="imagenet", data_path="data",
        image_size=(8,),
    ).resolved()  # fmt: skip
    for use in (
        lambda: take_subnet(open_network(config.init_path), config, splits),
        lambda: check_teacher(Checkpoint(spec, {}), "net.pth", splits),
    ):
        if digits == 3:
            use()
            continue
        with pytest.raises(DataError, match=r"000 to 999.* 0, 1, 10"):
            use()


# --- what can be known before training ---


def test_no_validation_images_are_refused(here, call):
    refused(call(*QUICK, "--validation-images", "0"), "--validation-images: ")
    assert [*here.iterdir()] == []


def test_broken_validation_images_are_found_before_training(here, call, monkeypatch):
    photos(here / "data")
    words = ["--task", "teacher", *FOLDER, "--data-path", "data"]
    cut(call, monkeypatch, *words, "--output", "begun")
    splits = load_dataset("imagefolder", "data")
    whole = {path: Path(path).read_bytes() for path in map(splits.validation.path, range(3))}
    for path in whole:
        Path(path).write_bytes(b"")
    monkeypatch.setattr(Trainer, "train_epoch", lambda *_: pytest.fail("began to train"))
    done = call(*words, "--output", "new")
    assert done.status == 1 and all(done.err.count(path) == 1 for path in whole)
    assert "3 of 27" in done.err
    assert not Path("new").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    for path, content in whole.items():
        Path(path).write_bytes(content)
    assert call(*words, "--output", "begun", "--resume").status == 0


def test_all_workers_know_what_is_broken(here):
    photos(here / "data", 60)
    splits = load_dataset("imagefolder", "data", validation_images=60)
    evaluator = Evaluator(splits, calibration_images=100)
    assert not isinstance(evaluator.source, MemorySource)
    Path(splits.validation.path(5)).write_bytes(b"")
    evaluator.check_images(8)
    assert [*evaluator.broken.paths] == [splits.validation.path(5)]
    Path(splits.validation.path(7)).write_bytes(b"")
    with pytest.raises(DataError, match="2 of 159"):
        evaluator.check_images(8)
