import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_weights import assert_same, images, make

from compofa.cli.tools import main
from compofa.errors import CheckpointError, CompofaError, SpaceError
from compofa.io.checkpoint import Checkpoint, file_hash, load_checkpoint
from compofa.io.convert import save_as
from compofa.io.formats.names import from_ours, from_slots
from compofa.io.formats.net_config import from_net_config, is_net_config, read_json, to_net_config
from compofa.io.formats.specialised import find_specialised
from compofa.io.open import open_network
from compofa.networks.families import subnet_from_config
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import at_resolution
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.seeds import rng


def a_checkpoint(net_id: str = "ofa-small") -> Checkpoint:
    net = make(net_id, 1)
    subnet = net.spec.space.sample(rng(1))
    weights = extract(net, subnet).state_dict()
    return Checkpoint(FixedNetwork.of(net.spec, subnet), weights, image_size=16)


def config(net_id: str = "ofa-small") -> dict[str, Any]:
    return to_net_config(a_checkpoint(net_id).network)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network as Once-for-All publishes it: nothing but its own names in the weights."""
    checkpoint = a_checkpoint()
    place = tmp_path / "net"
    place.mkdir()
    (place / "net.config").write_text(json.dumps(to_net_config(checkpoint.network)))
    (place / "run.config").write_text('{"image_size": 24}')
    slots = max(checkpoint.network.subnet.depths)
    state = from_slots(from_ours(checkpoint.weights, slots, "ofa"))
    torch.save({"state_dict": state}, place / "init")
    return place


# --- the configuration ---


@pytest.mark.parametrize(
    "net_id", ["ofa-small", "ofa-proxyless-small", "compofa-elastic-small", "ofa_resnet50"]
)
def test_every_subnet_comes_back(net_id: str) -> None:
    width = 1.0 if net_id == "ofa_resnet50" else 0.25
    spec = network_spec(net_id, 5, width_mult=width, resolutions=(32, 64))
    for seed in range(20):
        network = FixedNetwork.of(spec, spec.space.sample(rng(seed)))
        data = json.loads(json.dumps(to_net_config(network)))
        assert is_net_config(data)
        assert from_net_config(data, network.resolution) == network


def test_blocks_that_do_nothing_are_skipped_and_middle_channels_may_be_left_out() -> None:
    data = config()
    expected = from_net_config(data)
    nothing = [{"mobile_inverted_conv": None, "shortcut": data["blocks"][0]["shortcut"]}]
    nothing += [{"mobile_inverted_conv": {"name": "ZeroLayer", "stride": 1}, "shortcut": None}]
    data["blocks"] = [b for block in data["blocks"] for b in (block, *nothing)]
    for block in data["blocks"]:
        if block["mobile_inverted_conv"]:
            block["mobile_inverted_conv"]["mid_channels"] = None
    assert from_net_config(data) == expected
    newer = copy.deepcopy(data)
    newer["blocks"] = [
        {"name": "ResidualBlock", "conv": b["mobile_inverted_conv"], "shortcut": b["shortcut"]}
        for b in data["blocks"]
    ]
    assert from_net_config(newer) == expected
    assert from_net_config(data | {"resolution": 160}) == expected.at(160)


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    data = config()
    place: Any = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return data


CONV = ("blocks", 1, "mobile_inverted_conv")
BAD: list[tuple[Any, str]] = [
    ([], "'name'.* list"),
    ({}, "name"),
    (changed(("name",), "MCUNets"), "name: .*MobileNetV3, .*'MCUNets'"),
    (changed(("name",), "ResNets"), "input_stem"),
    (changed(("bn", "eps"), "1e-5"), "eps: .*str"),
    (changed(("bn", "ws_eps"), 1e-5), "bn: ws_eps: "),
    (changed(("first_conv", "groups"), 3), "first_conv: groups: .*'3'"),
    (changed(("first_conv", "bias"), True), "first_conv: bias: .*'True'"),
    (changed(("first_conv", "kernel_size"), 2**70), "kernel_size: "),
    (changed(("first_conv", "out_channels"), True), "out_channels: .*bool"),
    (changed(("first_conv", "ops_order"), "bn_act_weight"), "ops_order: .*'weight_bn_act'"),
    (changed(("blocks",), "no"), "blocks: .*str"),
    (changed(("blocks",), []), "stages.0.0"),
    (changed(("blocks",), [{}] * 1000), "blocks: .*512.* 1000"),
    (changed(("blocks", 1), 7), r"blocks\[1\]: .*int"),
    (changed((*CONV, "name"), "LSTM"), r"blocks\[1\]: .*MBInvertedConvLayer"),
    (changed((*CONV, "kernel_size"), 4), "odd"),
    (changed((*CONV, "act_func"), "gelu"), r"blocks\[1\]: act_func: .*relu"),
    (changed((*CONV, "expand_ratio"), float("inf")), "expand_ratio: "),
    (changed((*CONV, "mid_channels"), -8), "middle channels"),
    (changed((*CONV, "mid_channels"), 10**9), "middle channels"),
    (changed((*CONV, "groups"), 2), "groups: .*None"),
    (changed((*CONV, "in_channels"), 17), "8 input channels"),
    (changed(("blocks", 1, "shortcut"), {"name": "ConvLayer"}), "IdentityLayer"),
    (changed(("classifier", "bias"), False), "classifier: bias: "),
    (changed(("classifier", "in_features"), 5), "input channels"),
    (changed(("classifier", "dropout_rate"), 1.5), "dropout"),
    (changed(("resolution",), 10**9), "1000000|image size"),
]


@pytest.mark.parametrize(("data", "message"), BAD, ids=range(len(BAD)))
def test_a_wrong_value_is_named_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        from_net_config(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


RESNET_BLOCK = ("blocks", 1)
BAD_RESNET: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("input_stem",), [], "input_stem: .* 0"),
    (("input_stem", 1), 7, r"input_stem\[1\]: "),
    (("input_stem", 1, "shortcut"), None, r"input_stem\[1\]: "),
    (("input_stem", 2), "conv", r"input_stem\[2\]: .*str"),
    (("input_stem", 0, "groups"), 3, r"input_stem\[0\]: groups: "),
    (RESNET_BLOCK, 7, "'name'.* int"),
    ((*RESNET_BLOCK, "name"), "LSTM", r"blocks\[1\]: .*ResNetBottleneckBlock"),
    ((*RESNET_BLOCK, "downsample_mode"), "conv", "downsample_mode: .*'avgpool_conv'"),
    ((*RESNET_BLOCK, "groups"), 32, "groups: "),
    ((*RESNET_BLOCK, "mid_channels"), 0, "mid_channels: .* 0"),
    ((*RESNET_BLOCK, "expand_ratio"), -1, "expand_ratio: "),
    ((*RESNET_BLOCK, "in_channels"), 8, "input channels"),
    ((*RESNET_BLOCK, "stride"), 7, "stride"),
]


def resnet(seed: int = 0) -> FixedNetwork:
    spec = network_spec("ofa_resnet50", 5, resolutions=(64,))
    subnet = next(s for s in map(spec.space.sample, map(rng, range(seed, 99))) if s.depths[0])
    return FixedNetwork.of(spec, subnet)


@pytest.mark.parametrize(("path", "value", "message"), BAD_RESNET, ids=range(len(BAD_RESNET)))
def test_a_wrong_value_of_a_resnet_is_named_too(
    path: tuple[str | int, ...], value: Any, message: str
) -> None:
    data = to_net_config(resnet())
    place: Any = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(SpaceError, match=message) as caught:
        from_net_config(data)
    assert "\n" not in str(caught.value)


def test_a_resnet_of_other_widths_has_no_indices_of_widths() -> None:
    network = resnet()
    assert len(network.subnet.outer) == 6
    data = to_net_config(network)
    data["blocks"][-1]["out_channels"] = data["classifier"]["in_features"] = 1000
    for block in data["blocks"][-1:]:
        block["in_channels"], block["mid_channels"] = data["blocks"][-2]["out_channels"], 64
    other = from_net_config(data)
    assert subnet_from_config(other.subnet.to_config()) == other.subnet
    data["blocks"] = data["blocks"][:1]
    data["classifier"]["in_features"] = data["blocks"][0]["out_channels"]
    short = from_net_config(data)
    assert short.outer == () and len(short.subnet.stages) == 2


# --- files ---


def test_a_folder_is_recognised_by_any_of_its_names(folder: Path) -> None:
    wanted = a_checkpoint()
    for name in ("", "net.config", "run.config", "init"):
        opened = open_network(folder / name)
        kind, found = opened.format, opened.checkpoint
        assert kind == "ofa"
        assert found.network == wanted.network.at(24)
        assert (found.image_size, found.mean[0]) == (24, 0.485)
        assert found.digest == file_hash(folder / "init")
        assert_same(dict(found.weights), dict(wanted.weights))
    assert torch.equal(opened.network(images()), wanted.build()(images()))


def test_a_json_beside_a_pth_holds_its_resolution_and_other_normalisation(folder: Path) -> None:
    data = json.loads((folder / "net.config").read_text()) | {"resolution": 40}
    (folder.parent / "small.json").write_text(json.dumps(data))
    (folder / "init").rename(folder.parent / "small.pth")
    for name in ("small.json", "small.pth"):
        found = open_network(folder.parent / name).checkpoint
        assert found.network == a_checkpoint().network.at(40)
        assert (found.mean, found.std, found.image_size) == ((0.5,) * 3, (0.5,) * 3, 40)


def test_a_json_of_something_else_is_left_alone(tmp_path: Path) -> None:
    for text in ("{}", "[", "7", '{"ks": []}', "[" * 100_000):
        (tmp_path / "a.json").write_text(text)
        assert find_specialised(tmp_path / "a.pth") is None
    assert find_specialised(tmp_path / "nothing.pth") is None
    assert find_specialised(tmp_path) is None


@pytest.mark.parametrize("stem", [True, False])
def test_a_resnet_comes_back_bit_for_bit(stem: bool, tmp_path: Path) -> None:
    net = Supernet(network_spec("ofa-resnet50-small", 5, width_mult=0.1, resolutions=(16,)), 3)
    drawn = map(net.spec.space.sample, map(rng, range(99)))
    subnet = next(s for s in drawn if bool(s.depths[0]) is stem)
    network = FixedNetwork.of(net.spec, subnet)
    # The published networks pool after the stem; those for small images have no such form.
    layers = [layer for layer in network.layers if layer.name != "stem_pool"]
    pool = LayerSpec("maxpool", "stem_pool", 1, 1, *[layers[1 + stem].out_channels] * 2, 3, 2)
    pool = replace(pool, mid_channels=0, kernel=3, stride=2)
    layers.insert(2 + stem, pool)
    network = replace(network, layers=at_resolution(tuple(layers), 16))
    network = replace(network, outer=(), backbone="")
    original = Checkpoint(network, extract(net, subnet).state_dict(), image_size=16)
    save_as(tmp_path / "net", original, "ofa")
    names = set(torch.load(tmp_path / "net" / "init", weights_only=True)["state_dict"])
    assert f"input_stem.{1 + stem}.conv.weight" in names
    assert ("input_stem.1.conv.conv.weight" in names) is stem
    numbers = {int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
    assert numbers == set(range(sum(subnet.depths[1:])))
    assert "blocks.0.downsample.conv.weight" in names and "blocks.0.conv3.bn.weight" in names
    found = open_network(tmp_path / "net").checkpoint
    assert found.network == network
    assert_same(dict(found.weights), dict(original.weights))


@pytest.mark.parametrize("net_id", ["ofa-small", "ofa-proxyless-small"])
def test_what_is_written_comes_back_bit_for_bit(net_id: str, tmp_path: Path) -> None:
    original = replace(
        a_checkpoint(net_id), classes=tuple("abcde"), mean=(0.1, 0.2, 0.3), figures={"x": 1.5}
    )
    start = original
    for step, to in enumerate(("ofa", "compofa", "ofa", "ofa", "compofa")):
        save_as(tmp_path / f"{step}", start, to)
        opened = open_network(tmp_path / f"{step}")
        kind, start = opened.format, opened.checkpoint
        assert kind == to
    assert replace(start, weights={}) == replace(original, weights={})
    assert_same(dict(start.weights), dict(original.weights))
    assert [v.dtype for v in start.weights.values()] == [v.dtype for v in original.weights.values()]
    for name in ("net.config", "run.config", "init"):
        contents = {(tmp_path / step / name).read_bytes() for step in "023"}
        assert len(contents) == 1
    names = set(torch.load(tmp_path / "0" / "init", weights_only=True)["state_dict"])
    assert "blocks.1.mobile_inverted_conv.inverted_bottleneck.conv.weight" in names
    numbers = {int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
    assert numbers == set(range(1 + sum(original.network.subnet.depths)))


def test_a_folder_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for taken in ("notes", "notes/mine.txt"):
        with pytest.raises(CheckpointError, match="folder"):
            save_as(tmp_path / taken, a_checkpoint(), "ofa")
    full = OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(CompofaError, match="No space left on device"):
        save_as(tmp_path / "net", a_checkpoint(), "ofa")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    with pytest.raises(SpaceError, match=r"supernet.*specialised"):
        save_as(tmp_path / "net", a_checkpoint(), "mmrazor")


def no_weights(folder: Path) -> None:
    (folder / "init").unlink()


def other_weights(folder: Path) -> None:
    other = a_checkpoint("ofa-proxyless-small")
    torch.save(dict(other.weights), folder / "init")


def no_size(folder: Path) -> None:
    (folder / "run.config").write_text("{}")


def no_run(folder: Path) -> None:
    (folder / "run.config").unlink()


def cut(folder: Path) -> None:
    (folder / "net.config").write_text((folder / "net.config").read_text()[:500])


def huge(folder: Path) -> None:
    (folder / "net.config").write_text(" " * 5_000_000)


def mixed(folder: Path) -> None:
    save_as(folder.parent / "other", a_checkpoint(), "ofa")
    data = json.loads((folder / "net.config").read_text())
    data["classifier"]["dropout_rate"] = 0.25
    (folder.parent / "other" / "net.config").write_text(json.dumps(data))
    (folder.parent / "other").rename(folder.parent / "swap")
    for name in ("net.config", "init"):
        (folder.parent / "swap" / name).replace(folder / name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_weights, r"\binit\b"),
        (other_weights, "missing|misshapen|extra"),
        (no_size, "image_size"),
        (no_run, "run.config"),
        (cut, "net.config"),
        (huge, "4000000 bytes"),
        (mixed, "weights"),
    ],
)
def test_a_broken_folder_is_one_line(
    spoil: Any, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder)
    with pytest.raises(CompofaError, match=message):
        open_network(folder)
    assert main(["convert", str(folder), str(folder.parent / "out.pt"), "--to", "compofa"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (folder.parent / "out.pt").exists()


def test_the_command_converts_both_ways(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(folder), str(tmp_path / "net.pt"), "--to", "compofa"]) == 0
    assert main(["convert", str(tmp_path / "net.pt"), str(tmp_path / "out"), "--to", "ofa"]) == 0
    assert "ofa" in capsys.readouterr().out
    a, b = (torch.load(p / "init", weights_only=True) for p in (folder, tmp_path / "out"))
    assert_same(a["state_dict"], b["state_dict"])
    assert load_checkpoint(tmp_path / "net.pt").image_size == 24
    assert read_json(tmp_path / "out" / "run.config") == {"image_size": 24}


# --- published ---


def test_the_mobile_networks_of_proxylessnas_are_read(reference_data: Path, tmp_path: Path) -> None:
    sizes = {}
    for config_path in sorted((reference_data / "weights").glob("*.json")):
        found = open_network(config_path).checkpoint
        network = found.network
        assert isinstance(network, FixedNetwork)
        assert (network.bn_eps, network.classes, found.std) == (1e-3, 1000, (0.5,) * 3)
        save_as(tmp_path / "net", found, "ofa")
        back = open_network(tmp_path / "net").checkpoint
        assert back.network == network
        assert_same(dict(back.weights), dict(found.weights))
        published = torch.load(config_path.with_suffix(".pth"), weights_only=True)["state_dict"]
        assert list(map(torch.sum, back.weights.values())) == list(
            map(torch.sum, published.values())
        )
        sizes[network.resolution] = found.image_size
    assert sizes == {112: 112, 176: 176}
