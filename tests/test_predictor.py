"""Accuracy predictors: inference, files, errors, fitting and what ships."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from few import changed, floats, inverted

from compofa.errors import DataError, SpaceError, TableError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.families.resnet50d import RESNET50D
from compofa.space.arrays import SubnetArrays
from nas.accuracy.base import CardPredictor, interval_90
from nas.accuracy.fit import fit_accuracy, half_width
from nas.accuracy.predictor import NAMES, FittedPredictor, load_accuracy_model
from nas.model_file import read_npz
from nas.tables import read_subnets
from tools.fit.accuracy import fit_distilled
from tools.fit.distill import one_hot, recombine
from tools.fit.row_blocks import find_blocks

REFERENCE = os.environ.get("COMPOFA_REFERENCE_DATA")
needs_reference = pytest.mark.skipif(not REFERENCE, reason="COMPOFA_REFERENCE_DATA is not set")
EXPAND = {2: 3, 3: 4, 4: 6}


def subnets(count: int, resolutions: tuple[int, ...], *key: int, elastic=False) -> SubnetArrays:
    """Random compound subnets with kernels 3, 5, 3, 3, 5 by stage, or elastic ones."""
    generator = np.random.default_rng(key)
    d = generator.integers(2, 5, (count, 5))
    present = np.arange(4) < d[:, :, None]
    fixed = np.array([3, 5, 3, 3, 5])[None, :, None]
    kernels = generator.choice([3, 5, 7], present.shape) if elastic else fixed
    e = np.vectorize(EXPAND.get)(d)[:, :, None]
    r = generator.choice(resolutions, count)
    return inverted((kernels * present).reshape(count, 20), (e * present).reshape(count, 20), d, r)


def truth(arrays: SubnetArrays) -> np.ndarray:
    size = (arrays.depths * [1, 2, 1, 2, 3]).sum(axis=1)
    return (
        60
        + 0.5 * size
        + 0.2 * arrays.depths[:, 0] * arrays.depths[:, 1]
        + 0.4 * (arrays.resolutions - 24)
    )


def fit_own() -> CardPredictor:
    arrays = subnets(60, (24, 32), 1)
    noise = np.random.default_rng(2).normal(0, 0.2, 60)
    return fit_accuracy(arrays, truth(arrays) + noise)


def fit_small() -> FittedPredictor:
    arrays = subnets(60, (24, 32), 1)
    noise = np.random.default_rng(2).normal(0, 0.2, 60)
    return fit_distilled(
        arrays, truth(arrays) + noise, name="custom", steps=15, samples=4000, folds=3
    )


@pytest.fixture(scope="module")
def small() -> FittedPredictor:
    return fit_small()


@pytest.fixture(scope="module", params=["own records", "distilled"])
def model(request) -> CardPredictor:
    return fit_own() if request.param == "own records" else request.getfixturevalue("small")


def test_a_fit_averages_the_noise_of_its_measurements(model):
    fresh = subnets(500, (24, 32), 3)
    error = model.predict(fresh) - truth(fresh)
    assert np.abs(error).mean() < 0.25
    held_out = model.card["held_out"]["all"]
    assert held_out["mae"] < 0.5
    assert held_out["spearman"] > 0.95
    assert 0.75 < held_out["coverage_90"] <= 1.0
    noisy = truth(fresh) + np.random.default_rng(3).normal(0, 0.2, 500)
    inside = np.abs(model.predict(fresh) - noisy) < 1.645 * model.std(fresh)
    assert 0.8 < inside.mean() < 0.99


@pytest.mark.parametrize("fit", [fit_own, fit_small])
def test_fit_is_the_same_bit_for_bit_and_leaves_global_generators_alone(fit):
    np.random.seed(7)  # noqa: NPY002 - the disturbed global state is the point
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    one, again = fit(), fit()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    for key, value in one.arrays.items():
        np.testing.assert_array_equal(value, again.arrays[key])
    assert one.card == again.card


def percent_of(images: int, seed: int, arrays: SubnetArrays) -> np.ndarray:
    """Accuracies near 100 %, counted on ``images`` images."""
    share = 1 / (1 + np.exp(-(truth(arrays) - 62) / 2))
    return 100 * np.random.default_rng(seed).binomial(images, share) / images


@pytest.mark.parametrize("images", [30, 400])
def test_nothing_reaches_100_percent_where_the_images_are_counted(images, tmp_path):
    arrays, fresh = subnets(60, (24, 32), 1), subnets(500, (24, 32), 3)
    top1 = percent_of(images, 5, arrays)
    assert top1.max() == 100
    model = fit_accuracy(arrays, top1, images=images)
    expected, (low, high) = model.predict(fresh), model.interval(fresh)
    assert low.min() > 0 and high.max() < 100
    assert (low < expected).all() and (expected < high).all()
    assert (high - expected < expected - low)[expected > 90].all(), "there is less room above"
    model.save(tmp_path / "own.npz")
    again = load_accuracy_model(tmp_path / "own.npz")
    for before, after in zip(model.interval(fresh), again.interval(fresh), strict=True):
        np.testing.assert_array_equal(before, after)
    true = 100 / (1 + np.exp(-(truth(fresh) - 62) / 2))
    assert np.abs(expected - true).mean() < 25 / images**0.5


def test_intervals_widen_where_folds_were_missed_and_cards_cannot_break_them(small):
    assert half_width(np.full(50, 3.0)) == 3 and half_width(np.zeros(30)) == 1.645
    errors = np.random.default_rng(0).normal(size=2000)
    assert half_width(errors) == pytest.approx(1.645, abs=0.08)
    arrays = subnets(60, (24, 32), 1)
    model = fit_own()
    low, high = model.interval(arrays)
    np.testing.assert_allclose(high - low, 2 * model.half_width * model.std(arrays), rtol=1e-6)
    for value in ("wide", -1, 0, None, float("nan"), 1e9, True, [2]):
        model.card["half_width_90"] = value
        assert model.half_width == 1.645
    low, high = interval_90(small, arrays)
    np.testing.assert_allclose(high - low, 2 * 1.645 * small.std(arrays), rtol=1e-6)


@needs_reference
@pytest.mark.parametrize(
    "table", ["compofa_elastic_r128_160_192", "ofa_mbv3_w1.0_r128_160_192", "ofa_mbv3_w1.0_r224"]
)
def test_intervals_have_nine_of_ten_measurements_that_were_left_out(table):
    path = Path(REFERENCE) / "accuracy" / f"{table}.csv.gz"
    arrays, columns = read_subnets(path, ["top1"])
    inside = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(arrays))
        some, rest = order[:80], order[80:]
        low, high = fit_accuracy(arrays[some], columns["top1"][some]).interval(arrays[rest])
        inside.append(((low <= columns["top1"][rest]) & (columns["top1"][rest] <= high)).mean())
    assert 0.86 < np.mean(inside) < 0.96


@pytest.mark.parametrize("resolutions", [(24,), (24, 28, 32)])
def test_errors_left_out_are_those_of_a_fit_without_the_rows(resolutions):
    arrays = subnets(60, resolutions, 20)
    top1 = truth(arrays) + np.random.default_rng(21).normal(0, 0.2, 60)
    whole, groups = fit_accuracy(arrays, top1), np.arange(60) % 6
    mean, std = whole.left_out(groups)
    rows = groups == 2
    kept = {**whole.arrays}
    for key in ("features", "resolutions", "top1"):
        kept[key] = kept[key][~rows]
    part = type(whole)(kept, {}, "part")
    left = arrays[rows]
    # Centre and scale are those of the rows left: close, not equal.
    np.testing.assert_allclose(mean[rows], part.predict(left), atol=0.05)
    np.testing.assert_allclose(std[rows], part.std(left), rtol=0.1)


def test_predict_equals_the_network_it_stands_for(small):
    arrays = subnets(9000, (24, 32), 4)
    a = {key: value.astype(np.float64) for key, value in small.arrays.items()}
    x = one_hot(arrays, small.arrays["kernels"], small.arrays["expands"]).astype(np.float64)
    hidden = np.maximum(x @ a["input_weight"].reshape(x.shape[1], -1) + a["input_bias"], 0) ** 2
    hidden = np.maximum(hidden @ a["hidden_weight"] + a["hidden_bias"], 0)
    y = hidden @ a["output_weight"] + a["output_bias"]
    y += x @ a["skip_weight"].reshape(x.shape[1], -1)
    expected = y[np.arange(9000), (arrays.resolutions == 32).astype(int)]
    np.testing.assert_allclose(small.predict(arrays), expected, atol=2e-4)
    shuffled = np.random.default_rng(0).permutation(9000)
    moved = arrays[shuffled]
    np.testing.assert_allclose(small.predict(moved), expected[shuffled], atol=2e-4)


def test_accuracy_between_anchors_is_interpolated_linearly(small):
    arrays = subnets(50, (24,), 5)
    at = {r: small.predict(changed(arrays, resolutions=np.full(50, r))) for r in (24, 26, 32)}
    np.testing.assert_allclose(at[26], 0.75 * at[24] + 0.25 * at[32], rtol=1e-9)
    std = {r: small.std(changed(arrays, resolutions=np.full(50, r))) for r in (24, 26, 32)}
    assert (std[26] > 0).all()
    assert (small.std(arrays) >= small.model_std(arrays)).all()


def test_float_arrays_and_empty_input(model):
    arrays = subnets(20, (24,), 6)
    np.testing.assert_array_equal(model.predict(arrays), model.predict(floats(arrays)))
    assert model.predict(arrays[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: changed(a, resolutions=np.full(20, 33)), "24 to 32"),
        (lambda a: changed(a, resolutions=np.full(20, np.nan)), "24 to 32"),
        (
            lambda a: changed(a, kernel=np.where(a.blocks["kernel"] == 5, 9, a.blocks["kernel"])),
            "kernel.* 3, 5",
        ),
        (
            lambda a: changed(
                a, kernel=np.where(a.blocks["kernel"] == 5, 10**9, a.blocks["kernel"])
            ),
            "kernel.* 3, 5",
        ),
        (lambda a: changed(a, kernel=-a.blocks["kernel"]), "kernel.* 3, 5"),
        (
            lambda a: changed(a, expand=np.where(a.blocks["expand"] == 4, 5, a.blocks["expand"])),
            "expand.* 3, 4, 6",
        ),
        (
            lambda a: changed(
                a, expand=np.where(a.blocks["expand"] == 4, np.nan, a.blocks["expand"])
            ),
            "expand.* 3, 4, 6",
        ),
        (
            lambda a: changed(a, expand=np.where(a.blocks["kernel"] > 0, a.blocks["expand"], 3)),
            "blocks",
        ),
        (
            lambda a: changed(
                a, kernel=a.blocks["kernel"][:, :16], expand=a.blocks["expand"][:, :16]
            ),
            "16",
        ),
    ],
)
def test_subnets_outside_the_model_are_named(model, change, message):
    with pytest.raises(SpaceError, match=message) as caught:
        model.predict(change(subnets(20, (24,), 6)))
    assert "\n" not in str(caught.value)


def test_saved_model_is_read_back_exactly(model, tmp_path):
    path = tmp_path / "mine.npz"
    model.save(path)
    back = load_accuracy_model(path)
    arrays = subnets(100, (24, 32), 8)
    np.testing.assert_array_equal(model.predict(arrays), back.predict(arrays))
    np.testing.assert_array_equal(model.std(arrays), back.std(arrays))
    assert back.card == json.loads((tmp_path / "mine.json").read_text())
    assert back.name == "mine"
    assert "MAE" in back.error


@pytest.mark.parametrize(
    "held_out",
    [None, [], {}, "text", 3, {"24": {}}, {"24": 1}, {"24": {"mae": "\x1b[1m", "spearman": 1}}],
)
def test_a_card_without_figures_is_said_to_have_none(small, held_out):
    model = FittedPredictor(small.arrays, {**small.card, "held_out": held_out}, "mine")
    assert "MAE" not in model.error and "Spearman" not in model.error


def test_accuracies_that_are_all_equal_have_no_ranks(tmp_path):
    arrays = subnets(40, (24, 32), 3)
    same = np.where(arrays.resolutions == 24, 70.0, truth(arrays))
    for top1, error in ((same, "Spearman"), (np.full(40, 70.0), "no ranks")):
        model = fit_accuracy(arrays, top1)
        model.save(tmp_path / "mine.npz")
        assert error in load_accuracy_model(tmp_path / "mine.npz").error
        assert model.card["held_out"]["24"]["spearman"] is None
        text = (tmp_path / "mine.json").read_text()
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


OWN = {
    "few.npz": ("log_std", np.zeros(3)),
    "wide.npz": ("top1", np.full(60, 101.0)),
    "huge.npz": ("features", np.full((60, 1), 2.0)),
    "falling.npz": ("values", np.array([5.0, 3, 3, 4, 6])),
    "twice.npz": ("names", np.array(["kernel", "kernel"])),
    "lines.npz": ("names", np.array(["kernel", "a\n\x1b[1m"])),
    "counts.npz": ("counts", np.array([2, 4])),
    "none.npz": ("counts", np.array([0, 5])),
    "overflow.npz": ("counts", np.array([2**63 - 1, 2**63 - 1])),
    "text.npz": ("values", np.array(list("abcde"))),
    "uneven.npz": ("shape", np.array([20, 3])),
    "beyond.npz": ("columns", np.array([999])),
}


def test_damaged_models_of_own_records_get_one_line(tmp_path):
    whole = fit_own()
    for name, (key, value) in OWN.items():
        np.savez(tmp_path / name, **{**whole.arrays, key: value})
        with pytest.raises(TableError, match=name) as caught:
            load_accuracy_model(tmp_path / name)
        assert "\n" not in str(caught.value) and key in str(caught.value)
    for images, number, key in ((400, 2, "format"), (0, 3, "images"), (10**12, 3, "images")):
        counted = {"images": np.array(images), "format": np.array(number)}
        np.savez(tmp_path / "counted.npz", **{**whole.arrays, **counted})
        with pytest.raises(TableError, match=key):
            load_accuracy_model(tmp_path / "counted.npz")


def broken_files(model: FittedPredictor, folder: Path) -> dict[str, Path]:
    model.save(folder / "good.npz")
    good = (folder / "good.npz").read_bytes()
    contents = {
        "empty.npz": b"",
        "empty.pth": b"",
        "truncated.npz": good[: len(good) // 2],
        "flipped.npz": good[:400] + bytes(255 - byte for byte in good[400:600]) + good[600:],
        "text.pth": b"hello, this is no predictor\n" * 50,
        "pickle.pth": pickle.dumps({"a": 1}),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with zipfile.ZipFile(folder / "other.npz", "w") as archive:
        archive.writestr("readme.txt", "a zip of something else")
    arrays = dict(model.arrays)
    changes = {
        "missing.npz": {key: value for key, value in arrays.items() if key != "noise"},
        "extra.npz": {**arrays, "more": np.zeros(3)},
        "nan.npz": {**arrays, "noise": np.full(2, np.nan, np.float32)},
        "shape.npz": {**arrays, "output_bias": np.zeros(3, np.float32)},
        "dtype.npz": {**arrays, "kernels": np.array([3.0, 5.0])},
        "object.npz": {**arrays, "noise": np.array([{}, {}], dtype=object)},
        "order.npz": {**arrays, "resolutions": np.array([32, 24])},
        "version.npz": {**arrays, "format": np.array(99)},
        "elsewhere.npz": {"weights": np.zeros(3)},
    }
    for name, content in changes.items():
        np.savez(folder / name, **content)
    names = [*contents, "other.npz", *changes]
    return {name: folder / name for name in names}


def test_files_that_are_something_else_get_one_line(small, tmp_path):
    for name, path in broken_files(small, tmp_path).items():
        with pytest.raises(TableError) as caught:
            load_accuracy_model(path)
        assert "\n" not in str(caught.value), name
        assert name in str(caught.value)


def test_a_model_is_read_from_one_file_whatever_takes_its_name(small, tmp_path, monkeypatch):
    path = tmp_path / "model.npz"
    small.save(path)
    whole, load = read_npz(path, 1 << 20), np.load

    def replaced(*args: object, **more: object) -> object:
        path.unlink()
        path.write_bytes(b"another")
        return load(*args, **more)

    monkeypatch.setattr(np, "load", replaced)
    again = read_npz(path, 1 << 20)
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[name], whole[name]) for name in whole)


def test_an_archive_with_names_that_are_no_text_is_refused(tmp_path):
    path = tmp_path / "predictor.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("é", b"")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\x83\x83"))
    with pytest.raises(TableError, match=r"predictor\.pth"):
        load_accuracy_model(path)


def test_unknown_names_list_the_known_ones(tmp_path):
    for what in ("resnet", tmp_path, tmp_path / "none.npz"):
        with pytest.raises(TableError, match=r"ofa_mbv3_w1\.0, .*compofa"):
            load_accuracy_model(what)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_models_answer_for_their_network(name):
    model = load_accuracy_model(name)
    arrays = subnets(400, (160, 176, 192, 208, 224), 9, elastic=True)
    top1, std = model.predict(arrays), model.std(arrays)
    assert top1.dtype == std.dtype == np.float64
    assert ((top1 > 60) & (top1 < 80)).all()
    assert ((std > 0.02) & (std < 3)).all()
    up = [
        model.predict(changed(arrays, resolutions=np.full(400, r))).mean()
        for r in range(128, 225, 16)
    ]
    assert (np.diff(up) > 0.2).all()
    deep = subnets(400, (224,), 9, elastic=True)
    deep_top1 = model.predict(deep)
    assert np.corrcoef(deep.depths.sum(axis=1), deep_top1)[0, 1] > 0.7
    assert model.card["sources"]
    assert model.card["license"]


def test_shipped_uncertainty_is_larger_where_nothing_was_measured():
    arrays = subnets(200, (192,), 10, elastic=True)
    higher = changed(arrays, resolutions=np.full(200, 224))
    compofa = load_accuracy_model("compofa")
    assert (compofa.model_std(higher) > 1.3 * compofa.model_std(arrays)).mean() > 0.95
    measured = load_accuracy_model("ofa_mbv3_d234_e346_k357_w1.0")
    unmeasured = load_accuracy_model("ofa_mbv3_d234_e346_k357_w1.2")
    assert (unmeasured.std(higher) > 1.5).all()
    np.testing.assert_array_equal(unmeasured.predict(higher), measured.predict(higher))
    assert "width" in unmeasured.error


def test_inference_does_not_import_torch():
    code = (
        "import sys, numpy as np; from nas.accuracy.predictor import load_accuracy_model as load; "
        "from compofa.networks.zoo import network_spec; "
        "space = network_spec('compofa', resolutions=(160, 224)).space; "
        "load('compofa').predict(space.arrays_of([space.smallest, space.largest])); "
        "assert not {'torch', 'scipy', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_blocks_of_rows_are_found():
    arrays = subnets(360, (128, 160), 11, elastic=True)
    generator = np.random.default_rng(12)
    label = np.repeat([0, 1, 2], [100, 140, 120])
    offset = np.array([[-0.3, -0.1], [0.4, 0.3], [-0.2, 0.1]])[
        label, (arrays.resolutions == 160) * 1
    ]
    noise = generator.normal(0, 0.1, 360)
    found = find_blocks(arrays, truth(arrays) + noise + offset)
    assert len(np.unique(found)) == 3
    assert (found != label).sum() <= 6
    assert (find_blocks(arrays, truth(arrays) + noise) == 0).all()


def test_offsets_are_removed_from_the_fit():
    arrays = subnets(240, (24, 32), 13)
    label = np.arange(240) // 60
    offset = np.array([-0.4, 0.4, -0.3, 0.3])[label]
    noise = np.random.default_rng(14).normal(0, 0.05, 240)
    options = {"name": "custom", "steps": 20, "samples": 4000, "folds": 3, "subset": 240}
    model = fit_distilled(arrays, truth(arrays) + noise + offset, blocks=label, **options)
    assert model.card["cv_mae"] < 0.12 < 0.25 < model.card["cv_mae_raw"]
    found = [np.mean([block["24"], block["32"]]) for block in model.card["block_offsets"]]
    np.testing.assert_allclose(found, [-0.4, 0.4, -0.3, 0.3], atol=0.12)
    assert model.arrays["noise"].min() > 0.25


def test_bad_records_are_refused():
    arrays = subnets(30, (24,), 15)
    few = arrays[:10]
    with pytest.raises(DataError, match="20"):
        fit_accuracy(few, truth(few))
    with pytest.raises(DataError, match="10"):
        fit_accuracy(arrays, truth(few))
    with pytest.raises(DataError, match="percent"):
        fit_accuracy(arrays, truth(arrays) * np.nan)
    with pytest.raises(DataError, match=r"images.* 0"):
        fit_accuracy(arrays, truth(arrays), images=0)


def test_recombined_subnets_keep_the_coupling():
    drawn = recombine(subnets(200, (24,), 16), 1000, np.random.default_rng(17))
    stages = drawn.blocks["expand"].reshape(1000, 5, 4)
    assert (stages.max(axis=2) == np.vectorize(EXPAND.get)(drawn.depths)).all()
    assert ((stages > 0).sum(axis=2) == drawn.depths).all()
    assert ((drawn.blocks["kernel"] > 0) == (drawn.blocks["expand"] > 0)).all()


def measured(path):
    arrays, columns = read_subnets(path, ["top1"])
    return arrays, columns["top1"]


@needs_reference
def test_published_predictor_ranks_measured_subnets():
    folder = Path(REFERENCE)
    model = load_accuracy_model(folder / "predictors" / "acc_predictor.pth")
    arrays, top1 = measured(folder / "accuracy" / "ofa_mbv3_w1.0_r224.csv.gz")
    fraction = model.predict(arrays)
    ranks = [np.argsort(np.argsort(values)) for values in (fraction, top1)]
    assert np.corrcoef(*ranks)[0, 1] > 0.98
    assert abs((model.predict_percent(arrays) - top1).mean() - 6) < 0.5
    at = {
        r: model.predict(changed(arrays, resolutions=np.full(len(top1), r)))
        for r in (176, 180, 192)
    }
    np.testing.assert_allclose(at[180], 0.75 * at[176] + 0.25 * at[192], atol=1e-6)


@needs_reference
def test_published_resnet_predictor_rises_with_its_choices():
    model = load_accuracy_model(Path(REFERENCE) / "predictors" / "ofa_resnet50_acc_predictor.pth")
    space = RESNET50D.free_space(tuple(model.resolutions[:-2]))
    arrays = space.arrays(space.sample_genes(np.random.default_rng(0), 20_000))
    top1 = model.predict_percent(arrays)
    for values in (arrays.resolutions, *arrays.depths.T, *arrays.outer.T):
        means = [top1[values == value].mean() for value in np.unique(values)]
        assert len(means) > 1 and (np.diff(means) > 0).all()
    some = arrays[:9]
    at = {r: model.predict(changed(some, resolutions=np.full(9, r))) for r in (192, 200, 224, 256)}
    np.testing.assert_allclose(at[200], 0.75 * at[192] + 0.25 * at[224], atol=1e-6)
    assert list(space.subnets_of(some)) == list(space.subnets_of(space.arrays_of(
        [space.decode(row) for row in space.genes_of(some)]
    )))  # fmt: skip
    with pytest.raises(SpaceError, match=r"128 to 256.* 112"):
        model.predict(changed(some, resolutions=np.full(9, 112)))
    with pytest.raises(SpaceError, match="ofa_resnet50"):
        model.predict(MOBILENET_V3.free_space().arrays(np.zeros((1, 46), int)))
    with pytest.raises(SpaceError, match=r"expand.* 0\.2, 0\.25, 0\.35.* 0\.5"):
        model.predict(changed(some, expand=np.full_like(some.blocks["expand"], 0.5)))
    with pytest.raises(SpaceError, match="20 blocks"):
        load_accuracy_model("compofa").predict(some)


@needs_reference
@pytest.mark.parametrize(
    ("name", "table", "most"),
    [
        ("ofa_mbv3_w1.0", "ofa_mbv3_w1.0_r224", 0.045),
        ("compofa", "compofa_elastic_r128_160_192", 0.33),
    ],
)
def test_shipped_models_fit_their_tables(name, table, most):
    arrays, top1 = measured(Path(REFERENCE) / "accuracy" / f"{table}.csv.gz")
    model = load_accuracy_model(name)
    error = np.abs(model.predict(arrays) - top1)
    assert error.mean() < most
    assert (error < 2 * model.std(arrays)).mean() > 0.93
