import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_weights import images, make, state_of

from compofa.errors import CheckpointError, SpaceError
from compofa.io.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from compofa.io.export import export, load_exported, subnet_card
from compofa.io.formats.names import from_ours, from_slots
from compofa.networks.families import inverted, subnet_from_config
from compofa.networks.layout import at_resolution, layout
from compofa.networks.network_spec import FixedNetwork, network_from_json
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import network_spec
from compofa.nn.build import build
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.subnet import Subnet

NETS = ("ofa-small", "compofa-small", "ofa-proxyless-small", "ofa-resnet50-small")


def fixed(net_id: str = "ofa-small", seed: int = 0) -> FixedNetwork:
    spec = network_spec(net_id, 5, width_mult=0.1, resolutions=(16, 24))
    return FixedNetwork.of(spec, spec.space.sample(rng(seed)))


@pytest.mark.parametrize("net_id", NETS)
def test_a_subnet_and_its_definition_are_the_same_network(net_id: str) -> None:
    net = make(net_id, 1)
    for seed in range(5):
        subnet = net.spec.space.sample(rng(seed))
        network = FixedNetwork.of(net.spec, subnet)
        if "resnet" not in net_id:  # in narrow ones several ratios give the same channels
            assert network.subnet == subnet
        assert layout(net.spec.backbone, network.subnet, 5) == network.layers
        assert network.layers == layout(net.spec.backbone, subnet, 5)
        assert (network.classes, network.resolution) == (5, subnet.resolution)
        assert network.min_resolution == net.spec.min_resolution
        static = build(network).eval()
        load_weights(static, extract(net, subnet).state_dict())
        assert torch.equal(static(images()), extract(net, subnet)(images()))


def test_another_resolution_is_that_of_the_layout() -> None:
    spec = network_spec("ofa_mbv3_d234_e346_k357_w1.0")
    subnet = spec.space.sample(rng(0))
    for side in (32, 161, 224):
        network = FixedNetwork.of(spec, subnet).at(side)
        assert network.layers == layout(spec.backbone, subnet.at(side))
        assert network.layers_of(subnet.at(96)) == layout(spec.backbone, subnet.at(96))
    with pytest.raises(SpaceError, match=r"32 to 2048.* 31"):
        network.at(31)
    with pytest.raises(SpaceError, match=r"\bd "):
        network.layers_of(spec.space.largest)
    with pytest.raises(SpaceError, match=r"supernet.*specialised"):
        network.space.sample(rng(0))


def test_a_definition_comes_back_from_json() -> None:
    for net_id in NETS:
        network = fixed(net_id)
        assert network_from_json(json.loads(json.dumps(network.to_json()))) == network
    spec = network_spec("ofa-small")
    assert network_from_json(spec.to_json()) == spec


def test_what_has_a_usual_value_may_be_missing() -> None:
    data = fixed().to_json()
    for layer in data["layers"]:
        del layer["downsample"]
    assert network_from_json(data) == fixed()


def broken(change: dict, layer: int | None = None) -> dict:
    data = fixed().to_json()
    (data if layer is None else data["layers"][layer]).update(change)
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (broken({"layers": 3}), "layers: .*list.*int"),
        (broken({"layers": []}), "layers.* 0"),
        (broken({"layers": [{}] * 600}), "512 layers.* 600"),
        (broken({"layers": [{}] * 5}), "kind"),
        (broken({"resolution": 10**30}), "image size"),
        (broken({"resolution": True}), "resolution: .*int.*bool"),
        (broken({"bn_eps": 0}), "eps"),
        (broken({"dropout": float("nan")}), "dropout.*nan"),
        (broken({"kernel": 4}, 2), "kernel"),
        (broken({"kernel": "3"}, 2), "kernel: .*int.*str"),
        (broken({"stride": 0}, 2), "stride"),
        (broken({"act": "swish"}, 2), "relu, relu6"),
        (broken({"mid_channels": 2**40}, 2), "middle channels"),
        (broken({"mid_channels": 8}, 0), "middle channels"),
        (broken({"mid_channels": 9}, 1), "expansion"),
        (broken({"mid_channels": 0}, 1), "middle channels"),
        (broken({"options": {"before": 3}}, 2), "no option but none"),
        (broken({"out_channels": 40}, 2), "40 input channels"),
        (broken({"in_channels": 4}, 0), "stem: .*3 input channels"),
        (broken({"residual": True}, -4), "residual"),
        (broken({"se_channels": 10**6}, 2), "SE"),
        (broken({"kind": "conv"}, 2), "middle channels"),
        (broken({"name": "forward"}, 0), "stem, first"),
        (broken({"name": "stages.1.0"}, 2), "stages.0.0"),
        (broken({"name": "first"}, 0), "mbconv.*'conv'"),
        (broken({"name": "stages.0.0.conv"}, 2), "stages.0.0.conv"),
        (broken({"out_channels": 900_000}, -1), "100,000,000 parameters"),
    ],
)
def test_hostile_definitions_are_refused_in_one_line(data: dict, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        network_from_json(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_layers_must_have_the_sizes_of_their_resolution() -> None:
    layers = fixed().layers
    with pytest.raises(SpaceError, match="size"):
        FixedNetwork((*layers[:-1], replace(layers[-1], in_size=7)))
    with pytest.raises(SpaceError, match="stages"):
        FixedNetwork(at_resolution((layers[0], *reversed(layers[1:])), 16))


# --- checkpoints ---


def a_checkpoint() -> tuple[Checkpoint, StaticNetwork]:
    net = make("ofa-small", 2)
    static = extract(net, net.spec.space.sample(rng(1)))
    network = FixedNetwork.of(net.spec, net.spec.space.sample(rng(1)))
    return Checkpoint(network, static.state_dict(), image_size=16), static


def test_a_checkpoint_holds_a_specialised_network(tmp_path: Path) -> None:
    checkpoint, static = a_checkpoint()
    save_checkpoint(tmp_path / "net.pt", checkpoint)
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.network == checkpoint.network
    built = found.build()
    assert isinstance(built, StaticNetwork) and not built.training
    assert torch.equal(built(images()), static(images()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mix.conv.weight"), "missing: mix.conv.weight"),
        (lambda s: s.update(more=torch.zeros(1)), "extra: more"),
        (lambda s: s["mix.conv.weight"].resize_(3), "misshapen: mix.conv.weight"),
        (lambda s: s["classifier.bias"].fill_(torch.nan), "finite.*: classifier.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message: str) -> None:
    _, static = a_checkpoint()
    state = state_of(static)
    change(state)
    before = state_of(static)
    with pytest.raises(CheckpointError, match=message):
        load_weights(static, state)
    assert all(torch.equal(v, before[k]) for k, v in static.state_dict().items())


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_read_by_the_names_of_once_for_all(gaps: bool, prefix: str) -> None:
    _, static = a_checkpoint()
    network = a_checkpoint()[0].network
    slots = max(network.subnet.depths)
    theirs = from_ours(static.state_dict(), slots, "ofa")
    theirs = theirs if gaps else from_slots(theirs)
    other = build(network)
    load_weights(other, {prefix + name: value for name, value in theirs.items()})
    assert all(torch.equal(v, static.state_dict()[k]) for k, v in other.state_dict().items())


def test_an_exported_specialised_network_is_read_again(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    checkpoint, static = a_checkpoint()
    card = subnet_card(checkpoint.network, checkpoint.network.subnet)
    export(static, tmp_path / "net.safetensors", "safetensors", card)
    assert torch.equal(load_exported(tmp_path / "net.safetensors")(images()), static(images()))


def test_both_definitions_answer_alike() -> None:
    spec: NetworkSpec = network_spec("ofa-small", 5, width_mult=0.1, resolutions=(16,))
    subnet = spec.space.sample(rng(0))
    network = FixedNetwork.of(spec, subnet)
    assert FixedNetwork.of(network, subnet.at(24)) == network.at(24)
    assert isinstance(build(spec), Supernet) and spec.elastic and not network.elastic
    for side in (16, 24):
        assert spec.layers_of(subnet.at(side)) == network.layers_of(subnet.at(side))


def test_a_wide_resnet_is_written_as_ofa_does() -> None:
    spec = network_spec("ofa_resnet50")
    for seed in range(20):
        subnet = spec.space.sample(rng(seed))
        network = network_from_json(FixedNetwork.of(spec, subnet).to_json())
        assert network.subnet == subnet == subnet_from_config(network.subnet.to_config())
    data = network.to_json()
    for widths, message in (
        ([1, 2], "6"),
        ([0] * 5 + [16], "6"),
        ([0] * 5 + [True], "6"),
        ("no", "outer: .*list.*str"),
    ):
        with pytest.raises(SpaceError, match=message):
            network_from_json(data | {"outer": widths})
    with pytest.raises(SpaceError, match="depths"):
        network_from_json(fixed().to_json() | {"outer": [0] * 6})


def test_a_long_stage_is_written_as_a_subnet_that_reads_back() -> None:
    subnet = Subnet(64, (((3, 6),) * 7, ((5, 3),)), format=inverted.FORMAT)
    assert subnet_from_config(subnet.to_config()) == subnet
