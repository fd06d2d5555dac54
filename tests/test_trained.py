"""A checkpoint searched end to end: records, predictor, search and the winners measured."""

import csv
import functools
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from few import inverted

import nas.cost.measured
from compofa.cli.evaluate import main as evaluate
from compofa.errors import ConfigError, DataError
from compofa.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compofa.io.open import open_network
from compofa.io.records import read_records
from compofa.networks.families import subnet_from_config
from compofa.networks.zoo import network_spec
from compofa.nn.supernet import Supernet
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig
from compofa.training.run import train
from nas.accuracy.predictor import load_accuracy_model
from nas.cli.search import main
from nas.cost.timing import Settings
from nas.search import from_checkpoint
from nas.search.from_checkpoint import Clipped, Trained, fit_records, search_resolutions
from nas.search.pipeline import network_name

CLASSES = tuple("0123456789")


def tiny_checkpoint(path: Path, seed: int = 0) -> Path:
    """Write the checkpoint of an untrained supernet with 32 subnets."""
    pairs = ((2, 3), (3, 4))
    spec = network_spec("compofa-small", 10, coupling=pairs, width_mult=0.1, resolutions=(8,))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = Supernet(spec).state_dict()
    mean, std = (0.305,) * 3, (0.376,) * 3
    save_checkpoint(
        path, Checkpoint(spec, weights, CLASSES, mean, std, dataset="digits", image_size=8)
    )
    return path


@pytest.fixture(scope="module", autouse=True)
def quick(few_digits, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Few digits, short timing, and a cache of timings that is kept apart."""
    brief = functools.partial(Settings, rounds=1, visit_ms=0.01, networks=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nas.cost.measured, "Settings", brief)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    logging.captureWarnings(False)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("net") / "tiny.pt")


class Search(NamedTuple):
    folder: Path
    out: str

    def rows(self, name: str = "results.csv") -> list[dict[str, str]]:
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))


def options(net: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--net", str(net), "--output", str(folder), "--quiet", "--device", "cpu",
        "--resolutions", "8", "--samples", "24", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def searched(net: Path, tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A search on this machine's CPU."""
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        patch.setattr("builtins.print", lambda *words: written.append(" ".join(map(str, words))))
        more = ["--target-hardware", "cpu", "--compare", "free"]
        assert main(options(net, folder, *more)) == 0
    return Search(folder, "\n".join(written))


def test_everything_is_written(searched):
    names = {path.name for path in searched.folder.iterdir()}
    fixed = {
        "results.csv", "pareto.csv", "pareto.png", "pareto.svg", "report.html", "records.jsonl",
        "predictor.npz", "predictor.json",
    }  # fmt: skip
    rows = searched.rows()
    assert names == fixed | {f"subnet_{float(row['constraint']):.12g}.json" for row in rows}
    assert list(rows[0])[-8:] == [
        "top1_low", "top1_high", "validation_top1", "validation_top1_se", "measured_top1",
        "measured_top1_se", "measured_latency_ms", "above_budget_ms",
    ]  # fmt: skip
    for row in rows:
        assert 0 <= float(row["top1_low"]) < float(row["top1"]) < float(row["top1_high"]) < 100
    assert {row["net"] for row in rows} == {"tiny"}
    assert {row["net"] for row in searched.rows("pareto.csv")} == {"tiny"}
    report = (searched.folder / "report.html").read_text("utf-8")
    assert '"tiny-free"' in report and "not trained on this space" in report
    assert "validation images" in report, "few of them: a warning"
    assert "measured top1" in searched.out and "latency" in searched.out


def found_subnet(search: Search, row: dict[str, str]) -> Subnet:
    path = search.folder / f"subnet_{float(row['constraint']):.12g}.json"
    return subnet_from_config(json.loads(path.read_text()))


def test_every_found_subnet_meets_its_budget_and_is_in_the_space(searched, net):
    space = load_checkpoint(net).network.space
    rows = searched.rows()
    for row in rows:
        assert float(row["latency_ms"]) <= float(row["constraint"]) + 1e-4
        assert space.contains(found_subnet(searched, row))
        assert float(row["measured_latency_ms"]) > 0
    top1 = [float(row["validation_top1"]) for row in rows]
    assert top1 == sorted(top1), "a larger budget is not worse"


def test_measured_accuracy_is_what_the_evaluation_says(searched, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = searched.rows()[0]
    path = searched.folder / f"subnet_{float(row['constraint']):.12g}.json"
    assert evaluate(["--net", str(net), "--subnet", str(path), "--quiet", "--device", "cpu"]) == 0
    with Path("results.csv").open(newline="") as file:
        (own,) = csv.DictReader(file)
    assert float(own["top1"]) == float(row["measured_top1"])
    assert (own["macs"], own["params"]) == (row["macs"], row["params"])
    assert (own["d"], own["r"]) == (row["d"], row["r"])


def test_records_come_from_both_spaces(searched, net):
    records = read_records(searched.folder / "records.jsonl")
    space = load_checkpoint(net).network.space
    rows = searched.rows()
    assert 24 <= len(records) <= 24 + 3 * len(rows), "samples, then candidates"
    inside = sum(space.contains(record.subnet) for record in records[:24])
    assert inside >= 12 and 24 - inside >= 8
    assert all(space.contains(record.subnet) for record in records[24:])
    known = {record.subnet: record.top1 for record in records}
    for row in rows:
        assert known[found_subnet(searched, row)] == float(row["validation_top1"])
    assert {record.part for record in records} == {"validation"}


def test_the_predictor_can_be_used_again(searched, net, tmp_path):
    more = ["--accuracy-predictor", str(searched.folder / "predictor.npz"), "--compare", "none"]
    assert main(options(net, tmp_path, "--target-hardware", "flops", *more)) == 0
    assert len(read_records(tmp_path / "records.jsonl")) <= 3 * 4, "candidates alone"
    again = Search(tmp_path, "")
    rows = again.rows()
    assert all("latency_ms" not in row for row in rows)
    assert list(rows[0])[-1] == "measured_top1_se", "there is no latency to measure"
    assert {row["net"] for row in again.rows("pareto.csv")} == {"tiny"}

    space = load_checkpoint(net).network.space
    arrays = space.arrays(space.enumerate_genes())
    model = load_accuracy_model(searched.folder / "predictor.npz")
    assert model.width_mult == 0.1
    predicted = model.predict(arrays)
    assert float(rows[-1]["top1"]) <= predicted.max() + 1e-3


def test_a_search_without_verification_trusts_the_predictor(searched, net, tmp_path):
    more = ["--accuracy-predictor", str(searched.folder / "predictor.npz"), "--verify", "0"]
    assert main(options(net, tmp_path, "--target-hardware", "flops", *more)) == 0
    rows = Search(tmp_path, "").rows()
    assert "validation_top1" not in rows[0] and float(rows[0]["measured_top1"]) >= 0
    assert not (tmp_path / "records.jsonl").exists()


def test_the_same_seed_finds_the_same(net, tmp_path):
    tables = []
    for name in ("one", "two"):
        folder = tmp_path / name
        more = ["--target-hardware", "params", "--seed", "3", "--compare", "none"]
        assert main(options(net, folder, *more)) == 0
        names = ("results.csv", "pareto.csv", "records.jsonl", "report.html")
        tables.append([(folder / file).read_bytes() for file in names])
    assert tables[0] == tables[1]


def test_what_is_searched_is_printed_once(searched, net, tmp_path, capsys):
    predictor = ["--accuracy-predictor", str(searched.folder / "predictor.npz"), "--verify", "0"]
    for target, title in (("flops", "MACs"), ("params", "parameters")):
        argv = options(net, tmp_path / target, "--target-hardware", target, *predictor)
        assert main(argv) == 0
        heading, row, *_ = capsys.readouterr().out.splitlines()
        assert heading.split().count(title) == 1 and ("params" in heading) == (target == "flops")
        assert heading.index("subnet") == row.index("d ")


def test_a_predictor_decides_the_default_resolutions(searched, net, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    predictor = ["--accuracy-predictor", str(searched.folder / "predictor.npz"), "--verify", "0"]
    argv = options(net, tmp_path, "--target-hardware", "flops", *predictor)
    place = argv.index("--resolutions")
    save_checkpoint(tmp_path / "two.pt", replace(load_checkpoint(net), resolutions=(8, 12)))
    argv[argv.index(str(net))] = str(tmp_path / "two.pt")
    assert main(argv[:place] + argv[place + 2 :]) == 0
    assert "resolutions 8, which flops and the accuracy predictor serve" in caplog.text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-hardware", "nosuch"], "'nosuch'"),
        (["--target-hardware", "note10"], "mobilenet_v3"),
        (["--target-hardware", "flops", "--samples", "8"], "20"),
        (["--target-hardware", "flops", "--samples", "0"], "20"),
        (["--target-hardware", "flops", "--samples", "-9"], "20"),
        (["--target-hardware", "flops", "--compare", "compofa"], "free or none"),
        (["--target-hardware", "flops", "--verify", "-1"], "--verify"),
        (["--target-hardware", "flops", "--width-mult", "1"], "--width-mult"),
        (["--target-hardware", "flops", "--device", "tpu"], "tpu"),
        (["--target-hardware", "flops", "--resolutions", "4"], "image size"),
        (["--target-hardware", "flops", "--accuracy-predictor", "nosuch.npz"], "nosuch.npz"),
        (["--target-hardware", "flops", "--accuracy-predictor", "compofa"], "0.1"),
        (["--target-hardware", "flops", "--batch-size", "7"], "batch size"),
        (["--target-hardware", "flops", "--constraints", "7ms"], "--constraints"),
        (["--target-hardware", "flops", "--limit", "params=7ms"], "--limit params"),
        (["--target-hardware", "flops", "--limit", "memori=7"], "did you mean memory"),
        (["--target-hardware", "flops", "--constraints", "7", "6"], '"d":[2,2,2,2,2]'),
        (["--target-hardware", "flops", "--limit", "params=7"], "params, the least"),
        (["--target-hardware", "flops", "--limit", "macs=7"], " 7 MACs on flops"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(net, tmp_path, capsys, more, message):
    assert main(options(net, tmp_path, *more)) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "a.pt").write_text("hello")
    for name, message in (("a.pt", "a.pt"), ("b.pt", "b.pt")):
        argv = options(tmp_path / name, tmp_path / "out", "--target-hardware", "flops")
        assert main(argv) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/digits/best.pt", "digits"),
        ("runs/digits/last.pt", "digits"),
        ("runs/digits-compofa-small/compound-2/best.pt", "digits-compofa-small"),
        ("runs/mine/teacher/last.pt", "mine"),
        ("compound-1/best.pt", "compound-1"),
        ("checkpoints/tiny.pt", "tiny"),
        ("best.pt", "best"),
        ("compofa-digits", "compofa-digits"),
    ],
)
def test_names_of_checkpoints(path, name):
    assert network_name(path) == name


def test_predictions_stay_below_100_percent():
    class Proud:
        name, unit, error = "proud", "top-1 %", "by far"

        def predict(self, arrays: SubnetArrays) -> np.ndarray:
            return np.array([99.0, 101.5])

        def std(self, arrays: SubnetArrays) -> np.ndarray:
            return np.array([1.0, 2.0])

    clipped, nothing = Clipped(Proud()), inverted(*(np.zeros((0, 5)),) * 3, np.zeros(0))
    assert clipped.predict(nothing).tolist() == [99, 100]
    assert clipped.std(nothing).tolist() == [1, 2]
    assert (clipped.name, clipped.error) == ("proud", "by far")


def test_resolutions_are_those_asked_for_or_those_of_training(net):
    checkpoint = load_checkpoint(net)
    assert search_resolutions(checkpoint, (8, 24)) == (8, 24)
    assert search_resolutions(checkpoint, None) == (8,), "its own size, as it says no more"
    assert search_resolutions(replace(checkpoint, image_size=16), None) == (8, 12, 16)
    own = replace(checkpoint, dataset="imagefolder", image_size=24, resolutions=(16, 24))
    assert search_resolutions(own, None) == (16, 24), "those of training, not the data set's"
    many = replace(own, resolutions=tuple(range(8, 80, 4)))
    assert search_resolutions(many, None) == (8, 24, 40, 60, 76)
    published = replace(own, resolutions=tuple(range(128, 225, 4)))
    assert search_resolutions(published, None) == (160, 176, 192, 208, 224)
    with pytest.raises(ConfigError, match="--resolutions"):
        search_resolutions(replace(checkpoint, dataset=""), None)


def test_a_run_stores_the_resolutions_that_it_trains_at(tmp_path):
    config = TrainConfig(
        task="teacher", width_mult=0.1, epochs=1, batch_size=90, image_size=(8, 12),
        calibration_images=8, device="cpu", threads=1,
    )  # fmt: skip
    checkpoint = load_checkpoint(train(config, tmp_path, bar=False).best)
    assert checkpoint.resolutions == search_resolutions(checkpoint, None) == (8, 12)
    assert checkpoint.image_size == 12


def test_a_trained_again_checkpoint_is_not_mixed_with_the_search_before(
    searched, net, tmp_path, capsys
):
    folder = tmp_path / "again"
    shutil.copytree(searched.folder, folder)
    other = tmp_path / "tiny.pt"
    save_checkpoint(other, replace(load_checkpoint(net), figures={"epoch": 2}))
    before = (folder / "records.jsonl").read_bytes()
    assert main(options(other, folder, "--target-hardware", "cpu", "--compare", "none")) == 1
    err = capsys.readouterr().err.splitlines()
    assert "--overwrite" in err[-1] and load_checkpoint(other).digest in err[-1]
    assert (folder / "records.jsonl").read_bytes() == before
    more = ["--target-hardware", "flops", "--compare", "none", "--overwrite"]
    assert main(options(other, folder, *more)) == 0
    digests = {record.checkpoint for record in read_records(folder / "records.jsonl")}
    assert digests == {load_checkpoint(other).digest}


def test_the_found_subnets_say_what_was_measured(searched, net):
    for row in searched.rows():
        path = searched.folder / f"subnet_{float(row['constraint']):.12g}.json"
        found = json.loads(path.read_text())
        assert found["checkpoint"] == load_checkpoint(net).digest and found["device"] == "cpu"
        assert found["measured_top1"] == float(row["measured_top1"])
        assert "from end-to-end latency" in found["costs"]["latency_ms"]["error"]


def test_the_free_space_undoes_the_coupling(net):
    trained = Trained("mine", open_network(net), (8, 12))
    own, free = trained.space, trained.free_space
    assert (own.size, own.name, own.resolutions) == (2 * 2**5, "mine", (8, 12))
    assert free.name == "mine-free" and free.size == 2 * (2**2 + 2**3) ** 5
    assert all(free.contains(subnet) for subnet in own.enumerate())
    checkpoint = trained.opened.checkpoint
    checkpoint = replace(checkpoint, network=replace(checkpoint.network, space=free))
    alone = replace(trained, opened=replace(trained.opened, checkpoint=checkpoint))
    assert alone.free_space is None


def test_few_records_are_not_fitted(searched, net):
    records = read_records(searched.folder / "records.jsonl")[:24]
    space = Trained("mine", open_network(net), (8,)).free_space
    with pytest.raises(DataError, match="20"):
        fit_records(records[:19], space, "mine")
    model = fit_records(records, space, "mine")
    assert "24 records of mine" in model.card["source"]
    low, high = model.interval(space.arrays_of([records[0].subnet]))
    assert 0 < low < model.predict(space.arrays_of([records[0].subnet])) < high < 100
    assert model.arrays["images"] == records[0].images, "so that nothing reaches 100 %"


def test_samples_are_as_many_as_asked_for_whatever_the_spaces_share() -> None:
    space = network_spec("compofa-small", 10, resolutions=(16,)).space
    for count in (20, 25, 80):
        drawn = from_checkpoint._drawn([space, space.free()], count, 0)
        assert len(drawn) == len(set(drawn)) == count
    longer = from_checkpoint._drawn([space, space.free()], 80, 0)
    assert longer[:25] == from_checkpoint._drawn([space, space.free()], 25, 0)
    assert len(from_checkpoint._drawn([space], 1000, 0)) == space.size
