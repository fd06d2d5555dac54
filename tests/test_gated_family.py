"""A family from outside whose blocks may have a gate, with elastic widths and unequal stages."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from few import changed

from compofa.errors import CheckpointError, SpaceError
from compofa.io.checkpoint import Checkpoint, save_checkpoint
from compofa.io.open import open_network
from compofa.networks.backbone import Backbone, PlainLayer, Stage
from compofa.networks.families import BACKBONES
from compofa.networks.kinds import KINDS, LayerKind, mid_channels, ratio, se_channels
from compofa.networks.layout import layout, macs
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn import blocks
from compofa.nn.blocks import MBConv, register_block
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.choice import Choice
from compofa.space.subnet import Subnet
from nas.accuracy.fit import fit_accuracy
from nas.cost.base import macs_cost


def fields(stage, values, ins, outs, first):
    mid = mid_channels(ins, values["ratio"])
    return {
        "mid_channels": mid,
        "kernel": values["size"],
        "se_channels": se_channels(mid) if values["gate"] else 0,
        "expand": True,
        "residual": not first,
    }


def block(layer):
    gate = int(layer.se_channels > 0)
    return layer.kernel, gate, ratio(layer.mid_channels, layer.in_channels)


GATED = LayerKind("gated", KINDS["mbconv"].convs, fields, block)


def table(*choices: Choice) -> Backbone:
    def stage(width, stride, depths, choice=None):
        return Stage(width, stride, "relu", (3, 0), depths=depths, kind="gated", choice=choice)

    return Backbone(
        name="gated",
        stem=(PlainLayer("stem", "conv", 16, "relu", kernel=3),),
        stages=(stage(16, 1, (1,), 0), stage(24, 2, (1, 2), 1), stage(32, 2, (2, 3))),
        head=(PlainLayer("pool", "pool"),),
        choices=choices
        or (Choice("size", (3, 5)), Choice("gate", (0, 1)), Choice("ratio", (2, 4))),
        simple=((1, 2), (2, 3), (3, 4)),
        widths=(0.5, 1.0),
    )


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    for registry in (KINDS, blocks._BUILDERS):
        monkeypatch.setitem(registry, "gated", None)
        del registry["gated"]
    register_block(GATED, MBConv)
    monkeypatch.setitem(BACKBONES, "gated", table())
    return table()


@pytest.fixture(params=[False, True], ids=["centre", "matrices"])
def net(request: pytest.FixtureRequest, family: Backbone) -> Supernet:
    space = family.free_space((8, 16))
    return Supernet(NetworkSpec(family, space, 5, request.param, 0.0)).double().eval()


def with_gates(subnet: Subnet, gate: int) -> Subnet:
    stages = tuple(tuple((k, gate, e) for k, _, e in stage) for stage in subnet.stages)
    return replace(subnet, stages=stages)


def test_layers_bound_before_are_used_for_the_same_parts_alone(net: Supernet) -> None:
    images, kept, space = torch.randn(2, 3, 16, 16).double(), {}, net.spec.space
    for draw in range(10):
        for gate in (0, 1):
            subnet = with_gates(space.sample(rng(draw)), gate)
            with torch.no_grad():
                wanted = extract(net, subnet)(images)
                torch.testing.assert_close(net(images, subnet), wanted)
                torch.testing.assert_close(net.bind(subnet, kept)(images), wanted)


def test_gradients_reach_the_parts_that_ran_alone(net: Supernet) -> None:
    images, largest = torch.randn(2, 3, 8, 8).double(), net.spec.space.largest
    for gate in (0, 1):
        net.zero_grad(set_to_none=False)
        net.bind(with_gates(largest, gate))(images).square().sum().backward()
        moved = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(".se." in name for name in moved) == bool(gate)


def test_definitions_and_subnets_are_read_back(family: Backbone) -> None:
    spec = NetworkSpec(family, family.free_space((8,)), 5)
    assert NetworkSpec.from_json(spec.to_json()) == spec
    subnet = spec.space.sample(rng(0))
    assert {"size", "gate", "ratio", "depth", "width", "r"} == {*subnet.to_config()}
    assert spec.space.from_config(subnet.to_config()) == subnet
    assert spec.space.decode(spec.space.encode(subnet)) == subnet


def test_a_block_that_is_not_registered_is_named(
    family: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = NetworkSpec(family, family.free_space((8,)), 5)
    network = FixedNetwork.of(spec, spec.space.smallest)
    weights = extract(Supernet(spec), spec.space.smallest).state_dict()
    save_checkpoint(tmp_path / "n.pt", Checkpoint(network, weights, image_size=8))
    assert open_network(tmp_path / "n.pt").spec == network
    monkeypatch.delitem(KINDS, "gated")
    monkeypatch.delitem(BACKBONES, "gated")
    with pytest.raises(CheckpointError, match=r"n\.pt: .*'gated'.*register_block"):
        open_network(tmp_path / "n.pt")


def test_definitions_with_other_choices_are_refused(family: Backbone) -> None:
    data = NetworkSpec(family, family.free_space(), 5).to_json()
    data["space"]["stages"][0]["choices"] = {1: [2]}
    with pytest.raises(SpaceError, match="choices: expected size, gate, ratio"):
        NetworkSpec.from_json(data)


@pytest.mark.parametrize(
    "name", ["depth", "resolution", "resolutions", "r", "name", "width", "ratio"]
)
def test_choices_have_names_of_their_own(name: str) -> None:
    with pytest.raises(SpaceError, match=f"names of choices.*got {name}"):
        table(Choice("size", (3,)), Choice(name, (0, 1)), Choice("ratio", (2, 4))).free_space()


def test_values_may_be_large(family: Backbone) -> None:
    wide = table(Choice("size", (3,)), Choice("gate", (0,)), Choice("ratio", (2, 100)))
    space = wide.free_space((8,))
    arrays = space.arrays(space.enumerate_genes())
    counts = macs_cost(wide)(arrays)
    assert counts.tolist() == [macs(layout(wide, subnet)) for subnet in space.subnets_of(arrays)]
    with pytest.raises(SpaceError, match=r"ratio.* 100, got 200"):
        macs_cost(wide)(changed(arrays, ratio=arrays.blocks["ratio"] * 2))
    top1 = 50 + counts / counts.max()
    assert np.isfinite(fit_accuracy(arrays, top1).predict(arrays)).all()


def test_a_named_coupling_adds_no_depths() -> None:
    backbone = table()
    assert [stage.coupling for stage in backbone.compound_space().stages] == [
        None,
        ((1, 2), (2, 3)),
        ((2, 3), (3, 4)),
    ]
    typed = backbone.compound_space(((1, 2), (4, 4)))
    assert [stage.depths for stage in typed.stages] == [(1,), (1, 4), (1, 4)]
    with pytest.raises(SpaceError, match=r"coupling.*depths 1, 2"):
        replace(backbone, simple=((5, 2),)).compound_space()
