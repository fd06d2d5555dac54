"""What was once right stays so: losses, genes, and the files that earlier versions wrote."""

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.make import HERE, RESUMABLE, curves, genes, machine, predictions

from compofa.cli import evaluate
from compofa.io.export import load_exported
from compofa.io.open import open_network
from compofa.io.records import read_records
from compofa.io.tensors import checksum
from compofa.networks.families import subnet_from_config
from compofa.networks.zoo import NETWORKS
from compofa.training.config import TrainConfig
from compofa.training.run import train
from nas.cli import search
from nas.cost.devices import load_cost
from nas.cost.timing import Samples
from nas.search import pipeline
from nas.tables import read_subnets

FIRST = HERE / "v0.1"
EXPECTED = json.loads((FIRST / "expected.json").read_text())


def unpacked(name: str, folder: Path) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.decompress((FIRST / f"{name}.xz").read_bytes()))
    return path


def test_losses_of_every_task_are_those_of_before(few_digits: None, tmp_path: Path) -> None:
    golden = json.loads((HERE / "losses.json").read_text())
    found = curves(tmp_path)
    assert found.keys() == golden["curves"].keys()
    same = golden["machine"] == machine()  # elsewhere sums are taken in another order
    for name, losses in golden["curves"].items():
        assert found[name] == (losses if same else pytest.approx(losses, rel=0.02)), name


@pytest.mark.parametrize("network", NETWORKS)
def test_seeds_draw_the_genes_of_before(network: str) -> None:
    assert genes(network) == json.loads((HERE / "genes.json").read_text())[network]


@pytest.mark.parametrize("name", EXPECTED["weights"])
def test_checkpoints_of_the_first_version_are_read(name: str, tmp_path: Path) -> None:
    checkpoint = open_network(unpacked(name, tmp_path)).checkpoint
    assert checksum(dict(checkpoint.weights)) == EXPECTED["weights"][name]
    assert checkpoint.classes == tuple("0123456789")
    assert checkpoint.dataset == "digits"
    with torch.inference_mode():
        net, images = checkpoint.build(), torch.zeros(1, 3, 16, 16)
        subnet = (checkpoint.network.space.largest,) if checkpoint.network.elastic else ()
        assert net(images, *subnet).shape == (1, 10)


def test_a_specialised_network_of_the_first_version_is_read(tmp_path: Path) -> None:
    folder = shutil.copytree(FIRST / "specialised", tmp_path / "specialised")
    unpacked("specialised/init", tmp_path)
    assert checksum(dict(open_network(folder).checkpoint.weights)) == checksum(
        dict(open_network(unpacked("finetuned.pt", tmp_path)).checkpoint.weights)
    )


def test_an_exported_network_of_the_first_version_is_read(tmp_path: Path) -> None:
    single = open_network(unpacked("finetuned.pt", tmp_path)).network
    shutil.copy(FIRST / "exported.st.json", tmp_path)
    exported = load_exported(unpacked("exported.st", tmp_path))
    images = torch.ones(2, 3, 12, 12)
    with torch.inference_mode():
        assert torch.equal(exported(images), single(images))


def test_a_run_of_the_first_version_continues(few_digits: None, tmp_path: Path) -> None:
    folder = tmp_path / "supernet-1"
    unpacked("resumable.pt", folder).rename(folder / "last.pt")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(FIRST / name, folder)
    train(TrainConfig(**RESUMABLE), tmp_path, resume=True, bar=False)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert lines[0] == json.loads((FIRST / "metrics.jsonl").read_text())


@pytest.mark.parametrize(("name", "count"), [("supernet", 40), ("resnet50", 3), ("proxyless", 3)])
def test_records_of_the_first_version_are_read(name: str, count: int) -> None:
    records = read_records(FIRST / f"{name}.jsonl")
    assert len(records) == count
    written = [json.loads(line) for line in (FIRST / f"{name}.jsonl").read_text().splitlines()]
    assert [record.to_json() for record in records] == written


def test_models_of_the_first_version_predict_the_same() -> None:
    found = predictions(FIRST)
    assert found.keys() == EXPECTED["predictions"].keys()
    for name, values in EXPECTED["predictions"].items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


def test_tables_of_the_first_version_are_read(tmp_path: Path) -> None:
    backbone, space, classes = pipeline.named_space("compofa-small", None, (32,))
    shutil.copy(FIRST / "32_lookup_table.yaml", tmp_path)
    cost = load_cost("mine", backbone, classes, table=tmp_path, space=space)
    assert np.all(cost(space.arrays(space.sample_genes(np.random.default_rng(0), 5))) > 0)
    for name in ("results.csv", "evaluated.csv"):
        assert len(read_subnets(FIRST / name, ["top1"])[1]["top1"]) >= 3
    subnet = subnet_from_config(json.loads((FIRST / "subnet_20.json").read_text()))
    assert subnet.resolution == 192
    identity = json.loads((FIRST / "timings.jsonl").read_text().splitlines()[0])
    folder = tmp_path / "cache"
    path = Samples(folder, identity).path
    shutil.copy(FIRST / "timings.jsonl", path)
    assert len(Samples(folder, identity).values) > 20


def rows(text: str) -> list[list[str]]:
    """Return the rows of a printed table."""
    return [line.split() for line in text.splitlines() if line.lstrip()[:1].isdigit()]


def test_a_search_finds_and_prints_the_same(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert search.main(["--target-hardware", "note10", "--compare", "none"]) == 0
    assert rows(capsys.readouterr().out)[:4] == rows(EXPECTED["printed"]["search"])[:4]


def test_an_evaluation_measures_and_prints_the_same(
    few_digits: None, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    unpacked("supernet.pt", tmp_path)
    argv = ["--net", "supernet.pt", "--samples", "3", "--calibration-images", "30", "--quiet"]
    assert evaluate.main(argv) == 0
    found, wanted = (rows(text) for text in (capsys.readouterr().out, EXPECTED["printed"]["eval"]))
    counts = [[row[:-2] for row in table[:3]] for table in (found, wanted)]
    assert counts[0] == counts[1]
