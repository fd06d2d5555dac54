import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import Outcome, called
from PIL import Image

from compofa.cli import evaluate, tools
from compofa.data import Normalisation
from compofa.data.imagenet import WNIDS
from compofa.data.transforms import centre_crop
from compofa.errors import DataError
from compofa.io.checkpoint import Checkpoint, save_checkpoint
from compofa.io.export import card_path
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.zoo import network_spec
from compofa.nn.calibrate import calibrate
from compofa.nn.supernet import Supernet
from compofa.predict import class_names, find_images

CLASSES = ("cat", "cow", "dog")


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """A command in an empty folder, as a function."""
    monkeypatch.chdir(tmp_path)

    def command(name: str, *words: object) -> Outcome:
        argv = [*map(str, words), *["--device", "cpu", "--quiet"] * (name != "export")]
        if name == "eval":
            return called(evaluate.main, argv, capsys)
        return called(tools.main, [name, *argv], capsys)

    return command


def photos(folder: Path, images: int) -> Path:
    """Write images of several sizes, longer than wide and wider than long, in class folders."""
    generator = np.random.default_rng(0)
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            height, width = 20 + 7 * (index % 3), 41 - 9 * (index % 3)
            pixels = generator.integers(60 * place, 80 + 80 * place, (height, width, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def save(path: str, dataset: str = "imagefolder", single: bool = False) -> str:
    """Write a network that tells images apart: with statistics, and a large classifier."""
    spec = network_spec("compofa-small", len(CLASSES), width_mult=0.1)
    network = Supernet(spec, seed=2)
    network.classifier.weight.data *= 20
    if single:
        subnet = spec.space.smallest.at(24)
        images = torch.randn(20, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        network, spec = calibrate(network, [images], subnet), FixedNetwork.of(spec, subnet)
    weights = network.state_dict()
    save_checkpoint(path, Checkpoint(spec, weights, CLASSES, dataset=dataset, image_size=24))
    return path


def write_onnx(path: Path, card: dict) -> np.ndarray:
    """Write a file that averages each channel and multiplies the three by the returned matrix."""
    onnx = pytest.importorskip("onnx", reason="onnx, of the extra 'export', is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime, of 'export', is not installed")
    helper = onnx.helper
    matrix = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["pool"]),
            helper.make_node("Flatten", ["pool"], ["flat"]),
            helper.make_node("MatMul", ["flat", "matrix"], ["logits"]),
        ],
        "net",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 24, 24])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])],
        [onnx.numpy_helper.from_array(matrix, "matrix")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    card |= {"format": "onnx", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    card_path(path).write_text(json.dumps(card))
    return matrix


def rows(path: str | Path) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


# --- what it predicts ---


@pytest.mark.parametrize("single", [True, False], ids=["specialised", "supernet"])
@pytest.mark.parametrize("dataset", ["imagefolder", "cifar10"])
def test_predictions_are_those_of_evaluation(call, tmp_path, dataset, single) -> None:
    """Photographs are cropped, small images are not, and both are read as in evaluation."""
    photos(tmp_path / "data" / "train", 9)
    photos(tmp_path / "data" / "val", 6)
    save("net.pt", dataset, single)
    subnet = [] if single else ["largest"]
    data = ["--data-path", "data", "--seed", 4]
    given = [] if single else ["--subnet", "largest", "--calibration-images", 20]
    done = call("eval", "--net", "net.pt", *data, *given, "--details", "details")
    assert done.status == 0, done.err
    options = [] if single else [*data, "--calibration-images", 20]
    done = call("predict", "net.pt", *subnet, "data/val", *options, "--output", "said.csv",
                "--batch-size", 7)  # fmt: skip
    assert done.status == 0, done.err
    evaluated = {row["image"]: row for row in rows("details/images.csv")}
    predicted = {row["image"]: row for row in rows("said.csv")}
    assert evaluated.keys() == predicted.keys() and len(predicted) == 18
    assert len({row["class_1"] for row in predicted.values()}) > 1
    for image, row in predicted.items():
        wanted = evaluated[image]
        assert row["class_1"] == wanted["predicted"], image
        assert float(row["probability_1"]) == pytest.approx(float(wanted["probability"]), abs=2e-5)
    (record,) = rows("results.csv")
    right = sum(row["class_1"] == Path(image).parent.name for image, row in predicted.items())
    assert 100 * right / 18 == pytest.approx(float(record["top1"]))


def test_an_exported_file_is_run_by_its_card(call, tmp_path) -> None:
    photos(tmp_path / "val", 2)
    norm = Normalisation((0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
    matrix = write_onnx(tmp_path / "net.onnx", dict(CARD))
    done = call("predict", "net.onnx", "val", "--top", 9, "--output", "said.csv")
    assert done.status == 0, done.err
    for row in rows("said.csv"):
        assert [*row] == [
            "image",
            *(f"{x}_{i}" for i in (1, 2, 3) for x in ("class", "probability")),
        ]
        with Image.open(row["image"]) as image:
            pixels = np.asarray(centre_crop(image, 24)) / 255
        logits = ((pixels.mean((1, 2)) - norm.mean) / norm.std) @ matrix
        wanted = np.exp(logits) / np.exp(logits).sum()
        for rank, place in enumerate(np.argsort(-wanted), 1):
            assert row[f"class_{rank}"] == CLASSES[place]
            assert float(row[f"probability_{rank}"]) == pytest.approx(wanted[place], abs=1e-5)


CARD = {
    "network": network_spec("compofa-small", 3).to_json(),
    "classes": list(CLASSES),
    "resolution": 24,
    "normalisation": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3]},
    "dataset": "imagefolder",
}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"resolution": float("inf")}, "resolution"),
        ({"resolution": 10**9}, "image size"),
        ({"resolution": 32}, "ONNX Runtime"),
        ({"classes": ["cat"]}, "classes"),
        ({"classes": ["cat", None, "dog"]}, "classes"),
        ({"classes": "cat"}, "classes"),
        ({"network": network_spec("compofa-small", 5).to_json(), "classes": []}, "5 classes"),
        ({"network": []}, "network"),
        ({"normalisation": {"mean": [0.1] * 3, "std": [0] * 3}}, "standard deviations"),
        ({"normalisation": {"mean": [[]] * 3, "std": [1] * 3}}, "mean"),
        ({"normalisation": None}, "normalisation"),
        ({"dataset": None}, "dataset"),
        ({"dataset": "mine"}, "register_dataset"),
    ],
)
def test_wrong_cards_are_refused(call, tmp_path, changed, named) -> None:
    photos(tmp_path / "val", 1)
    write_onnx(tmp_path / "net.onnx", CARD | changed)
    done = call("predict", "net.onnx", "val")
    assert done.status == 1 and named in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"no ONNX", None], ids=["empty", "text", "truncated"])
def test_files_that_are_no_onnx_are_refused(call, tmp_path, content) -> None:
    photos(tmp_path / "val", 1)
    write_onnx(tmp_path / "net.onnx", dict(CARD))
    whole = Path("net.onnx").read_bytes()
    Path("net.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    digest = hashlib.sha256(Path("net.onnx").read_bytes()).hexdigest()
    Path("net.onnx.json").write_text(json.dumps(CARD | {"format": "onnx", "sha256": digest}))
    done = call("predict", "net.onnx", "val")
    assert done.status == 1 and "net.onnx: " in done.err and done.err.count("\n") == 1


def test_damaged_exports_are_refused(call, tmp_path) -> None:
    photos(tmp_path / "val", 1)
    write_onnx(tmp_path / "net.onnx", dict(CARD))
    assert "--image-size" in call("predict", "net.onnx", "val", "--image-size", 8).err
    Path("net.onnx").write_bytes(Path("net.onnx").read_bytes() + b"x")
    assert "SHA-256" in call("predict", "net.onnx", "val").err
    Path("net.onnx.json").unlink()
    done = call("predict", "net.onnx", "val")
    assert done.status == 1 and "net.onnx.json" in done.err


def test_what_is_printed(call, tmp_path) -> None:
    photos(tmp_path / "val", 1)
    save("net.pt", single=True)
    done = call("predict", "net.pt", "val/dog", "val/cat/0.png", "--top", 2)
    assert done.status == 0, done.err
    first, second = done.out.splitlines()
    assert first.startswith("val/dog/0.png: ") and second.startswith("val/cat/0.png: ")
    names = [part.split(" (")[0] for part in first.split(": ")[1].split(", ")]
    assert len(names) == 2 and {*names} < {*CLASSES}
    done = call("predict", "net.pt", "val", "--output", "/dev/stdout")
    assert done.status == 0 and "val/dog/0.png: " in done.err, "the table alone is on stdout"


# --- images ---


def test_files_folders_and_patterns(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/b/2.jpg", "a/1.PNG", "a/.hidden.png", "a/notes.txt", "scan", "x[1].png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    inside = ["a/1.PNG", "a/b/2.jpg"]
    assert find_images(["a"]) == inside
    assert find_images(["a/b/2.jpg", "a"]) == inside[::-1], "each once"
    assert find_images(["scan", "x[1].png"]) == ["scan", "x[1].png"]
    assert find_images(["**/*.jpg"]) == ["a/b/2.jpg"]
    assert find_images(["a/*"]) == inside
    for word in ("missing.png", "*.gif", "a/.hidden", "notes*"):
        with pytest.raises(DataError, match="expected an image"):
            find_images(["a", word])
    Path("empty").mkdir()
    with pytest.raises(DataError, match=r"empty.*without images"):
        find_images(["empty"])


def test_unreadable_images_are_named_and_skipped(call, tmp_path, caplog) -> None:
    photos(tmp_path / "val", 1)
    Path("val/cat/1.png").write_bytes(b"no image")
    save("net.pt", single=True)
    done = call("predict", "net.pt", "val", "--output", "said.csv", "--batch-size", 1)
    assert done.status == 0 and "1 unreadable" in done.out
    assert "val/cat/1.png" in caplog.text
    assert [row["image"] for row in rows("said.csv")] == [f"val/{name}/0.png" for name in CLASSES]
    Path("said.csv").unlink()
    done = call("predict", "net.pt", "val/cat/1.png", "--output", "said.csv")
    assert done.status == 1 and "none of 1" in done.err and not Path("said.csv").exists()
    done = call("predict", "net.pt", "val/cat/0.png", "--output", "val/cat/0.png")
    assert done.status == 1 and "apart from the input" in done.err


# --- calibration and arguments ---


def test_a_subnet_is_calibrated_on_something(call, tmp_path) -> None:
    photos(tmp_path / "val", 3)
    save("net.pt")
    done = call("predict", "net.pt", "smallest", "val")
    assert done.status == 1
    assert "--data-path" in done.err and "--calibrate-on-images" in done.err
    said = {}
    for way in ("--calibrate-on-images", "--no-calibrate"):
        done = call("predict", "net.pt", "smallest", "val", way, "--top", 3, "--output", "said.csv")
        assert done.status == 0, done.err
        said[way] = [row["probability_1"] for row in rows("said.csv")]
    assert said["--calibrate-on-images"] != said["--no-calibrate"]


@pytest.mark.parametrize(
    ("single", "words", "named"),
    [
        (False, ["val"], "SUBNET"),
        (False, ["largest"], "IMAGE"),
        (False, ['{"d": 3}', "val"], "ks"),
        (False, ["largest", "val", "--calibrate-on-images", "--data-path", "x"], "--data-path"),
        (True, ["largest", "val"], "SUBNET"),
        (True, ["val", "--no-calibrate"], "--no-calibrate"),
        (True, ["val", "--top", "0"], "--top"),
        (True, ["val", "--batch-size", "0", "--workers", "-1"], "--workers"),
        (True, ["val", "--std", "0"], "deviations"),
    ],
)  # fmt: skip
def test_bad_arguments(call, tmp_path, single, words, named) -> None:
    photos(tmp_path / "val", 1)
    save("net.pt", single=single)
    done = call("predict", "net.pt", *words)
    assert done.status == 1 and named in done.err, done.err


def test_names_of_unreadable_files_stay_in_their_line(call, tmp_path, caplog) -> None:
    photos(tmp_path / "val", 1)
    write_onnx(tmp_path / "net.onnx", dict(CARD))
    Path("val/cat/a\nb.png").write_text("no image")
    done = call("predict", "net.onnx", "val")
    assert done.status == 0 and "a\\nb.png" in caplog.text and "a\nb.png" not in caplog.text


def test_few_images_to_calibrate_on_are_warned_of(call, tmp_path, caplog) -> None:
    photos(tmp_path / "val", 1)
    save("net.pt")
    done = call("predict", "net.pt", "smallest", "val", "--calibrate-on-images")
    assert done.status == 0 and "3 images" in caplog.text


def test_details_are_not_written_among_the_images(call, tmp_path) -> None:
    photos(tmp_path / "data", 2)
    save("net.pt", single=True)
    done = call("eval", "--net", "net.pt", "--data-path", "data", "--details", "data")
    assert done.status == 1 and "data" in done.err and not Path("data/images.html").exists()


def test_names_of_classes() -> None:
    assert class_names(CLASSES, 3) == CLASSES
    assert class_names((), 3) == ("class 0", "class 1", "class 2")
    english = class_names((), 1000)
    assert len({*english}) == 1000 and english[207] == "golden retriever"
    assert class_names(WNIDS, 1000) == WNIDS
