"""ProxylessNAS: a last stage that always is one block, and a head whose convolution has BN."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compofa.errors import SpaceError, TableError
from compofa.networks.families import subnet_from_config
from compofa.networks.families.proxyless import PROXYLESS
from compofa.networks.layout import layout, macs, params
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import network_spec
from compofa.nn.calibrate import calibrate
from compofa.nn.extract import extract
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.subnet import Subnet
from nas.cost.base import macs_cost, params_cost
from nas.tables import require_members

FREE = PROXYLESS.free_space()
COMPOUND = PROXYLESS.compound_space()


@pytest.fixture
def net() -> Supernet:
    return Supernet(network_spec("ofa-proxyless-small", 5, width_mult=0.2, dropout=0.0)).eval()


def images(n: int = 8, side: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def test_sizes() -> None:
    assert FREE.size == (9**2 + 9**3 + 9**4) ** 5 * 9
    assert COMPOUND.size == 3**5 * 3
    assert PROXYLESS.compound_space(elastic=True).size == 117**5 * 9
    assert len(FREE.genes) == 5 * (1 + 4 + 4) + (1 + 1 + 1) + 1  # none for blocks it cannot have


def test_the_last_stage_is_not_coupled() -> None:
    assert [stage.coupling is None for stage in COMPOUND.stages] == [False] * 5 + [True]
    assert {subnet.stages[5] for subnet in COMPOUND.enumerate()} == {
        ((7, expand),) for expand in (3, 4, 6)
    }


def test_the_wide_table_has_the_published_widths() -> None:
    layers = layout(PROXYLESS.scaled(1.3), FREE.largest)
    widths = [spec.out_channels for spec in layers if spec.name.endswith(".0")]
    assert widths == [32, 56, 104, 128, 248, 416]
    assert [spec.out_channels for spec in layers[:2]] == [40, 24]
    assert [spec.name for spec in layers[-3:]] == ["mix", "pool", "classifier"]
    assert [spec.out_channels for spec in layers[-3:]] == [1664, 1664, 1000]
    assert {spec.act for spec in layers} == {"relu6", "none"}
    assert not layers[1].residual and not any(spec.se_channels for spec in layers)
    assert PROXYLESS.stride == 32


def test_the_config_format_has_21_blocks_and_5_depths() -> None:
    for seed in range(20):
        subnet = FREE.sample(rng(seed))
        config = FREE.to_config(subnet)
        assert [len(config[key]) for key in ("ks", "e", "d")] == [21, 21, 5]
        assert subnet_from_config(json.loads(json.dumps(config))) == subnet
        assert subnet.to_config() == config
        plain = replace(subnet, format=FREE.config_format.with_single_last(False)).to_config()
        assert [len(plain[key]) for key in ("ks", "e", "d")] == [24, 24, 6]  # as records had it
        assert subnet_from_config(plain) == subnet
        assert subnet_from_config(plain).to_config() == plain


def test_a_config_of_ofa_is_chosen(net: Supernet) -> None:
    subnet = FREE.sample(rng(1))
    assert net.set_active_subnet(**FREE.to_config(subnet)) == subnet
    assert net.set_active_subnet(d=2, ks=3, e=[3, 3, 3, 3, 3, 6]).depths == (2, 2, 2, 2, 2, 1)
    assert net.active.stages[5] == ((3, 6),)
    assert net.set_active_subnet(d=[2, 3, 4, 3, 2]).depths == (2, 3, 4, 3, 2, 1)
    assert net.set_active_subnet(d=[2, 3, 4, 3, 2, 1], ks=[5] * 24).stages[5] == ((5, 6),)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"ks": [3] * 20}, "1, 6 or 21 .*got 20"),
        ({"d": [2] * 4}, "1 or 5 .*got 4"),
        ({"d": [2, 2, 2, 2, 2, 2]}, "stage 6 depth.* 1, got 2"),
        ({"e": [3] * 20 + [5]}, "stage 6 block 1 expand.* 3 or 4 or 6, got 5"),
    ],
)
def test_bad_choices_are_refused(net: Supernet, choice: dict, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        net.set_active_subnet(**choice)


def test_a_restriction_of_depths_keeps_the_single_block() -> None:
    part = FREE.restrict(depth=(3, 4), expand=(6,))
    assert [stage.depths for stage in part.stages] == [(3, 4)] * 5 + [(1,)]
    spec = network_spec("ofa-proxyless-small", 5)
    assert NetworkSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.largest_only().space.largest.depths == (4, 4, 4, 4, 4, 1)


def test_extracted_networks_compute_what_the_supernet_computes(net: Supernet) -> None:
    for seed in range(4):
        subnet = net.spec.space.sample(rng(seed))
        static = extract(net, subnet)
        with torch.no_grad():
            torch.testing.assert_close(static(images()), net(images(), subnet))
        layers = layout(net.spec.backbone, subnet, 5)
        assert params(layers) == sum(p.numel() for p in static.parameters())


def test_calibration_measures_every_norm_the_head_included(net: Supernet) -> None:
    subnet = net.spec.space.sample(rng(3))
    expected = extract(net, subnet).train()(images())
    calibrated = calibrate(net, [images()], subnet)
    torch.testing.assert_close(calibrated(images()), expected, atol=1e-4, rtol=1e-3)
    halves = calibrate(net, [images()[:4], images()[4:]], subnet)
    torch.testing.assert_close(halves.mix.bn.running_var, calibrated.mix.bn.running_var)


def test_sorting_leaves_the_largest_network_alone(net: Supernet) -> None:
    other = copy.deepcopy(net)
    sort_channels(other)
    assert not torch.equal(
        other.stages[5][0].project.conv.weight, net.stages[5][0].project.conv.weight
    )
    with torch.no_grad():
        torch.testing.assert_close(other(images()), net(images()), atol=1e-5, rtol=1e-4)


def test_counts_equal_the_layout() -> None:
    wide, space = PROXYLESS.scaled(1.3), PROXYLESS.free_space((160, 224))
    arrays = space.arrays(space.sample_genes(rng(0), 50))
    expected = [layout(wide, subnet) for subnet in space.subnets_of(arrays)]
    assert macs_cost(wide)(arrays).tolist() == [macs(x) for x in expected]
    assert params_cost(wide)(arrays).tolist() == [params(x) for x in expected]


def test_tables_in_the_config_format_of_ofa_are_read() -> None:
    subnets = [FREE.sample(rng(seed)) for seed in range(5)]
    configs = [FREE.to_config(subnet) for subnet in subnets]
    columns = {key: np.array([c[key] for c in configs]) for key in ("ks", "e", "d", "r")}
    table = FREE.config_format.read_table(columns)
    assert list(FREE.subnets_of(require_members(table, FREE, "t"))) == subnets
    padded = [subnet_from_config(c).stages for c in configs]
    again = FREE.arrays_of([replace(s, stages=p) for s, p in zip(subnets, padded, strict=True)])
    assert list(FREE.subnets_of(require_members(again, FREE, "t"))) == subnets
    short = {**columns, "ks": columns["ks"][:, 1:], "e": columns["e"][:, 1:]}
    with pytest.raises(TableError, match="kernel 20, expand 20, depth 5"):
        require_members(FREE.config_format.read_table(short), FREE, "t")


def test_the_published_specialised_networks_are_in_the_space(reference_data: Path) -> None:
    found = 0
    for path in sorted((reference_data / "specialized").glob("*/net.config")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config["name"] != "ProxylessNASNets":
            continue
        found += 1
        stages, published = [], []
        for block in config["blocks"][1:]:
            part = block["mobile_inverted_conv"]
            if part is None or "Zero" in part["name"]:
                continue
            ins, outs, stride = (part[k] for k in ("in_channels", "out_channels", "stride"))
            mid = part["mid_channels"] or round(ins * part["expand_ratio"])
            published.append((ins, outs, mid, part["kernel_size"], stride, part["act_func"]))
            if ins != outs or stride > 1:
                stages.append([])
            expand = min(
                PROXYLESS.values("expand"), key=lambda e, mid=mid, ins=ins: abs(e * ins - mid)
            )
            stages[-1].append((part["kernel_size"], expand))
        subnet = Subnet(224, tuple(map(tuple, stages)))
        assert FREE.contains(subnet), path
        assert config["bn"] == {"momentum": PROXYLESS.bn_momentum, "eps": PROXYLESS.bn_eps}
        blocks = [s for s in layout(PROXYLESS.scaled(1.3), subnet) if s.name.startswith("stages.")]
        assert published == [
            (s.in_channels, s.out_channels, s.mid_channels, s.kernel, s.stride, s.act)
            for s in blocks
        ]
    assert found == 16
