"""The family of the page on extending, plain and with elastic widths, held to every invariant."""

import copy
import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from few import same
from test_extending import blocks

from compofa.errors import CheckpointError, CompofaError, SpaceError
from compofa.io.checkpoint import Checkpoint, save_checkpoint
from compofa.io.convert import save_as
from compofa.io.open import open_network
from compofa.networks import families, kinds, network_spec, zoo
from compofa.networks.backbone import Backbone
from compofa.networks.layout import macs, params
from compofa.networks.network_spec import FixedNetwork, network_from_json
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn import blocks as modules
from compofa.nn.extract import extract
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from nas.cost.base import macs_cost, params_cost


@pytest.fixture(scope="module")
def tables() -> Iterator[dict[str, Backbone]]:
    """The backbones, registered while the tests of this file run."""
    with (
        patch.dict(kinds.KINDS), patch.dict(families.BACKBONES), patch.dict(zoo.NETWORKS),
        patch.dict(modules._BUILDERS), patch.dict(modules.ACTIVATIONS),
        patch.object(network_spec, "ACTS", list(network_spec.ACTS)),
        patch.object(modules, "ACTS", network_spec.ACTS),
    ):  # fmt: skip
        exec(compile(blocks()[0], "extending.md", "exec"), {})
        plain = families.BACKBONES["two_depthwise"]
        first, second, third = plain.stages
        wide = replace(
            plain,
            name="two_depthwise_wide",
            stem=(replace(plain.stem[0], choice=0),),
            stages=(
                replace(first, choice=0), replace(second, choice=1), replace(third, depths=(1,)),
            ),
            widths=(0.5, 1.0),
        )  # fmt: skip
        families.register_backbone(wide)
        yield {"plain": plain, "wide": wide}


@pytest.fixture(params=["plain", "wide"])
def table(request: pytest.FixtureRequest, tables: dict[str, Backbone]) -> Backbone:
    return tables[request.param]


@pytest.fixture(params=[False, True], ids=["centre", "matrices"])
def net(request: pytest.FixtureRequest, table: Backbone) -> Supernet:
    space = table.compound_space("simple", True, (8, 12))
    spec = NetworkSpec(table, space, 5, kernel_transform=request.param, dropout=0.0)
    return Supernet(spec, 1).double()


def some(net: Supernet) -> list:
    space = net.spec.space
    return [*(space.sample(rng(seed)) for seed in range(4)), space.largest, space.smallest]


def test_bound_subnets_train_as_those_in_the_graph(net: Supernet) -> None:
    """Also where two subnets of a step leave out different convolutions of the same block."""
    images, kept = torch.randn(4, 3, 8, 8, dtype=torch.double), {}
    bound, sliced = copy.deepcopy(net), copy.deepcopy(net)
    for subnet in some(net):
        bound.bind(subnet, kept)(images).square().mean().backward()
        sliced(images, subnet).square().mean().backward()
    for (name, one), other in zip(bound.named_parameters(), sliced.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), name
        else:
            torch.testing.assert_close(one.grad, other.grad, msg=name)
    for one, other in zip(bound.buffers(), sliced.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_extracted_saved_and_opened_networks_are_those_of_the_supernet(
    net: Supernet, tmp_path: Path
) -> None:
    net = net.eval().float()
    sort_channels(net, (2, 3))
    spec, images = net.spec, torch.randn(2, 3, 8, 8)
    save_checkpoint(tmp_path / "n.pt", Checkpoint(spec, net.state_dict(), tuple("abcde")))
    opened = open_network(tmp_path / "n.pt")
    assert opened.spec == spec
    for subnet in some(net):
        alone = extract(net, subnet)
        assert torch.equal(opened.network(images, subnet), net(images, subnet))
        torch.testing.assert_close(alone(images), net(images, subnet))
        fixed = FixedNetwork.of(spec, subnet)
        assert network_from_json(json.loads(json.dumps(fixed.to_json()))) == fixed
        assert (fixed.subnet, sum(p.numel() for p in alone.parameters())) == (
            subnet, params(fixed.layers),
        )  # fmt: skip
        assert pickle.loads(pickle.dumps(subnet)) == copy.deepcopy(subnet) == subnet


@pytest.mark.parametrize(
    "options",
    [{"before": 4}, {"before": -3}, {"before": 2.5}, {"before": 10**8}, {"before": 3, "x": 1}],
)
def test_options_that_no_block_has_are_refused(table: Backbone, options: dict) -> None:
    spec = NetworkSpec(table, table.compound_space("simple", True, (8,)), 5)
    data = FixedNetwork.of(spec, spec.space.largest).to_json()
    block = next(layer for layer in data["layers"] if layer["name"] == "stages.0.0")
    block["options"] = options
    with pytest.raises(SpaceError, match=r"stages\.0\.0.*(convolutions|option)"):
        network_from_json(data)


def test_formats_that_have_no_such_blocks_refuse_them(table: Backbone, tmp_path: Path) -> None:
    spec = NetworkSpec(table, table.compound_space("simple", True, (8,)), 5)
    net, subnet = Supernet(spec), spec.space.smallest
    fixed = Checkpoint(FixedNetwork.of(spec, subnet), extract(net, subnet).state_dict())
    for checkpoint in (Checkpoint(spec, net.state_dict()), fixed):
        for to in ("ofa", "mmrazor"):
            with pytest.raises(CompofaError, match=f"silu|{to}|supernet") as caught:
                save_as(tmp_path / "out", checkpoint, to)
            assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_counts_configs_and_arrays_agree(table: Backbone) -> None:
    space = table.compound_space(None, True, (8, 12))
    arrays = space.arrays(space.sample_genes(np.random.default_rng(0), 100))
    subnets = list(space.subnets_of(arrays))
    layers = [NetworkSpec(table, space, 5).layers_of(subnet) for subnet in subnets]
    assert macs_cost(table, 5)(arrays).tolist() == list(map(macs, layers))
    assert params_cost(table, 5)(arrays).tolist() == list(map(params, layers))
    configs = [json.loads(json.dumps(subnet.to_config())) for subnet in subnets]
    assert [families.subnet_from_config(config) for config in configs] == subnets
    assert same(space.arrays_of(subnets), arrays)


def test_choices_are_set_by_name(tables: dict[str, Backbone]) -> None:
    table = tables["wide"]
    net = Supernet(NetworkSpec(table, table.compound_space("simple", True, (8,)), 5))
    chosen = net.set_active_subnet(depth=1, before=0, after=[3, 5, 3], width=[0, 1])
    assert chosen.stages == (((0, 3, 2),), ((0, 5, 2),), ((0, 3, 4),)) and chosen.outer == (0, 1)
    for wrong in ({"ks": 3}, {"before": 9}, {"depth": [1] * 4}, {"width": 7}, {"r": 0}):
        name = "resolution" if "r" in wrong else next(iter(wrong))
        with pytest.raises(SpaceError, match=name):
            net.set_active_subnet(**wrong)


def test_a_family_that_is_not_registered_is_named(table: Backbone, tmp_path: Path) -> None:
    spec = NetworkSpec(table, table.compound_space("simple", True, (8,)), 5)
    save_checkpoint(tmp_path / "n.pt", Checkpoint(spec, Supernet(spec).state_dict()))
    with (
        patch.dict(families.BACKBONES),
        pytest.raises(CheckpointError, match=rf"n\.pt: .*'{table.name}'.*register_backbone") as e,
    ):
        del families.BACKBONES[table.name]
        open_network(tmp_path / "n.pt")
    assert "damaged" not in str(e.value)
