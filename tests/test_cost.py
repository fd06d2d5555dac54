"""Costs that are sums over layers: exact, vectorised, and clear about what they cannot count."""

import numpy as np
import pytest
from few import changed, floats

from compofa.errors import SpaceError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3, MOBILENET_V3_SMALL_IMAGES
from compofa.networks.layout import layout, macs, params
from compofa.space.arrays import arrays_of
from compofa.space.subnet import Subnet
from nas.cost.base import LayerSumCost, macs_cost, params_cost
from nas.tables import read_subnets

SPACE = MOBILENET_V3.free_space((128, 160, 164, 224))


def sample(space=SPACE, n=200, seed=0):
    return space.arrays(space.sample_genes(np.random.default_rng(seed), n))


@pytest.mark.parametrize("width", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("classes", [10, 1000])
def test_counts_equal_the_layout(width, classes):
    backbone = MOBILENET_V3.scaled(width)
    arrays = sample()
    expected = [layout(backbone, subnet, classes) for subnet in SPACE.subnets_of(arrays)]
    assert macs_cost(backbone, classes)(arrays).tolist() == [macs(x) for x in expected]
    assert params_cost(backbone, classes)(arrays).tolist() == [params(x) for x in expected]


def test_counts_equal_the_published_tables(reference_data):
    path = reference_data / "accuracy/ofa_mbv3_w1.0_r224.csv.gz"
    arrays, columns = read_subnets(path, ("macs", "params"))
    assert np.array_equal(macs_cost(MOBILENET_V3)(arrays), columns["macs"])
    assert np.array_equal(params_cost(MOBILENET_V3)(arrays), columns["params"])


def test_any_choice_works_and_is_learnt_on_the_way():
    cost = macs_cost(MOBILENET_V3_SMALL_IMAGES, 10)
    stages = tuple(((9, 2.5),) * depth for depth in (1, 2, 3, 4, 4))
    odd = MOBILENET_V3_SMALL_IMAGES.free_space().arrays_of([Subnet(33, stages)])
    before = cost(sample())
    assert cost(odd)[0] == macs(layout(MOBILENET_V3_SMALL_IMAGES, Subnet(33, stages), 10))
    assert np.array_equal(cost(sample()), before)


def test_more_slots_than_four_and_another_layout_of_arrays():
    cost = macs_cost(MOBILENET_V3)
    subnet = Subnet(160, (((3, 4),) * 6,) * 5)
    for slots in (6, 8, 6):
        arrays = arrays_of([subnet], ("kernel", "expand"), slots)
        assert cost(arrays)[0] == macs(layout(MOBILENET_V3, subnet))


def test_float_arrays_give_what_integers_give():
    arrays = sample()
    as_floats = floats(arrays)
    cost = macs_cost(MOBILENET_V3)
    assert np.array_equal(cost(as_floats), cost(arrays))


def test_each_distinct_layer_is_asked_once():
    asked = []
    cost = LayerSumCost(MOBILENET_V3, 1000, lambda layer: asked.append(layer) or 1.0, "n", "layers")
    arrays = sample(n=500)
    counts = cost(arrays)
    assert np.array_equal(counts, arrays.depths.sum(axis=1) + 6)
    before = len(asked)
    cost(arrays)
    assert len(asked) == before <= len(SPACE.resolutions) * 96


def test_nothing_gives_nothing():
    empty = sample()[:0]
    assert macs_cost(MOBILENET_V3)(empty).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: changed(a, kernel=a.blocks["kernel"] - 1), "kernel.* 32.* -1"),
        (lambda a: changed(a, expand=a.blocks["expand"] * 100), "expand.* 32"),
        (lambda a: changed(a, expand=a.blocks["expand"] * np.nan), "expand.*nan"),
        (lambda a: changed(a, expand=a.blocks["expand"] * 1.01), "0.05"),
        (lambda a: changed(a, kernel=a.blocks["kernel"] * 1.5), "kernel.* 1, got"),
        (lambda a: changed(a, resolutions=a.resolutions * 100), "resolution.* 2048"),
        (lambda a: changed(a, resolutions=a.resolutions * 0), "resolution"),
        (lambda a: changed(a, kernel=a.blocks["kernel"][:, :3]), "shape"),
        (
            lambda a: changed(
                a, kernel=a.blocks["kernel"][:, :19], expand=a.blocks["expand"][:, :19]
            ),
            "stages",
        ),
        (lambda a: changed(a, kernel=a.blocks["kernel"] * 0), "blocks"),
    ],
)
def test_impossible_choices_are_errors(change, message):
    with pytest.raises(SpaceError, match=message) as caught:
        macs_cost(MOBILENET_V3)(change(sample()))
    assert "\n" not in str(caught.value)
