"""What a search leaves in its folder: subnets that say what they are, whose results, the zoo."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calls import Outcome, called

import compofa.io.hub
import nas.report.figure
from compofa import __version__
from compofa.cli import tools as compofa_tools
from compofa.errors import ConfigError
from compofa.io.hub import published_path
from compofa.networks.layout import macs
from compofa.networks.published import SPECIALISED, specialised, zoo_devices
from nas.cli import search
from nas.cost.devices import load_cost
from nas.search import pipeline
from nas.search.folder import PREDICTOR, RECORDS, claim_folder
from nas.search.specialised import published_cost

NOTE10 = {"net": "compofa", "device": "note10"}
ALONE = ["--compare", "none"]


@pytest.fixture
def call(capsys, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """The search command in an empty folder, without pictures."""
    monkeypatch.setattr(nas.report.figure, "write_plot", lambda data, *paths: None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    return lambda *argv: called(search.main, ["--output", "out", *ALONE, *argv], capsys)


def rows_of(path: Path | str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


# --- found subnets ---


def test_a_found_subnet_says_what_it_is(call, capsys):
    assert call("--constraints", "20", "--limit", "macs=300M").status == 0
    (row,) = rows_of("out/results.csv")
    found = json.loads(Path("out/subnet_20.json").read_text())
    assert {"net", "device", "budget", "unit", "version"} <= found.keys()
    assert (found["net"], found["device"], found["budget"]) == ("compofa", "note10", 20.0)
    assert found["version"] == __version__ and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    backbone, space, _ = pipeline.named_space("compofa", None)
    model, cost = pipeline.accuracy_model("compofa"), load_cost("note10", backbone)
    arrays = space.arrays_of([space.from_config(found)])
    top1, std = model.predict(arrays)[0], model.std(arrays)[0]
    assert found["top1"]["predicted"] == pytest.approx(top1, abs=1e-4)
    low, high = found["top1"]["interval_90"]
    assert (low, high) == pytest.approx((top1 - 1.645 * std, top1 + 1.645 * std), abs=0.006)
    assert found["costs"]["latency_ms"] == {
        "value": float(row["latency_ms"]), "unit": "ms", "device": "note10", "error": cost.error,
        "limit": 20.0,
    }  # fmt: skip
    assert found["costs"]["macs"]["limit"] == 3e8
    assert found["costs"]["macs"]["value"] == int(row["macs"])
    argv = ["convert", "out/subnet_20.json", "plain.json", "--to", "compofa"]
    assert called(compofa_tools.main, argv, capsys).status == 0
    assert list(json.loads(Path("plain.json").read_text())) == ["ks", "e", "d", "r"]


# --- whose results they are ---


def test_the_same_search_is_repeated_and_another_is_refused(call, tmp_path):
    assert call("--constraints", "20", "25").status == 0
    assert call("--constraints", "25").status == 0
    names = {path.name for path in Path("out").glob("subnet_*")}
    assert names == {"subnet_25.json"}, "those of before are gone"
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    for other, message in (
        (["--target-hardware", "v100"], "compofa on note10"),
        (["--net", "compofa-elastic"], "compofa-elastic"),
    ):
        refused = call("--constraints", "25", *other)
        assert refused.status == 1 and message in refused.err and "--overwrite" in refused.err
        assert len(refused.err.splitlines()) == 1
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before
    Path("out/own.txt").write_text("mine")
    Path("out", RECORDS).write_text("")
    assert call("--target-hardware", "v100", "--constraints", "30", "--overwrite").status == 0
    names = {path.name for path in Path("out").iterdir()}
    assert "own.txt" in names and RECORDS not in names
    assert {name for name in names if name.startswith("subnet_")} == {"subnet_30.json"}


def test_a_checkpoint_trained_again_is_another_search(tmp_path):
    (tmp_path / "results.csv").write_text("constraint,net\n2.0,mine\n")
    data = {"net": "mine", "checkpoint": "ab12", "device": "cpu"}
    (tmp_path / "subnet_2.json").write_text(json.dumps(data))
    claim_folder(tmp_path, data)
    with pytest.raises(ConfigError, match=r"ab12.* cd34"):
        claim_folder(tmp_path, {**data, "checkpoint": "cd34"})
    (tmp_path / PREDICTOR).write_text("")
    claim_folder(tmp_path, {**data, "checkpoint": "cd34"}, overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_results_of_earlier_versions_are_known_by_their_network(tmp_path):
    (tmp_path / "results.csv").write_text("constraint,net\n20.0,compofa\n")
    (tmp_path / "subnet_20.json").write_text('{"ks": [], "e": [], "d": [], "r": 160}')
    claim_folder(tmp_path, NOTE10)
    with pytest.raises(ConfigError, match="another search, compofa:"):
        claim_folder(tmp_path, {**NOTE10, "net": "ofa-small"})


@pytest.mark.parametrize("text", ["", "constraint\n1\n", "constraint,net\n", "a,b\n1,2\n"])
def test_a_folder_without_readable_results_is_free(tmp_path, text):
    (tmp_path / "results.csv").write_text(text)
    claim_folder(tmp_path, NOTE10)
    claim_folder(tmp_path / "nosuch", NOTE10)


# --- the zoo ---


def test_devices_of_the_zoo():
    found = zoo_devices()
    assert sum(map(len, found.values())) == 58 - 3 - 8, "all but those by multiply-accumulates"
    assert {"note10", "tx2", "pixel1", "pixel2", "s7edge", "note8", "LG-G8", "1080ti"} <= set(found)
    v100 = specialised("v100_gpu64@11ms_top1@76.1_finetune@25")
    assert (v100.device, v100.batch, v100.value) == ("v100", 64, 11.0)
    assert v100.target == "11 ms on v100, batch 64"
    assert published_cost(v100, load_cost("v100")) == 11.0
    assert published_cost(v100, load_cost("v100-b1")) is None, "another batch size"
    assert published_cost(v100, load_cost("note10")) is None
    assert specialised("resnet50D_MAC@4.1B_top1@79.8").value == 4.1e9


def test_specialised_networks_within_the_budgets_are_shown(call):
    result = call("--constraints", "11", "20", "--limit", "params=6M")
    assert result.status == 0, result.err
    rows = {row["id"]: row for row in rows_of("out/specialised.csv")}
    latency = load_cost("note10")
    for net_id, row in rows.items():
        entry = specialised(net_id)
        assert float(row["latency_ms"]) <= 20 and int(row["params"]) <= 6e6
        assert int(row["macs"]) == macs(entry.network.layers)
        if entry.device == "note10":
            assert (row["source"], float(row["latency_ms"])) == ("published", entry.value)
        elif entry.supernet == "w1.0":
            space = entry.backbone.free_space((entry.resolution,))
            predicted = latency(space.arrays_of([entry.subnet]))[0]
            assert row["source"] == "predicted"
            assert float(row["latency_ms"]) == pytest.approx(predicted, abs=1e-4)
    assert any(row["source"] == "predicted" for row in rows.values())
    costs = [float(row["latency_ms"]) for row in rows.values()]
    assert costs == sorted(costs)
    best = max((row for row in rows.values() if float(row["latency_ms"]) <= 11),
               key=lambda row: float(row["top1"]))  # fmt: skip
    assert best["id"] in result.out and "--task finetune --init-path" in result.out
    assert "eval_sampled_config.py --net" in result.out


def test_weights_that_are_there_are_said_to_be(call, tmp_path):
    net_id = "note10_lat@11ms_top1@73.6_finetune@25"
    path = published_path(f"ofa_specialized/{specialised(net_id).folder}/init")
    assert path.is_relative_to(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    assert call("--constraints", "11").status == 0
    weights = {row["id"]: row["weights"] for row in rows_of("out/specialised.csv")}
    assert weights.pop(net_id) == "downloaded" and set(weights.values()) == {"download"}


def test_counts_include_every_family(call):
    assert call("--target-hardware", "macs", "--constraints", "1G").status == 0
    rows = {row["id"]: row for row in rows_of("out/specialised.csv")}
    assert len(rows) == 52, "50 with a definition, and two ResNet50D by their published numbers"
    assert {row["source"] for row in rows.values()} == {"counted", "published"}
    assert int(rows["resnet50D_MAC@0.9B_top1@76.3_finetune@25"]["macs"]) == 900_000_000
    assert all(
        int(row["macs"]) == macs(SPECIALISED[net_id.replace("@", "-")].network.layers)
        for net_id, row in rows.items()
        if row["source"] == "counted"
    )


def test_a_search_without_them_leaves_no_table_of_before(call):
    assert call("--constraints", "20").status == 0
    assert Path("out/specialised.csv").exists()
    assert call("--constraints", "20", "--limit", "params=3.43M").status == 0
    assert not Path("out/specialised.csv").exists()


def test_the_hub_folder_is_that_of_torch(monkeypatch, tmp_path):
    import torch

    for variables in ({"TORCH_HOME": "~/t"}, {"XDG_CACHE_HOME": str(tmp_path)}, {}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        wanted = Path(torch.hub.get_dir())
        with monkeypatch.context() as patch:
            patch.delitem(compofa.io.hub.sys.modules, "torch")
            assert compofa.io.hub._hub_folder() == wanted


def test_the_interval_stays_within_a_percentage(call):
    assert call("--constraints", "20").status == 0
    low, high = json.loads(Path("out/subnet_20.json").read_text())["top1"]["interval_90"]
    assert 0 <= low < high <= 100 and np.isfinite([low, high]).all()
