"""``run_NAS.py`` on named networks: options, files, errors."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import nas.report.figure
from compofa.cli.networks import read_subnet
from compofa.networks.families import subnet_from_config
from compofa.networks.zoo import NETWORKS
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.cli.search import COMPARED, main
from nas.cost.devices import DEVICES, load_cost
from nas.cost.lookup import layer_key
from nas.cost.measured import space_layers
from nas.report import results
from nas.search import pipeline

OFA, WIDE = "ofa_mbv3_d234_e346_k357_w1.0", "ofa_mbv3_d234_e346_k357_w1.2"
RESULTS = ["constraint", "net", "ks", "e", "d", "r", "top1", "latency_ms", "macs", "params"]
ALONE = ["--compare", "none"]


class Search(NamedTuple):
    status: int | str | None
    folder: Path
    out: str
    err: str

    def rows(self, name: str = "results.csv") -> list[dict[str, str]]:
        with (self.folder / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def call(capsys, tmp_path, monkeypatch) -> Callable[..., Search]:
    """The command in an empty folder, without pictures, as a function."""
    monkeypatch.setattr(nas.report.figure, "write_plot", lambda data, *paths: None)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, folder: str = "out") -> Search:
        try:
            status = main(["--output", folder, "--overwrite", *argv])
        except SystemExit as end:
            status = end.code
        return Search(status, tmp_path / folder, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """The command without any option but where to write."""
    folder = tmp_path_factory.mktemp("usual") / "runs"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        status = main(["--output", str(folder)])
    return Search(status, folder, "\n".join(lines), "")


def subnet(row: dict[str, str]) -> Subnet:
    config: dict[str, object] = {
        key: [int(value) for value in row[key].split(" ")] for key in ("ks", "e", "d")
    }
    return subnet_from_config({**config, "r": int(row["r"])})


def space_of(net: str) -> SearchSpace:
    return pipeline.named_space(net, None)[1]


def test_files_and_columns(usual):
    assert usual.status == 0
    budgets = [15, 20, 25, 30]
    assert {path.name for path in usual.folder.iterdir()} == {
        "results.csv", "pareto.csv", "pareto.png", "pareto.svg", "report.html", "specialised.csv",
        *(f"subnet_{budget}.json" for budget in budgets),
    }  # fmt: skip
    rows = usual.rows()
    assert list(rows[0]) == [*RESULTS, *results.INTERVAL]
    assert list(usual.rows("pareto.csv")[0]) == RESULTS[1:]
    assert [float(row["constraint"]) for row in rows] == budgets
    for row in rows:
        assert [len(row[key].split(" ")) for key in ("ks", "e", "d")] == [20, 20, 5]
        depths = [int(depth) for depth in row["d"].split()]
        for key in ("ks", "e"):
            active = [value != "0" for value in row[key].split()]
            assert active == [place < depth for depth in depths for place in range(4)]
    assert (usual.folder / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_the_optimum_of_the_enumeration_is_found_for_every_budget(usual):
    backbone, space, classes = pipeline.named_space("compofa", None)
    arrays = space.arrays(space.enumerate_genes())
    latency = load_cost("note10", backbone, classes)(arrays)
    top1 = pipeline.accuracy_model("compofa").predict(arrays)
    for row in usual.rows():
        inside = latency <= float(row["constraint"])
        best = np.flatnonzero(inside)[top1[inside].argmax()]
        assert subnet(row) == space.decode(space.enumerate_genes()[best])
        assert float(row["top1"]) == pytest.approx(top1[best], abs=1e-4)
        assert float(row["latency_ms"]) == pytest.approx(latency[best], abs=1e-4)


def test_each_subnet_file_is_taken_by_the_evaluation(usual):
    for row in usual.rows():
        path = usual.folder / f"subnet_{float(row['constraint']):.12g}.json"
        config = json.loads(path.read_text())
        assert list(config)[:4] == ["ks", "e", "d", "r"]
        read = read_subnet(str(path), space_of("compofa").restrict(resolutions=(224,)), 224)
        assert read == subnet_from_config(config) == subnet(row)


def test_both_fronts_are_fronts_of_their_spaces(usual):
    rows = usual.rows("pareto.csv")
    assert list(dict.fromkeys(row["net"] for row in rows)) == ["compofa", OFA]
    for net in ("compofa", OFA):
        own = [row for row in rows if row["net"] == net]
        space = space_of(net)
        subnets = [subnet(row) for row in own]
        assert all(space.contains(each) for each in subnets) and len(set(subnets)) == len(own) > 9
        arrays = space.arrays_of(subnets)
        latency = load_cost("note10")(arrays)
        top1 = pipeline.accuracy_model(net).predict(arrays)
        np.testing.assert_allclose([float(row["latency_ms"]) for row in own], latency, atol=1e-4)
        np.testing.assert_allclose([float(row["top1"]) for row in own], top1, atol=1e-4)
        assert (np.diff(latency) > 0).all() and (np.diff(top1) > 0).all()
    everything = space_of("compofa").arrays(space_of("compofa").enumerate_genes())
    latency = load_cost("note10")(everything)
    top1 = pipeline.accuracy_model("compofa").predict(everything)
    for row in rows:
        if row["net"] == "compofa":
            better = (latency < float(row["latency_ms"]) - 1e-4) & (
                top1 > float(row["top1"]) - 1e-4
            )
            assert not better.any()


def test_what_was_found_is_on_the_front(usual):
    rows = usual.rows("pareto.csv")
    for found in usual.rows():
        best = max(
            float(row["top1"])
            for row in rows
            if row["net"] == "compofa" and float(row["latency_ms"]) <= float(found["constraint"])
        )
        assert best == float(found["top1"])


def test_what_is_printed_says_how_wrong_it_is(usual):
    for text in ("1,215 subnets", "MAPE", "MAE", "138,212,704"):
        assert text in usual.out
    assert usual.out.count("budget") == 1, "in the heading: every budget is binding"


@pytest.mark.parametrize("net", ["compofa-elastic", OFA])
def test_evolution_meets_budgets_and_repeats_itself(call, net):
    argv = ["--net", net, *ALONE, "--constraints", "25", "18.5", "--target-hardware", "note10"]
    runs = [call(*argv, "--seed", "7", folder=name) for name in ("a", "b")]
    rows = runs[0].rows()
    assert [row["constraint"] for row in rows] == ["25.0", "18.5"], "in the order asked for"
    for row in rows:
        assert float(row["latency_ms"]) <= float(row["constraint"])
        assert space_of(net).contains(subnet(row))
    for path in sorted(runs[0].folder.iterdir()):
        assert path.read_bytes() == (runs[1].folder / path.name).read_bytes(), path.name
    assert "evolution" in runs[0].out


def test_default_budgets(call):
    rows = call(*ALONE, "--target-hardware", "v100").rows()
    assert len(rows) == 4 and len({row["ks"] + row["e"] + row["r"] for row in rows}) == 4
    wide = call("--net", WIDE, *ALONE, "--resolutions", "224")
    assert wide.status == 0, "15 ms cannot be met there, and nobody asked for it"
    assert all(float(row["constraint"]) > 17 for row in wide.rows())


def test_a_count_has_its_own_column_and_no_latency(call):
    for device, column in (("flops", "macs"), ("params", "params")):
        search = call(*ALONE, "--target-hardware", device)
        assert search.status == 0
        for row in search.rows():
            assert "latency_ms" not in row and float(row[column]) <= float(row["constraint"])
        assert all(column in row for row in search.rows("pareto.csv"))
    search = call(*ALONE, "--target-hardware", "flops", "--constraints", "150000001", "2e8")
    assert (search.folder / "subnet_150000001.json").exists()


def test_resolutions_with_commas_blanks_and_underscores(call):
    search = call(*ALONE, "--resolutions", "176,192", "176", "--target_hardware", "note10")
    assert {row["r"] for row in search.rows("pareto.csv")} == {"176", "192"}
    assert "486 subnets" in search.out


def test_comparisons(call):
    alone = call(*ALONE)
    assert {row["net"] for row in alone.rows("pareto.csv")} == {"compofa"}
    several = call("--compare", "compofa-elastic", OFA, "--constraints", "20")
    nets = [row["net"] for row in several.rows("pareto.csv")]
    assert list(dict.fromkeys(nets)) == ["compofa", "compofa-elastic", OFA]
    assert all(name in NETWORKS for name in COMPARED)


def test_the_folder_has_a_name_of_its_own(call, tmp_path):
    assert main([*ALONE, "--constraints", "20"]) == 0
    assert (tmp_path / "runs" / "search-compofa-note10" / "results.csv").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--net", "nosuch"], "compofa, compofa-elastic"),
        (["--net", "runs/nosuch.pt"], "runs/nosuch.pt"),
        (["--target-hardware", "nosuch"], ", ".join(DEVICES)),
        (["--compare", "nosuch"], ", ".join(NETWORKS)),
        (["--compare", "compofa"], "compofa, compofa"),
        (["--compare", OFA, OFA], f"{OFA}, {OFA}"),
        ([*ALONE, "--constraints", "4", "3"], "3, 4 ms on note10"),
        ([*ALONE, "--constraints", "3"], '{"ks":[3,3,0,0,5,5,0,0,3,3,0,0,3,3,0,0,5,5,0,0],"e":'),
        (["--net", OFA, *ALONE, "--constraints", "3"], '"d":[2,2,2,2,2],"r":160}'),
        ([*ALONE, "--resolutions", "226"], "128 to 224"),
        ([*ALONE, "--resolutions", "8"], "32 to 2048"),
        ([*ALONE, "--width-mult", "0"], "width multiplier"),
        ([*ALONE, "--width-mult", "1.2", "--target-hardware", "v100"], "1.0"),
        ([*ALONE, "--width-mult", "0.3"], "0.8 to 1.25"),
        ([*ALONE, "--width-mult", "8", "--target-hardware", "flops"], "0.8 to 1.25"),
        ([*ALONE, "--batch-size", "7"], "batch size"),
        ([*ALONE, "--latency-table", "nosuch"], "nosuch"),
        ([*ALONE, "--accuracy-predictor", "nosuch.pth"], "nosuch.pth"),
        (["--net", "compofa-small", *ALONE], "compofa-small"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(call, argv, message):
    search = call(*argv)
    assert search.status == 1
    assert message in search.err and len(search.err.splitlines()) == 1
    assert search.err.startswith("run_NAS.py: error: ") and search.out == ""
    assert not search.folder.exists()


@pytest.mark.parametrize("argv", [["--constraints", "x"], ["--resolutions", "1,a"], ["--seeds"]])
def test_words_that_are_no_options(call, argv):
    search = call(*argv)
    assert search.status == 2 and len(search.err.splitlines()) == 1


@pytest.mark.parametrize("net", ["compofa", "compofa-elastic"])
def test_budgets_out_of_reach_do_not_end_the_others(call, caplog, net):
    search = call("--net", net, *ALONE, "--constraints", "20", "3", "25", "5", "-1", folder="some")
    assert search.status == 0
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert net in warning.message and "-1, 3, 5 ms" in warning.message
    alone = call("--net", net, *ALONE, "--constraints", "20", "25", folder="alone")
    assert search.rows() == alone.rows()
    names = {path.name for path in search.folder.glob("subnet_*")}
    assert names == {"subnet_20.json", "subnet_25.json"}


def test_the_least_that_is_named_can_be_met(call):
    for net in ("compofa", "compofa-elastic"):
        words = call("--net", net, *ALONE, "--constraints", "2").err.split()
        least = words[words.index("least") + 1]
        assert call("--net", net, *ALONE, "--constraints", least).status == 0


def test_a_budget_that_all_meet_is_said_to_decide_nothing(call):
    search = call(*ALONE, "--constraints", "20", "500")
    assert search.out.count("budget") == 2, "the heading, and what is said of the second"
    arrays = space_of("compofa").arrays(space_of("compofa").enumerate_genes())
    best = pipeline.accuracy_model("compofa").predict(arrays).max()
    assert float(search.rows()[1]["top1"]) == pytest.approx(best, abs=1e-4)


def test_an_output_that_cannot_be_written_is_found_first(call, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipeline, "run_search", None)
    search = call("--net", "nosuch", folder="file/out")
    assert search.status == 1 and "file/out" in search.err


def test_a_folder_of_tables_is_searched(call, tmp_path):
    backbone, space, classes = pipeline.named_space("compofa", None, (160, 192))
    for resolution, layers in space_layers(backbone, space, classes).items():
        entries = [f"{layer_key(layer)}:\n  mean: {layer.macs / 1e7:.9f}\n" for layer in layers]
        path = tmp_path / "tables" / f"{resolution}_lookup_table.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(entries))
    sizes = ["--resolutions", "160,192", "--constraints", "14", "18"]
    searches = [
        call(*ALONE, *sizes, "--latency-table", "tables", folder="a"),
        call(*ALONE, *sizes, "--target-hardware", "tables", folder="b"),
    ]
    for search in searches:
        for row in search.rows():
            assert float(row["latency_ms"]) == pytest.approx(int(row["macs"]) / 1e7, abs=1e-4)
    assert "cost tables: " in searches[1].out
    lacking = call(*ALONE, "--resolutions", "176", "--latency-table", "tables")
    assert "176" in lacking.err and "160, 192" in lacking.err
    for text, message in (("", "160"), ("a: [1", "YAML"), ("a: 1", "a")):
        (tmp_path / "tables" / "160_lookup_table.yaml").write_text(text)
        broken = call(*ALONE, *sizes, "--latency-table", "tables")
        assert broken.status == 1 and message in broken.err and "160_lookup" in broken.err
    shutil.rmtree(tmp_path / "tables")
    (tmp_path / "tables").mkdir()
    assert "R_lookup_table.yaml" in call(*ALONE, "--latency-table", "tables").err


def test_the_published_tables_and_predictor(call, reference_data):
    tables = ["--latency-table", str(reference_data / "latency" / "note10_lut")]
    predictor = ["--accuracy-predictor", str(reference_data / "predictors" / "acc_predictor.pth")]
    wrong = call(*ALONE, *tables)
    assert "Conv-input:160x160x3-output:80x80x16" in wrong.err
    assert "1.2" in wrong.err
    budgets = ["--constraints", "20", "30"]
    search = call("--net", WIDE, *ALONE, *tables, *predictor, *budgets)
    rows = search.rows()
    assert float(rows[0]["top1"]) >= 80.51 and float(rows[1]["top1"]) >= 82.93
    assert all(float(row["latency_ms"]) <= float(row["constraint"]) for row in rows)
    compound = call("--width-mult", "1.2", *ALONE, *tables, *predictor)
    backbone, space, classes = pipeline.named_space("compofa", 1.2)
    arrays = space.arrays(space.enumerate_genes())
    latency = load_cost("note10", backbone, classes, table=tables[1])(arrays)
    top1 = pipeline.accuracy_model(predictor[1]).predict(arrays)
    for row in compound.rows():
        best = top1[latency <= float(row["constraint"])].max()
        assert float(row["top1"]) == pytest.approx(best, abs=1e-4)
    other = str(reference_data / "predictors" / "ofa_resnet50_acc_predictor.pth")
    assert "ofa_resnet50" in call(*ALONE, "--accuracy-predictor", other).err
    lacking = call(*ALONE, "--width-mult", "1.2", *tables, "--resolutions", "128")
    assert "128" in lacking.err and "160, 164" in lacking.err


def test_torch_and_the_like_are_not_imported(tmp_path):
    code = (
        "import sys; from nas.cli.search import main; status = main(sys.argv[1:]); "
        "print(status, sorted({'torch', 'torchvision', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *ALONE, "--output", str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 []"
