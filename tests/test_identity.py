"""Identity of the images a network was trained on, regardless of their location."""

import os
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calls import Outcome, called
from PIL import Image

from compofa.cli import evaluate
from compofa.data import DataSplits, MemorySource, load_dataset
from compofa.data.identity import DataIdentity, identify, identify_part, image_names
from compofa.data.sampling import hold_out_by_share, image_order
from compofa.errors import CheckpointError, DataError
from compofa.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compofa.io.records import EvalRecord
from compofa.networks.zoo import network_spec, open_checkpoint
from compofa.nn.supernet import Supernet
from compofa.seeds import rng

CLASSES = ("ant", "bee", "cat")
PARTS = ("train", "validation", "test")


def photos(
    folder: Path, each: int = 20, classes: tuple[str, ...] = CLASSES, first: int = 0
) -> Path:
    """Write images that are unique to their folder, class and number."""
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + each):
            pixels = rng(folder.name, name, i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


def names(splits: DataSplits) -> dict[str, set[bytes]]:
    return {part: {*getattr(splits, part).paths.tolist()} for part in PARTS}


def trained_on(path: Path, folder: Path, **more: object) -> Path:
    """Write the checkpoint of a network trained on ``folder``."""
    splits = load_dataset("imagefolder", folder, seed=3)
    spec = network_spec("compofa-small", len(splits.classes), width_mult=0.1)
    checkpoint = Checkpoint(
        spec, Supernet(spec).state_dict(), splits.classes, dataset="imagefolder", image_size=8,
        data_path=str(folder.resolve()), data_seed=3, data=identify(splits, 3),
    )  # fmt: skip
    save_checkpoint(path, replace(checkpoint, **more))
    return path


@pytest.fixture
def flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return photos(tmp_path / "flat")


# --- splits ---


def test_the_spelling_of_a_path_does_not_matter(flat: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = names(load_dataset("imagefolder", flat))
    assert [len(wanted[part]) for part in PARTS] == [48, 5, 7]
    Path("link").symlink_to(flat)
    with tarfile.open("flat.tar", "w") as tar:
        for name in CLASSES:
            tar.add(flat / name, name)
    for path in ("flat", "flat/", "./flat", "flat/../flat", "link", "flat.tar"):
        assert names(load_dataset("imagefolder", path)) == wanted, path
    monkeypatch.chdir(flat)
    assert names(load_dataset("imagefolder", ".")) == wanted


def test_added_images_do_not_move_others(flat: Path):
    photos(flat, 60)
    before = names(load_dataset("imagefolder", flat))
    photos(flat, 15, first=60)
    photos(flat, 40, ("dog",))
    after = names(load_dataset("imagefolder", flat))
    assert all(before[part] < after[part] for part in PARTS)


def test_an_added_image_may_send_one_to_training_but_takes_none_from_it(tmp_path: Path):
    for number in range(5):
        folder = photos(tmp_path / str(number), 6)
        before = names(load_dataset("imagefolder", folder, seed=number))
        photos(folder, 6, first=100)
        after = names(load_dataset("imagefolder", folder, seed=number))
        assert before["train"] <= after["train"]
        assert not before["validation"] & after["test"]


def test_small_classes_are_in_every_part():
    targets = np.repeat(np.arange(5), (1, 2, 3, 4, 2000))
    order = image_order(rng(0).integers(0, 2**64, len(targets), np.uint64), "test")
    held = hold_out_by_share(order, targets, 0.1)
    assert np.bincount(targets[held])[:3].tolist() == [0, 1, 1]
    assert 150 < held[10:].sum() < 250 and np.array_equal(held[10:], order[10:] < 2**64 // 10)
    assert np.unique(targets[~held]).tolist() == [0, 1, 2, 3, 4]
    assert np.bincount(targets[hold_out_by_share(order, targets, 1.0)]).tolist() == [
        0,
        1,
        2,
        3,
        1999,
    ]


# --- identity ---


def test_the_identity_comes_back_from_a_checkpoint(flat: Path):
    path = trained_on(Path("net.pt"), flat)
    found = load_checkpoint(path)
    assert found.data == identify(load_dataset("imagefolder", "flat", seed=3), 3)
    assert (found.data.train.images, len(found.data.trained)) == (45, 45)
    assert replace(found, data=None).slim().data is None and found.slim().data == found.data
    save_checkpoint(path, replace(found, data=None))
    assert load_checkpoint(path).data is None


@pytest.mark.parametrize(
    "damage",
    [
        None, {}, {"parts": []}, {"parts": [[1, "x" * 16]] * 3}, {"parts": [[True, "0" * 16]] * 3},
        {"held": []}, {"held": {"test": {"ant": -1}}}, {"held": {"test": 3}},
        {"trained": ["0"]}, {"trained": None},
    ],
)  # fmt: skip
def test_a_damaged_identity_is_refused(flat: Path, damage: object, monkeypatch):
    data = identify(load_dataset("imagefolder", flat), 0).to_json()
    assert DataIdentity.from_json(data).to_json() == data
    damage = {**data, **damage} if damage else damage
    with pytest.raises(DataError, match=r"\bdata: "):
        DataIdentity.from_json(damage)
    path = trained_on(Path("net.pt"), flat)
    monkeypatch.setattr(DataIdentity, "to_json", lambda self: damage)
    save_checkpoint(path, load_checkpoint(path))
    with pytest.raises(CheckpointError, match=r"net\.pt: .*\bdata: "):
        load_checkpoint(path)


def test_differences_are_named(flat: Path):
    then = identify(load_dataset("imagefolder", flat), 0)
    assert then.differences(identify(load_dataset("imagefolder", flat.rename("moved")), 0)) == []
    for image in Path("moved/ant").iterdir():
        image.write_bytes(image.read_bytes() + b"\0")
    now = identify(load_dataset("imagefolder", "moved"), 0)
    assert now.train.images == then.train.images
    assert [each for each in then.differences(now) if "train images" in each]
    for image in Path("moved/ant").glob("01*"):
        image.unlink()
    splits = load_dataset("imagefolder", "moved")
    counts = (f"{then.train.images} ", f" {len(splits.train)} ")
    found = then.differences(identify(splits, 0))
    assert any(all(count in each for count in counts) for each in found)


def test_arrays_have_an_identity():
    images = rng(0).integers(0, 256, (6, 3, 4, 4), dtype=np.uint8)
    one = MemorySource(images, np.arange(6))
    same, other = (
        MemorySource(images.copy(), np.arange(6)),
        MemorySource(images, np.arange(6)[::-1]),
    )
    assert identify_part(one) == identify_part(same) != identify_part(other)
    assert identify(load_dataset("digits"), 0).seen_in(one) == 0


def test_many_images_are_recognised_by_a_sample(tmp_path: Path):
    folder = tmp_path / "many"
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        for i in range(500):
            (folder / name / f"{i}.png").write_bytes(f"{name} {i}".encode())
    splits = load_dataset("imagefolder", folder)
    known = identify(splits, 0)
    assert len(known.trained) == 256 == known.seen_in(splits.train)
    assert known.seen_in(splits.validation) == known.seen_in(splits.test) == 0
    assert len({*image_names(splits.train).tolist()}) == len(splits.train)
    for i in range(0, 500, 2):
        (folder / "ant" / f"{i}.png").write_bytes(b"another image of the same name")
        os.replace(folder / "bee" / f"{i}.png", folder / "bee" / f"renamed {i}.png")
    assert 0 < known.seen_in(load_dataset("imagefolder", folder).train) < 200
    both = identify(load_dataset("imagefolder", photos(tmp_path / "x")), 0, before=[known, None])
    assert known.trained < both.trained


# --- evaluation ---


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    seen: list[EvalRecord] = []
    monkeypatch.setattr(evaluate, "print_table", lambda records, *_: seen.extend(records))

    def go(*words: object) -> tuple[int, Outcome]:
        seen.clear()
        argv = [*map(str, words), "--samples", "1", "--quiet", "--device", "cpu"]
        done = called(evaluate.main, [*argv, "--calibration-images", "20"], capsys)
        return seen[0].images if seen else 0, done

    return go


def test_images_are_recognised_at_another_path(flat: Path, call, caplog):
    net = trained_on(Path("net.pt"), flat)
    caplog.set_level("INFO", "compofa")
    held = {*load_dataset("imagefolder", flat).test.paths.tolist()}
    assert call("--net", net)[0] == len(held) == 7, "from another folder than trained in"
    Path("link").symlink_to("flat")
    for path in ("flat", "flat/", "./flat", flat, "link"):
        assert call("--net", net, "--data-path", path)[0] == 7
    shutil.move(flat, "elsewhere")
    photos(Path("elsewhere"), 30, first=100)
    images, done = call("--net", net, "--data-path", "elsewhere")
    assert done.status == 0 and images > 7
    grown = load_dataset("imagefolder", "elsewhere", evaluation_only=True,
                         known=load_checkpoint(net).data)  # fmt: skip
    assert held < {*grown.test.paths.tolist()} and len(grown.test) == images
    assert "elsewhere" in caplog.text
    assert call("--net", net, "--part", "validation", "--data-path", "elsewhere")[1].status == 0


def test_no_image_of_a_tiny_class_changes_sides(tmp_path: Path):
    for number in range(8):
        folder = tmp_path / str(number)
        photos(folder, 2, ("ant",))
        photos(folder, 9, ("bee",))
        before = load_dataset("imagefolder", folder, seed=number)
        known = identify(before, number)
        photos(folder, 30, ("ant",), first=5)
        after = load_dataset("imagefolder", folder, seed=number, evaluation_only=True, known=known)
        assert all(names(before)[part] <= names(after)[part] for part in PARTS)


def test_images_trained_on_are_never_test_images(flat: Path, call):
    net = trained_on(Path("net.pt"), flat)
    shutil.copytree(flat, "parts/train")
    shutil.copytree(flat, "parts/val")
    for image in Path("parts/val/ant").iterdir():
        image.write_bytes(image.read_bytes() + b"\0")
    for command in (("--part", "test"), ("--part", "validation")):
        images, done = call("--net", net, "--data-path", "parts", *command)
        assert images == 0 and done.status == 1 and done.err.count("\n") == 1
        assert "trained on" in done.err
        assert not Path("results.csv").exists()
    net = trained_on(Path("parts.pt"), Path("parts"))  # with the same test part
    assert call("--net", net)[0] == 60
    images, done = call("--net", net, "--data-path", "parts/train")  # all but a tenth trained on
    assert done.status == 1 and "trained" in done.err


def test_evaluation_works_without_the_validation_folder(flat: Path, call):
    for part in ("train", "val", "test"):
        photos(Path("own") / part, 9)
    net = trained_on(Path("net.pt"), Path("own"))
    assert call("--net", net, "--part", "validation")[0] == 27
    shutil.rmtree("own/val")
    assert call("--net", net)[0] == 27
    images, done = call("--net", net, "--part", "validation")
    assert (images, done.status, done.err.count("\n")) == (0, 1, 1) and "empty" in done.err


def test_other_images_are_all_test_images(flat: Path, call, caplog):
    caplog.set_level("INFO", "compofa")
    net = trained_on(Path("net.pt"), flat)
    other = load_checkpoint(net)
    photos(Path("other/val"), 4)
    photos(Path("other/train"), 9)  # the same names, other images
    assert call("--net", net, "--data-path", "other")[0] == 12
    assert "other has no images" in caplog.text
    splits = load_dataset("imagefolder", "other/val", evaluation_only=True, known=other.data)
    assert len(splits.test) == 12 and len(splits.train) == 0


def test_checkpoints_without_identity_are_warned_about(flat: Path, call, caplog):
    caplog.set_level("INFO", "compofa")
    net = trained_on(Path("net.pt"), flat, data=None)
    then = load_dataset("imagefolder", flat, by_position=True)
    for path in ("flat", "./flat/"):
        images, done = call("--net", net, "--data-path", path)
        assert (images, done.status) == (6, 0) == (len(then.test), 0)
    assert "earlier version" in caplog.text
    photos(Path("val/val"), 2)
    photos(Path("val/train"), 8)
    assert call("--net", net, "--data-path", "val")[0] == 6
    assert "which images" in caplog.text


def test_files_are_not_mistaken_for_arrays(flat: Path, call, caplog):
    said = "files or arrays"
    arrays = identify(load_dataset("digits"), 0)
    net = trained_on(Path("net.pt"), flat, data=arrays)
    photos(Path("parts/train"), 8)
    photos(Path("parts/val"), 2)
    assert call("--net", net, "--data-path", "parts")[1].status == 0 and said in caplog.text
    caplog.clear()
    files = identify(load_dataset("imagefolder", flat, seed=3), 3)
    digits = replace(open_checkpoint("compofa-digits")[1], data=files, data_path="")
    save_checkpoint("digits.pt", digits)
    assert call("--net", "digits.pt")[1].status == 0 and said in caplog.text
    caplog.clear()
    save_checkpoint("digits.pt", replace(digits, data=replace(arrays, trained=files.trained)))
    assert call("--net", "digits.pt")[1].status == 0 and said not in caplog.text


# --- classes ---


def test_a_test_set_may_lack_classes(flat: Path, call, caplog):
    caplog.set_level("INFO", "compofa")
    net = trained_on(Path("net.pt"), flat)
    photos(Path("new/val"), 5, ("cat", "ant"))
    photos(Path("new/train"), 9)
    images, done = call("--net", net, "--data-path", "new")
    assert (images, done.status) == (10, 0), done.err
    assert "2 of the network's 3 classes" in caplog.text
    found = evaluate.open_data(
        load_checkpoint(net), evaluate.parser().parse_args(["--data-path", "new"])
    )
    assert found.classes == CLASSES and found.test.targets.tolist() == [0] * 5 + [2] * 5
    with pytest.raises(DataError, match=r"train.*\bbee\b"):
        load_dataset("imagefolder", "new")

    photos(Path("few/val"), 5, ("bee",))
    found = evaluate.open_data(
        load_checkpoint(net), evaluate.parser().parse_args(["--data-path", "few"])
    )
    assert found.test.targets.tolist() == [1] * 5
    photos(Path("few/val"), 1, ("dog",))
    done = call("--net", net, "--data-path", "few")[1]
    assert done.status == 1 and "'ant'" in done.err and "'dog'" in done.err


def test_two_folders_are_one_too_many(flat: Path, call):
    net = trained_on(Path("net.pt"), flat)
    done = call("--net", net, "--data-path", "flat", "--imagenet-path", "flat")[1]
    assert done.status == 1 and "--imagenet-path" in done.err and "--data-path" in done.err
    done = call("--net", "compofa-digits", "--data-path", "flat")[1]
    assert done.status == 1 and "digits" in done.err and "data path" in done.err
