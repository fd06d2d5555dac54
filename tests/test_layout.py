import csv
import gzip
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compofa.errors import SpaceError
from compofa.networks.backbones import (
    MOBILENET_V3,
    MOBILENET_V3_SMALL_IMAGES,
    PROXYLESS,
    RESNET50D,
    RESNET50D_SMALL_IMAGES,
    Backbone,
    backbone,
    divisible8,
)
from compofa.networks.layout import layout, macs, mid_channels, params, se_channels
from compofa.nn.static import StaticNetwork
from compofa.seeds import rng
from compofa.space.subnet import Subnet

TABLES = [
    MOBILENET_V3.scaled(0.25),
    MOBILENET_V3.scaled(1.2),
    MOBILENET_V3_SMALL_IMAGES.scaled(0.25),
    PROXYLESS.scaled(0.3),
    RESNET50D.scaled(0.1),
    RESNET50D_SMALL_IMAGES.scaled(0.25),
]
each_table = pytest.mark.parametrize(
    "table", TABLES, ids=lambda table: f"{table.name} {table.width_mult}"
)


def samples(table: Backbone) -> list[Subnet]:
    """Return subnets of all shapes, at resolutions that do and do not divide by the strides."""
    space = table.free_space((32, 40, 33))
    return [space.smallest, space.largest, *(space.sample(rng(seed)) for seed in range(4))]


def watched(network: nn.Module, side: int) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Run one image through ``network``; return the input's and output's shape of each module."""
    seen = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, x: tuple[Tensor], y: Tensor) -> None:
            seen[name] = tuple(x[0].shape), tuple(y.shape)

        module.register_forward_hook(hook)

    for name, module in network.named_modules():
        watch(name, module)
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    return seen


@each_table
def test_shapes_are_those_of_the_running_network(table: Backbone) -> None:
    for subnet in samples(table):
        layers = layout(table, subnet, 7)
        network = StaticNetwork(layers).eval()
        seen = watched(network, subnet.resolution)
        for spec in layers[:-1]:
            x, y = seen[spec.name]
            assert x == (1, spec.in_channels, spec.in_size, spec.in_size), spec
            assert y == (1, spec.out_channels, spec.out_size, spec.out_size), spec
        assert seen["classifier"] == ((1, layers[-1].in_channels), (1, 7))


@each_table
def test_parameters_are_those_of_the_network(table: Backbone) -> None:
    for subnet in samples(table):
        layers = layout(table, subnet, 7)
        network = StaticNetwork(layers)
        for spec in layers:
            module = network.get_submodule(spec.name)
            assert spec.params == sum(p.numel() for p in module.parameters()), spec
        assert params(layers) == sum(p.numel() for p in network.parameters())


@each_table
def test_macs_are_those_that_hooks_count(table: Backbone) -> None:
    for subnet in samples(table):
        layers = layout(table, subnet, 7)
        network = StaticNetwork(layers).eval()
        seen = watched(network, subnet.resolution)
        # Each output number is a product with one filter of [in / groups, k, k] or [in].
        assert macs(layers) == sum(
            math.prod(seen[name][1]) * math.prod(module.weight.shape[1:])
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        )


def test_published_parameters_and_macs_are_reproduced(reference_data: Path) -> None:
    table = reference_data / "accuracy" / "ofa_mbv3_w1.0_r224.csv.gz"
    with gzip.open(table, "rt", encoding="utf-8") as file:
        rows = list(islice(csv.DictReader(file), 0, None, 10))
    assert len(rows) > 100
    for row in rows:
        config = {key: [int(value) for value in row[key].split()] for key in ("ks", "e", "d")}
        layers = layout(MOBILENET_V3, Subnet.from_config({**config, "r": int(row["r"])}))
        assert macs(layers) == int(row["macs"])
        assert params(layers) == int(row["params"])


def test_the_wide_table_has_the_published_widths() -> None:
    layers = layout(MOBILENET_V3.scaled(1.2), MOBILENET_V3.free_space().largest)
    widths = [spec.out_channels for spec in layers if spec.name.endswith(".0")]
    assert widths == [32, 48, 96, 136, 192]
    assert [spec.out_channels for spec in layers[-4:]] == [1152, 1152, 1536, 1000]
    assert layers[0].out_channels == 24


def test_residuals_strides_and_se_stand_where_the_table_says() -> None:
    layers = layout(MOBILENET_V3, MOBILENET_V3.free_space().largest)
    blocks = [spec for spec in layers if spec.name.startswith("stages.")]
    assert [spec.residual for spec in blocks] == [False, True, True, True] * 5
    assert [spec.stride for spec in blocks[::4]] == [2, 2, 2, 1, 2]
    assert {spec.stride for spec in blocks if spec.residual} == {1}
    assert [spec.se_channels > 0 for spec in blocks[::4]] == [False, True, False, True, True]
    assert (layers[1].name, layers[1].residual, layers[1].expand) == ("first", True, False)
    assert MOBILENET_V3.stride == 32
    assert MOBILENET_V3_SMALL_IMAGES.stride == 8


def test_divisible8() -> None:
    assert [divisible8(value) for value in (1, 8, 11.9, 12, 16, 19.2, 28.8, 115.2)] == (
        [8, 8, 16, 16, 16, 24, 32, 112]
    )
    for value in range(8, 3000):
        rounded = divisible8(value)
        assert rounded % 8 == 0
        assert rounded >= 0.9 * value
        assert abs(rounded - value) <= 8
    assert mid_channels(24, 4) == 96
    assert mid_channels(16, 2.5) == 40
    assert se_channels(144) == 40


def test_a_subnet_of_other_stages_or_of_no_pixels_is_refused() -> None:
    largest = MOBILENET_V3.free_space().largest
    with pytest.raises(SpaceError, match=r"5 stages.* 4"):
        layout(MOBILENET_V3, Subnet(224, largest.stages[:4]))
    with pytest.raises(SpaceError, match=r"pixel.* 0"):
        layout(MOBILENET_V3, largest.at(0))


def test_unknown_backbones_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"'vgg'.*mobilenet_v3"):
        backbone("vgg")
    for width in (0, -1, float("nan"), 9):
        with pytest.raises(SpaceError, match="width multiplier"):
            backbone("mobilenet_v3", width)
