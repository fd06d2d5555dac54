"""``python -m nas``: devices, predictions, measurements, records and fits."""

import csv
import functools
import gzip
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from calls import Outcome, called
from few import changed, same
from scipy.stats import spearmanr
from test_trained import tiny_checkpoint

import nas.cost.measured
from compofa.io.checkpoint import load_checkpoint
from compofa.io.records import read_records
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.space.arrays import SubnetArrays
from nas.accuracy.predictor import NAMES, FittedPredictor
from nas.cli.search import main as search
from nas.cli.tools import main
from nas.cost.base import macs_cost, params_cost
from nas.cost.devices import DEVICES, FittedDevice, load_cost
from nas.cost.timing import Settings
from nas.model_file import MODELS
from nas.search import pipeline
from nas.tables import read_subnets, write_subnets

FORMAT = MOBILENET_V3.config_format
WIDE = "ofa_mbv3_d234_e346_k357_w1.2"
MEASURED = [name for name, device in DEVICES.items() if isinstance(device, FittedDevice)]
SHIPPED = [name for name in NAMES if name in pipeline.NETWORKS]


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
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("net") / "tiny.pt"))


@pytest.fixture
def call(capsys, tmp_path, monkeypatch) -> Callable[..., Outcome]:
    """The command in an empty folder, as a function."""
    monkeypatch.chdir(tmp_path)

    return lambda *argv: called(main, argv, capsys)


@pytest.fixture
def predict(call) -> Callable[..., dict[str, np.ndarray]]:
    """Predictions as arrays by column."""

    def run(source: Path, columns: str, *more: str) -> dict[str, np.ndarray]:
        argv = ["--columns", columns, "--input", str(source), "--output", "out.csv", *more]
        result = call("predict", *argv)
        assert result.status == 0, result.err
        return read_subnets("out.csv", columns.split(","))[1]

    return run


def table(path: Path, name: str = "compofa", count: int = 40, seed: int = 0) -> SubnetArrays:
    """Write a table of random subnets at 160, 192 and 224 pixels."""
    space = pipeline.named_space(name, None, (160, 192, 224))[1]
    arrays = space.arrays(space.sample_genes(np.random.default_rng(seed), count))
    write_subnets(path, arrays, FORMAT, {})
    return arrays


def test_devices_are_listed_with_source_and_error(call):
    result = call("devices")
    *lines, last = result.out.splitlines()
    assert result.status == 0 and len(lines) == 2 * len(DEVICES)
    assert {"tx2", "pixel1", "1080ti"} <= set(re.findall(r"\w+", last)) and "note10" not in last
    for first, second, (name, device) in zip(lines[::2], lines[1::2], DEVICES.items(), strict=True):
        assert first.split()[0] == name and device.description in first
        assert device.source in second and device.error in second
        assert "MAPE" in second or name not in MEASURED
    assert "; w0.6 to 2.4; r 128 to 224]" in lines[0] and "; w1; " in lines[2]


def test_predictions_keep_order_and_columns(call, tmp_path, caplog):
    caplog.set_level("INFO")
    arrays = table(tmp_path / "in.csv")
    columns = "params,latency:note10,top1,macs,top1_std"
    argv = ["predict", "--columns", columns, "--input", "in.csv", "--output", "new/out.csv"]
    result = call(*argv)
    assert result.status == 0 and "40 subnets" in result.out
    assert "MAPE" in caplog.text and "MAE" in caplog.text, "each states its error"
    with Path("new/out.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["ks", "e", "d", "r", *columns.split(",")]
    back, values = read_subnets("new/out.csv", columns.split(","))
    assert same(arrays, back)
    model = pipeline.accuracy_model("compofa")
    assert (values["top1"] == model.predict(arrays)).all()
    assert (values["top1_std"] == model.std(arrays)).all()
    assert (values["latency:note10"] == load_cost("note10")(arrays)).all()
    assert (values["macs"] > 5e7).all() and (values["params"] > 3e6).all()


def test_columns_are_added_to_those_of_the_input(call, tmp_path, caplog):
    caplog.set_level("INFO")
    arrays = table(tmp_path / "plain.csv")
    with Path("plain.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    for number, row in enumerate(rows):
        row.insert(0, f'"name", {number}' if number else "name")
        row += ["macs", "ünit"] if number == 0 else ["7", f"{number / 3}"]
    with Path("in.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    argv = ["predict", "--columns", "top1,macs", "--input", "in.csv", "--output"]
    for output in ("out.csv", "in.csv"):  # in place last
        result = call(*argv, output)
        assert result.status == 0 and "macs" in caplog.text and "in.csv" in caplog.text
        with Path(output).open(newline="") as file:
            header, *back = csv.reader(file)
        assert header == ["name", "ks", "e", "d", "r", "macs", "ünit", "top1"]
        for old, new in zip(rows[1:], back, strict=True):
            assert (new[:5], new[6]) == (old[:5], old[6])
        assert [int(row[5]) for row in back] == macs_cost(MOBILENET_V3)(arrays).tolist()
        top1 = pipeline.accuracy_model("compofa").predict(arrays)
        assert [float(row[7]) for row in back] == top1.tolist()
    before = Path("in.csv").read_bytes()
    assert call(*argv, "in.csv").status == 0 and Path("in.csv").read_bytes() == before
    Path("in.csv").write_text("ks,e,d,r,name,name\n")
    assert "'name'" in call(*argv, "out.csv").err


def test_predictions_that_are_no_numbers_are_not_written(call, tmp_path, monkeypatch):
    table(tmp_path / "in.csv")
    monkeypatch.setattr(
        FittedPredictor, "predict", lambda self, arrays: arrays.resolutions * np.nan
    )
    result = call("predict", "--columns", "macs,top1", "--input", "in.csv", "--output", "out.csv")
    assert result.status == 1 and "finite" in result.err and "top1" in result.err
    assert not Path("out.csv").exists()


def test_models_are_not_written_over(call, tmp_path):
    table(tmp_path / "in.csv")
    sources = {"acc": "accuracy_compofa", "lat": DEVICES["note10"].model}
    for name, source in sources.items():
        for ending in (".npz", ".json"):
            shutil.copy((MODELS / source).with_suffix(ending), name + ending)
    argv = ["predict", "--input", "in.csv", "--accuracy-predictor", "acc.npz",
            "--columns", "macs,top1,latency:lat.npz"]  # fmt: skip
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for output in ("acc.npz", "./acc.json", "lat.npz", "lat.json"):
        result = call(*argv, "--output", output)
        assert result.status == 1 and "input" in result.err, output
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_gzipped_tables_and_full_lists_give_the_same(predict, tmp_path):
    arrays = table(tmp_path / "in.csv")
    columns = "top1,macs,params,latency:v100"
    plain = predict(tmp_path / "in.csv", columns)
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress((tmp_path / "in.csv").read_bytes()))
    filled = changed(
        arrays,
        kernel=np.where(arrays.blocks["kernel"] == 0, 7, arrays.blocks["kernel"]),
        expand=np.where(arrays.blocks["expand"] == 0, 6, arrays.blocks["expand"]),
    )
    write_subnets(tmp_path / "full.csv", filled, FORMAT, {})
    for name in ("in.csv.gz", "full.csv"):
        again = predict(tmp_path / name, columns)
        assert all((again[key] == plain[key]).all() for key in plain), name


@pytest.mark.parametrize("net_id", SHIPPED)
def test_every_device_and_every_network_answer(predict, tmp_path, net_id):
    table(tmp_path / "in.csv", net_id)
    wide = pipeline.NETWORKS[net_id].width_mult != 1
    names = [name for name in MEASURED if not (wide and DEVICES[name].widths == "w1")]
    columns = ",".join(["top1", "flops", "memory", *(f"latency:{name}" for name in names)])
    values = predict(tmp_path / "in.csv", columns, "--net", net_id)
    assert (values["top1"] > 60).all() and (values["top1"] < 85).all()
    for name in names:
        assert (values[f"latency:{name}"] > 1).all() and np.ptp(values[f"latency:{name}"]) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",192\n", ",100\n", 1), "100"),
        (lambda text: text.replace(",192\n", ",20\n", 1), "20"),
        (lambda text: text.replace(",192\n", ",\n", 1), "r: "),
        (lambda text: text.replace(",192\n", "\n", 1), "r: "),
        (lambda text: text.replace(",192\n", ",192,1\n", 1), "4 fields"),
        (lambda text: text.replace(" 0,", " 8,"), None),
    ],
)
def test_wrong_rows_are_named_by_their_lines(call, tmp_path, change, message):
    arrays = table(tmp_path / "in.csv")
    text = (tmp_path / "in.csv").read_text()
    (tmp_path / "in.csv").write_text(change(text))
    result = call("predict", "--columns", "top1", "--input", "in.csv", "--output", "out.csv")
    if message is None:
        assert result.status == 0, "what stands past a depth is no part of the subnet"
        return
    line = int(np.flatnonzero(arrays.resolutions == 192)[0]) + 2
    assert result.status == 1 and f"in.csv, line {line}: " in result.err and message in result.err
    assert len(result.err.splitlines()) == 1 and not Path("out.csv").exists()


def test_subnets_of_another_space_are_named_by_their_lines(call, tmp_path):
    table(tmp_path / "in.csv", "compofa-elastic")
    argv = ["predict", "--columns", "macs", "--input", "in.csv", "--output", "out.csv"]
    assert "compofa: lines 2, 3, 4, 5, 6 and 35 more; line 2: " in call(*argv).err
    assert call(*argv, "--net", "compofa-elastic").status == 0


def test_subnets_of_a_checkpoint_have_its_classes(call, predict, net, tmp_path):
    spec = load_checkpoint(net).network
    arrays = spec.space.arrays(spec.space.enumerate_genes())
    write_subnets("in.csv", arrays, FORMAT, {}, {"net": ["tiny"] * len(arrays)})
    values = predict(Path("in.csv"), "macs,params", "--net", net)
    assert (values["macs"] == macs_cost(spec.backbone, spec.classes)(arrays)).all()
    assert (values["params"] == params_cost(spec.backbone, spec.classes)(arrays)).all()
    argv = ["predict", "--input", "in.csv", "--output", "new.csv", "--columns"]
    for more, message in (
        (["macs"], "its checkpoint"),
        (["top1", "--net", net], "--accuracy-predictor"),
        (["macs", "--net", net, "--width-mult", "1"], "--width-mult"),
        (["macs", "--net", "gone.pt"], "gone.pt"),
    ):
        result = call(*argv, *more)
        assert result.status == 1 and message in result.err and len(result.err.splitlines()) == 1
    assert not Path("new.csv").exists()


@pytest.mark.parametrize("text", ['{"net": "a", "ks": [3, 3]}\n', "<!doctype html>\n", "[1, 2]\n"])
def test_what_is_no_table_is_said_to_be_none(call, tmp_path, text):
    (tmp_path / "in.csv").write_text(text)
    result = call("predict", "--columns", "macs", "--input", "in.csv", "--output", "out.csv")
    assert result.status == 1 and "names of columns" in result.err and "line 1" in result.err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--columns", "top1,speed"], "'speed'"),
        (["--columns", "top1,"], "''"),
        (["--columns", "latency:nosuch"], ", ".join(DEVICES)),
        (["--columns", "latency:v100", "--width-mult", "1.2"], "1.0"),
        (["--columns", "top1", "--width-mult", "0.3"], "0.8 to 1.25"),
        (["--columns", "latency:note10", "--width-mult", "8"], "0.6 to 2.4"),
        (["--columns", "macs", "--net", "nosuch"], "'nosuch'"),
        (["--columns", "macs", "--width-mult", "-1"], "width multiplier"),
        (["--columns", "macs", "--input", "nosuch.csv"], "nosuch.csv"),
        (["--columns", "macs", "--output", "in.csv/out.csv"], "in.csv"),
        (["--columns", "top1", "--accuracy-predictor", "in.csv"], "in.csv"),
        (["--columns", "latency:note10", "--latency-table", "."], "R_lookup_table.yaml"),
    ],
)
def test_what_predict_cannot_do(call, tmp_path, more, message):
    table(tmp_path / "in.csv")
    result = call("predict", "--input", "in.csv", "--output", "out.csv", *more)
    assert result.status == 1 and message in result.err
    assert "Traceback" not in result.err and not Path("out.csv").exists()


def test_sums_of_the_published_tables(predict, reference_data):
    latency = reference_data / "latency"
    tables = ["--latency-table", str(latency / "note10_lut"), "--width-mult", "1.2"]
    for part, name in (("compofa",) * 2, ("compofa_elastic", "compofa-elastic"), ("ofa", WIDE)):
        source = latency / f"note10_lut_sum_{part}.csv.gz"
        got = predict(source, "latency:note10", "--net", name, *tables)["latency:note10"]
        known = read_subnets(source, ["latency_ms"])[1]["latency_ms"]
        digits = np.array([float(f"{value:.6g}") for value in got])  # as many as the tables give
        np.testing.assert_allclose(digits, known, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("file", "net_id", "mae", "rho"),
    [
        ("ofa_mbv3_w1.0_r224", "ofa_mbv3_d234_e346_k357_w1.0", 0.049, 0.997),
        ("compofa_elastic_r128_160_192", "compofa-elastic", 0.345, 0.987),
    ],
)
def test_accuracy_is_better_than_the_baselines(predict, reference_data, file, net_id, mae, rho):
    source = reference_data / "accuracy" / f"{file}.csv.gz"
    counts = "macs,params" if "224" in file else "macs"
    got = predict(source, f"top1,{counts}", "--net", net_id)
    known = read_subnets(source, ["top1", *counts.split(",")] if "224" in file else ["top1"])[1]
    assert np.abs(got["top1"] - known["top1"]).mean() < mae
    assert spearmanr(got["top1"], known["top1"]).statistic > rho
    assert all((got[key] == value).all() for key, value in known.items() if key != "top1")


def test_measured_tables_are_read_back(call, tmp_path):
    argv = ["--net", "compofa-small", "--width-mult", "0.1", "--resolutions", "24", "16", "--quiet"]
    result = call("measure", *argv, "--output", "tables", "--device", "cpu", "--batch-size", "2")
    assert result.status == 0 and "3 random subnets" in result.out
    assert sorted(path.name for path in Path("tables").iterdir()) == [
        "16_lookup_table.yaml", "24_lookup_table.yaml", "tables.json",
    ]  # fmt: skip
    backbone, space, _ = pipeline.named_space("compofa-small", 0.1, (16, 24))
    assert load_cost("tables", backbone).error in result.out, "it travels with the tables"
    write_subnets("in.csv", space.arrays(space.enumerate_genes()), FORMAT, {})
    argv = [*argv[:4], "--input", "in.csv", "--output", "out.csv", "--latency-table", "tables"]
    assert call("predict", *argv, "--columns", "latency:cpu").status == 0
    arrays, values = read_subnets("out.csv", ["latency:cpu"])
    expected = load_cost("tables", backbone)(arrays)
    assert (values["latency:cpu"] == expected).all() and (expected > 0).all()
    assert call("measure", "--output", "in.csv/x").err.startswith("python -m nas: error: ")
    assert "got 4" in call("measure", "--net", "ofa-small", "--resolutions", "4",
                           "--output", "t").err  # fmt: skip


def collect_options(net: str, output: str, *more: str) -> list[str]:
    return [
        "collect", "--net", net, "--output", output, "--quiet", "--device", "cpu",
        "--resolutions", "8", "--samples", "22", "--calibration-images", "20", *more,
    ]  # fmt: skip


def test_collected_records_fit_a_predictor_that_a_search_takes(call, net, tmp_path):
    assert call(*collect_options(net, "r.jsonl", "--samples", "5")).status == 0
    begun = Path("r.jsonl").read_text()
    Path("r.jsonl").write_text(begun + begun[:50])
    result = call(*collect_options(net, "r.jsonl"))
    assert result.status == 0 and "22 records" in result.out
    assert Path("r.jsonl").read_text().startswith(begun)
    call(*collect_options(net, "whole.jsonl"))
    assert Path("r.jsonl").read_text() == Path("whole.jsonl").read_text()

    fit = call("fit-accuracy", "--input", "r.jsonl", "--output", "p.npz", "--name", "mine")
    assert fit.status == 0 and "mine: " in fit.out and "MAE" in fit.out
    assert json.loads(Path("p.json").read_text())["source"] == "r.jsonl"
    more = ["--target-hardware", "flops", "--compare", "none", "--output", "s", "--quiet"]
    assert search(["--net", net, "--accuracy-predictor", "p.npz", "--resolutions", "8", *more]) == 0

    twice = Path("r.jsonl").read_text() * 2
    Path("twice.jsonl").write_text(twice)
    assert call("fit-accuracy", "--input", "twice.jsonl", "--output", "same.npz").status == 0
    with np.load("p.npz") as one, np.load("same.npz") as same:
        assert all((one[key] == same[key]).all() for key in one.files)

    other = Path("r.jsonl").read_text().replace('"checkpoint": "', '"checkpoint": "0')
    Path("two.jsonl").write_text(Path("r.jsonl").read_text() + other)
    mixed = call("fit-accuracy", "--input", "two.jsonl", "--output", "m.npz")
    assert mixed.status == 1 and "two.jsonl" in mixed.err and "2" in mixed.err

    rows = read_records("r.jsonl")
    with Path("t.csv").open("w") as file:
        file.write("ks,e,d,r,top1,images\n")
        for row in rows:
            config = row.subnet.format.write(row.subnet, slots=3)
            parts = [" ".join(map(str, config[key])) for key in ("ks", "e", "d")]
            file.write(
                (",".join([*parts, str(config["r"]), repr(row.top1), str(row.images)]) + "\n") * 2
            )
    assert call("fit-accuracy", "--input", "t.csv", "--output", "q.npz").status == 0
    with np.load("p.npz") as one, np.load("q.npz") as other:
        assert all((one[key] == other[key]).all() for key in one.files)
        assert one["images"] == rows[0].images


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--samples", "0"], "--samples: "),
        (["--net", "nosuch"], "'nosuch'"),
        (["--net", "compofa"], "compofa"),
        (["--output", "file/r.jsonl"], "file"),
        (["--output", "other.jsonl"], "other.jsonl, line 1: "),
        (["--resolutions", "4"], "image size"),
        (["--calibration-images", "0"], "calibration"),
    ],
)
def test_what_collect_cannot_do(call, net, tmp_path, more, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "other.jsonl").write_text("something\n")
    result = call(*collect_options(net, "r.jsonl", *more))
    assert result.status == 1 and message in result.err and "Traceback" not in result.err
    assert (tmp_path / "other.jsonl").read_text() == "something\n"


def test_a_latency_model_is_fitted_to_a_table(call, predict, tmp_path):
    arrays = table(tmp_path / "in.csv", count=120)
    cost = load_cost("note10")
    write_subnets(tmp_path / "t.csv", arrays, FORMAT, {"ms": cost(arrays)})
    argv = ["fit-latency", "--input", "t.csv", "--column", "ms", "--name", "mine"]
    result = call(*argv, "--output", "new/m.npz")
    assert result.status == 0 and result.out.startswith("mine: ") and "MAPE" in result.out
    fresh = table(tmp_path / "fresh.csv", seed=1)
    column = f"latency:{tmp_path / 'new' / 'm.npz'}"
    got = predict(tmp_path / "fresh.csv", column)[column]
    assert np.abs(got / cost(fresh) - 1).mean() < 0.03
    for more, message in (
        (["--column", "latency_ms"], "latency_ms"),
        (["--input", "fresh.csv"], "fresh.csv"),
        (["--output", "t.csv/m.npz"], "t.csv"),
    ):
        failed = call(*argv, "--output", "m.npz", *more)
        assert failed.status == 1 and message in failed.err


@pytest.mark.parametrize("command", ["fit-accuracy", "fit-latency"])
def test_fits_need_an_input(call, command, tmp_path):
    assert "--input" in call(command, "--output", "m").err
    assert "cannot read" in call(command, "--output", "m", "--input", "nosuch").err
    (tmp_path / "file").write_text("")
    empty = call(command, "--output", "m", "--input", "file")
    assert empty.status == 1 and "file" in empty.err


def test_few_rows_are_not_fitted(call, tmp_path):
    arrays = table(tmp_path / "in.csv", count=19)
    columns = {"top1": np.arange(19), "latency_ms": np.arange(19) + 1}
    write_subnets("t.csv", arrays, FORMAT, columns)
    for command in ("fit-accuracy", "fit-latency"):
        result = call(command, "--input", "t.csv", "--output", "m.npz")
        assert result.status == 1 and "19" in result.err


def test_predict_imports_neither_torch_nor_scipy(tmp_path):
    table(tmp_path / "in.csv")
    code = (
        "import sys; from nas.cli.tools import main; status = main(sys.argv[1:]); "
        "print(status, sorted({'torch', 'torchvision', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    argv = ["predict", "--columns", "top1,macs,params,latency:note10,latency:p40",
            "--input", str(tmp_path / "in.csv"), "--output", str(tmp_path / "out.csv")]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *argv],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 []"
    whole = [sys.executable, "-m", "nas", "devices"]
    listed = subprocess.run(whole, capture_output=True, text=True, check=True,
                            cwd=Path(__file__).parent.parent)  # fmt: skip
    assert listed.stdout.startswith("note10")
