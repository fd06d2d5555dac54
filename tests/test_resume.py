import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
import torch
from few import AfterEpoch
from sklearn.utils import Bunch

from compofa.errors import CheckpointError, CompofaError, ConfigError
from compofa.io.checkpoint import load_checkpoint
from compofa.training import phase_run
from compofa.training.config import TrainConfig
from compofa.training.journal import Journal
from compofa.training.recipes import RECIPES, SMALL_IMAGES, Phase, Recipe
from compofa.training.run import RunResult, train
from compofa.training.trainer import Trainer

EPOCHS = 3
SMALL: dict[str, Any] = {
    "epochs": EPOCHS,
    "image_size": (8, 12),
    "batch_size": 45,
    "width_mult": 0.1,
    "dynamic_batch_size": 1,
    "calibration_images": 30,
    "validate_every": 2,
    "warmup_epochs": 1,
    "lr": 0.05,
    "weight_decay": 1e-4,
}


class StopError(Exception):
    """What the tests interrupt runs with."""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """150 digits, of which 90 to train on, and a teacher that is trained for two epochs."""
    data = sklearn.datasets.load_digits()
    few = Bunch(images=data.images[:150], target=data.target[:150])
    teacher, *others = SMALL_IMAGES.phases
    cheap = Phase(**{**vars(teacher), "epochs": 2, "warmup_epochs": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", lambda: few)
        patch.setitem(RECIPES, "digits", Recipe((cheap, *others), quick=True))
        yield


def go(folder: Path, stop_after: int | None = None, **more: Any) -> RunResult:
    keywords = {name: more.pop(name) for name in ("resume", "overwrite") if name in more}

    def after_epoch(done: int) -> None:
        if done == stop_after:
            raise StopError

    config = TrainConfig(**{**SMALL, **more})
    return train(config, folder, bar=False, callbacks=[AfterEpoch(after_epoch)], **keywords)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A compound run that was never interrupted, and its folder (with the teacher's)."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, go(folder)


@pytest.fixture
def folder(tmp_path: Path, whole: tuple[Path, RunResult]) -> Path:
    """A folder with the same finished teacher in it."""
    shutil.copytree(whole[0] / "teacher", tmp_path / "run" / "teacher")
    return tmp_path / "run"


def metrics(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["train"].pop("images_per_s") > 0
    return lines


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    """Compare checkpoints' contents: tensors to the bit, without times and what depends on them."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds", "teacher", "digest"}:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}/{index}")
    else:
        assert one == other, where


def assert_same_run(folder: Path, result: RunResult, whole: tuple[Path, RunResult]) -> None:
    other_folder, other = whole
    for name in ("best", "last"):
        mine, theirs = (vars(load_checkpoint(getattr(r, name))) for r in (result, other))
        assert_equal(mine, theirs, name)
    assert result.figures == other.figures
    lines = metrics(folder / "compound-1")
    assert [line["epoch"] for line in lines] == list(range(EPOCHS))
    assert lines == metrics(other_folder / "compound-1")
    mine, theirs = (
        json.loads((f / "compound-1" / "summary.json").read_text()) for f in (folder, other_folder)
    )
    assert mine["best"] == theirs["best"] and mine.keys() == theirs.keys()


def test_the_reference_is_worth_comparing_with(whole):
    folder, result = whole
    last = load_checkpoint(result.last)
    assert last.training["progress"]["epoch"] == EPOCHS
    buffers = last.training["trainer"]["optimizer"]["state"]
    assert any(state["momentum_buffer"].any() for state in buffers.values())
    validated = ["validation" in line for line in metrics(folder / "compound-1")]
    assert validated == [False, True, True]


# --- interrupted and resumed ---


def test_stopped_after_every_epoch(folder, whole):
    for epoch in range(1, EPOCHS):
        with pytest.raises(StopError):
            go(folder, stop_after=epoch, resume=epoch > 1)
        assert not (folder / "compound-1" / "summary.json").exists()
        assert load_checkpoint(folder / "compound-1" / "last.pt").figures["epoch"] == epoch
    assert_same_run(folder, go(folder, resume=True), whole)


@pytest.mark.parametrize(
    ("owner", "name", "call", "late"),
    [
        (Trainer, "train_step", 4, False),  # within the second epoch
        (Journal, "write", 2, False),  # where it is noted
        (phase_run, "save_checkpoint", 2, True),  # its best.pt: the first epoch wrote last.pt alone
        (phase_run, "save_checkpoint", 3, True),  # its last.pt
    ],
)
def test_stopped_within_an_epoch(folder, whole, monkeypatch, owner, name, call, late):
    calls = []
    real = getattr(owner, name)

    def stop(*args: Any, **keywords: Any) -> Any:
        calls.append(name)
        if len(calls) == call and not late:
            raise StopError
        result = real(*args, **keywords)
        if len(calls) == call:
            raise StopError
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(StopError):
            go(folder)
    assert_same_run(folder, go(folder, resume=True), whole)


def test_an_unfinished_teacher_is_resumed_not_used(tmp_path, whole):
    own = {name: None for name in ("epochs", "lr", "warmup_epochs", "dynamic_batch_size")}
    with pytest.raises(StopError):
        go(tmp_path, stop_after=1, task="teacher", validate_every=1, **own)
    assert (tmp_path / "teacher" / "best.pt").exists()
    result = go(tmp_path, validate_every=1, stop_after=None, epochs=1, warmup_epochs=0)
    assert result.best.parent.name == "compound-1"
    assert (tmp_path / "teacher" / "summary.json").exists()
    assert [line["epoch"] for line in metrics(tmp_path / "teacher")] == [0, 1]
    mine, theirs = (load_checkpoint(f / "teacher" / "last.pt") for f in (tmp_path, whole[0]))
    assert_equal(mine.weights, theirs.weights)


def test_the_best_mean_of_smallest_and_largest_is_kept(folder, monkeypatch):
    top1 = [(60, 90), (80, 85), (50, 99), (82, 83)]  # the second has the best mean, and is first
    monkeypatch.setattr(
        Trainer,
        "validate",
        lambda trainer: {
            name: {"top1": value, "top5": 100.0, "loss": 1.0}
            for name, value in zip(("smallest", "largest"), top1.pop(0), strict=True)
        },
    )
    with pytest.raises(StopError):
        go(folder, stop_after=2, epochs=4, validate_every=1)
    second = load_checkpoint(folder / "compound-1" / "last.pt")
    result = go(folder, resume=True, epochs=4, validate_every=1)
    best = load_checkpoint(result.best)
    assert result.figures["smallest"]["top1"] == 80 and best.figures == second.figures
    assert_equal(best.weights, second.weights)


# --- resumed when it is over, or changed ---


def test_a_finished_run_returns_at_once(whole, monkeypatch):
    folder, result = whole
    before = (folder / "compound-1" / "last.pt").read_bytes()
    monkeypatch.setattr(Trainer, "train_epoch", lambda *args: pytest.fail("it is over"))
    again = go(folder, resume=True, price=2.0, workers=1)
    assert (folder / "compound-1" / "last.pt").read_bytes() == before
    assert again.figures == result.figures and again.seconds == result.seconds
    assert again.cost["cost"] == pytest.approx(result.seconds / 3600 * 2)
    assert_same_run(folder, go(folder, resume=True), whole)


def test_changed_settings_are_named(whole):
    with pytest.raises(ConfigError) as caught:
        go(whole[0], resume=True, epochs=2, seed=5, image_size=(8,), workers=1)
    text = str(caught.value)
    assert "\n" not in text
    named = [part.split(":")[0].split()[-1] for part in text.split("; ")]
    assert named[1:] == ["eval_size", "seed", "epochs"]
    assert re.search(r"image_size: \[8, 12\].*\[8\].*epochs: 3\b.*3 are done.*\b2 now", text)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match=r"last\.pt"):
        go(tmp_path / "run", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_saved_nothing_is_begun_again_with_the_same_settings(tmp_path):
    folder = tmp_path / "teacher"
    folder.mkdir()
    own = {"task": "teacher", "epochs": 1, "warmup_epochs": 0}
    (folder / "config.json").write_text(json.dumps({"config": {"task": "teacher", "seed": 3}}))
    with pytest.raises(ConfigError, match=r"seed: 3\b.*\b0\b"):
        go(tmp_path, resume=True, **own)
    for text in ("[" * 9999, "{}", "[]", "null"):
        (folder / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"last\.pt"):
            go(tmp_path, resume=True, **own)
    (folder / "config.json").unlink()  # as where a teacher was being trained first
    assert go(tmp_path, resume=True, **own).last.exists()


def test_an_earlier_version_is_resumed(folder, whole):
    # It knew of epochs only, and of no checksum.
    with pytest.raises(StopError):
        go(folder, stop_after=2)
    last = folder / "compound-1" / "last.pt"
    data = torch.load(last, weights_only=True)
    del data["compofa-sha256"]
    for name in ("tally", "skipped", "broken"):
        del data["training"]["trainer"][name]
    for name in ("max_skipped", "save_minutes"):
        del data["training"]["config"][name]
    torch.save(data, last)
    assert_same_run(folder, go(folder, resume=True), whole)


@pytest.mark.parametrize("damage", ["truncated", "empty", "best", "foreign"])
def test_a_state_that_cannot_be_read_stops_the_run(folder, whole, damage):
    good = whole[1].last.read_bytes()
    last = folder / "compound-1" / "last.pt"
    last.parent.mkdir()
    if damage == "best":  # a checkpoint, but without the state to resume from
        shutil.copy(whole[1].best, last)
    elif damage == "foreign":
        torch.save({"state_dict": {}}, last)
    else:
        last.write_bytes(good[: len(good) // 2] if damage == "truncated" else b"")
    before = last.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        go(folder, resume=True)
    assert str(last) in str(caught.value) and "\n" not in str(caught.value)
    assert last.read_bytes() == before and list(last.parent.iterdir()) == [last]


# --- a run that is there already ---


def test_an_existing_run_is_neither_lost_nor_mixed(whole):
    folder, result = whole
    before = result.last.read_bytes()
    with pytest.raises(CompofaError, match="--resume"):
        go(folder)
    assert result.last.read_bytes() == before


@pytest.mark.parametrize("option", ["init_path", "teacher_path"])
def test_what_a_run_begins_with_is_not_written_over(folder, option):
    last = folder / "teacher" / ".." / "compound-1" / "last.pt"
    (folder / "compound-1").mkdir()
    shutil.copy(folder / "teacher" / "last.pt", last)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(CompofaError, match=r"last\.pt"):
        go(folder, overwrite=True, **{option: str(last)})
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_overwriting_begins_again(folder, whole):
    with pytest.raises(StopError):
        go(folder, stop_after=2, seed=7)
    with pytest.raises(StopError):
        go(folder, stop_after=1, overwrite=True)
    assert not (folder / "compound-1" / "best.pt").exists(), "the other run's best"
    assert [line["epoch"] for line in metrics(folder / "compound-1")] == [0]
    assert_same_run(folder, go(folder, resume=True), whole)
