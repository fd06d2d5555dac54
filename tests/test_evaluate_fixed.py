"""Evaluation and export of specialised networks, and class folders named as ImageNet's."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calls import Outcome, called
from PIL import Image
from test_weights import make

from compofa.cli import evaluate, tools
from compofa.data import Normalisation, load_dataset
from compofa.data.imagenet import WNIDS, by_wnid, is_imagenet
from compofa.errors import DataError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint, load_weights, save_checkpoint
from compofa.io.open import read_any, save_as
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.seeds import rng

QUIET = ["--quiet", "--device", "cpu"]


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path, main: Callable = evaluate.main) -> Outcome:
        words = [str(word) for word in argv]
        return called(main, [*words, *QUIET] if main is evaluate.main else words, capsys)

    return run


def fixed(classes: int = 5, side: int = 16) -> Checkpoint:
    spec = network_spec("ofa-small", classes, width_mult=0.1, resolutions=(side,))
    subnet = spec.space.sample(rng(1))
    network = FixedNetwork.of(spec, subnet)
    static = network.build()
    if classes == 5:
        load_weights(static, extract(make("ofa-small", 1), subnet).state_dict())
    return Checkpoint(network, static.state_dict(), dataset="imagefolder", image_size=side)


def photos(folder: Path, classes: tuple[str, ...], each: int = 3) -> Path:
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = generator.integers(0, 256, (24, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def rows(path: str = "results.csv") -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


# --- specialised networks ---


@pytest.mark.parametrize("to", ["ofa", "compofa"])
def test_a_specialised_network_is_evaluated_as_it_is(to: str, call, tmp_path: Path) -> None:
    checkpoint = fixed()
    save_as(tmp_path / "net", checkpoint, to)
    data = photos(tmp_path / "data" / "val", tuple("abcde")).parent
    done = call("--net", "net", "--data-path", data)
    assert done.status == 0, done.err
    (row,) = rows()
    assert (row["calibration_images"], row["r"], row["images"]) == ("0", "16", "15")
    assert int(row["params"]) == sum(p.numel() for p in checkpoint.build().parameters())
    splits = load_dataset("imagefolder", data, evaluation_only=True)
    evaluator = Evaluator(splits, "test", calibration_images=0)
    found = evaluator.measure(checkpoint.build(), checkpoint.network.subnet)
    assert (float(row["top1"]), float(row["top5"])) == (found.top1, found.top5)
    assert "15 test images of imagefolder" in done.out


def test_its_statistics_are_measured_where_that_is_asked_for(call, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net.pt", fixed())
    data = photos(tmp_path / "data" / "train", tuple("abcde"), 6).parent
    photos(data / "val", tuple("abcde"))
    done = call("--net", "net.pt", "--data-path", data, "--calibration-images", 9)
    assert done.status == 0, done.err
    assert rows()[0]["calibration_images"] == "9"
    done = call("--net", "net.pt", "--data-path", data, "--image-size", 24)
    assert done.status == 0 and rows()[0]["r"] == "24"


def test_normalisation_can_be_given(call, tmp_path: Path) -> None:
    checkpoint = fixed()
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    data = photos(tmp_path / "data", tuple("abcde"))
    args = evaluate.parser().parse_args(["--mean", "0.5", "--std", "0.1", "0.2", "0.3"])
    assert evaluate.normalisation(checkpoint, args) == Normalisation((0.5,) * 3, (0.1, 0.2, 0.3))
    for bad in (["--mean", "1", "2"], ["--std", "0"], ["--mean", "9e9"], ["--std", "1e-300"]):
        done = call("--net", "net.pt", "--data-path", data, *bad)
        assert done.status == 1 and "standard deviations" in done.err
    assert call("--net", "net.pt", "--data-path", data, "--mean", "0.5").status == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "3"], "--samples: net.pt"),
        (["--all"], "--all: net.pt"),
        (["--subnet", "{}"], "--subnet: net.pt"),
        (["--image-size", "7"], "8 to 2048, got 7"),
        (["--net", "note10_lat@9ms"], "note10_lat@8ms_top1@71.4_finetune@25"),
        (["--net", "nowhere/net.config"], "nowhere/net.config"),
    ],
)
def test_what_does_not_fit_is_one_line(words, message: str, call, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net.pt", fixed())
    data = photos(tmp_path / "data", tuple("abcde"), 1)
    done = call("--net", "net.pt", "--data-path", data, *words)
    assert done.status == 1 and done.err.count("\n") == 1
    assert message in done.err


def test_a_search_needs_a_supernet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nas.cli import search

    save_checkpoint(tmp_path / "net.pt", replace(fixed(10), dataset="digits"))
    assert search.main(["--net", str(tmp_path / "net.pt"), "--target-hardware", "cpu"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "supernet" in err and "specialised" in err


def test_a_specialised_network_is_exported(call, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    checkpoint = replace(fixed(), figures={"published": {"top1": 71.4}})
    save_as(tmp_path / "net", checkpoint, "ofa")
    done = call("export", "net", "--to", "safetensors", "--fold-bn", main=tools.main)
    assert done.status == 0, done.err
    card = json.loads((tmp_path / "net.safetensors.json").read_text())
    assert card["figures"] == {"published": {"top1": 71.4}} and card["calibration"] is None
    assert (card["resolution"], card["max_difference"] < 1e-4) == (16, True)
    done = call("export", "net", "largest", "--to", "pt2", main=tools.main)
    assert done.status == 1 and "SUBNET: net " in done.err
    done = call("export", "compofa-digits", "--to", "pt2", main=tools.main)
    assert done.status == 1 and "SUBNET: " in done.err


def test_unreadable_images_are_named_once_and_with_the_reason(
    call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_checkpoint(tmp_path / "net.pt", fixed())
    data = photos(tmp_path / "data", tuple("abcde"), 3)
    (data / "c" / "1.png").write_bytes(b"")
    Image.new("I", (9, 9), 1).save(data / "d" / "0.png", format="TIFF")
    for workers in (0, 2):
        done = call("--net", "net.pt", "--data-path", data, "--workers", workers)
        assert done.status == 1 and done.err.count("\n") == 1 and not Path("results.csv").exists()
        assert "2 of 15" in done.err and ".png" not in done.err
        first, second = caplog.messages
        assert "c/1.png: empty" in first and re.search("d/0.png: .*32", second)
        caplog.clear()


# --- ImageNet's classes ---


def test_the_classes_of_imagenet() -> None:
    assert len(WNIDS) == 1000 and list(WNIDS) == sorted(set(WNIDS))
    assert (WNIDS[0], WNIDS[207], WNIDS[999]) == ("n01440764", "n02099601", "n15075141")
    assert is_imagenet((), 1000) and is_imagenet(WNIDS, 1000)
    assert not is_imagenet((), 10) and not is_imagenet(tuple(map(str, range(1000))), 1000)


def test_a_part_of_the_classes_keeps_their_numbers(tmp_path: Path) -> None:
    chosen = (WNIDS[207], WNIDS[3], WNIDS[999])
    photos(tmp_path / "train", chosen, 4)
    photos(tmp_path / "val", chosen, 2)
    splits = by_wnid(load_dataset("imagenet", tmp_path))
    assert splits.classes == WNIDS
    assert splits.test.targets.tolist() == [3, 3, 207, 207, 999, 999]
    assert set(splits.train.targets) == {3, 207, 999} >= set(splits.validation.targets)
    photos(tmp_path / "val", ("cat",), 1)
    photos(tmp_path / "train", ("cat",), 4)
    with pytest.raises(DataError, match=r"n01440764.* 4: cat"):
        by_wnid(load_dataset("imagenet", tmp_path))


def test_a_part_of_imagenet_is_evaluated(call, tmp_path: Path) -> None:
    checkpoint = replace(fixed(1000), dataset="imagenet")
    checkpoint.weights["classifier.bias"][207] += 100  # whatever comes is a golden retriever
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    data = photos(tmp_path / "data", (WNIDS[3], WNIDS[207]), 2)
    done = call("--net", "net.pt", "--data-path", data)
    assert done.status == 0, done.err
    assert float(rows()[0]["top1"]) == 50
    done = call("--net", "net.pt", "--data-path", photos(tmp_path / "other", ("cat", "dog"), 1))
    assert done.status == 1 and done.err.count("\n") == 1
    assert "n01440764" in done.err and "cat, dog" in done.err


@pytest.mark.parametrize("digits", [1, 4])
def test_numbered_folders_are_outputs_in_numeric_order(call, tmp_path: Path, digits: int) -> None:
    checkpoint = replace(fixed(1000), dataset="imagenet")
    checkpoint.weights["classifier.bias"][207] += 100
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    data = photos(tmp_path / "data", tuple(f"{n:0{digits}}" for n in range(1000)), 1)
    splits = by_wnid(load_dataset("imagenet", data, evaluation_only=True))
    assert splits.classes == WNIDS
    for image, target in enumerate(splits.test.targets):
        assert f"/{int(target):0{digits}}/" in splits.test.path(image)
    assert sorted(splits.test.targets) == list(range(1000))
    for i in range(1, 9):  # as text, this folder would be class 119
        shutil.copy(data / f"{207:0{digits}}" / "0.png", data / f"{207:0{digits}}" / f"{i}.png")
    assert call("--net", "net.pt", "--data-path", data).status == 0
    assert float(rows()[0]["top1"]) == pytest.approx(100 * 9 / 1008, abs=0.01)
    (data / f"{0:0{digits}}").rename(data / "cat")
    with pytest.raises(DataError, match=r"\bcat, "):
        by_wnid(load_dataset("imagenet", data, evaluation_only=True))
    shutil.rmtree(data / "cat")
    done = call("--net", "net.pt", "--data-path", data)
    assert done.status == 1 and done.err.count("\n") == 1
    assert "0 to 999" in done.err and " 999:" in done.err


def test_imagenet_weights_know_imagenet(reference_data: Path, tmp_path: Path) -> None:
    import tarfile

    archive = reference_data / "images" / "imagenet_1000_samples.tar"
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile()][::10]
        tar.extractall(tmp_path, members, filter="data")
    splits = by_wnid(load_dataset("imagenet", tmp_path, evaluation_only=True))
    _, found = read_any(reference_data / "weights" / "proxyless-w0.25-r112_imagenet.pth")
    evaluator = Evaluator(
        splits, "test", normalisation=Normalisation(found.mean, found.std), calibration_images=0
    )
    record = evaluator.measure(found.build(), found.network.subnet)
    assert record.images == 100 and record.macs == 10_691_008
    assert record.top1 > 40 and record.top5 > 60
