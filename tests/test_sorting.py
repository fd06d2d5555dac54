import pytest
import torch
from torch import nn

from compofa.networks.kinds import mid_channels, se_channels
from compofa.networks.zoo import network_spec
from compofa.nn.blocks import MBConv
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.seeds import rng


def make_supernet(net_id: str, width_mult: float | None = None) -> Supernet:
    """A supernet in evaluation mode with random weights, biases and BN statistics."""
    net = Supernet(network_spec(net_id, classes=5, width_mult=width_mult), seed=2).eval()
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.running_var):
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            for tensor in (module.bias, module.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator))
    return net


def blocks(net: Supernet) -> dict[str, MBConv]:
    found = {k: m for k, m in net.stages.named_modules() if isinstance(m, MBConv)}
    assert len(found) == 20
    return found


def importance(weight: torch.Tensor) -> torch.Tensor:
    """The L1 norm over a convolution's outputs, one a channel that it reads."""
    return weight.abs().sum((0, 2, 3))


UNSORTED = (".project.bn.", ".matrices.", ".num_batches_tracked")
CASES = [
    ("compofa", 0.35, 64),
    ("compofa-small", None, 16),
    ("ofa_mbv3_d234_e346_k357_w1.0", 0.35, 64),
]


@pytest.mark.parametrize(("net_id", "width_mult", "size"), CASES)
def test_the_full_network_computes_what_it_did(net_id, width_mult, size):
    net = make_supernet(net_id, width_mult)
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    space = net.spec.space
    narrow = space.smallest
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        full, small = net(images, space.largest), net(images, narrow)
        sort_channels(net)
        torch.testing.assert_close(net(images, space.largest), full, rtol=1e-4, atol=1e-4)
        change = (net(images, narrow) - small).abs().max()
    assert change > 1e-2, "narrow networks must have other channels now"
    for name, value in net.state_dict().items():
        stays = not name.startswith("stages.") or any(part in name for part in UNSORTED)
        assert torch.equal(value, before[name]) is stays, name


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_full_width_networks_of_any_depth_compute_what_they_did(depth):
    net = make_supernet("ofa-small")
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    subnet = net.set_active_subnet(d=depth, e=6, ks=[3, 5, 7, 5, 3])
    with torch.no_grad():
        before = net(images, subnet)
        sort_channels(net)
        torch.testing.assert_close(net(images, subnet), before, rtol=1e-4, atol=1e-4)


def test_importance_descends():
    net = make_supernet("compofa-small")
    unsorted = 0
    for block in blocks(net).values():
        unsorted += bool((importance(block.project.conv.weight).diff() > 0).any())
    assert unsorted == 20
    sort_channels(net)
    gates = 0
    for name, block in blocks(net).items():
        assert (importance(block.project.conv.weight).diff() <= 0).all(), name
        if block.se is not None:
            gates += 1
            assert (importance(block.se.expand.weight).diff() <= 1e-6).all(), name
    assert gates == 12


def test_narrow_networks_get_the_most_important_channels():
    net = make_supernet("compofa-small")
    chosen = {}
    for name, block in blocks(net).items():
        mid, hidden = mid_channels(block.expand.conv.in_channels, 3), 0
        order = importance(block.project.conv.weight).argsort(descending=True)[:mid]
        rows = {
            "expand": block.expand.conv.weight[order].clone(),
            "depthwise": block.depthwise.conv.weight[order].clone(),
            "project": block.project.conv.weight[:, order].clone(),
            "bn": block.depthwise.bn.running_mean[order].clone(),
        }
        if block.se is not None:
            hidden = se_channels(mid)
            best = importance(block.se.expand.weight).argsort(descending=True)[:hidden]
            rows["se"] = block.se.reduce.weight[best][:, order].clone()
            rows["gate"] = block.se.expand.weight[order][:, best].clone()
            rows["bias"] = block.se.reduce.bias[best].clone()
        chosen[name] = (mid, hidden, rows)
    sort_channels(net)
    for name, block in blocks(net).items():
        mid, hidden, rows = chosen[name]
        now = {
            "expand": block.expand.conv.weight[:mid],
            "depthwise": block.depthwise.conv.weight[:mid],
            "project": block.project.conv.weight[:, :mid],
            "bn": block.depthwise.bn.running_mean[:mid],
        }
        if block.se is not None:
            now["se"] = block.se.reduce.weight[:hidden, :mid]
            now["gate"] = block.se.expand.weight[:mid, :hidden]
            now["bias"] = block.se.reduce.bias[:hidden]
        assert now.keys() == rows.keys()
        for what, value in now.items():
            assert torch.equal(value, rows[what]), f"{name} {what}"


def test_sorting_again_changes_nothing():
    net = make_supernet("compofa-small")
    sort_channels(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sort_channels(net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nothing_is_left_behind_for_autograd():
    net = make_supernet("compofa-small")
    sort_channels(net)
    net.train()
    subnet = net.spec.space.sample(rng(0))
    net(torch.randn(4, 3, 16, 16), subnet).sum().backward()
    assert all(p.is_leaf and p.requires_grad for p in net.parameters())
