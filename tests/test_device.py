"""One's own device: from a sample of subnets, over their measured latencies, to a search."""

import ast
import csv
import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest

import nas.cost.measured_onnx
from compofa.errors import ConfigError, SpaceError, TableError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.zoo import NETWORKS, network_spec
from compofa.seeds import rng
from compofa.space.subnet import Subnet
from nas.cli.search import main as search
from nas.cli.tools import main as nas_main
from nas.cost import on_device
from nas.cost.devices import load_cost
from nas.cost.fit_latency import count_table, fit_latency
from nas.cost.lookup import TableCost
from nas.cost.measured_onnx import export_tables, measure_onnx
from nas.cost.models import load_model
from nas.cost.sampling import DeviceFolder, spread_sample, static_onnx
from nas.cost.served import default_resolutions, served_resolutions
from nas.cost.timing import Settings, machine
from nas.search.timed import ABOVE, MEASURED
from nas.tables import read_subnets

TINY = network_spec("compofa-small", 10, width_mult=0.1, resolutions=(16, 24, 32))
CONVERTED = {
    "Add", "AveragePool", "Constant", "Conv", "Flatten", "Gemm", "HardSigmoid", "HardSwish",
    "Identity", "MaxPool", "Mul", "ReduceMean", "Relu", "Clip",
}  # fmt: skip
"""Operators of opset 17 that onnx2tf converts."""


def made_up(spec, arrays) -> np.ndarray:
    """Latencies that are a sum over layers: 0.1 ms, and more for each count."""
    names, counts = count_table(arrays, spec.backbone, spec.classes)
    weights = 0.1 + np.array([len(name) % 5 for name in names])
    return counts @ weights / 10


def fill_in(folder: DeviceFolder, values: np.ndarray) -> None:
    """Write latencies to a table as the script does."""
    columns, rows = on_device.read_rows(str(folder.table))
    for row, value in zip(rows, values, strict=True):
        row[on_device.LATENCY], row[on_device.SETUP] = f"{value:.9g}", "made up"
    on_device.write_rows(str(folder.table), columns, rows)


# --- the sample ---


@pytest.mark.parametrize("net", ["compofa", "compofa-elastic", "ofa_resnet50", "ofa-small"])
def test_a_sample_is_spread_over_the_space(net):
    space = network_spec(net, resolutions=(160, 192, 224)).space
    subnets = spread_sample(space, 60, seed=1)
    assert len(set(subnets)) == 60 and subnets == spread_sample(space, 60, seed=1)
    assert {space.smallest, space.largest} <= set(subnets)
    assert set(subnets) != set(spread_sample(space, 60, seed=2))
    counts = [sum(s.resolution == r for s in subnets) for r in (160, 192, 224)]
    assert min(counts) >= 17
    depths = np.array([subnet.depths for subnet in subnets])
    for stage, column in zip(space.stages, depths.T, strict=True):
        for depth in stage.depths:
            assert (column == depth).sum() >= 0.6 * 60 / len(stage.depths)


def test_a_sample_too_small_for_a_fit_is_refused_before_it_is_measured():
    with pytest.raises(ConfigError, match="50"):
        spread_sample(TINY.space, 49)
    few = TINY.space.restrict(resolutions=(16,), depth=(2,))
    with pytest.raises(ConfigError, match="has 1 "):
        spread_sample(few, 60)


def test_a_folder_continues_and_refuses_another_sample(tmp_path):
    subnets = spread_sample(TINY.space, 50)
    folder = DeviceFolder(tmp_path, TINY, "mine")
    names = folder.start(subnets)
    assert sorted(names) == names and len(set(names)) == 50
    assert {path.name for path in tmp_path.iterdir()} == {"latency.csv", "network.json",
                                                          "measure.py"}  # fmt: skip
    fill_in(folder, np.arange(50) + 1.0)
    assert folder.start(subnets) == names, "a table that is filled in is of the same sample"
    arrays, columns = read_subnets(folder.table, ["latency_ms"])
    assert (columns["latency_ms"] == np.arange(50) + 1).all()
    assert list(TINY.space.subnets_of(arrays)) == subnets
    assert DeviceFolder.of_table(folder.table) == folder
    for other, sample in (
        (folder, spread_sample(TINY.space, 50, seed=1)),
        (DeviceFolder(tmp_path, TINY, "mine", batch=2), subnets),
    ):
        with pytest.raises(ConfigError, match="same sample"):
            other.start(sample)
    assert read_subnets(folder.table, ["latency_ms"])[1]["latency_ms"][-1] == 50


@pytest.mark.parametrize("net", ["compofa-small", "ofa-proxyless-small", "ofa-resnet50-small"])
def test_files_are_static_and_of_operators_that_convert(net):
    spec = network_spec(net, 10, width_mult=0.1, resolutions=(16,))
    subnet = spec.space.smallest
    content = static_onnx(spec.layers_of(subnet), subnet.resolution, batch=2)
    assert content == static_onnx(spec.layers_of(subnet), subnet.resolution, batch=2)
    model = onnx.load_from_string(content)
    shapes = [
        [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        for entry in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [[2, 3, 16, 16], [2, 10]]
    assert [opset.version for opset in model.opset_import] == [17]
    assert {node.op_type for node in model.graph.node} <= CONVERTED


# --- the script on the device ---


@pytest.fixture
def phone(tmp_path) -> DeviceFolder:
    """A folder of three files, as copied to a device."""
    folder = DeviceFolder(tmp_path, TINY, "mine")
    subnets = spread_sample(TINY.space, 50)[::24]
    for name, subnet in zip(folder.start(subnets), subnets, strict=True):
        assert folder.export(name, subnet) and not folder.export(name, subnet)
    return folder


def measure(folder: DeviceFolder, *more: str) -> int:
    argv = ["--csv", str(folder.table), "--threads", "1", "--repeats", "2", "--quiet", *more]
    return on_device.main(argv)


def rows_of(folder: DeviceFolder) -> list[dict[str, str]]:
    with folder.table.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_script_stands_alone():
    text = Path(on_device.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 8))
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules == {
        "__future__", "argparse", "collections", "csv", "numpy", "onnxruntime", "os", "re", "sys",
        "tempfile", "time", "typing",
    }  # fmt: skip


def test_the_script_fills_in_the_table_and_continues(phone, monkeypatch, capsys):
    assert measure(phone, "--rounds", "1") == 0
    rows = rows_of(phone)
    assert all(float(row["latency_ms"]) > 0 for row in rows)
    assert all("onnxruntime" in row["measured_with"] for row in rows)
    timed = []
    monkeypatch.setattr(
        on_device, "times_ms", lambda session, *_: timed.append(session) or [9.0, 4.0, 5.0]
    )
    assert measure(phone, "--rounds", "3") == 0 and len(timed) == 3 * 2
    for before, row in zip(rows, rows_of(phone), strict=True):
        first = float(before["latency_ms"])
        assert [float(value) for value in row["samples_ms"].split()] == [first, 5, 5]
        assert float(row["latency_ms"]) == 5, "the median of the rounds' medians"
    assert measure(phone, "--rounds", "3") == 0 and len(timed) == 6
    assert "vary by" in capsys.readouterr().err


def test_the_script_says_what_is_wrong(phone, tmp_path, capsys):
    assert measure(phone, "--rounds", "1") == 0
    (last,) = sorted(tmp_path.glob("*_r32.onnx"))
    last.unlink()
    for more, word in (
        (["--statistic", "min"], "median"),
        (["--rounds", "2"], last.name),
        (["--provider", "NoSuch"], "NoSuch"),
        (["--repeats", "0"], "repeat"),
        (["--csv", "nosuch.csv"], "nosuch.csv"),
        (["--from-benchmark", "nosuch"], "nosuch"),
    ):
        capsys.readouterr()
        assert measure(phone, *more) == 1
        error = capsys.readouterr().err
        assert word in error and error.startswith("measure.py: error: ") and error.count("\n") == 1
    last.write_text("no model")
    assert measure(phone, "--rounds", "3") == 1
    assert last.name in capsys.readouterr().err


def test_outputs_of_tflite_are_read(phone, tmp_path):
    (tmp_path / "benchmark").mkdir()
    for place, row in enumerate(rows_of(phone)):
        line = f"Init: 6174, First inference: 5033, Warmup (avg): 4.5e+03, Inference (avg): {place}"
        name = Path(row["file"]).with_suffix(".txt").name
        (tmp_path / "benchmark" / name).write_text(
            f"INFO: x\nInference timings in us: {line}500.25"
        )
    assert measure(phone, "--from-benchmark", str(tmp_path / "benchmark")) == 0
    found = [float(row["latency_ms"]) for row in rows_of(phone)]
    assert found == pytest.approx([0.50025, 1.50025, 2.50025])


# --- the fit ---


@pytest.mark.parametrize(
    "net", ["compofa", "compofa-elastic", "ofa-proxyless-small", "ofa_resnet50", "ofa-small"]
)
def test_sixty_networks_of_any_family_suffice(net, tmp_path):
    spec = network_spec(net, resolutions=(64, 96, 128))
    arrays = spec.space.arrays_of(spread_sample(spec.space, 60))
    model = fit_latency(arrays, made_up(spec, arrays), spec.backbone, name="phone")
    model.save(tmp_path / "m.npz")
    cost = load_model(tmp_path / "m.npz").cost(spec.backbone)
    assert "held-out MAPE" in cost.error and cost.name == "phone"
    assert model.card["held_out"]["mape"] < 2.5
    fresh = spec.space.arrays(spec.space.sample_genes(rng(5), 40))
    assert np.abs(cost(fresh) / made_up(spec, fresh) - 1).mean() < 0.025


def test_noise_is_in_the_stated_error():
    spec = network_spec("compofa", resolutions=(160, 192, 224))
    arrays = spec.space.arrays_of(spread_sample(spec.space, 100))
    noise = np.exp(0.1 * rng(3).standard_normal(100))
    model = fit_latency(arrays, made_up(spec, arrays) * noise, spec.backbone)
    assert 6 < model.card["held_out"]["mape"] < 14, "0.08 is the mean of |N(0, 0.1)|"


@pytest.mark.parametrize("quantity", ["latency", "energy"])
def test_measurements_too_noisy_for_a_table_of_blocks_are_fitted_by_counts(quantity, caplog):
    caplog.set_level(logging.INFO)
    spec = network_spec("compofa", resolutions=(160, 224))
    arrays = spec.space.arrays_of(spread_sample(spec.space, 50))
    noise = np.exp(rng(0).standard_normal(50))
    model = fit_latency(arrays, made_up(spec, arrays) * noise, spec.backbone,
                        card={"quantity": quantity})  # fmt: skip
    assert "no table of blocks" in caplog.text and model.kind == "counts"
    assert model.card["held_out"]["mape"] > 50
    assert (model.cost(spec.backbone)(spec.space.arrays(spec.space.enumerate_genes())) > 0).all()
    with pytest.raises(TableError, match="above 0, got -1"):
        fit_latency(arrays, np.full(50, -1.0), spec.backbone)


def test_a_model_refuses_what_no_measured_network_had():
    spec = network_spec("compofa", resolutions=(160, 224))
    arrays = spec.space.arrays_of(spread_sample(spec.space, 60))
    model = fit_latency(arrays, made_up(spec, arrays), spec.backbone)
    assert model.kind == "counts" and model.measured_resolutions == (160, 224)
    cost = model.cost(spec.backbone)
    between = spec.space.restrict(resolutions=(176,))
    assert np.isfinite(cost(between.arrays_of([between.largest]))).all()
    for size in (128, 240):
        outside = spec.space.restrict(resolutions=(size,))
        with pytest.raises(SpaceError, match=f"160 to 224.*{size}"):
            cost(outside.arrays_of([outside.largest]))
    free = network_spec("ofa_mbv3_d234_e346_k357_w1.0", resolutions=(224,)).space
    with pytest.raises(SpaceError, match="depthwise7"):
        cost(free.arrays_of([free.largest]))
    with pytest.raises(TableError, match=r"1\.2"):
        model.cost(spec.backbone.scaled(1.2))
    with pytest.raises(TableError, match="proxyless"):
        model.cost(network_spec("compofa-proxyless").backbone)


@pytest.mark.parametrize("change", [{"weights": -1.0}, {"resolutions": 5.0}])
def test_damaged_models_are_refused(tmp_path, change):
    spec = network_spec("compofa", resolutions=(160, 224))
    arrays = spec.space.arrays_of(spread_sample(spec.space, 60))
    model = fit_latency(arrays, made_up(spec, arrays), spec.backbone)
    for name, value in change.items():
        model.arrays[name] = np.full_like(model.arrays[name], value)
    model.save(tmp_path / "m.npz")
    with pytest.raises(TableError, match=next(iter(change))):
        load_model(tmp_path / "m.npz")


# --- the commands ---


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns its status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def called(main, *argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(list(argv))
        return status, *capsys.readouterr()

    yield called
    logging.captureWarnings(False)


def measured(path: str, net: str, sizes: tuple[int, ...]) -> DeviceFolder:
    """A folder whose table is filled in; without ONNX files, which a fit does not need."""
    spec = network_spec(net, resolutions=sizes)
    subnets = spread_sample(spec.space, 60)
    folder = DeviceFolder(Path(path), spec, net)
    folder.path.mkdir()
    folder.start(subnets)
    fill_in(folder, made_up(spec, spec.space.arrays_of(subnets)))
    return folder


def test_a_measured_device_is_searched_at_once(call, caplog):
    caplog.set_level(logging.INFO)
    folder = measured("phone", "compofa", (160, 192, 224))
    fit = ("fit-latency", "--input", str(folder.table), "--output", "phone.npz")
    status, out, err = call(nas_main, *fit)
    assert status == 0 and "held-out MAPE" in out and "%|" in err, "with a progress bar"
    card = json.loads(Path("phone.json").read_text())
    assert (card["net"], card["batch"], card["measured_with"]) == ("compofa", 1, "made up")
    status, out, _ = call(search, "--target-hardware", "phone.npz")
    assert status == 0 and "160 192 224" in caplog.text
    assert "not compared with ofa_mbv3" in caplog.text and "depthwise7" in caplog.text
    assert f"cost phone: {card['error']}" in out
    arrays, _ = read_subnets("runs/search-compofa-phone/results.csv")
    assert set(arrays.resolutions) <= {160, 192, 224}
    assert call(search, "--target-hardware", "phone.npz", "--resolutions", "240")[0] == 1
    for asked in ("ofa_mbv3_d234_e346_k357_w1.0", "ofa_resnet50"):
        status, _, err = call(search, "--target-hardware", "phone.npz", "--compare", asked)
        assert status == 1 and err.count("\n") <= 2


def test_a_table_that_is_not_all_measured_alike_is_refused(call):
    folder = measured("phone", "compofa-small", (16, 32))
    fit = ("fit-latency", "--input", str(folder.table), "--output", "m.npz", "--quiet")
    text = folder.table.read_text()
    folder.table.write_text(text.replace("made up", "otherwise", 1))
    assert "otherwise" in call(nas_main, *fit)[2]
    columns, rows = on_device.read_rows(str(folder.table))
    rows[3][on_device.LATENCY] = ""
    on_device.write_rows(str(folder.table), columns, rows)
    assert "line 5" in call(nas_main, *fit)[2] and not Path("m.npz").exists()
    folder.table.write_text(text)
    assert "--width-mult" in call(nas_main, *fit, "--width-mult", "2")[2]
    (folder.path / "network.json").write_text("[]")
    assert "network.json" in call(nas_main, *fit)[2]
    assert call(nas_main, *fit, "--net", "compofa-small")[0] == 0


def test_sample_needs_no_weights_and_checks_its_options(call, monkeypatch):
    monkeypatch.setattr(
        "nas.cost.sampling.static_onnx", lambda layers, r, batch, seed: f"{r} {batch}".encode()
    )
    status, out, _ = call(nas_main, "sample", "--net", "ofa-small", "--samples", "50", "--quiet",
                          "--export", "tflite-ready", "--batch-size", "2", "dir")  # fmt: skip
    assert status == 0 and "50 subnets of ofa-small at 40 44 48 52 56 px" in out
    assert len(list(Path("dir").glob("*.onnx"))) == 50
    assert "onnx2tf" in Path("dir/to_tflite.sh").read_text()
    assert next(Path("dir").glob("*_r44.onnx")).read_text() == "44 2"
    for more, word in (
        (["--net", "nosuch"], "nosuch"),
        (["--samples", "10"], "50"),
        (["--resolutions", "4"], "4"),
        (["--batch-size", "0"], "--batch-size"),
        (["--net", "compofa-digits", "--width-mult", "2"], "--width-mult"),
    ):
        status, _, err = call(nas_main, "sample", "other", "--quiet", *more)
        assert status == 1 and word in err and not Path("other/latency.csv").exists()


@pytest.mark.parametrize("device", ["note10", "flops", "cpu", "v100"])
def test_devices_that_serve_them_are_searched_at_the_usual_resolutions(device):
    assert served_resolutions(device, (160, 176, 192)) == (160, 176, 192)


def test_a_folder_of_tables_is_searched_at_its_resolutions(tmp_path):
    for size in (176, 64):
        (tmp_path / f"{size}_lookup_table.yaml").write_text("a: {mean: 1.0}\n")
    assert served_resolutions(tmp_path, (160, 176, 192)) == (176,)
    assert served_resolutions("note10", (160, 192), tmp_path) == (64, 176)


@pytest.mark.parametrize(
    ("tables", "usual", "anchors", "found"),
    [
        ((64, 96, 128), (160, 192, 224), (128, 160, 224), (128,)),
        ((64, 160, 176), (160, 176, 192), (128, 160), (160,)),
        ((8, 12, 20), (40, 48), (8, 12, 16), (8, 12)),
        ((64, 160), (160, 192), (), (160,)),
    ],
)
def test_the_default_is_what_device_and_predictor_both_serve(
    tables, usual, anchors, found, tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    for size in tables:
        (tmp_path / f"{size}_lookup_table.yaml").write_text("a: {mean: 1.0}\n")
    assert default_resolutions(tmp_path, MOBILENET_V3, usual, anchors) == found
    assert caplog.text.count("\n") == 1 and " ".join(map(str, found)) in caplog.text
    with pytest.raises(ConfigError, match=r"64.*256 to 300"):
        (tmp_path / "64_lookup_table.yaml").write_text("a: {mean: 1.0}\n")
        default_resolutions(tmp_path, MOBILENET_V3, usual, (256, 300))


def test_counts_are_searched_where_the_predictor_serves():
    assert default_resolutions("flops", MOBILENET_V3, (160, 192), (128, 160, 176)) == (160,)
    assert default_resolutions("flops", MOBILENET_V3, (40, 48), (8, 12, 16)) == (8, 12, 16)
    assert default_resolutions("cpu", MOBILENET_V3, (40, 48)) == (40, 48)


def test_a_device_measured_at_other_sizes_is_searched_where_both_serve(call, caplog):
    caplog.set_level(logging.INFO)
    folder = measured("phone", "compofa", (64, 96, 128))
    fit = ("fit-latency", "--input", str(folder.table), "--output", "phone.npz", "--quiet")
    assert call(nas_main, *fit)[0] == 0
    assert call(search, "--target-hardware", "phone.npz", "--compare", "none")[0] == 0
    assert "resolutions 128, which phone.npz and the accuracy predictor serve" in caplog.text
    arrays, _ = read_subnets("runs/search-compofa-phone/results.csv")
    assert set(arrays.resolutions) == {128}
    small = measured("small", "compofa-small", (16, 32))
    fit = ("fit-latency", "--input", str(small.table), "--output", "small.npz", "--quiet")
    assert call(nas_main, *fit)[0] == 0
    status, _, err = call(search, "--target-hardware", "small.npz")
    assert status == 1 and "mobilenet_v3_small_images" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "sizes", "classes"),
    [
        (["--net", "compofa-small"], (40, 44, 48, 52, 56), 1000),
        (["--net", "compofa-medium"], (80, 88, 96, 104, 112), 1000),
        (["--net", "compofa-digits"], (8, 12, 16), 10),
        (["--net", "compofa-small", "--resolutions", "32", "16"], (16, 32), 1000),
    ],
)
def test_networks_are_timed_at_their_own_sizes(call, monkeypatch, argv, sizes, classes):
    seen = []

    def stop(backbone, space, classes, *_, **__):
        seen.append((space.resolutions, classes))
        raise ConfigError("seen")

    monkeypatch.setattr("nas.cost.measured.measure", stop)
    assert call(nas_main, "measure", "--output", "tables", *argv)[0] == 1
    assert seen == [(sizes, classes)]


# --- this machine in ONNX Runtime ---

ORT = Settings(networks=50, rounds=1, runtime="onnxruntime")


@pytest.fixture
def fake_onnx(monkeypatch):
    """Networks take 1 ms, and 1 ms more for each 100,000 multiply-accumulates."""
    calls = []

    def run(layers, resolution, settings, provider):
        calls.append(layers)
        return 1 + sum(layer.macs for layer in layers) / 1e5

    monkeypatch.setattr(nas.cost.measured_onnx, "time_onnx", run)
    return calls


def test_this_machine_in_onnx_runtime(tmp_path, fake_onnx):
    cost = measure_onnx(TINY.backbone, TINY.space, 10, ORT, tmp_path, progress=False)
    assert len(fake_onnx) == 50 and "ONNX Runtime" in cost.error and "held-out" in cost.error
    arrays = TINY.space.arrays(TINY.space.enumerate_genes()[::7])
    truth = [
        1 + sum(layer.macs for layer in TINY.layers_of(s)) / 1e5
        for s in TINY.space.subnets_of(arrays)
    ]
    assert np.abs(cost(arrays) / truth - 1).mean() < 0.02
    measure_onnx(TINY.backbone, TINY.space, 10, ORT, tmp_path, progress=False)
    assert len(fake_onnx) == 50, "the second time all is in the cache"
    paths = export_tables(cost, tmp_path / "tables", TINY.space)
    assert len(paths) == 3
    tables = TableCost(tmp_path / "tables", TINY.backbone, 10)
    assert tables(arrays) == pytest.approx(cost(arrays)) and tables.error == cost.error


def test_runtimes_have_their_own_cache():
    torch, onnx_runtime = machine(Settings()), machine(ORT)
    assert "torch" in torch and "torch" not in onnx_runtime and "onnxruntime" in onnx_runtime


def test_a_runtime_for_what_is_not_timed_here_is_refused(call):
    with pytest.raises(ConfigError, match="onnxruntime"):
        load_cost("note10", runtime="onnxruntime")
    status, _, err = call(search, "--target-hardware", "v100", "--runtime", "onnxruntime")
    assert status == 1 and "runtime" in err


def test_a_network_is_really_timed():
    subnet: Subnet = TINY.space.smallest
    layers = TINY.layers_of(subnet)
    ms = nas.cost.measured_onnx.time_onnx(layers, 16, ORT, "CPUExecutionProvider")
    assert 0 < ms < 1000


def test_winners_are_timed_and_marked_above_their_budget(call, fake_onnx):
    argv = ["--net", "compofa", "--resolutions", "128", "--target-hardware", "cpu", "--runtime",
            "onnxruntime", "--compare", "none", "--quiet"]  # fmt: skip
    status, out, err = call(search, *argv)
    assert status == 0, err
    _, columns = read_subnets(
        "runs/search-compofa-cpu/results.csv", ["constraint", MEASURED, ABOVE]
    )
    excess = np.maximum(columns[MEASURED] - columns["constraint"], 0)
    assert columns[ABOVE] == pytest.approx(excess, abs=1e-3)
    assert out.count("above the budget") == (columns[ABOVE] > 0).sum()


def test_names_in_the_table_of_networks_can_all_be_sampled():
    for net in NETWORKS:
        spec = network_spec(net, resolutions=(128, 160))
        arrays = spec.space.arrays_of(spread_sample(spec.space, 50))
        names, counts = count_table(arrays[:2], spec.backbone)
        assert np.isfinite(counts).all() and "network" in names
