"""Named costs: an objective and a device from outside, limits, several objectives, columns."""

import csv
from pathlib import Path

import numpy as np
import pytest

from compofa.errors import ConfigError, SearchError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from nas.accuracy.predictor import load_accuracy_model
from nas.cli.search import main
from nas.cli.tools import main as tools
from nas.cost.base import macs_cost
from nas.cost.devices import DEVICES, LocalDevice, Networks, Objective, load_cost, register
from nas.cost.objectives import LimitedCost, column_names
from nas.search import pipeline
from nas.search.evolution import Evolution
from nas.search.pareto import non_dominated
from nas.search.search import search
from nas.tables import read_subnets

SPACE = MOBILENET_V3.compound_space(resolutions=(160, 192, 224))
OF_SPACE = Networks(space=SPACE)
ALL = SPACE.arrays(SPACE.enumerate_genes())
PICOJOULES = {"stem": 4.0, "mbconv": 2.5}


def energy_mj(layers: tuple[LayerSpec, ...]) -> float:
    """Energy of an image: picojoules per multiply-accumulate by kind of layer, from a table."""
    return 1e-9 * sum(PICOJOULES.get(layer.kind, 3.0) * layer.macs for layer in layers)


@pytest.fixture
def energy():
    register(Objective("energy", "mJ", "energy of an image", "a table", function=energy_mj))
    yield "energy"
    del DEVICES["energy"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_function_of_layers_is_an_objective_of_the_search_command(energy, tmp_path):
    argv = ["--target-hardware", energy, "--constraints", "0.5", "0.7", "--compare", "none",
            "--output", str(tmp_path), "--quiet"]  # fmt: skip
    assert main(argv) == 0
    rows = rows_of(tmp_path / "results.csv")
    assert list(rows[0])[-6:] == ["top1", "energy_mj", "macs", "params", "top1_low", "top1_high"]
    arrays, _ = read_subnets(tmp_path / "results.csv")
    for row, subnet in zip(rows, SPACE.subnets_of(arrays), strict=True):
        budget = float(row["constraint"])
        spent = energy_mj(layout(MOBILENET_V3, subnet))
        assert float(row["energy_mj"]) == pytest.approx(spent, abs=1e-4)
        assert 0.8 * budget < spent <= budget
    assert {"energy_mj", "top1"} <= rows_of(tmp_path / "pareto.csv")[0].keys()


def test_a_name_is_registered_once(energy):
    with pytest.raises(ConfigError, match="energy"):
        register(LocalDevice("energy"))


def test_layers_one_by_one_and_together_give_the_same_sum(energy):
    together = load_cost(energy, space=SPACE)
    per_layer = Objective(
        "energy", "mJ", function=lambda layer: energy_mj((layer,)), per_layer=True
    )  # fmt: skip
    DEVICES["energy"] = per_layer
    np.testing.assert_allclose(together(ALL), load_cost(energy)(ALL), rtol=1e-9)
    assert together.unit == "mJ" and together.name == "energy"


def test_an_objective_goes_by_its_own_name_everywhere(energy, tmp_path, capsys):
    argv = ["--target-hardware", energy, "--compare", "none", "--output", str(tmp_path / "s")]
    assert main([*argv, "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "energy mJ" in printed and "cost energy: exact" in printed
    texts = [p.read_text() for p in (tmp_path / "s").iterdir() if p.suffix != ".png"]
    assert len(texts) > 5 and not any("latency" in text.lower() for text in [printed, *texts])
    argv = ["--input", str(tmp_path / "s" / "pareto.csv"), "--output", str(tmp_path / "p.csv")]
    assert tools(["predict", *argv, "--columns", energy]) == 0
    _, columns = read_subnets(tmp_path / "p.csv", ["energy", "energy_mj"])
    np.testing.assert_allclose(columns["energy"], columns["energy_mj"], atol=1e-4)


def test_a_count_of_ones_own_has_a_column_of_its_own():
    costs = [macs_cost(MOBILENET_V3), Objective("dense", "MACs", function=len).cost(OF_SPACE)]
    assert column_names(costs[1:]) == ["dense_macs"]
    assert column_names(costs) == ["macs", "dense_macs"]


def test_columns_are_named_after_units_and_devices(energy):
    costs = [load_cost(name, space=SPACE) for name in ("note10", "v100", "flops", energy)]
    assert column_names(costs) == ["latency_ms", "v100_b64_ms", "macs", "energy_mj"]
    with pytest.raises(ConfigError, match="flops, flops"):
        column_names([macs_cost(MOBILENET_V3)] * 2)


def test_limits_hold_beside_the_budget(energy):
    latency, spent = load_cost("note10"), load_cost(energy, space=SPACE)
    macs = macs_cost(MOBILENET_V3)
    accuracy = load_accuracy_model("compofa")
    of = pipeline.Target("compofa", MOBILENET_V3, 1000, SPACE, accuracy, latency)
    limits = [(macs, 2e8), (spent, 0.5)]
    found = pipeline.run_search([of], [15.0, 1e9], limits=limits).found
    within = (macs(ALL) <= 2e8) & (spent(ALL) <= 0.5)
    assert 0 < within.sum() < len(within)
    for result in found:
        best = accuracy.predict(ALL)[within & (latency(ALL) <= result.budget)].max()
        assert result.accuracy == pytest.approx(best, abs=1e-6)
        assert result.cost == pytest.approx(latency(SPACE.arrays_of([result.subnet]))[0])
    with pytest.raises(SearchError, match="flops, the least"):
        pipeline.run_search([of], [15.0], limits=[(macs, 1.0)])


def test_limits_hold_in_an_evolution():
    latency, macs = load_cost("note10"), macs_cost(MOBILENET_V3)
    accuracy = load_accuracy_model("compofa")
    limited = LimitedCost(latency, [(macs, 2e8)], ceiling=1e3)
    few = Evolution(population=10, children=40, generations=8, restarts=1)
    (exact,) = search(SPACE, accuracy, limited, [30.0])
    (evolved,) = search(SPACE, accuracy, limited, [30.0], evolution=few, enumerate_up_to=1)
    assert macs(SPACE.arrays_of([evolved.subnet]))[0] <= 2e8
    assert exact.accuracy - 0.3 < evolved.accuracy <= exact.accuracy + 1e-6


def test_limits_and_objectives_of_the_command(energy, tmp_path, capsys):
    argv = ["--output", str(tmp_path), "--compare", "none", "--constraints", "20",
            "--resolutions", "160", "192", "--quiet"]  # fmt: skip
    more = ["--limit", "flops", "1.7e8", "--limit", "v100", "100", "--objectives", energy, "flops"]
    assert main([*argv, *more]) == 0
    (row,) = rows_of(tmp_path / "results.csv")
    assert int(row["macs"]) <= 1.7e8 and float(row["v100_b64_ms"]) <= 100
    rows = rows_of(tmp_path / "objectives.csv")
    columns = ("latency_ms", "energy_mj", "macs")
    points = np.array([[-float(row["top1"]), *(float(row[c]) for c in columns)] for row in rows])
    assert len(points) > 10
    assert len(non_dominated(points.round(2))) > 0.5 * len(points)  # columns are rounded
    assert main(argv) == 0
    assert not (tmp_path / "objectives.csv").exists(), "a new search replaces what is there"
    capsys.readouterr()
    for options, key in (
        (["--limit", "flops", "many"], "many"),
        (["--limit", "flops", "1"], "flops"),
        (["--limit", "note10", "20"], "note10"),
        (["--objectives", "nosuch"], "nosuch"),
    ):
        assert main([*argv, *options]) == 1
        assert key in capsys.readouterr().err


def test_every_cost_takes_no_subnets_at_all(energy):
    none = ALL[:0]
    for name in (energy, "flops", "note10"):
        assert load_cost(name, space=SPACE)(none).shape == (0,)
