"""Logits that the published programs computed, reproduced by supernet and extracted network."""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compofa.io.formats.names import to_ours
from compofa.io.weights import load_state
from compofa.model_zoo import ofa_net
from compofa.networks.families import subnet_from_config
from compofa.networks.layout import layout, macs, params
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet

NETS = {
    "compofa_fixed_nomatrix": "compofa",
    "compofa_elastic_matrix": "compofa-elastic",
    "ofa_mbv3_w1.0": "ofa_mbv3_d234_e346_k357_w1.0",
    "ofa_mbv3_w1.2": "ofa_mbv3_d234_e346_k357_w1.2",
    "ofa_proxyless_w1.3": "ofa_proxyless_d234_e346_k357_w1.3",
    "ofa_resnet50": "ofa_resnet50",
}
CASES = range(3)


def weight(key: str, shape: list[int]) -> Tensor:
    """Return the weight that the vectors were computed with: a rule of its name and shape."""
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1)
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("_matrix"):
        value = np.eye(shape[0]) + 0.1 * z
    elif key.endswith("running_mean"):
        value = 0.1 * z
    elif key.endswith("running_var"):
        value = 1 + 0.2 * np.abs(z)
    elif len(shape) == 1:
        value = 1 + 0.1 * z if key.endswith("weight") else 0.1 * z
    else:
        value = z * np.sqrt(1.5 / np.prod(shape[1:]))
    return torch.from_numpy(value.astype(np.float32))


def images(n: int, side: int) -> Tensor:
    generator = np.random.default_rng([0, n, side])
    return torch.from_numpy(generator.standard_normal((n, 3, side, side)).astype(np.float32))


@cache
def vectors(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "vectors" / "reference_logits.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=NETS)
def entry(request: pytest.FixtureRequest, reference_data: Path) -> tuple[str, dict[str, Any]]:
    return request.param, vectors(reference_data)[request.param]


@pytest.fixture(scope="module")
def net(entry: tuple[str, dict[str, Any]]) -> Supernet:
    name, values = entry
    net = ofa_net(NETS[name])
    load_state(net, {key: weight(key, shape) for key, shape in values["shapes"].items()})
    return net.eval()


def test_every_published_weight_has_its_place(
    net: Supernet, entry: tuple[str, dict[str, Any]]
) -> None:
    shapes = to_ours(entry[1]["shapes"], 4)
    assert len(shapes) == len(entry[1]["shapes"])
    assert shapes.keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        published = shapes[key]
        if "depthwise.conv" in key and key.startswith("stages."):
            published = [*published[:2], *value.shape[2:]]  # a fixed kernel stores its size only
        assert list(value.shape) == published, key


@pytest.mark.parametrize("case", CASES)
def test_logits_parameters_and_macs_are_reproduced(
    net: Supernet, entry: tuple[str, dict[str, Any]], case: int
) -> None:
    case = entry[1]["cases"][case]
    subnet = subnet_from_config(case)
    assert net.spec.space.contains(subnet.at(224))
    expected = torch.tensor(case["logits"])
    static = extract(net, subnet)
    for network in (lambda x: net(x, subnet), static):
        with torch.no_grad():
            logits = network(images(2, subnet.resolution))
        torch.testing.assert_close(logits[:, :16], expected, atol=1e-4, rtol=0)
        assert logits.norm().item() == pytest.approx(case["norm"], rel=1e-4)
    layers = layout(net.spec.backbone, subnet)
    assert params(layers) == case["params"] == sum(p.numel() for p in static.parameters())
    assert macs(layers) == case["macs"]


def test_the_seeds_calls_give_the_same_logits(
    net: Supernet, entry: tuple[str, dict[str, Any]]
) -> None:
    case = entry[1]["cases"][0]
    net.set_active_subnet(**{key: case[key] for key in ("ks", "e", "d", "w") if key in case})
    x, expected = images(2, case["r"]), torch.tensor(case["logits"])
    with torch.no_grad():
        for network in (net, net.get_active_subnet(preserve_weight=True)):
            torch.testing.assert_close(network(x)[:, :16], expected, atol=1e-4, rtol=0)
