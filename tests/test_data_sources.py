import csv
import logging
import pickle
import struct
import textwrap
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from PIL import Image

import compofa.data
from compofa.cli import evaluate, train
from compofa.data import (
    DATASETS,
    RawDataset,
    dataset_info,
    datasets,
    load_dataset,
    register_dataset,
)
from compofa.data.decoding import BrokenImages, UnreadableImageError, decode_rgb
from compofa.data.sampling import stratified_split
from compofa.data.sources import FilesSource, MemorySource
from compofa.data.torchvision_shim import import_torchvision
from compofa.errors import DataError
from compofa.seeds import rng


def make_classes(root, per_class, classes=("cat", "dog"), suffix=".png", size=(12, 10)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.new("RGB", size, (40 * number, i, 7)).save(root / name / f"{i:03d}{suffix}")
    return root


def names(source):
    return [source.path(i) for i in range(len(source))]


def parts(splits):
    return splits.train, splits.validation, splits.test


# --- splits ---


def test_stratified_split_is_proportional_and_disjoint():
    targets = np.repeat(np.arange(4), (100, 50, 25, 1))
    kept, held = stratified_split(targets, 17, rng(0))
    assert sorted([*kept, *held]) == list(range(176))
    assert np.bincount(targets[held], minlength=4).tolist() == [10, 5, 2, 0]
    assert np.array_equal(held, stratified_split(targets, 17, rng(0))[1])
    assert not np.array_equal(held, stratified_split(targets, 17, rng(1))[1])


def test_every_class_keeps_an_image():
    targets = np.repeat(np.arange(5), (1, 1, 3, 2, 9))
    kept, held = stratified_split(targets, 11, rng(0))
    assert len(held) == 11 and np.unique(targets[kept]).tolist() == [0, 1, 2, 3, 4]


def test_digits():
    splits = load_dataset("digits")
    assert [len(part) for part in parts(splits)] == [1078, 359, 360]
    assert splits.classes == tuple("0123456789")
    for part in parts(splits):
        counts = np.bincount(part.targets)
        assert counts.max() - counts.min() <= 0.06 * len(part)
        image = part.load(0)
        assert image.shape == (3, 8, 8) and image.dtype.is_floating_point is False
    assert splits.train.images.max() == 255 and splits.train.images.min() == 0
    other = load_dataset("digits", seed=5)
    assert np.array_equal(splits.train.images, other.train.images)


# --- class folders ---


def test_train_and_val_folders(tmp_path):
    make_classes(tmp_path / "train", 20)
    make_classes(tmp_path / "val", 3)
    (tmp_path / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / ".cache").mkdir()
    splits = load_dataset("imagefolder", tmp_path)
    assert splits.classes == ("cat", "dog")
    assert [len(part) for part in parts(splits)] == [38, 2, 6]
    assert np.bincount(splits.validation.targets).tolist() == [1, 1]
    asked = load_dataset("imagefolder", tmp_path, validation_images=5).validation
    assert sorted(np.bincount(asked.targets).tolist()) == [2, 3]
    train, validation, test = (set(names(part)) for part in parts(splits))
    assert not train & validation and all("/val/" in path for path in test)
    other = load_dataset("imagefolder", tmp_path, seed=1)
    assert names(other.validation) != names(splits.validation)
    assert names(other.test) == names(splits.test)
    for i in range(len(splits.train)):
        assert f"/{splits.classes[splits.train.targets[i]]}/" in splits.train.path(i)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_names_of_the_test_folder(tmp_path, name):
    make_classes(tmp_path / "train", 5)
    make_classes(tmp_path / name, 2)
    assert len(load_dataset("imagenet", tmp_path).test) == 4


def test_one_folder_is_split_or_evaluated_as_a_whole(tmp_path):
    make_classes(tmp_path, 50)
    splits = load_dataset("imagefolder", tmp_path)
    assert [len(part) for part in parts(splits)] == [83, 5, 12]
    assert len(set(chain(*map(names, parts(splits))))) == 100
    assert names(load_dataset("imagefolder", tmp_path, seed=9).test) == names(splits.test)
    whole = load_dataset("imagefolder", tmp_path, evaluation_only=True)
    assert [len(part) for part in parts(whole)] == [0, 0, 100]


def test_evaluation_without_training_images(tmp_path):
    make_classes(tmp_path / "val", 1)
    splits = load_dataset("imagenet", tmp_path, evaluation_only=True)
    assert [len(part) for part in parts(splits)] == [0, 0, 2]
    with pytest.raises(DataError, match="/train"):
        load_dataset("imagenet", tmp_path)


def test_images_deeper_in_a_class_folder_and_odd_names(tmp_path):
    make_classes(tmp_path / "val", 1)
    make_classes(tmp_path / "train", 5)
    deep = tmp_path / "train" / "cat" / "images" / "é"
    deep.mkdir(parents=True)
    Image.new("L", (5, 5)).save(deep / "a b.JPEG")
    splits = load_dataset("imagefolder", tmp_path, validation_images=0)
    assert len(splits.train) == 11 and len(splits.validation) == 0
    index = names(splits.train).index(str(deep / "a b.JPEG"))
    assert splits.train.load(index).mode == "RGB"


def test_cifar10_from_class_folders_has_one_size(tmp_path):
    make_classes(tmp_path / "train", 10, size=(32, 32))
    make_classes(tmp_path / "test", 2, size=(40, 20))
    splits = load_dataset("cifar10", tmp_path, download=False)
    images, kept, broken = splits.test.load_all(np.arange(4))
    assert images.shape == (4, 3, 32, 32) and kept == [0, 1, 2, 3] and broken == ()
    assert splits.train.size == 32


def test_bad_folders_are_one_line_errors(tmp_path):
    def refused(message, path, name="imagefolder", **options):
        with pytest.raises(DataError, match=message) as caught:
            load_dataset(name, path, **options)
        assert "\n" not in str(caught.value)

    refused("mnist", None, "mnist")
    refused("imagenet", None, "imagenet")
    refused("nowhere", tmp_path / "nowhere")
    (tmp_path / "archive.tar").write_bytes(b"tar")
    refused(r"archive\.tar", tmp_path / "archive.tar")
    (tmp_path / "empty").mkdir()
    refused("empty", tmp_path / "empty")

    make_classes(tmp_path / "a" / "train", 5, ("ant", "bee", "cow"))
    refused("/a/val", tmp_path / "a")
    make_classes(tmp_path / "a" / "val", 1, ("ant", "bee", "dog"))
    refused(r"train.*\bcow\b.*val.*\bdog\b", tmp_path / "a")
    (tmp_path / "a" / "val" / "cow").mkdir()
    refused("/val/cow", tmp_path / "a")

    make_classes(tmp_path / "few", 1)
    refused("3 .*images per class", tmp_path / "few")
    make_classes(tmp_path / "one" / "train", 1)
    make_classes(tmp_path / "one" / "val", 1)
    refused("2 .*images per class", tmp_path / "one")
    refused("validation images.* 1$", tmp_path / "one", validation_images=1)
    make_classes(tmp_path / "ok", 10)
    refused("16 validation images.* 17$", tmp_path / "ok", validation_images=17)
    refused("validation images.* -1$", tmp_path / "ok", validation_images=-1)


# --- torchvision's files ---


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is\nunreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_without_network_the_message_helps(tmp_path, no_network, name):
    for download in (True, False):
        with pytest.raises(DataError, match=r"train/<class>.*test/<class>") as caught:
            load_dataset(name, tmp_path, download=download)
        message = str(caught.value)
        assert "\n" not in message and ".gz" in message and str(tmp_path) in message
        assert ("unreachable" in message) == download
    # Files of an interrupted download are not mistaken for class folders.
    with pytest.raises(DataError, match=r"train/<class>.*test/<class>"):
        load_dataset(name, tmp_path)


def test_damaged_cifar_file(tmp_path, no_network):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"half")
    for path in (tmp_path, folder):
        with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz"):
            load_dataset("cifar10", path)


def test_cifar10_from_torchvision_files(tmp_path, monkeypatch):
    torchvision = import_torchvision()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {"data": pixels, "labels": [i % 10 for i in range(200)]}
        (folder / name).write_bytes(pickle.dumps(content))
    meta = {"label_names": [f"c{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    splits = load_dataset("cifar10", tmp_path, download=False)
    assert [len(part) for part in parts(splits)] == [900, 100, 200]
    assert splits.classes[3] == "c3" and splits.test.targets[13] == 3
    assert np.array_equal(splits.test.images[5], pixels[5].reshape(3, 32, 32))


def test_fashion_mnist_from_torchvision_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        head = struct.pack(">4I", 0x803, 40, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = bytes(i % 10 for i in range(40))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 40) + labels)
    splits = load_dataset("fashion-mnist", tmp_path, download=False)
    assert [len(part) for part in parts(splits)] == [36, 4, 40]
    assert np.array_equal(splits.test.images[7], np.repeat(pixels[7][None], 3, axis=0))
    (raw / "t10k-images-idx3-ubyte").write_bytes(head + pixels.tobytes()[:50])
    with pytest.raises(DataError, match=r"fashion-mnist.*damaged"):
        load_dataset("fashion-mnist", tmp_path, download=False)


def test_default_hold_out_is_at_most_ten_thousand(monkeypatch):
    images = np.zeros((120_000, 3, 1, 1), np.uint8)
    source = MemorySource(images, np.arange(120_000) % 10)
    made = RawDataset(tuple("0123456789"), source, source)
    monkeypatch.setattr(datasets, "_class_folders", lambda *_: (made, 0.1, ()))
    assert len(load_dataset("imagenet", "x").validation) == 10_000


# --- data sets registered from outside the package ---


@pytest.fixture
def shapes(tmp_path):
    """Register the data set of the example in ``register_dataset``; returns a file for it."""
    example = textwrap.dedent(register_dataset.__doc__.partition("Example::\n")[2])
    assert len(example.strip().splitlines()) <= 15
    draws, ramp = rng(0), np.arange(16)
    arrays = {}
    for part, n in (("train", 60), ("test", 20)):
        labels, (x, y) = np.arange(n) % 2, draws.integers(6, 10, (2, n, 1, 1))
        dx, dy = abs(ramp - x), abs(ramp[:, None] - y)
        inside = np.where(labels[:, None, None], np.maximum(dx, dy) < 4, dx**2 + dy**2 < 16)
        arrays[f"{part}_images"] = np.repeat(255 * inside[:, None].astype(np.uint8), 3, axis=1)
        arrays[f"{part}_labels"] = labels
    np.savez(tmp_path / "shapes.npz", **arrays)
    exec(example, {**vars(compofa.data), "np": np, "MemorySource": MemorySource})
    yield tmp_path / "shapes.npz"
    del DATASETS["shapes"]


def test_a_registered_data_set_is_split(shapes):
    splits = load_dataset("shapes", shapes)
    assert [len(part) for part in parts(splits)] == [54, 6, 20]
    assert splits.classes == ("circle", "square")
    assert len(load_dataset("shapes", shapes, validation_images=20).validation) == 20
    other = load_dataset("shapes", shapes, seed=1).validation
    assert not np.array_equal(other.images, splits.validation.images)
    with pytest.raises(DataError, match="shapes"):
        register_dataset(dataset_info("shapes"))


def test_a_registered_data_set_is_trained_and_evaluated(shapes, monkeypatch, capsys):
    monkeypatch.chdir(shapes.parent)
    words = ["--dataset", "shapes", "--data-path", str(shapes), "--device", "cpu", "--quiet"]
    small = [
        "--task",
        "teacher",
        "--epochs",
        "1",
        "--batch-size",
        "27",
        "--width-mult",
        "0.1",
        "--name",
        "run",
    ]
    assert train.main([*words, *small]) == 0, capsys.readouterr().err
    net = ["--net", "runs/run/teacher/best.pt", "--samples", "1", "--output", "results.csv"]
    assert evaluate.main([*words, *net]) == 0, capsys.readouterr().err
    with open("results.csv") as file:
        (row,) = csv.DictReader(file)
    assert (row["dataset"], row["part"], row["images"]) == ("shapes", "test", "20")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_resolutions": ()}, "resolutions"),
        ({"eval_resolution": 0}, "resolutions"),
        ({"augmentation": "mixup"}, "mixup"),
        ({"native_size": None}, "native_size"),
    ],
)
def test_an_invalid_row_is_refused(change, message):
    with pytest.raises(DataError, match=message):
        replace(dataset_info("cifar10"), **change)


# --- decoding ---


def broken_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((64, 64), 50).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "head.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (folder / "folder.jpg").mkdir()
    (folder / "whole.jpg").unlink()
    return sorted(folder.iterdir())


def test_unreadable_files(tmp_path, monkeypatch):
    for path in [*broken_files(tmp_path), tmp_path / "missing.jpg"]:
        with pytest.raises(UnreadableImageError) as caught:
            decode_rgb(path)
        assert caught.value.path == str(path) and caught.value.reason
        assert str(path) not in caught.value.reason and "\n" not in caught.value.reason
    Image.new("RGB", (30, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert decode_rgb(tmp_path / "bomb.png").size == (30, 30)  # Pillow only warns
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with pytest.raises(UnreadableImageError):
        decode_rgb(tmp_path / "bomb.png")


def test_unreadable_files_are_skipped(tmp_path):
    make_classes(tmp_path, 2, ("cat",))
    paths = np.array([b"cat/000.png", b"cat/gone.png", b"cat/001.png"])
    for size in (None, 8):
        source = FilesSource(tmp_path, paths, np.array([0, 0, 0]), size)
        images, kept, broken = source.load_all(np.array([1, 2, 0]))
        assert len(images) == 2 and kept == [1, 2]
        assert broken == ((str(tmp_path / "cat" / "gone.png"), "No such file or directory"),)
        images, kept, broken = source.load_all(np.array([1]))
        assert len(images) == 0 and kept == [] and len(broken) == 1


def test_small_files_are_decoded_once_and_not_sent_to_workers(tmp_path):
    make_classes(tmp_path, 1, ("cat",))
    source = FilesSource(tmp_path, np.array([b"cat/000.png"]), np.array([0]), 8)
    first = source.load(0).clone()
    source.load(0).zero_()
    (tmp_path / "cat" / "000.png").unlink()
    assert source.load(0).equal(first)
    with pytest.raises(UnreadableImageError):
        pickle.loads(pickle.dumps(source)).load(0)


def test_unreadable_images_are_logged_once_and_limited(caplog):
    tracker = BrokenImages(300)
    with caplog.at_level(logging.WARNING, "compofa"):
        tracker.add([("a", "empty"), ("b", "cut"), ("a", "empty")])
        tracker.add([("b", "cut"), ("c", "gone")])
        BrokenImages(100, tracker.named).add([("a", "empty")])
    assert len(tracker) == 3
    for message, end in zip(caplog.messages, ("a: empty", "b: cut", "c: gone"), strict=True):
        assert message.endswith(end)
    with caplog.at_level(logging.WARNING, "compofa"):
        with pytest.raises(DataError, match="4 of 300"):
            tracker.add([("d", "dark")])
        with pytest.raises(DataError, match="5 of 300"):
            tracker.count(["e"])
    assert len(caplog.records) == 4 and "d: dark" in caplog.messages[3]
    with caplog.at_level(logging.WARNING, "compofa"), pytest.raises(DataError, match="25 of 50"):
        BrokenImages(50).add((str(i), "cut") for i in range(25))
    assert len(caplog.records) == 4 + 20 + 1 and "5 more" in caplog.messages[-1]
    BrokenImages(10).add([])


def test_memory_source_refuses_other_shapes():
    with pytest.raises(ValueError, match="uint8"):
        MemorySource(np.zeros((2, 1, 4, 4), np.uint8), np.zeros(2, np.int64))
