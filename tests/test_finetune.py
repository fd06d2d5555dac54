"""Fine-tuning: one network of a supernet, trained by itself."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from few import AfterEpoch

import compofa.io.open
from compofa.cli import evaluate
from compofa.cli.train import main
from compofa.data import Normalisation, load_dataset
from compofa.errors import CompofaError, ConfigError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint, file_hash, load_checkpoint, save_checkpoint
from compofa.io.open import open_network
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.zoo import network_spec
from compofa.nn.calibrate import calibrate
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig
from compofa.training.run import RunResult, train
from compofa.training.sources import take_subnet

pytestmark = pytest.mark.usefixtures("few_digits")

KS = [3, 7, 5, 0] * 5
SUBNET = {"ks": KS, "e": [3, 6, 4, 0] * 5, "d": [3] * 5, "r": 12}
CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a free supernet whose weights and statistics are random."""
    spec = network_spec("ofa-small", 10, width_mult=0.1, resolutions=(16,))
    net = Supernet(spec, seed=3)
    generator = torch.Generator().manual_seed(0)
    for name, value in net.state_dict().items():
        if name.endswith("running_mean"):
            value.copy_(torch.randn(value.shape, generator=generator))
        elif ".matrices." in name:
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    path = tmp_path_factory.mktemp("net") / "net.pt"
    extra = {"classes": CLASSES, "mean": (0.4,) * 3, "std": (0.2,) * 3, "image_size": 16}
    save_checkpoint(path, Checkpoint(spec, net.state_dict(), dataset="digits", **extra))
    return path


def config_of(path: Path | str, **more: Any) -> TrainConfig:
    settings = {"subnet": json.dumps(SUBNET), "image_size": (12,), "batch_size": 45, "epochs": 2}
    return TrainConfig(task="finetune", init_path=str(path), **{**settings, **more})


def begin(config: TrainConfig) -> Checkpoint:
    return take_subnet(open_network(config.init_path), config, load_dataset("digits"))


def go(config: TrainConfig, folder: Path, **more: Any) -> RunResult:
    return train(config, folder, bar=False, **more)


def test_it_begins_with_the_calibrated_subnet(supernet):
    """Any free choice of kernels and widths, with its own statistics and the same inputs."""
    splits, config = load_dataset("digits"), config_of(supernet).resolved()
    begun, whole = begin(config), load_checkpoint(supernet)
    normalisation = Normalisation(whole.mean, whole.std)
    images = Evaluator(splits, normalisation=normalisation).calibration_batches(12)
    subnet = whole.network.space.from_config(SUBNET)
    expected = calibrate(whole.build(), images, subnet)
    assert [b[0] for stage in begun.network.subnet.stages for b in stage] == [3, 7, 5] * 5
    assert (begun.mean, begun.std) == (whole.mean, whole.std)
    assert begun.network.resolution == 12 and begun.network.dropout == config.dropout
    assert begun.weights.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(begun.weights[name], value, msg=name)


def test_one_network_comes_out(supernet, tmp_path, capsys):
    result = go(config_of(supernet, epochs=3, lr=0.05), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["finetune"]
    assert result.figures.keys() == {"fine-tuned"}
    best = load_checkpoint(result.best)
    assert isinstance(best.network, FixedNetwork) and best.network.resolution == 12
    assert (best.mean, best.classes) == ((0.4,) * 3, CLASSES)
    net, begun = best.build(), begin(config_of(supernet).resolved())
    assert any(not torch.equal(v, begun.weights[k]) for k, v in net.state_dict().items())

    out = str(tmp_path / "results.csv")
    words = ["--net", str(result.best), "--part", "validation", "--output", out, "--device", "cpu"]
    assert evaluate.main([*words, "--quiet"]) == 0
    assert f"top-1 {result.figures['fine-tuned']['top1']:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("taught", [False, True])
def test_a_network_is_opened_once(supernet, tmp_path, monkeypatch, taught):
    monkeypatch.chdir(tmp_path)
    real, opened = compofa.io.open._opened, []
    monkeypatch.setattr(
        compofa.io.open, "_opened", lambda *args: opened.append(args) or real(*args)
    )
    words = ["--init-path", str(supernet), "--subnet", "smallest", "--epochs", "1"]
    words += ["--teacher-path", str(supernet)] * taught
    assert main(["--task", "finetune", *words, "--device", "cpu", "--quiet"]) == 0
    assert len(opened) == 1


def test_it_learns(tmp_path):
    """A network of the weights that ship, with its classifier forgotten."""
    config = config_of("compofa-digits", subnet="smallest", image_size=(16,), epochs=4, lr=0.1)
    begun = begin(config.resolved())
    weights = {**begun.weights, "classifier.weight": 0 * begun.weights["classifier.weight"]}
    save_checkpoint(tmp_path / "bare.pt", replace(begun, weights=weights))
    config = replace(config, init_path=str(tmp_path / "bare.pt"), subnet=None)
    found = go(config, tmp_path / "run").figures["fine-tuned"]
    assert found["top1"] > 80, "30 images, 13 % without learning"


def test_other_classes_get_a_classifier_of_their_own(supernet, tmp_path):
    named = replace(load_checkpoint(supernet), classes=tuple("abcdefghij"))
    save_checkpoint(tmp_path / "named.pt", named)
    kept, fresh = (begin(config_of(path).resolved()) for path in (supernet, tmp_path / "named.pt"))
    for name, value in kept.weights.items():
        assert torch.equal(value, fresh.weights[name]) is not (name == "classifier.weight"), name
    assert fresh.classes == CLASSES

    spec = replace(load_checkpoint(supernet).network, classes=3)
    other = Checkpoint(spec, Supernet(spec).state_dict(), dataset="digits", image_size=16)
    save_checkpoint(tmp_path / "three.pt", other)
    begun = begin(config_of(tmp_path / "three.pt").resolved())
    assert begun.network.classes == len(begun.weights["classifier.bias"]) == 10
    begun.build()


def test_resumed_is_uninterrupted(supernet, tmp_path):
    class StopError(Exception):
        pass

    def stop(epoch: int) -> None:
        raise StopError

    whole = go(config_of(supernet), tmp_path / "whole")
    with pytest.raises(StopError):
        go(config_of(supernet), tmp_path / "cut", callbacks=[AfterEpoch(stop)])
    resumed = go(config_of(supernet), tmp_path / "cut", resume=True)
    mine, other = (load_checkpoint(r.last).weights for r in (resumed, whole))
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


def test_a_teacher_may_be_given(supernet, tmp_path):
    plain = go(config_of(supernet, epochs=1), tmp_path / "plain")
    taught = go(config_of(supernet, epochs=1, teacher_path=str(supernet)), tmp_path / "taught")
    weights = [load_checkpoint(r.last).weights["stem.conv.weight"] for r in (plain, taught)]
    assert not torch.equal(*weights)
    origins = load_checkpoint(taught.last).training["origins"]
    origin = [str(supernet), file_hash(supernet)]
    assert origins == {"teacher": origin, "start": origin}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_path": None}, "--init-path: "),
        ({"net": "compofa"}, "--net: .*--task finetune"),
        ({"heuristic": "simple"}, "--heuristic: "),
        ({"task": "compound"}, "--subnet: .*--task compound"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    config = replace(config_of("compofa-digits"), **settings)
    with pytest.raises(ConfigError, match=message):
        config.resolved()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init-path", "nowhere.pt"], "nowhere.pt"),
        (["--init-path", "compofa-digit"], "'compofa-digit'"),
        (["--init-path", "compofa-digits"], "--subnet: "),
        (["--init-path", "compofa-digits", "--subnet", "{"], "--subnet: "),
        (["--init-path", "compofa-digits", "--subnet", json.dumps(SUBNET)], "not in space"),
        (["--init-path", "compofa-digits", "--subnet", '{"ks":3,"e":3,"d":[2,2]}'], "number"),
        ([], "--init-path: "),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--task", "finetune", "--device", "cpu", "--quiet", *words]) == 1
    err = capsys.readouterr().err
    assert message in err and err.strip().count("\n") == 0, err
    assert list(tmp_path.iterdir()) == []


def test_one_network_has_no_subnets(supernet, tmp_path):
    config = config_of(supernet).resolved()
    save_checkpoint(tmp_path / "one.pt", begin(config))
    with pytest.raises(CompofaError, match="--subnet: "):
        go(config_of(tmp_path / "one.pt"), tmp_path / "run")
