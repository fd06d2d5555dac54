import csv
import json
import logging
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import Outcome, called
from PIL import Image
from test_cli_train import as_ofa

import compofa.cli.evaluate
from compofa.cli.evaluate import choose_subnets, main, open_data, parser
from compofa.data import load_dataset
from compofa.data.identity import identify
from compofa.io.checkpoint import Checkpoint, file_hash, load_checkpoint, save_checkpoint
from compofa.io.records import EvalRecord
from compofa.networks.zoo import network_spec
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig
from compofa.training.recipes import RECIPES, SMALL_IMAGES, Recipe
from compofa.training.run import train

ROOT = Path(__file__).parent.parent
QUIET = ["--quiet", "--device", "cpu"]
NUMBERS = {"r", "images", "macs", "params", "calibration_images", "seed"}


@pytest.fixture(scope="module", autouse=True)
def quick(few_digits) -> Iterator[None]:
    """A teacher that is trained for one epoch."""
    teacher, *others = SMALL_IMAGES.phases
    cheap = Recipe((replace(teacher, epochs=1, warmup_epochs=0), *others), quick=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "digits", cheap)
        yield
    logging.captureWarnings(False)


@pytest.fixture(scope="module")
def net(quick: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a checkpoint that was trained a little, of a space of 32 subnets."""
    config = TrainConfig(
        epochs=2, heuristic="2:3,3:4", width_mult=0.1, image_size=(8, 12), eval_size=8, lr=0.05,
        batch_size=45, dynamic_batch_size=1, validation_images=25, calibration_images=30,
    )  # fmt: skip
    return str(train(config, tmp_path_factory.mktemp("run"), bar=False).best)


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """The command in an empty folder of its own, as a function."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    return lambda *argv: called(main, [*QUIET, *argv], capsys)


def read(path: str | Path = "results.csv") -> list[EvalRecord]:
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("ks", "e", "d"):
            row[name] = [int(value) for value in row[name].split()]
        row.update({name: int(row[name]) for name in NUMBERS})
    return [EvalRecord.from_json(row) for row in rows]


def photos(folder: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for i in range(4):
                image = Image.new("RGB", (9, 8), (90 * number, 9 * i, 7))
                image.save(folder / part / name / f"{i}.png")
    return folder


def save(path: Path, classes: tuple[str, ...] = ("cat", "dog"), **more: object) -> str:
    spec = network_spec("compofa-small", len(classes), width_mult=0.1)
    weights = Supernet(spec).state_dict()
    save_checkpoint(path, Checkpoint(spec, weights, classes, image_size=8, **more))
    return str(path)


# --- what it measures ---


def test_details_are_those_of_one_subnet(call, net):
    done = call("--net", net, "--subnet", "largest", "--details", "details")
    assert done.status == 0, done.err
    (record,) = read()
    with Path("details/images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == record.images and str(Path("details/images.html")) in done.out
    right = sum(row["true"] == row["predicted"] for row in rows)
    assert 100 * right / len(rows) == pytest.approx(record.top1)
    done = call("--net", net, "--samples", "2", "--details", "more")
    assert done.status == 1 and "--details" in done.err and not Path("more").exists()


def test_a_checkpoint_needs_no_other_flags(call, net):
    done = call("--net", net)
    assert done.status == 0, done.err
    records = read()
    checkpoint = load_checkpoint(net)
    assert len(records) == 10 == len({record.subnet for record in records})
    for record in records:
        assert checkpoint.network.space.contains(record.subnet) and record.subnet.resolution == 8
        assert 0 <= record.top1 <= record.top5 <= 100 and record.images == 30
        assert (record.dataset, record.part, record.net) == ("digits", "test", net)
        assert record.checkpoint == file_hash(net) and record.calibration_images == 95
    table = done.out.splitlines()
    assert table[0].split() == ["subnet", "params", "MACs", "top-1", "top-5"] and len(table) == 12
    for line, record in zip(table[1:], records, strict=False):
        for part in (str(record.subnet), f"{record.params:,}", f"{record.macs:,}"):
            assert part in line
        assert line.endswith(f"{record.top1:.2f}%  {record.top5:>6.2f}%")
    assert all(word in table[-1] for word in ("10 subnet", "compofa", "30 test images of digits"))


def test_the_seed_decides_and_samples_count(call, net):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert call("--net", net, "--samples", "4", "--seed", seed, "--output", name).status == 0
    assert read("a") == read("b") and len(read("a")) == 4
    assert [r.subnet for r in read("a")] != [r.subnet for r in read("c")]


def test_the_whole_space(call, net):
    assert call("--net", net, "--all", "--output", "new/folder/all.csv").status == 0
    records = read("new/folder/all.csv")
    space = load_checkpoint(net).network.space
    assert {record.subnet for record in records} == set(space.enumerate()) and len(records) == 32
    largest = max(records, key=lambda record: record.macs)
    assert largest.subnet == space.largest


def test_a_subnet_by_itself_gets_the_same_figures(call, net):
    assert call("--net", net, "--samples", "2", "--calibration-images", "50").status == 0
    _, record = read()
    text = json.dumps(record.subnet.to_config())
    Path("subnet.json").write_text(text)
    for source in (text, "subnet.json"):
        done = call("--net", net, "--subnet", source, "--calibration_images", "50")
        assert done.status == 0, done.err
        assert read() == [record]


def test_the_resolution_comes_from_the_option_the_subnet_or_the_checkpoint(call, net):
    smallest = load_checkpoint(net).network.space.smallest
    config = smallest.to_config()
    without = {key: value for key, value in config.items() if key != "r"}
    for text, more, expected in (
        (without, [], 8),
        ({**config, "r": 12}, [], 12),
        ({**config, "r": [12]}, ["--image-size", "16"], 16),
    ):
        assert call("--net", net, "--subnet", json.dumps(text), *more).status == 0
        assert read()[0].subnet == smallest.at(expected)
    assert call("--net", net, "--samples", "1", "--image_size", "12").status == 0
    assert read()[0].subnet.resolution == 12


def test_validation_images_are_those_of_the_training(call, net):
    assert call("--net", net, "--samples", "1", "--part", "validation").status == 0
    assert read()[0].images == 25 and read()[0].part == "validation"


@pytest.mark.parametrize("earlier", [False, True])
def test_the_images_held_out_are_found_again(tmp_path, earlier):
    folder = photos(tmp_path / "photos")
    held = []
    for seed in range(5):
        splits = load_dataset(
            "imagefolder", folder, seed=seed, validation_images=4, by_position=earlier
        )
        checkpoint = Checkpoint(
            network_spec("compofa-small", 2), {}, ("cat", "dog"), dataset="imagefolder",
            data_path=str(folder), data_seed=seed, validation_images=4,
            data=None if earlier else identify(splits, seed),
        )  # fmt: skip
        found = open_data(checkpoint, parser().parse_args([])).validation
        assert found.paths.tolist() == splits.validation.paths.tolist()
        held.append(tuple(found.paths.tolist()))
    assert len(set(held)) > 1


def test_own_images(call, tmp_path):
    folder = photos(tmp_path / "photos")
    path = save(tmp_path / "own.pt", dataset="imagefolder", data_path=str(folder))
    done = call("--net", path, "--samples", "1")
    assert done.status == 0, done.err
    assert read()[0].images == 8 and read()[0].dataset == "imagefolder"
    other = photos(tmp_path / "other")
    (other / "val" / "cat" / "extra.png").write_bytes((folder / "val/cat/0.png").read_bytes())
    assert call("--net", path, "--samples", "1", "--data-path", str(other)).status == 0
    assert read()[0].images == 9
    assert call("--net", path, "--samples", "1", "--imagenet_path", str(other)).status == 0
    assert read()[0].images == 9 and read()[0].dataset == "imagenet"


def test_weights_of_other_programs_name_their_network(call, tmp_path):
    folder = photos(tmp_path / "photos")
    net = Supernet(network_spec("ofa-small", 2), seed=3)
    state = {as_ofa(name): value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "other.pth")
    words = ["--net", str(tmp_path / "other.pth"), "--imagenet_path", str(folder)]
    done = call(*words, "--arch", "ofa-small", "--samples", "2", "--image-size", "8")
    assert done.status == 0, done.err
    assert len(read()) == 2 and " of ofa on 8 test images of imagenet" in done.out
    done = call(*words, "--samples", "2", "--image-size", "8")  # the first network of its widths
    assert done.status == 0 and " of compofa-elastic on" in done.out
    done = call(*words, "--arch", "compofa-elastic", "--image-size", "8")
    assert done.status == 1 and done.err.count("\n") == 1


def test_records_carry_the_hash_of_the_weights_that_were_evaluated(
    call, net, tmp_path, monkeypatch
):
    path = tmp_path / "last.pt"
    path.write_bytes(Path(net).read_bytes())
    opened = compofa.cli.evaluate.open_data

    def beside_a_training(*args: object) -> object:
        save_checkpoint(path, load_checkpoint(net).slim())
        return opened(*args)

    monkeypatch.setattr(compofa.cli.evaluate, "open_data", beside_a_training)
    assert call("--net", str(path), "--samples", "1").status == 0
    assert read()[0].checkpoint == file_hash(net) != file_hash(path)


def test_a_name_that_is_not_utf8_is_written_as_an_escape(call, net, tmp_path):
    path = tmp_path / "z\udcff\x1b[31m.pt"
    path.write_bytes(Path(net).read_bytes())
    done = call("--net", str(path), "--samples", "1")
    assert done.status == 0, done.err
    assert read()[0].net == f"{tmp_path}/z\\udcff\x1b[31m.pt"
    done = call("--net", f"{path}x")
    assert done.status == 1 and "z\\udcff\\x1b[31m.ptx" in done.err and "\x1b" not in done.err


def test_without_arguments_it_evaluates_the_network_that_ships(call):
    done = call()
    assert done.status == 0, done.err
    assert len(read()) == 10 and {record.net for record in read()} == {"compofa-digits"}
    assert {record.subnet.resolution for record in read()} == {16}


def test_the_script_on_all_digits(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "eval_sampled_config.py"), "--samples=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]
    records = read(tmp_path / "results.csv")
    assert [record.images for record in records] == [360] and records[0].top1 > 94


# --- bad input ---


def config(depth: int = 2, expand: float = 3, stages: int = 5) -> str:
    blocks = [3, 5, 3, 3, 5][:stages]
    ks = [kernel for kernel in blocks for _ in range(4)]
    return json.dumps({"ks": ks, "e": [expand] * len(ks), "d": [depth] * stages, "r": 8})


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--subnet", config(expand=5)], ["expand", "got 5"]),
        (["--subnet", config(depth=9)], ["stage 1: d: ", "9"]),
        (["--subnet", config(depth=4, expand=6)], ["stage 1 depth", "2 or 3", "4"]),
        (["--subnet", config(expand=4)], ["depth 2", "expected 3, got 4"]),
        (["--subnet", config(stages=4)], ["stages", "expected 5, got 4"]),
        (["--subnet", config()[:-9]], ["--subnet: "]),
        (["--subnet", '{"ks": 3}'], ["e, d"]),
        (["--subnet", "none.json"], ["--subnet: ", "none.json"]),
        (["--subnet", ""], ["--subnet: "]),
        (["--subnet", config().replace('"r": 8', '"r": 4')], ["image size", "4"]),
        (["--subnet", config(), "--all"], ["--all", "--subnet"]),
        (["--image-size", "4"], ["image size", "8 to 2048", "4"]),
        (["--image-size", "0"], ["image size", "8 to 2048", "0"]),
        (["--dataset", "mnist"], ["'mnist'", "fashion-mnist"]),
        (["--dataset", "imagefolder"], ["imagefolder", "data path"]),
        (["--imagenet_path", "none"], ["none "]),
        (["--device", "tpu"], ["cpu, cuda or mps", "'tpu'"]),
        (["--net", "resnet"], ["'resnet'", "compofa-digits"]),
        (["--net", "compofa-small"], ["weights", "compofa-small"]),
        (["--net", "none.pt"], ["none.pt"]),
        (["--net", "."], ["folder"]),
        (
            ["--samples", "0", "--batch-size", "0", "--workers=-1", "--calibration-images", "0"],
            ["--samples: ", "--batch-size", "--workers", "--calib"],
        ),
        (["--samples", "many"], ["--samples: ", "'many'"]),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(call, net, words, expected):
    done = call("--net", net, "--output", "new/results.csv", *words)
    assert done.status in (1, 2)
    assert done.err.count("\n") == 1 and done.err.endswith("\n") and done.out == ""
    assert done.err.startswith("eval_sampled_config.py: error: ")
    for part in expected:
        assert part in done.err
    assert list(Path.cwd().iterdir()) == []


class Runs:
    """Would make a file if it were unpickled without care."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (Path("executed"),)


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "zip", "pickle", "hidden pickle", "text", "other network"]
)
def test_a_checkpoint_that_is_none(call, net, tmp_path, kind):
    path = tmp_path / "bad.pt"
    good = Path(net).read_bytes()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("photo.txt", "not a checkpoint")
    elif kind == "other network":
        torch.save({"state_dict": torch.nn.Linear(3, 4).state_dict()}, path)
    elif kind == "hidden pickle":
        torch.save({"format": "compofa-checkpoint", "weights": Runs()}, path)
    else:
        data = {
            "truncated": good[: len(good) // 2],
            "empty": b"",
            "pickle": pickle.dumps(Runs()),
            "text": b"hello\n",
        }
        path.write_bytes(data[kind])
    done = call("--net", str(path))
    assert done.status == 1 and done.err.count("\n") == 1, done.err
    assert "error: " in done.err and done.out == ""
    assert list(Path.cwd().iterdir()) == [], "nothing written, nothing executed"
    if kind != "other network":
        assert str(path) in done.err


@pytest.mark.parametrize(
    "data",
    [
        {"state_dict": [1, 2]},
        {"state_dict": {}},
        {1: torch.ones(2)},
        {"classifier.linear.bias": torch.tensor(1.0)},
        {"classifier.linear.bias": 3},
        {"format": "other"},
        [torch.ones(2)],
    ],
)
def test_a_mapping_without_weights(call, tmp_path, data):
    torch.save(data, tmp_path / "odd.pt")
    done = call("--net", str(tmp_path / "odd.pt"))
    assert done.status == 1 and done.err.count("\n") == 1
    assert str(tmp_path / "odd.pt") in done.err


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (("ant", "dog", "owl"), ("'ant'", "'cat'")),
        (("cat", "owl"), ("'owl'", "'dog'")),
    ],
)
def test_other_classes(call, tmp_path, classes, expected):
    folder = photos(tmp_path / "photos")
    path = save(tmp_path / "own.pt", classes, dataset="digits")
    done = call("--net", path, "--dataset", "imagefolder", "--data-path", str(folder))
    assert (
        done.status == 1
        and done.err.count("\n") == 1
        and all(part in done.err for part in expected)
    )
    assert list(Path.cwd().iterdir()) == []


def test_classes_without_names_are_as_many(call, tmp_path):
    folder = photos(tmp_path / "photos")
    spec = network_spec("compofa-small", 3, width_mult=0.1)
    checkpoint = Checkpoint(spec, Supernet(spec).state_dict(), image_size=8)
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    words = ["--net", str(tmp_path / "net.pt"), "--dataset", "imagefolder"]
    done = call(*words, "--data-path", str(folder))
    assert done.status == 1 and "3 classes" in done.err and "2" in done.err


def test_an_output_that_cannot_be_written(call, net):
    Path("file").write_text("in the way")
    done = call("--net", net, "--output", "file/results.csv")
    assert done.status == 1 and done.err.count("\n") == 1 and "file" in done.err
    assert Path("file").read_text() == "in the way"


def test_the_data_set_is_not_written_over(call, tmp_path):
    images = tmp_path / "photos.tar"
    with tarfile.open(images, "w") as tar:
        tar.add(photos(tmp_path / "photos"), "photos")
    before = images.read_bytes()
    data = {"dataset": "imagefolder", "data_path": str(images)}
    nets = save(tmp_path / "net.pt"), save(tmp_path / "own.pt", **data)
    for net, words in zip(
        nets, (["--dataset", "imagefolder", "--data-path", images], []), strict=True
    ):
        done = call("--net", net, *map(str, words), "--samples", "1", "--output", str(images))
        assert done.status == 1 and str(images) in done.err
    assert images.read_bytes() == before


def test_a_network_that_answers_nothing_writes_nothing(call, net, tmp_path):
    checkpoint = load_checkpoint(net)
    huge = {name: value * 1e30 for name, value in checkpoint.weights.items()}
    save_checkpoint(tmp_path / "huge.pt", replace(checkpoint, weights={
        name: huge[name] if name.endswith("conv.weight") else value
        for name, value in checkpoint.weights.items()
    }))  # fmt: skip
    done = call("--net", str(tmp_path / "huge.pt"), "--samples", "1")
    assert done.status == 1 and "finite" in done.err and done.err.count("\n") == 1
    assert list(Path.cwd().iterdir()) == []


# --- parts ---


def test_subnets_are_distinct_and_there_are_no_more_than_exist():
    space = network_spec("compofa-small").space
    chosen = choose_subnets(space, 100, seed=0)
    assert len(set(chosen)) == 100 and all(isinstance(subnet, Subnet) for subnet in chosen)
    assert choose_subnets(space, 30, seed=0) == chosen[:30]
    assert choose_subnets(space, 1000, seed=0) == list(space.enumerate())


def test_help_is_quick():
    program = (
        "import sys\nsys.argv = ['eval_sampled_config.py', '--help']\n"
        "from compofa.cli.evaluate import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([m for m in ('torch', 'sklearn', 'tqdm', 'PIL') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.endswith("[]\n") and done.stderr == ""
    assert "--imagenet-path DIR" in done.stdout
    args = parser().parse_args(["--imagenet_path", "a_b", "--batch_size=7"])
    assert args.imagenet_path == "a_b" and args.batch_size == 7
