"""From targets to files: budgets, fronts, tables and reports of a search."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nas.report.figure
from compofa.errors import CompofaError, ConfigError, SearchError, SpaceError, TableError
from compofa.io.untrusted import printable
from compofa.networks.families import subnet_from_config
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.zoo import NETWORKS
from compofa.space.arrays import SubnetArrays
from nas.cost.base import macs_cost, params_cost
from nas.report.data import Measured, count, si
from nas.report.results import INTERVAL, found_columns, report_data, write_outcome
from nas.search.evolution import Evolution
from nas.search.pipeline import (
    Outcome,
    Target,
    accuracy_model,
    named_space,
    network_name,
    require_distinct,
    run_search,
    usual_budgets,
)

RESULTS = ["constraint", "net", "ks", "e", "d", "r", "top1", "latency_ms", "macs", "params"]


class Made:
    """An accuracy and a latency that are easy to work out by hand."""

    name, unit, error = "made up", "ms", "none"
    quantity = "latency"

    def __call__(self, arrays: SubnetArrays) -> np.ndarray:
        return (
            np.asarray(arrays.blocks["kernel"]).sum(axis=1)
            * np.asarray(arrays.resolutions)
            / 1000.0
        )

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        weights = np.linspace(1, 2, arrays.blocks["expand"].shape[1])
        return (
            np.asarray(arrays.blocks["expand"]) @ weights / 10
            + np.asarray(arrays.resolutions) / 16.0
        )

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        return np.ones(len(arrays.resolutions))


def target(name: str = "compofa", **changes: object) -> Target:
    backbone, space, classes = named_space(name, None, (160, 224))
    parts = {"accuracy": Made(), "cost": Made()} | changes
    return Target(name, backbone, classes, space, **parts)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    quick = Evolution(population=20, children=40, generations=5, restarts=1)
    return run_search([target(), target("compofa-elastic")], [9.0, 12.5], evolution=quick)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_search_finds_the_optimum_of_the_enumeration(outcome):
    first = outcome.targets[0]
    arrays = first.space.arrays(first.space.enumerate_genes())
    costs, accuracy = first.cost(arrays), first.accuracy.predict(arrays)
    for found in outcome.found:
        assert found.cost <= found.budget
        assert found.accuracy == accuracy[costs <= found.budget].max()
        assert first.space.contains(found.subnet) and found.exact and not found.slack


def test_fronts_and_clouds_belong_to_their_targets(outcome):
    assert len(outcome.fronts) == len(outcome.clouds) == 2
    for aim, front, cloud in zip(outcome.targets, outcome.fronts, outcome.clouds, strict=True):
        for points in (front, cloud):
            arrays = aim.space.arrays(points.genes)
            np.testing.assert_allclose(points.accuracy, aim.accuracy.predict(arrays))
            np.testing.assert_allclose(points.costs[:, 0], aim.cost(arrays))
        assert (np.diff(front.costs[:, 0]) > 0).all() and (np.diff(front.accuracy) > 0).all()
        assert len(cloud.accuracy) == 2000


def test_the_found_subnets_stand_on_the_front_of_a_sampled_space():
    quick = Evolution(population=10, children=20, generations=2, restarts=1)
    result = run_search([target("compofa-elastic")], [9.0, 12.5, 14.0], evolution=quick)
    front = result.fronts[0]
    for found in result.found:
        assert not found.exact
        no_dearer = front.costs[:, 0] <= found.cost
        assert front.accuracy[no_dearer].max() >= found.accuracy


def test_tables_hold_what_was_found(outcome, tmp_path):
    paths = write_outcome(outcome, tmp_path / "new" / "folder", pictures=False)
    assert [path.name for path in paths] == [
        "results.csv", "pareto.csv", "subnet_9.json", "subnet_12.5.json", "report.html",
    ]  # fmt: skip
    rows = rows_of(paths[0])
    assert list(rows[0]) == [*RESULTS, *INTERVAL]
    assert [row["constraint"] for row in rows] == ["9.0", "12.5"]
    first = outcome.targets[0]
    for row, found, path in zip(rows, outcome.found, paths[2:4], strict=True):
        arrays = first.space.arrays_of([found.subnet])
        assert row["macs"] == str(int(macs_cost(MOBILENET_V3)(arrays)[0]))
        assert row["params"] == str(int(params_cost(MOBILENET_V3)(arrays)[0]))
        assert float(row["latency_ms"]) == pytest.approx(found.cost, abs=1e-4)
        assert float(row["top1"]) == pytest.approx(found.accuracy, abs=1e-4)
        config = json.loads(path.read_text())
        assert subnet_from_config(config) == found.subnet
        assert row["ks"] == " ".join(map(str, config["ks"])) and row["r"] == str(config["r"])


NAMES = [
    "$a$",
    "a_$\\frac",
    "_x",
    "a\nb\t",
    "\x1b[31mred\x07",
    "z\udcff",
    "名前",
    "n" * 240,
    "a\u202eb",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_search_is_written_whatever_the_network_is_called(outcome, tmp_path, name):
    called = network_name(f"{name}.pt")
    first = replace(outcome.targets[0], name=called)
    paths = write_outcome(replace(outcome, targets=(first, outcome.targets[1])), tmp_path)
    assert [path.name for path in paths[-2:]] == ["pareto.png", "pareto.svg"]
    assert {row["net"] for row in rows_of(paths[0])} == {called}
    texts = re.findall("<!-- (.*?) -->", paths[-1].read_text("utf-8"))
    shown = printable(name)
    if len(shown) < 30:
        assert {f"{shown}: front", f"{shown}: best within budget", f"{shown} on made up"} <= set(
            texts
        )
    assert max(map(len, (text for text in texts if "front" in text))) <= 40
    assert ascii(shown)[1:-1] in ascii(paths[-3].read_text("utf-8"))


def test_what_a_picture_lacks_is_said_and_the_rest_is_written(
    outcome, tmp_path, monkeypatch, caplog
):
    whole = write_outcome(outcome, tmp_path)

    def fails(*args: object) -> None:
        raise ValueError("no\nfont")

    monkeypatch.setattr(nas.report.figure, "write_plot", fails)
    paths = write_outcome(outcome, tmp_path)
    assert paths == whole[:-2] and set(tmp_path.iterdir()) == set(paths), "no other search's"
    assert len(caplog.messages) == 1 and "no font" in caplog.messages[0]


def test_the_subnets_of_an_earlier_search_go(outcome, tmp_path):
    other = replace(outcome, found=(replace(outcome.found[0], budget=10.25), outcome.found[1]))
    (tmp_path / "subnet_7.json").write_text("my own")
    (tmp_path / "results.csv").write_text("constraint\nnone\n")
    for each in (other, outcome):
        paths = write_outcome(each, tmp_path, pictures=False)
        assert set(tmp_path.iterdir()) == {*paths, tmp_path / "subnet_7.json"}


def test_both_fronts_are_in_one_table(outcome, tmp_path):
    rows = rows_of(write_outcome(outcome, tmp_path, pictures=False)[1])
    assert list(rows[0]) == RESULTS[1:]
    for aim, front in zip(outcome.targets, outcome.fronts, strict=True):
        own = [row for row in rows if row["net"] == aim.name]
        assert len(own) == len(front.accuracy) > 3
        np.testing.assert_allclose(
            [float(row["latency_ms"]) for row in own], front.costs[:, 0], atol=1e-4
        )


def test_a_cost_that_is_no_latency_has_a_column_of_its_own(tmp_path):
    counted = target(cost=macs_cost(MOBILENET_V3))
    result = run_search([counted], [150_000_001, 150_000_002], seed=3)
    paths = write_outcome(result, tmp_path, pictures=False)
    for path in paths[:2]:
        assert all("latency_ms" not in row and row["macs"] for row in rows_of(path))
    names = [path.name for path in paths[2:-1]]
    assert names == ["subnet_150000001.json", "subnet_150000002.json"], "a file each"


def test_measured_columns_stand_behind_the_others(outcome, tmp_path):
    measured = Outcome(
        outcome.targets,
        outcome.found,
        outcome.fronts,
        outcome.clouds,
        measured={"measured_top1": [61.5, 62], "measured_top1_se": [0.5, 0.25], "energy": [3, 4]},
    )
    assert list(found_columns(measured))[-3:] == ["measured_top1", "measured_top1_se", "energy"]
    rows = rows_of(write_outcome(measured, tmp_path, pictures=False)[0])
    assert list(rows[0])[len(RESULTS) + 2 :] == ["measured_top1", "measured_top1_se", "energy"]
    assert [row["measured_top1"] for row in rows] == ["61.5", "62"]
    shown = report_data(measured).found[1]
    assert shown.measured == Measured(62, 0.25) and shown.extra["Energy"] == "4"
    assert "standard error" in report_data(measured).caption


def test_intervals_are_in_the_table_the_band_and_the_caption(outcome, tmp_path):
    rows = rows_of(write_outcome(outcome, tmp_path, pictures=False)[0])
    data = report_data(outcome)
    for row, shown in zip(rows, data.found, strict=True):
        low, top1, high = (float(row[name]) for name in ("top1_low", "top1", "top1_high"))
        assert (top1 - low, high - top1) == pytest.approx((1.645, 1.645), abs=1e-3)
        assert shown.interval == (low, high) and shown.measured is None
    for series in data.series:
        low, high = series.front_band
        np.testing.assert_allclose(series.front_accuracies - low, 1.645)
        np.testing.assert_allclose(high - series.front_accuracies, 1.645)
    assert "90 %" in data.caption and "standard error" not in data.caption


def test_an_uncertain_comparison_says_so_in_the_caption():
    wide = target(accuracy=accuracy_model("compofa", 1.2))
    own = replace(target(accuracy=accuracy_model("compofa", 1.0)), name="own")
    quick = Evolution(population=10, children=20, generations=2, restarts=1)
    data = report_data(run_search([own, wide], [12.5], evolution=quick))
    assert "own: held-out" in data.caption and "± 1.5 points" in data.caption
    widths = [np.ptp(series.front_band, axis=0).max() for series in data.series]
    assert widths[0] < 3 and 1.645 * 2 * 1.5 < widths[1] < 8


def test_a_front_that_is_not_to_be_shown_is_in_no_picture(outcome, tmp_path):
    first, other = outcome.targets
    hidden = replace(outcome, targets=(first, replace(other, no_front="none", notes=("mind",))))
    paths = write_outcome(hidden, tmp_path)
    assert {row["net"] for row in rows_of(paths[1])} == {first.name}
    data = report_data(hidden)
    assert data.notes == ("Mind.",) and data.series[1].no_front == "none"
    assert not len(data.series[1].front_costs) and len(data.series[1].costs) == 2000
    assert "compofa-elastic: no front" in paths[-1].read_text("utf-8")


def test_counts_are_named_and_have_prefixes():
    counted = target(cost=macs_cost(MOBILENET_V3))
    data = report_data(run_search([counted], [150_000_000]))
    assert data.cost_label == "Multiply-accumulates (MACs)"
    assert data.title == "compofa: top-1 against multiply-accumulates"
    assert [si(value) for value in (0.16, 42, 9990, 2e6, 1.0762e6, 999_999, 3e9, 0)] == [
        "0.16", "42", "9,990", "2M", "1.08M", "1M", "3G", "0",
    ]  # fmt: skip
    assert [count(number) for number in (1215, 218 * 10**17)] == ["1,215", "2.18·10^19"]


def test_the_report_says_what_figures_are_worth(outcome):
    data = report_data(outcome)
    assert [series.name for series in data.series] == ["compofa", "compofa-elastic"]
    assert data.cost_unit == "ms" and "made up" in data.cost_name
    assert len(data.sources) == 2 and "486 subnets" in data.sources[0]
    assert set(data.found[0].extra) == {"MACs", "Parameters"}


def test_the_same_seed_writes_the_same_files(tmp_path):
    quick = Evolution(population=10, children=20, generations=3, restarts=1)
    texts = []
    for seed in (5, 5, 6):
        result = run_search([target("compofa-elastic")], [9.0], seed=seed, evolution=quick)
        paths = write_outcome(result, tmp_path / str(len(texts)), pictures=False)
        texts.append([path.read_bytes() for path in paths])
    assert texts[0] == texts[1] != texts[2]


def test_an_output_that_cannot_be_written(outcome, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CompofaError, match="file/folder"):
        write_outcome(outcome, tmp_path / "file" / "folder")


def test_usual_budgets_spread_over_the_costs():
    budgets = usual_budgets(target())
    arrays = target().space.arrays(target().space.enumerate_genes())
    costs = Made()(arrays)
    assert len(budgets) == 4 and budgets == sorted(budgets)
    assert costs.min() <= budgets[0] and budgets[-1] < costs.max()
    assert all(float(f"{budget:.1e}") == budget for budget in budgets)


def test_usual_budgets_can_be_met_where_all_costs_are_nearly_equal():
    class Flat(Made):
        def __call__(self, arrays: SubnetArrays) -> np.ndarray:
            return 10.2 + Made()(arrays) * 1e-4

    flat = target(cost=Flat())
    assert 10.0 not in usual_budgets(flat), "the two digits of them all, and below them all"
    assert run_search([flat], usual_budgets(flat)).found


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_by_name(name):
    backbone, space, classes = named_space(name, None, (160, 224))
    assert space.name == name and space.resolutions == (160, 224) and classes == 1000
    assert backbone.width_mult == NETWORKS[name].width_mult
    assert named_space(name, 0.5)[0].width_mult == 0.5


def test_unknown_networks_and_impossible_resolutions():
    with pytest.raises(ConfigError, match=r"'nosuch'.* compofa, compofa-elastic"):
        named_space("nosuch", None)
    with pytest.raises(SpaceError, match=r"32 to 2048.* 16"):
        named_space("compofa", None, (160, 16))


def test_a_network_is_not_compared_with_itself():
    require_distinct(["a", "b"])
    with pytest.raises(SearchError, match="a, b, a"):
        require_distinct(["a", "b", "a"])


@pytest.mark.parametrize("width", [0.3, 0.79, 1.3, 8.0])
@pytest.mark.parametrize("net", ["compofa", "ofa_mbv3_d234_e346_k357_w1.2"])
def test_widths_far_from_those_that_were_measured_are_refused(net, width):
    with pytest.raises(TableError, match=rf"0\.8 to 1\.25.* {width:g}"):
        accuracy_model(net, width)


def test_the_measured_width_is_certain_whatever_the_network_usually_has():
    named, own = (
        accuracy_model("ofa_mbv3_d234_e346_k357_w1.2", width).extra_std for width in (None, 1.0)
    )
    assert named == 1.5 and own == 0


def test_a_file_knows_the_width_that_it_was_measured_on(tmp_path):
    model = accuracy_model("compofa")
    for width in (0.1, None):
        model.card["width_mult"] = width
        model.save(tmp_path / "own.npz")
        assert accuracy_model(tmp_path / "own.npz", 0.1).extra_std == 0
    model.card["width_mult"] = 0.1
    model.save(tmp_path / "own.npz")
    with pytest.raises(TableError, match=r"\bown\b.* 0\.1\b"):
        accuracy_model(tmp_path / "own.npz", 1.0)


def test_another_width_makes_accuracy_uncertain():
    arrays = target().space.arrays(target().space.enumerate_genes())
    own = accuracy_model("compofa", 1.0)
    wider = accuracy_model("compofa", 1.2)
    assert "width" in wider.error and "width" not in own.error
    assert (wider.predict(arrays) == own.predict(arrays)).all()
    assert wider.std(arrays).min() > 1.4 > own.std(arrays).max()


def test_the_published_predictor_is_turned_into_percent(reference_data):
    model = accuracy_model(reference_data / "predictors" / "acc_predictor.pth")
    arrays = target().space.arrays(target().space.enumerate_genes()[:50])
    assert model.unit == "top-1 %" and model.error
    assert 60 < model.predict(arrays).min() < model.predict(arrays).max() < 95
    assert (model.std(arrays) == 6).all()
    accuracy_model(reference_data / "predictors" / "acc_predictor.pth", 1.2)
    with pytest.raises(TableError, match=r"\b1 or 1\.2\b.* 0\.3"):
        accuracy_model(reference_data / "predictors" / "acc_predictor.pth", 0.3)


def test_a_predictor_that_is_none(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"something else")
    with pytest.raises(TableError, match=r"a\.npz"):
        accuracy_model(tmp_path / "a.npz")
