import numpy as np
import pytest
import torch

from compofa.errors import SpaceError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3_SMALL_IMAGES
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.choice import Choice
from compofa.space.coupling import parse_coupling
from compofa.space.subnet import Subnet

WIDTH, CLASSES = 0.1, 3


def make(net_id: str) -> Supernet:
    return Supernet(network_spec(net_id, CLASSES, width_mult=WIDTH))


@pytest.fixture
def small() -> Supernet:
    return make("ofa-small")


def blocks(depth: int, kernel: int, expand: float) -> tuple:
    return ((kernel, expand),) * depth


@pytest.mark.parametrize(
    ("choice", "stages"),
    [
        ({}, [(4, 7, 6)] * 5),
        ({"ks": 3, "e": 4, "d": 2}, [(2, 3, 4)] * 5),
        ({"ks": [3.0], "e": (4,), "d": np.array([2])}, [(2, 3, 4)] * 5),
        ({"ks": [3, 5, 7, 3, 5]}, [(4, k, 6) for k in (3, 5, 7, 3, 5)]),
        ({"e": [3, 4, 6, 3, 4], "ks": 5}, [(4, 5, e) for e in (3, 4, 6, 3, 4)]),
        ({"d": [2, 3, 4, 3, 2]}, [(d, 7, 6) for d in (2, 3, 4, 3, 2)]),
    ],
)
def test_choices_are_a_number_or_one_per_stage(
    small: Supernet, choice: dict[str, Choice], stages: list
) -> None:
    chosen = small.set_active_subnet(**choice)
    assert chosen.stages == tuple(blocks(*stage) for stage in stages)
    assert chosen is small.active


def test_choices_are_one_per_block(small: Supernet) -> None:
    ks, e = [3, 5, 7, 3] * 5, [3, 4, 6, 0] * 5
    chosen = small.set_active_subnet(ks=ks, e=e, d=[3, 2, 3, 3, 3], r=96)
    row = ((3, 3), (5, 4), (7, 6))
    assert chosen == Subnet(96, (row, row[:2], row, row, row))
    with pytest.raises(SpaceError, match=r"stage 1 block 4 .* 0\b"):
        small.set_active_subnet(e=e, d=4)
    assert small.active == chosen


def test_what_is_left_out_stays_as_it_was(small: Supernet) -> None:
    small.set_active_subnet(ks=5, e=3, d=2, r=96)
    assert small.set_active_subnet(d=3) == Subnet(96, (blocks(3, 5, 3),) * 5)
    assert small.set_active_subnet(e=6) == Subnet(96, (blocks(3, 5, 6),) * 5)


def test_a_config_of_ofa_is_chosen() -> None:
    net = make("compofa-elastic-small")
    for seed in range(5):
        subnet = net.spec.space.sample(rng(seed))
        assert net.set_active_subnet(**subnet.to_config()) == subnet


def test_coupled_expand_ratios_follow_the_depth_and_the_other_way_round() -> None:
    net = make("compofa-elastic-small")
    chosen = net.set_active_subnet(d=[2, 3, 4, 3, 2], ks=3)
    pairs = [(len(stage), stage[0][1]) for stage in chosen.stages]
    assert pairs == [(2, 3), (3, 4), (4, 6), (3, 4), (2, 3)]
    assert net.set_active_subnet(e=4).depths == (3,) * 5
    assert net.set_active_subnet(e=[3, 4, 6, 6, 6]).depths == (2, 3, 4, 4, 4)
    assert net.set_active_subnet(d=2, e=3, ks=7).stages == (blocks(2, 7, 3),) * 5
    with pytest.raises(SpaceError, match="expected 3, got 6"):
        net.set_active_subnet(d=2, e=6)


def test_an_own_coupling_is_followed() -> None:
    space = MOBILENET_V3_SMALL_IMAGES.compound_space(parse_coupling("1:4,2:3"))
    net = Supernet(NetworkSpec(MOBILENET_V3_SMALL_IMAGES.scaled(WIDTH), space, CLASSES))
    assert net.set_active_subnet(d=1).stages[0] == blocks(1, 3, 4)
    assert net.set_active_subnet(e=3).stages[0] == blocks(2, 3, 3)
    net.eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for subnet in space.enumerate():
            torch.testing.assert_close(net(x, subnet), extract(net, subnet)(x))


def test_every_fault_is_told_at_once(small: Supernet) -> None:
    before = small.active
    with pytest.raises(SpaceError) as caught:
        small.set_active_subnet(ks=9, e=[5, 3, 3, 3, 3], d=[4, 9, 4, 4, 0], r=0)
    message = str(caught.value)
    for fault in (
        "stage 1 block 1 kernel",
        "expected 3 or 5 or 7, got 9",
        "stage 1 block 4 expand",
        "expected 3 or 4 or 6, got 5",
        "stage 2 depth",
        "got 9",
        "stage 5 depth",
        "got 0",
        "resolution",
    ):
        assert fault in message
    assert "\n" not in message
    assert small.active == before


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"d": 9}, "depth.* 2 or 3 or 4, got 9"),
        ({"d": 2.5}, "got 2.5"),
        ({"d": [2, 3]}, "1 or 5 .*got 2"),
        ({"d": []}, "1 or 5 .*got 0"),
        ({"e": 5}, "expand.* 3 or 4 or 6, got 5"),
        ({"e": [3] * 19}, "1, 5 or 20 .*got 19"),
        ({"e": "6"}, "got '6'"),
        ({"ks": 4}, "kernel.* 3 or 5 or 7, got 4"),
        ({"ks": float("nan")}, "got nan"),
        ({"ks": [[3] * 4] * 5}, r"got \[3"),
        ({"ks": True}, "got True"),
        ({"d": 2, "ks": [3, 3, 4, 3] * 5}, "block 3 kernel.* 3 or 5 or 7, got 4"),
        ({"r": 0}, "resolution.* 0"),
        ({"r": 96.5}, "got 96.5"),
        ({"r": "96"}, "got '96'"),
        ({"r": True}, "got True"),
    ],
)
def test_bad_choices_are_refused_in_one_line(small: Supernet, choice: dict, message: str) -> None:
    before = small.active
    with pytest.raises(SpaceError, match=message) as caught:
        small.set_active_subnet(**choice)
    assert "\n" not in str(caught.value)
    assert small.active == before


def test_a_choice_under_two_names_is_refused(small) -> None:
    with pytest.raises(SpaceError, match="ks, kernel"):
        small.set_active_subnet(ks=3, kernel=3)
