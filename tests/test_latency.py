"""Latency: lookup in tables, the models that ship, fitting, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import yaml
from few import changed

from compofa.errors import ConfigError, SpaceError, TableError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3, MOBILENET_V3_SMALL_IMAGES
from compofa.networks.layout import layout
from compofa.space.subnet import Subnet
from nas.cost.base import macs_cost
from nas.cost.devices import DEVICES, FittedDevice, load_cost
from nas.cost.fit import fit_network
from nas.cost.lookup import TableCost, layer_key, read_table, table_files
from nas.cost.models import load_model
from nas.model_file import MODELS
from nas.tables import read_subnets
from tools.fit.__main__ import main as fit
from tools.fit.latency import SHIPPED

WIDE = MOBILENET_V3.scaled(1.2)
SPACE = MOBILENET_V3.free_space((160, 176, 192, 208, 224))
SHIPPED_MODELS = [name for name, device in DEVICES.items() if isinstance(device, FittedDevice)]


def sample(space=SPACE, n=100, seed=0):
    return space.arrays(space.sample_genes(np.random.default_rng(seed), n))


def write_tables(folder, backbone, resolutions):
    """Write tables in which a layer takes a millisecond per million multiply-accumulates."""
    for r in resolutions:
        lines = {}
        for kernel in backbone.values("kernel"):
            for expand in backbone.values("expand"):
                stages = (((kernel, expand),) * 2,) * len(backbone.stages)
                for layer in layout(backbone, Subnet(r, stages)):
                    lines[layer_key(layer)] = layer.macs / 1e6
        text = "".join(f"{k}:\n  count: 9\n  mean: {v:.7f}\n" for k, v in lines.items())
        (folder / f"{r}_lookup_table.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("tables"), WIDE, (160, 224))


def test_a_lookup_is_a_sum_over_layers(tables):
    arrays = sample(WIDE.free_space((160, 224)))
    assert TableCost(tables, WIDE)(arrays) * 1e6 == pytest.approx(macs_cost(WIDE)(arrays), abs=10)


def test_lookups_equal_the_published_sums(reference_data):
    folder = reference_data / "latency"
    for name in ("ofa", "compofa", "compofa_elastic"):
        arrays, columns = read_subnets(folder / f"note10_lut_sum_{name}.csv.gz", ["latency_ms"])
        sums = TableCost(folder / "note10_lut", WIDE)(arrays)
        written = np.array([float(f"{value:.6g}") for value in sums])
        assert (
            np.abs(written - columns["latency_ms"]).max() < 1e-9
        )  # they are written with six digits


def test_only_the_tables_asked_for_are_read(tables, tmp_path):
    (tmp_path / "160_lookup_table.yaml").write_bytes(
        (tables / "160_lookup_table.yaml").read_bytes()
    )
    (tmp_path / "999_lookup_table.yaml").write_text("not: [a table")
    cost = TableCost(tmp_path, WIDE)
    assert (cost(sample(WIDE.free_space((160,)))) > 0).all()


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_a_table_of_another_width_says_which(tables, width):
    with pytest.raises(TableError, match=rf"Conv-input:.* 1\.2\b.* {width:g}"):
        TableCost(tables, MOBILENET_V3.scaled(width))(sample(SPACE.restrict(resolutions=(160,))))


def test_a_layer_or_resolution_that_a_table_lacks_is_named(tables):
    arrays = sample(WIDE.free_space((160,)))
    with pytest.raises(TableError, match=r"expanded_conv.*-kernel:9-"):
        TableCost(tables, WIDE)(changed(arrays, kernel=np.where(arrays.blocks["kernel"] > 0, 9, 0)))
    with pytest.raises(TableError, match=r"176.* 160, 224"):
        TableCost(tables, WIDE)(changed(arrays, resolutions=arrays.resolutions + 16))
    with pytest.raises(TableError, match=r"Logits.*classes"):
        TableCost(tables, WIDE, 10)(arrays)


def test_a_folder_without_tables_is_an_error(tmp_path):
    with pytest.raises(TableError, match=r"R_lookup_table\.yaml"):
        TableCost(tmp_path, WIDE)
    with pytest.raises(TableError, match="missing"):
        TableCost(tmp_path / "missing", WIDE)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "160_lookup"),
        ("# nothing\n", "160_lookup"),
        ("a: [1, 2", "YAML"),
        ("- 1\n- 2\n", "list"),
        ("a:\n  count: 3\n", r"\ba\b"),
        ("a:\n  mean: fast\n", r"\ba\b"),
        ("a:\n  mean: true\n", r"\ba\b"),
        ("a:\n  mean: -1.0\n", "0 ms"),
        ("a:\n  mean: .inf\n", "0 ms"),
        ("Conv-a:\n  mean: 1.0e+400\n", "0 ms"),
        ("1:\n  mean: 1.0\n", r"\b1\b"),
        (BOMB, "alias"),
        ("a: !!python/object/apply:os.system ['true']\n", "tag"),
        ("a: " + "[" * 5000, "deep"),
        ("a:\n  mean: 1.0\n\x00", "YAML"),
    ],
)
def test_hostile_and_broken_tables_are_one_line_errors(tmp_path, text, message):
    path = tmp_path / "160_lookup_table.yaml"
    path.write_text(text)
    with pytest.raises(TableError, match=message) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_and_huge_tables_are_errors(tmp_path, monkeypatch):
    path = tmp_path / "t.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match="UTF-8"):
        read_table(path)
    monkeypatch.setattr("nas.cost.lookup.MAX_FILE_BYTES", 10)
    path.write_text("a" * 11)
    with pytest.raises(TableError, match="10 bytes"):
        read_table(path)


def test_the_plain_reader_agrees_with_yaml(tables, tmp_path):
    path = tables / "160_lookup_table.yaml"
    expected = {key: entry["mean"] for key, entry in yaml.safe_load(path.read_text()).items()}
    assert read_table(path) == expected
    other = tmp_path / "160_lookup_table.yaml"
    other.write_text(yaml.safe_dump({key: {"mean": ms} for key, ms in expected.items()}, indent=4))
    assert read_table(other) == expected


def test_the_plain_reader_agrees_with_yaml_on_published_tables(reference_data):
    for path in list(table_files(reference_data / "latency/note10_lut").values())[:3]:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        expected = yaml.load(path.read_text(), Loader=loader)
        assert read_table(path) == {key: entry["mean"] for key, entry in expected.items()}


@pytest.mark.parametrize("name", SHIPPED_MODELS)
def test_shipped_models_load_and_say_their_error(name):
    device = DEVICES[name]
    cost = load_cost(name)
    assert cost.unit == "ms"
    assert "%" in cost.error
    assert cost.error == device.error
    arrays = sample(MOBILENET_V3.free_space(device.resolutions))
    latency = cost(arrays)
    assert np.isfinite(latency).all()
    assert (latency > 1).all()
    assert np.array_equal(cost(arrays[::-1]), latency[::-1])
    assert cost(arrays[:0]).shape == (0,)
    assert cost(sample(SPACE, 1)).shape == (1,)


def ridge_on_choices(arrays, latency):
    """Fit latency by a ridge on one-hot choices x (1, r, r^2), and predict the same rows."""
    ks, e, r = (
        arrays.blocks["kernel"][:, :, None],
        arrays.blocks["expand"][:, :, None],
        arrays.resolutions[:, None],
    )
    hot = np.concatenate([ks == [3, 5, 7], e == [3, 4, 6]], axis=2).reshape(len(ks), -1)
    size = (r - r.mean()) / 32
    x = np.concatenate([hot, hot * size, hot * size**2, size**0, size, size**2], axis=1)
    return x @ np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ latency)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_models_fit_their_tables_better_than_a_ridge(reference_data, name):
    table, column, *_ = SHIPPED[name]
    arrays, columns = read_subnets(reference_data / table, [column])
    latency = columns[column]
    error, of_ridge = (
        100 * np.abs(predicted / latency - 1).mean()
        for predicted in (load_cost(name)(arrays), ridge_on_choices(arrays, latency))
    )
    assert error < of_ridge
    assert error < {"p40": 0.6, "rtx2080ti": 1.5, "v100-b64": 0.6}.get(name, np.inf)


def test_the_note10_model_is_reproduced_from_the_tables(reference_data, tmp_path):
    assert (
        fit(["latency", str(reference_data), "--output", str(tmp_path), "--names", "note10"]) == 0
    )
    made, shipped = (
        load_model(tmp_path / "latency_note10.npz"),
        load_model(MODELS / "latency_note10.npz"),
    )
    assert made.card == shipped.card
    for name, array in shipped.arrays.items():
        if array.dtype.kind == "U":
            assert array.tolist() == made.arrays[name].tolist()
        else:
            assert made.arrays[name] == pytest.approx(array, rel=1e-6, abs=1e-9)


def test_only_shipped_models_are_fitted_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        fit(["latency", str(tmp_path), "--output", str(tmp_path), "--names", "note11"])
    assert end.value.code != 0 and "note11" in capsys.readouterr().err
    assert fit(["accuracy", str(tmp_path), "--output", str(tmp_path / "models")]) == 1
    assert "accuracy" in capsys.readouterr().err, "the missing table is named"


def test_note10_serves_other_widths_and_resolutions():
    arrays = sample(MOBILENET_V3.free_space((128, 130, 224)))
    narrow, wide = (load_cost("note10", MOBILENET_V3.scaled(w))(arrays) for w in (1.0, 1.2))
    assert (narrow < wide).all()
    with pytest.raises(SpaceError, match="128 to 224"):
        load_cost("note10")(changed(arrays, resolutions=arrays.resolutions * 2))
    with pytest.raises(SpaceError, match="kernel 9"):
        load_cost("note10")(changed(arrays, kernel=np.where(arrays.blocks["kernel"] > 0, 9, 0)))


@pytest.mark.parametrize("width", [0.3, 0.5, 2.5, 8.0])
def test_layers_far_from_those_that_were_measured_are_refused(width):
    with pytest.raises(TableError, match=rf"note10 .* 1\.2: .* {width:g}"):
        load_cost("note10", MOBILENET_V3.scaled(width))


@pytest.mark.parametrize("width", ["wide", 0, -1.0, float("nan"), True])
def test_a_card_whose_width_is_none_is_refused(tmp_path, width):
    model = load_model(MODELS / "latency_note10.npz")
    model.card["width_mult"] = width
    model.save(tmp_path / "model.npz")
    with pytest.raises(TableError, match="width multiplier"):
        load_cost(tmp_path / "model.npz")


def test_cards_cannot_write_to_the_terminal(tmp_path):
    model = load_model(MODELS / "latency_note10.npz")
    model.card.update(name="\x1b]0;x\x07phone", error="\x1b[2Jnone\nat all")
    model.save(tmp_path / "model.npz")
    cost = load_cost(tmp_path / "model.npz")
    assert cost.name == "\\x1b]0;x\\x07phone" and cost.error == "\\x1b[2Jnone\\nat all"


def test_a_batch_size_for_what_is_not_timed_here_is_refused():
    for device in ("note10", "v100-b32", "flops", MODELS / "latency_p40.npz"):
        with pytest.raises(ConfigError, match="batch size"):
            load_cost(device, batch=7)


def test_models_refuse_what_was_not_measured():
    arrays = sample()
    with pytest.raises(TableError, match=r"mobilenet_v3 .* 1\.0\b.* 1\.2"):
        load_cost("v100", WIDE)
    with pytest.raises(TableError, match="mobilenet_v3_small_images"):
        load_cost("note10", MOBILENET_V3_SMALL_IMAGES)
    with pytest.raises(SpaceError, match=r"160, 176, 192, 208, 224.* 161"):
        load_cost("p40")(changed(arrays, resolutions=arrays.resolutions * 0 + 161))
    with pytest.raises(SpaceError, match=r"kernel.* 3, 5, 7"):
        load_cost("v100")(changed(arrays, kernel=np.where(arrays.blocks["kernel"] > 0, 9, 0)))
    with pytest.raises(SpaceError, match=r"expand.* 3, 4, 6"):
        load_cost("v100")(changed(arrays, expand=np.where(arrays.blocks["expand"] > 0, 5, 0)))


def test_unknown_devices_list_the_known(tmp_path):
    with pytest.raises(ConfigError, match=r"'note11'.*note10.*flops"):
        load_cost("note11")
    with pytest.raises(ConfigError, match="space"):
        load_cost("cpu")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x80\x04 pickle"])
def test_files_that_are_no_model_are_errors(tmp_path, content):
    path = tmp_path / "model.npz"
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"model\.npz") as caught:
        load_cost(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("block_ms", np.zeros(3)),
        ("block_ms", np.array([None])),
        ("fixed_ms", np.full(5, np.nan)),
        ("kernels", np.array([7, 5, 3])),
        ("log_ratio", np.full((5, 243, 12), 50.0)),
        ("grid_ms", np.zeros((5, 12))),
        ("fixed_ms", np.array(["one"] * 5)),
        ("fixed_ms", np.full(5, -30.0)),
        ("weights", np.array(["x"] * 20)),
        ("weights", -np.ones(20)),
        ("factors", np.full(53, np.inf)),
        ("factor_names", np.zeros(53)),
    ],
)
def test_models_are_validated(tmp_path, name, array):
    device = "note10" if name in ("weights", "factors", "factor_names") else "p40"
    model = load_model(MODELS / f"latency_{device}.npz")
    array = np.resize(array, model.arrays[name].shape) if device == "note10" else array
    path = tmp_path / "model.npz"
    model.save(path)
    assert np.array_equal(load_cost(path)(sample()), load_cost(device)(sample()))
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, **{**model.arrays, name: array})
    with pytest.raises(TableError, match="expected"):
        load_cost(path)(sample())


def test_a_fit_recovers_a_sum_over_blocks(tmp_path):
    space = SPACE.restrict(resolutions=(160, 224))
    arrays = sample(space, 250)
    truth = 0.5 + macs_cost(MOBILENET_V3)(arrays) / 2e7
    model = fit_network(arrays, truth, MOBILENET_V3, "made-up")
    fresh = sample(space, 200, seed=1)
    expected = 0.5 + macs_cost(MOBILENET_V3)(fresh) / 2e7
    assert 100 * np.abs(model(fresh) / expected - 1).mean() < 1
    assert model.card["held_out"]["mape"] < 1
    path = tmp_path / "made-up.npz"
    model.save(path)
    assert np.array_equal(load_cost(path)(fresh), model(fresh))
    first = path.read_bytes()
    model.save(path)
    assert path.read_bytes() == first


def test_own_measurements_are_checked():
    with pytest.raises(TableError, match="at least 50 measured networks, got 20"):
        fit_network(sample(n=20), np.ones(20), MOBILENET_V3)
    with pytest.raises(TableError, match="0 ms"):
        fit_network(sample(n=60), np.zeros(60), MOBILENET_V3)


def test_searching_needs_neither_torch_nor_scipy():
    code = (
        "import sys; from nas.cost.devices import load_cost\n"
        "load_cost('note10'); load_cost('v100')\n"
        "bad = {'torch', 'scipy', 'sklearn'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
