from typing import Any

import numpy as np
import pytest

from compofa.errors import SpaceError
from compofa.networks.families import subnet_from_config
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.seeds import rng
from compofa.space.subnet import Subnet, as_number, numbers

CONFIG = {"ks": [3] * 4 + [5] * 4, "e": [4] * 4 + [6] * 4, "d": [2, 4], "r": 160}


def test_the_config_format_of_ofa_is_read() -> None:
    subnet = subnet_from_config(CONFIG)
    assert subnet == Subnet(160, (((3, 4),) * 2, ((5, 6),) * 4))
    assert subnet.depths == (2, 4)


def test_written_configs_are_read_back() -> None:
    space = MOBILENET_V3.free_space((160, 224))
    for seed in range(20):
        subnet = space.sample(rng(seed))
        assert subnet_from_config(subnet.to_config()) == subnet


def test_blocks_past_the_depth_are_zero_when_written_and_ignored_when_read() -> None:
    written = subnet_from_config(CONFIG).to_config()
    assert written["ks"] == [3, 3, 0, 0, 5, 5, 5, 5]
    assert written["e"] == [4, 4, 0, 0, 6, 6, 6, 6]
    assert subnet_from_config(written) == subnet_from_config(CONFIG)


def test_equal_networks_are_equal_and_hash_equal() -> None:
    other = {**CONFIG, "ks": [3, 3, 7, 7, 5.0, 5, 5, 5], "e": np.array(CONFIG["e"], float)}
    assert subnet_from_config(other) == subnet_from_config(CONFIG)
    assert len({subnet_from_config(other), subnet_from_config(CONFIG)}) == 1
    assert subnet_from_config(CONFIG).at(96) != subnet_from_config(CONFIG)


def test_resolution_may_be_a_list_of_one_or_left_out() -> None:
    assert subnet_from_config({**CONFIG, "r": [176]}).resolution == 176
    without = {key: value for key, value in CONFIG.items() if key != "r"}
    assert subnet_from_config(without).resolution == 224
    assert subnet_from_config(without, resolution=96).resolution == 96


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "got NoneType"),
        ([CONFIG], "got list"),
        ("ks", "got str"),
        ({}, "ks, e, d"),
        ({"ks": [3], "d": [1]}, r"\be\b"),
        ({**CONFIG, "ks": [3] * 7}, "7 and 8"),
        ({**CONFIG, "d": [2, 2, 2]}, "8 and 8"),
        ({**CONFIG, "d": []}, "0 stages"),
        ({**CONFIG, "d": [0, 4]}, "stage 1: .*4, got 0"),
        ({**CONFIG, "d": [2, 5]}, "stage 2: .*4, got 5"),
        ({**CONFIG, "d": [2, -1]}, "stage 2: .*4, got -1"),
        ({**CONFIG, "d": [2, 2.5]}, "got 2.5"),
        ({**CONFIG, "ks": [3.7] * 8}, "got 3.7"),
        ({**CONFIG, "r": 160.5}, "got 160.5"),
        ({**CONFIG, "r": [160, 176]}, "resolution, got 2"),
        ({**CONFIG, "r": []}, "resolution, got 0"),
        ({**CONFIG, "r": None}, "got None"),
        ({**CONFIG, "ks": "3" * 8}, "got '33333333'"),
        ({**CONFIG, "ks": ["3"] * 8}, "got '3'"),
        ({**CONFIG, "e": [float("nan")] * 8}, "got nan"),
        ({**CONFIG, "e": [float("inf")] * 8}, "got inf"),
        ({**CONFIG, "e": [True] * 8}, "got True"),
        ({**CONFIG, "e": [10**400] * 8}, "got 1000"),
        ({**CONFIG, "e": [1j] * 8}, "got 1j"),
        ({**CONFIG, "e": [[4] * 4, [6] * 4]}, r"got \[4, 4, 4, 4\]"),
        ({**CONFIG, "d": {"a": 1}}, r"got \{'a': 1\}"),
        ({**CONFIG, "e": np.zeros((8, 90))}, r"\be\b"),
    ],
)
def test_bad_configs_are_refused_in_one_line(config: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message) as caught:
        subnet_from_config(config)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_numbers_reads_one_or_many() -> None:
    assert numbers("x", 3) == [3]
    assert numbers("x", (3.0, 2.5, np.int64(4), np.float32(0.5))) == [3, 2.5, 4, 0.5]
    assert all(type(value) in (int, float) for value in numbers("x", np.array([1, 2.5])))


def test_whole_numbers_become_integers() -> None:
    assert (as_number(3.0), type(as_number(3.0))) == (3, int)
    assert (as_number(2.5), type(as_number(2.5))) == (2.5, float)
