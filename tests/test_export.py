import copy
import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compofa.errors import CheckpointError, CompofaError, ConfigError
from compofa.io import export as module
from compofa.io.export import (
    SUFFIXES,
    card_path,
    export,
    fold_bn,
    load_exported,
    require_packages,
    subnet_card,
)
from compofa.networks.layout import layout, macs, params
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.seeds import rng

SIDE = 16


def make(seed: int = 0, net_id: str = "compofa-elastic-small") -> tuple[StaticNetwork, dict]:
    """Return a random subnet whose BN does something, and its card."""
    spec = network_spec(net_id, 5, width_mult=0.1, resolutions=(SIDE,))
    network = extract(Supernet(spec, seed), subnet := spec.space.sample(rng(seed))).eval()
    generator = torch.Generator().manual_seed(seed)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                value.add_(torch.rand(value.shape, generator=generator), alpha=0.5)
    return network, subnet_card(spec, subnet)


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9))


def need(format: str) -> None:
    for name in module.NEEDS.get(format, ()):
        pytest.importorskip(name, reason=f"{name}, of the extra 'export', is not installed")


@pytest.mark.parametrize("seed", range(3))
def test_folded_network_is_equal_and_has_no_bn(seed: int) -> None:
    network, _ = make(seed)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = fold_bn(network)
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        expected = network(images())
        assert expected.std() > 1e-3
        torch.testing.assert_close(folded(images()), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_folding_uses_running_statistics_of_a_training_network() -> None:
    network, _ = make()
    expected = network(images())
    folded = fold_bn(network.train())
    assert network.training
    torch.testing.assert_close(folded(images()), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "net_id", ["compofa-elastic-small", "ofa-proxyless-small", "ofa-resnet50-small"]
)
def test_a_subnet_can_be_scripted(net_id: str) -> None:
    network, _ = make(2, net_id)
    for plain in (network, fold_bn(network)):
        scripted = torch.jit.script(plain)
        assert not scripted.training
        for count in (1, 4):
            with torch.no_grad():
                assert torch.equal(scripted(images(count)), plain(images(count)))
    network.train()
    assert torch.jit.script(network).training and network.training
    first = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    first.eval()  # a user's choice
    torch.jit.script(network)
    assert not first.training


def test_card_tells_what_layout_tells() -> None:
    spec = network_spec("ofa-small", 5, resolutions=(SIDE,))
    subnet = spec.space.sample(rng(1))
    card = subnet_card(spec, subnet)
    layers = layout(spec.backbone, subnet, 5)
    assert (card["params"], card["macs"]) == (params(layers), macs(layers))
    assert card["subnet"] == subnet.to_config()
    assert json.loads(json.dumps(card)) == card


@pytest.mark.parametrize(
    ("format", "fold"), [(name, True) for name in SUFFIXES] + [("torchscript", False)]
)
def test_exported_file_agrees_at_any_batch_size(format: str, fold: bool, tmp_path: Path) -> None:
    need(format)
    network, card = make(1)
    path = tmp_path / f"net{SUFFIXES[format]}"
    difference = export(network, path, format, card, fold=fold)
    assert 0 <= difference <= 1e-5
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.json"}
    written = json.loads((tmp_path / f"{path.name}.json").read_text())
    assert written == {
        "file": path.name,
        "format": format,
        "bn_folded": fold,
        **card,
        "max_difference": difference,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    if format == "onnx":
        check_graph(path)
    run = module._load(path.read_bytes(), format)
    with torch.no_grad():
        for count in (1, 4, 7):
            expected = network(images(count))
            torch.testing.assert_close(run(images(count)), expected, rtol=0, atol=1e-5)


def check_graph(path: Path) -> None:
    import onnx

    model = onnx.load(path)
    onnx.checker.check_model(model)
    (given,), (made,) = model.graph.input, model.graph.output
    assert (given.name, made.name) == ("images", "logits")
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert dims == ["batch", 3, SIDE, SIDE]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}


def test_a_file_that_disagrees_leaves_nothing_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, card = make()
    path = tmp_path / "net"
    path.write_text("old")
    other, _ = make()
    other.classifier.bias.data += 1
    serialise = module._serialise
    monkeypatch.setattr(module, "_serialise", lambda _, *rest: serialise(other, *rest))
    with pytest.raises(CompofaError, match=r"0\.0001 .* 1\b"):
        export(network, path, "torchscript", card)
    assert [p.name for p in tmp_path.iterdir()] == ["net"]
    assert path.read_text() == "old"


def test_the_tolerance_is_relative_to_large_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, card = make()
    network.classifier.bias.data += 1000
    other = copy.deepcopy(network)
    other.classifier.bias.data += 0.01
    serialise = module._serialise
    monkeypatch.setattr(module, "_serialise", lambda _, *rest: serialise(other, *rest))
    difference = export(network, tmp_path / "net.ts", "torchscript", card)
    assert difference == pytest.approx(0.01, rel=0.05)


def test_not_a_number_disagrees(tmp_path: Path) -> None:
    network, card = make()
    network.classifier.bias.data[2] = float("nan")
    with pytest.raises(CompofaError, match=r"\bnan\b"):
        export(network, tmp_path / "net.ts", "torchscript", card)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, card = make()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompofaError, match=r"/net\.ts\S*: No space left on device") as caught:
        export(network, tmp_path / "net.ts", "torchscript", card)
    assert "draft" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["file/net.ts", "folder"])
def test_places_that_cannot_be_written(output: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    network, card = make()
    with pytest.raises(CompofaError, match=output.partition("/")[0]) as caught:
        export(network, tmp_path / output, "torchscript", card)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "folder").iterdir())


def test_unknown_formats_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'tflite'.*onnx, torch"):
        require_packages("tflite")
    monkeypatch.setitem(module.NEEDS, "onnx", ("torch", "no_such_package"))
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install 'compofa\[export\]"):
        require_packages("onnx")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), r"net\.safetensors"),
        (lambda path: path.write_bytes(b"x" * 40), r"net\.safetensors"),
        (lambda path: foreign(path, {}), r"net\.safetensors"),
        (lambda path: foreign(path, {"compofa": "{}"}), r"net\.safetensors"),
    ],
)
def test_other_safetensors_are_refused(damage: Any, message: str, tmp_path: Path) -> None:
    need("safetensors")
    network, card = make()
    export(network, path := tmp_path / "net.safetensors", "safetensors", card)
    card_path(path).unlink()  # what has none is judged by itself
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_exported(path)
    assert "\n" not in str(caught.value)


def test_a_file_is_held_to_the_hash_of_its_card(tmp_path: Path) -> None:
    need("safetensors")
    path, card = tmp_path / "net.safetensors", tmp_path / "net.safetensors.json"
    for seed in (0, 1):
        network, known = make(seed)
        export(network, path, "safetensors", known)
        with torch.no_grad():
            assert torch.equal(load_exported(path)(images()), network(images()))
        if seed == 0:
            old = path.read_bytes()
    new = path.read_bytes()
    flipped = new[:-1] + bytes([new[-1] ^ 1])  # of a weight: all else about the file is sound
    for content in (old, flipped):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"SHA-256 \w{64} .*net\.safetensors\.json"):
            load_exported(path)
    path.write_bytes(new)
    written = json.loads(card.read_text())
    for text, message in (
        ("[]", r"net\.safetensors\.json.* card"),
        ("{", r"net\.safetensors\.json"),
    ):
        card.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_exported(path)
    del written["sha256"]
    card.write_text(json.dumps(written))  # an earlier version's
    load_exported(path)
    card.unlink()
    load_exported(path)


def test_a_stream_gets_the_file_and_no_card(tmp_path: Path) -> None:
    need("safetensors")
    network, card = make()
    fifo, read = tmp_path / "net", []
    os.mkfifo(fifo)
    thread = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    thread.start()
    export(network, fifo, "safetensors", card)
    thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    (tmp_path / "copy").write_bytes(read[0])
    with torch.no_grad():
        assert torch.equal(load_exported(tmp_path / "copy")(images()), network(images()))


def foreign(path: Path, metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, path, metadata)


def test_exported_weights_are_checked_as_any_others(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    need("safetensors")
    from safetensors import safe_open
    from safetensors.torch import save_file

    network, card = make()
    export(network, path, "safetensors", card)
    card_path(path).unlink()  # of a version that wrote no hash
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in weights if name.endswith("running_var"))
    for value in (-3.0, float("nan")):
        save_file({**weights, name: weights[name] + value}, path, metadata)
        with pytest.raises(CheckpointError, match=name):
            load_exported(path)
