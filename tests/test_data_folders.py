"""Recognition of the parts and classes of a data set by its folders."""

import logging
import tarfile
from pathlib import Path

import pytest
from calls import called
from PIL import Image

from compofa.cli import train
from compofa.data import load_dataset
from compofa.data.folders import PARTS, part_of
from compofa.errors import DataError

CLASSES = ("cat", "dog")


def fill(folder: Path, each: int, classes: tuple[str, ...] = CLASSES) -> Path:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            Image.new("RGB", (4, 4), (i, 7, 9)).save(folder / name / f"{i}.png")
    return folder


def loose(folder: Path) -> Path:
    folder.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    return folder


def counts(path: Path, **options) -> list[int]:
    splits = load_dataset("imagefolder", path, **options)
    assert splits.classes == CLASSES
    return [len(part) for part in (splits.train, splits.validation, splits.test)]


def refused(path: Path, *words: str, **options) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset("imagefolder", path, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "compofa")
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("train_name", "test_name"),
    [
        ("train", "val"), ("Training", "Testing"), ("TRAIN", "TEST"), ("Train", "Val"),
        ("train_set", "test_set"), ("training-set", "test-set"), ("trainset", "testset"),
        ("trn", "tst"), ("seg_train", "seg_test"), ("Train Images", "valid"),
        ("training_data", "Evaluation"), ("asl_alphabet_train", "asl_alphabet_test"),
        ("train2017", "val2017"), ("train", "dev"),
    ],
)  # fmt: skip
def test_parts_have_many_names(tmp_path: Path, said, train_name: str, test_name: str) -> None:
    fill(tmp_path / train_name, 10)
    fill(tmp_path / test_name, 3)
    assert counts(tmp_path) == [18, 2, 6]
    plain = (train_name, test_name) == ("train", "val")
    assert bool(said()) is not plain
    if not plain:
        assert all(name in said()[0] for name in (train_name, test_name))


def test_the_table_of_names_is_consistent() -> None:
    for part, words in PARTS.items():
        for word in words:
            assert part_of(word) == part_of(f"{word.upper()}_Data") == (part, ())
    for name in ("cat", "latest", "contest", "train_test", "strain", "value", ""):
        assert part_of(name) is None


def test_validation_and_test_folders_are_both_used(tmp_path: Path, said) -> None:
    fill(tmp_path / "train", 10)
    fill(tmp_path / "valid", 2)
    fill(tmp_path / "test", 3)
    assert counts(tmp_path) == [20, 4, 6]
    assert "valid," in said()[0] and "test" in said()[0]
    assert counts(tmp_path, validation_images=6) == [14, 6, 6]
    assert "valid " not in said()[-1] and "training images" in said()[-1]
    fill(tmp_path / "valid", 1, ("cow",))
    refused(tmp_path, "valid", "cow")


def test_ambiguous_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    fill(tmp_path / "test", 2)
    fill(tmp_path / "Testing", 2)
    refused(tmp_path, "Testing", "test")
    fill(tmp_path / "b" / "x_train", 2)
    for name in ("x_test", "y_train", "y_test"):
        fill(tmp_path / "b" / name, 2)
    refused(tmp_path / "b", "x_test, x_train, y_test, y_train")


def test_parts_without_class_folders_are_refused(tmp_path: Path, said) -> None:
    fill(tmp_path / "a" / "train", 5)
    loose(tmp_path / "a" / "val")
    refused(tmp_path / "a", "a/val", "class")
    loose(tmp_path / "b" / "train")
    loose(tmp_path / "b" / "test")  # not two classes
    refused(tmp_path / "b", "b/test", "class")
    fill(tmp_path / "c" / "val", 5)
    loose(tmp_path / "c" / "train")
    refused(tmp_path / "c", "c/train", "class")
    fill(tmp_path / "d" / "train", 5)
    refused(tmp_path / "d", "d/val", "data path")
    assert not said()
    # Unlabelled images, as in competitions, beside an evaluation part.
    fill(tmp_path / "c" / "test", 2)
    assert counts(tmp_path / "c", evaluation_only=True) == [0, 10, 4]


def test_classes_may_be_named_as_a_part(tmp_path: Path) -> None:
    fill(tmp_path, 5, ("bus", "car", "train"))
    assert load_dataset("imagefolder", tmp_path).classes == ("bus", "car", "train")


def test_wrapping_folders_are_descended_through(tmp_path: Path, said) -> None:
    inner = tmp_path / "above" / "kaggle" / "images"
    fill(inner / "seg_train" / "seg_train", 10)
    fill(inner / "seg_test" / "seg_test", 3)
    loose(inner / "seg_pred" / "seg_pred")
    (tmp_path / "above" / "__MACOSX").mkdir()
    assert counts(tmp_path / "above") == [18, 2, 6]
    assert str(inner) in said()[0]
    assert "seg_pred" in said()[1]
    (inner / "seg_test" / "__MACOSX").mkdir()
    assert counts(inner) == [18, 2, 6]
    assert counts(inner / "seg_test", evaluation_only=True) == [0, 0, 6]

    whole = fill(tmp_path / "flat" / "wrap" / "classes", 50)
    (whole / "@eaDir").mkdir()
    parts = counts(whole)
    assert sum(parts) == 100 and 5 <= parts[1] <= 20 and 5 <= parts[2] <= 20
    assert counts(tmp_path / "flat") == parts
    assert str(whole) in said()[-1] and "@eaDir" in said()[-1]
    with tarfile.open(tmp_path / "flat.tar", "w") as tar:
        tar.add(tmp_path / "flat", "flat-main")
    assert counts(tmp_path / "flat.tar") == parts


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path)
    refused(tmp_path, "link")


def test_a_single_class_is_refused_for_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "flat", 10, ("cat",))
    fill(tmp_path / "parts" / "train", 10, ("cat",))
    fill(tmp_path / "parts" / "test", 10, ("cat",))
    monkeypatch.chdir(tmp_path)
    for folder in ("flat", "parts"):
        argv = ["--task", "teacher", "--dataset", "imagefolder", "--data-path", folder]
        done = called(train.main, argv, capsys)
        assert done.status == 1 and done.err.count("\n") == 1
        assert "classes" in done.err and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_any_data_set_may_be_wrapped_or_in_a_tar(tmp_path: Path, name: str) -> None:
    fill(tmp_path / "data" / "inner" / "Training", 10)
    fill(tmp_path / "data" / "inner" / "Testing", 3)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(tmp_path / "data", "data")
    for path in (tmp_path / "data", tmp_path / "data.tar"):
        splits = load_dataset(name, path, download=False)
        assert (len(splits.train), len(splits.test), splits.classes) == (18, 6, CLASSES)
