"""Several costs at once: peak memory, an own column, limits by name, tables of a search."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calls import Outcome, called

import nas.report.figure
from compofa.networks.families import backbone
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.layout import layout
from nas.cli import search, tools
from nas.cost.base import macs_cost
from nas.cost.devices import load_cost
from nas.cost.memory import peak_elements
from nas.cost.objectives import column_names, cost_label
from nas.search import pipeline
from nas.tables import read_subnets, write_subnets

OFA = "ofa_mbv3_d234_e346_k357_w1.0"
QUICK = ["--constraints", "20", "--resolutions", "160", "192", "--quiet"]


@pytest.fixture
def call(capsys, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """The search command in an empty folder, without pictures."""
    monkeypatch.setattr(nas.report.figure, "write_plot", lambda data, *paths: None)
    monkeypatch.chdir(tmp_path)
    return lambda *argv: called(search.main, ["--output", "out", *argv], capsys)


def rows_of(path: Path | str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


# --- peak memory ---


@pytest.mark.parametrize("name", ["compofa_elastic", "ofa_mbv3_w1.0"])
def test_published_peaks_are_reproduced(reference_data, name):
    path = reference_data / "memory" / f"peak_elements_{name}.csv.gz"
    arrays, columns = read_subnets(path, ["peak_elements"])
    assert len(arrays) > 1000
    assert (load_cost("peak_memory_int8")(arrays) == columns["peak_elements"]).all()
    assert (load_cost("peak_memory")(arrays) == 4 * columns["peak_elements"]).all()


@pytest.mark.parametrize("name", ["mobilenet_v3", "proxyless", "resnet50d"])
def test_the_peak_is_that_of_the_greatest_layer(name):
    table = backbone(name)
    space = table.free_space((128, 160))
    arrays = space.arrays(space.sample_genes(np.random.default_rng(1), 60))
    by_layer = [
        max(peak_elements(layer) for layer in layout(table, subnet))
        for subnet in space.subnets_of(arrays)
    ]
    cost = load_cost("memory_int8", table)
    assert cost(arrays).tolist() == by_layer and cost.unit == "bytes"
    assert len(set(by_layer)) > 1


def test_a_peak_by_hand():
    layers = {each.name: each for each in layout(MOBILENET_V3, MOBILENET_V3.free_space().largest)}
    stem = 224**2 * 3 + 112**2 * 16 + 16 * 3 * 3 * 3
    assert peak_elements(layers["stem"]) == stem
    block = layers["stages.0.1"]  # 24 channels at 56 px, expanded to 144, residual, kernel 7
    depthwise = 2 * 56**2 * 144 + 144 * 49 + 56**2 * 24
    assert block.residual and peak_elements(block) == depthwise
    assert [peak_elements(layers[name]) for name in ("pool", "mix", "classifier")] == [0, 0, 0]


# --- limits ---


def test_limits_by_quantity_prefix_and_unit_hold(call):
    more = ["--limit", "latency=20ms", "--limit", "params=6.3M", "macs=160M", "--limit",
            "memory=2MB", "--resolutions", "160", "192"]  # fmt: skip
    result = call("--compare", "none", *more)
    assert result.status == 0, result.err
    (row,) = rows_of("out/results.csv")
    assert float(row["constraint"]) == 20.0
    space = pipeline.named_space("compofa", None, (160, 192))[1]
    every = space.arrays(space.enumerate_genes())
    costs = {name: load_cost(name)(every) for name in ("note10", "params", "macs", "memory")}
    bounds = {"note10": 20, "params": 6.3e6, "macs": 160e6, "memory": 2e6}
    within = np.all([costs[name] <= most for name, most in bounds.items()], axis=0)
    top1 = pipeline.accuracy_model("compofa").predict(every)
    assert float(row["top1"]) == pytest.approx(top1[within].max(), abs=1e-4)
    for name in ("params", "macs", "memory"):
        others = [costs[each] <= most for each, most in bounds.items() if each != name]
        assert top1[within].max() < top1[np.all(others, axis=0)].max(), f"{name} is binding"
    assert int(row["peak_memory_bytes"]) <= 2e6 and "." not in row["peak_memory_bytes"]
    assert "peak memory bytes" in result.out and "cost peak_memory: exact" in result.out
    report = Path("out/report.html").read_text()
    assert "Peak memory in float32 (MB)" in report and "at most 2,000,000 bytes" in report


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--limit", "memory=3MX"], "--limit memory: "),
        (["--limit", "macs"], "--limit macs: "),
        (["--limit", "macs=x"], "--limit macs: "),
        (["--limit", "v1000=3"], "did you mean v100"),
        (["--limit", "energy:v100=3"], "latency:v100"),
        (["--limit", "latency=25", "--constraints", "20"], "20 and 25"),
        (["--target-hardware", "flops", "--limit", "latency=25"], "note10=20"),
        (["--constraints", "20MB"], "20MB"),
        (["--limit", "macs=3M"], "flops, the least"),
        (["--target-hardware", "pixel1"], "7 specialised networks"),
        (["--target-hardware", "pixel1"], "--like pixel1"),
        (["--target-hardware", "pixle1"], "did you mean pixel1"),
        (["--target-hardware", "lg-g8"], "nas sample"),
        (["--net", "compfa"], "did you mean compofa"),
        (["--compare", "compfa"], "did you mean compofa"),
        (["--net", "compofa-medium"], "checkpoint"),
        (["--net", "ofa_resnet50", "--target-hardware", "flops"], "fit-accuracy"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, argv, message):
    result = call("--compare", "none", *argv)
    assert result.status == 1 and message in result.err and len(result.err.splitlines()) == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("main", "argv", "hint"),
    [
        (search.main, ["--constrains", "20"], "--constraints"),
        (tools.main, ["mesure"], "measure"),
        (tools.main, ["devices", "--columms", "top1"], "--columns"),
    ],
)
def test_misspelt_options_and_commands_are_suggested(main, argv, hint, capsys):
    result = called(main, argv, capsys)
    assert result.status == 2 and f"did you mean {hint}" in result.err
    assert len(result.err.splitlines()) == 1


# --- an own column ---


def test_a_fitted_energy_keeps_its_name_and_unit_everywhere(call, capsys):
    space = pipeline.named_space("compofa", None, (160, 192))[1]
    arrays = space.arrays(space.sample_genes(np.random.default_rng(0), 90))
    energy = 3e-9 * macs_cost(MOBILENET_V3)(arrays) + 0.2
    write_subnets("measured.csv", arrays, MOBILENET_V3.config_format, {"energy_mj": energy})
    fit = ["fit-latency", "--input", "measured.csv", "--column", "energy_mj", "--name", "phone"]
    assert "energy in mJ" in called(tools.main, [*fit, "--output", "phone.npz"], capsys).out
    cost = load_cost("phone.npz")
    assert (cost.name, cost.quantity, cost.unit) == ("phone", "energy", "mJ")
    assert column_names([load_cost("note10"), cost]) == ["latency_ms", "energy_mj"]
    assert cost_label(cost) == "Energy on phone"

    target = ["--target-hardware", "phone.npz", "--compare", "none", "--resolutions", "160"]
    result = call(*target, "--limit", "energy=0.6mJ", "--limit", "note10=30")
    assert result.status == 0, result.err
    (row,) = rows_of("out/results.csv")
    assert float(row["energy_mj"]) <= 0.6 == float(row["constraint"])
    assert float(row["latency_ms"]) <= 30, "the one latency there is"
    assert "energy_mj" in rows_of("out/pareto.csv")[0] and "energy mJ" in result.out
    found = json.loads(Path("out/subnet_0.6.json").read_text())
    assert (found["device"], found["unit"]) == ("phone", "mJ")
    assert found["costs"]["energy_mj"]["error"] == cost.error
    assert "Energy on phone (mJ)" in Path("out/report.html").read_text()

    limit = call("--limit", "phone.npz=0.6", "--objectives", "memory", *QUICK, "--overwrite")
    assert limit.status == 0, limit.err
    assert float(rows_of("out/results.csv")[0]["energy_mj"]) <= 0.6
    assert "peak_memory_bytes" in rows_of("out/objectives.csv")[0]

    predict = ["predict", "--input", "out/results.csv", "--output", "p.csv", "--columns"]
    good = called(tools.main, [*predict, "energy:phone.npz"], capsys)
    assert good.status == 0, good.err
    (row,) = rows_of("p.csv")
    assert float(row["energy:phone.npz"]) == pytest.approx(float(row["energy_mj"]), abs=1e-4)
    wrong = called(tools.main, [*predict, "latency:phone.npz"], capsys)
    assert wrong.status == 1 and "energy:phone.npz" in wrong.err


# --- tables as a search wrote them ---


def test_the_fronts_of_a_search_are_predicted_each_as_its_own_network(call, capsys):
    assert call(*QUICK).status == 0
    before = rows_of("out/pareto.csv")
    assert {row["net"] for row in before} == {"compofa", OFA}
    argv = ["predict", "--input", "out/pareto.csv", "--columns", "top1,macs,memory,latency:note10"]
    for net in ([], ["--net", "compofa"], ["--net", OFA]):
        result = called(tools.main, [*argv, *net, "--output", "p.csv"], capsys)
        assert result.status == 0, result.err
        after = rows_of("p.csv")
        assert list(after[0])[: len(before[0])] == list(before[0]), "all columns are kept"
        for old, new in zip(before, after, strict=True):
            assert float(new["top1"]) == pytest.approx(float(old["top1"]), abs=1e-4)
            assert float(new["latency:note10"]) == pytest.approx(float(old["latency_ms"]), abs=1e-4)
            assert new["macs"] == old["macs"] and int(new["memory"]) > 1e6
    other = called(tools.main, [*argv, "--net", "compofa-elastic", "--output", "q.csv"], capsys)
    assert other.status == 1 and "compofa-elastic" in other.err and not Path("q.csv").exists()
    text = Path("out/pareto.csv").read_text().replace(OFA, "mine")
    Path("mine.csv").write_text(text)
    argv[2] = "mine.csv"
    unknown = called(tools.main, [*argv, "--output", "q.csv"], capsys)
    assert unknown.status == 1 and "'mine'" in unknown.err and "--net" in unknown.err
