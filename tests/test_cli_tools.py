import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import Outcome, called

from compofa.cli.tools import main
from compofa.data import Normalisation, load_dataset
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint, file_hash, load_checkpoint, save_checkpoint
from compofa.io.open import open_network
from compofa.networks.families import subnet_from_config
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.zoo import network_spec
from compofa.nn.build import build
from compofa.nn.calibrate import calibrate
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.seeds import rng


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """The command in an empty folder, as a function."""
    monkeypatch.chdir(tmp_path)

    return lambda *argv: called(main, argv, capsys)


def export(*argv: str) -> tuple[str, ...]:
    return ("export", "compofa-digits", *argv, "--to", "torchscript")


def run_file(path: str, images: torch.Tensor) -> torch.Tensor:
    with pytest.warns(DeprecationWarning):
        return torch.jit.load(path)(images)


def test_export_calibrates_as_evaluation_does(call: Callable[..., Outcome]) -> None:
    result = call(*export("smallest", "--calibration-images", "50", "--fold-bn"))
    assert result.status == 0, result.err
    opened = open_network("compofa-digits")
    path, checkpoint = opened.path, opened.checkpoint
    subnet = checkpoint.network.space.smallest.at(checkpoint.image_size)
    evaluator = Evaluator(
        load_dataset("digits"),
        normalisation=Normalisation(checkpoint.mean, checkpoint.std),
        calibration_images=50,
    )
    batches = evaluator.calibration_batches(subnet.resolution)
    expected = calibrate(checkpoint.build(), batches, subnet)
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = run_file("compofa-digits.ts", images)
        torch.testing.assert_close(logits, expected(images), rtol=0, atol=1e-5)
    card = json.loads(Path("compofa-digits.ts.json").read_text())
    assert card["subnet"] == subnet.to_config()
    assert card["checkpoint"] == file_hash(path)
    assert card["source"] == "compofa-digits"
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert card["normalisation"]["mean"] == card["input"]["mean"] == list(checkpoint.mean)
    assert [step["size"] for step in card["input"]["steps"]] == [[8, 8], [16, 16]]
    assert card["calibration"] == {"dataset": "digits", "images": 50, "seed": 0}
    assert card["figures"]["validation"] == checkpoint.figures["validation"]["smallest"]
    assert f"{card['params']:,} parameters" in result.out
    assert f"maximal difference from PyTorch {card['max_difference']:.2g}" in result.out


def test_export_of_a_given_subnet_without_calibration(call: Callable[..., Outcome]) -> None:
    checkpoint = open_network("compofa-digits").checkpoint
    subnet = next(iter(checkpoint.network.space.enumerate())).at(12)
    Path("subnet.json").write_text(json.dumps(subnet.to_config()))
    result = call(*export("subnet.json", "--no-calibrate", "--output", "new/net.ts"))
    assert result.status == 0, result.err
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = extract(checkpoint.build(), subnet)(images)
        torch.testing.assert_close(run_file("new/net.ts", images), expected, rtol=0, atol=1e-5)
    card = json.loads(Path("new/net.ts.json").read_text())
    assert subnet_from_config(card["subnet"]) == subnet
    assert card["calibration"] is None
    assert card["figures"] == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("largst",), "SUBNET: "),
        (('{"ks": [3]}',), "e, d"),
        (("largest", "--image-size", "4"), "image size"),
        (("largest", "--calibration-images", "0"), "--calibration-images"),
        (("largest", "--dataset", "digitz"), "digitz"),
        (("largest", "--output", "file/net.ts"), "file"),
    ],
)
def test_export_errs_in_one_line_and_leaves_nothing(
    argv: tuple[str, ...], message: str, call: Callable[..., Outcome]
) -> None:
    Path("file").touch()
    result = call(*export(*argv))
    assert result.status == 1
    assert message in result.err
    assert result.err.count("\n") == 1
    assert [p.name for p in Path().iterdir()] == ["file"]


def test_unknown_nets_and_formats(call: Callable[..., Outcome]) -> None:
    result = call("export", "compofa-digit", "largest", "--to", "pt2")
    assert result.status == 1
    assert "'compofa-digit'" in result.err
    result = call("export", "compofa", "largest", "--to", "pt2")
    assert result.status == 1 and "compofa" in result.err
    result = call("export", "compofa-digits", "largest", "--to", "tflite")
    assert result.status == 2
    assert "'tflite'" in result.err
    assert call("export", "--help").status == 0


def test_convert_there_and_back(call: Callable[..., Outcome]) -> None:
    path = open_network("compofa-digits").path
    for source, target, to in (
        (str(path), "a", "ofa"),
        ("a", "b", "mmrazor"),
        ("b", "c", "compofa"),
    ):
        result = call("convert", source, target, "--to", to)
        assert result.status == 0, result.err
    assert "mmrazor" in result.out and "compofa" in result.out
    expected, found = load_checkpoint(path), load_checkpoint("c")
    assert list(found.weights) == list(expected.weights)
    for name, value in expected.weights.items():
        assert found.weights[name].dtype == value.dtype
        assert torch.equal(found.weights[name], value)
    assert replace(found, weights={}) == replace(expected, weights={})


def test_convert_a_subnet_there_and_back(call: Callable[..., Outcome]) -> None:
    subnet = network_spec("ofa_mbv3_d234_e346_k357_w1.2").space.sample(rng(0))
    Path("a.json").write_text(json.dumps(subnet.to_config()))
    arch = ("--arch", "ofa_mbv3_d234_e346_k357_w1.2")
    assert call("convert", "a.json", "b.yaml", "--to", "mmrazor", *arch).status == 0
    assert call("convert", "b.yaml", "c.json", "--to", "compofa", *arch).status == 0
    assert json.loads(Path("c.json").read_text()) == subnet.to_config()
    result = call("convert", "b.yaml", "d.json", "--to", "ofa")
    assert result.status == 1
    assert "24" in result.err
    assert not Path("d.json").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.pt", "missing.pt"),
        ("missing.yaml", "No such file"),
        ("missing.json", "IN: "),
        ("text.pt", "text.pt"),
        ("text.yaml", "text.yaml: "),
        ("text.json", "text.json: "),
    ],
)
def test_convert_errs_in_one_line(source: str, message: str, call: Callable[..., Outcome]) -> None:
    for name in ("text.pt", "text.yaml", "text.json"):
        Path(name).write_text("hello")
    before = sorted(Path().iterdir())
    result = call("convert", source, "out", "--to", "mmrazor")
    assert result.status == 1
    assert message in result.err
    assert result.err.count("\n") == 1
    assert sorted(Path().iterdir()) == before


def test_what_is_read_is_not_written_over(call: Callable[..., Outcome]) -> None:
    net, subnet = Path("last.pt"), Path("subnet.json")
    save_checkpoint(net, replace(load_checkpoint(shipped()), training={"epoch": 3}))
    subnet.write_text(
        json.dumps(open_network("compofa-digits").checkpoint.network.space.largest.to_config())
    )
    Path("link.pt").symlink_to("last.pt")
    before = {path: path.read_bytes() for path in (net, subnet)}
    for argv in (
        ("convert", "last.pt", "last.pt", "--to", "ofa"),
        ("convert", "last.pt", "./link.pt", "--to", "compofa"),
        ("convert", "link.pt", "last.pt", "--to", "mmrazor"),
        ("convert", "subnet.json", "subnet.json", "--to", "mmrazor"),
        ("export", "last.pt", "largest", "--to", "pt2", "--output", "last.pt"),
        ("export", "last.pt", "subnet.json", "--to", "pt2", "--output", "subnet"),
    ):
        result = call(*argv)
        assert result.status == 1 and "input" in result.err, argv
        assert result.err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in before}
    assert sorted(path.name for path in Path().iterdir()) == ["last.pt", "link.pt", "subnet.json"]


def test_export_does_not_write_over_the_data_set(call: Callable[..., Outcome]) -> None:
    spec = network_spec("compofa-small", 3, width_mult=0.1)
    checkpoint = Checkpoint(spec, Supernet(spec).state_dict(), image_size=8)
    save_checkpoint("net.pt", replace(checkpoint, data_path=str(Path("images.tar").resolve())))
    for name in ("images.tar", "other.tar"):
        Path(name).write_bytes(b"images")
        result = call(
            "export", "net.pt", "largest", "--to", "pt2", "--data-path", "other.tar",
            "--output", name,
        )  # fmt: skip
        assert result.status == 1 and "input" in result.err
        assert Path(name).read_bytes() == b"images"


def test_a_specialised_network_is_not_written_over(call: Callable[..., Outcome]) -> None:
    spec = network_spec("compofa-small", 3, resolutions=(16,))
    network = FixedNetwork.of(spec, spec.space.smallest)
    save_checkpoint("net.pt", Checkpoint(network, build(network).state_dict(), image_size=16))
    assert call("convert", "net.pt", "net", "--to", "ofa").status == 0
    before = {path: path.read_bytes() for path in Path("net").iterdir()}
    for output, to in (("net", "ofa"), ("net/net.config", "compofa"), ("net/init", "compofa")):
        result = call("convert", "net", output, "--to", to)
        assert result.status == 1 and "input" in result.err, output
    assert before == {path: path.read_bytes() for path in Path("net").iterdir()}


def shipped() -> Path:
    return open_network("compofa-digits").path
