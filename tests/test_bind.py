"""A bound subnet is a plain network over the supernet's memory."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compofa.errors import SpaceError, TrainingError
from compofa.networks.zoo import network_spec
from compofa.nn.elastic import ElasticKernel
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.subnet import Subnet
from compofa.training.optim import make_optimizer

NETS = {
    "compofa-small": {"width_mult": 0.25},
    "ofa-small": {"width_mult": 0.25},
    "ofa-small, centre": {"width_mult": 0.25},
    "ofa-proxyless-small": {"width_mult": 0.25},
    "ofa-resnet50-small": {"width_mult": 0.25},
}
CLASSES = 5


def make(name: str) -> Supernet:
    """Return a supernet in double precision with matrices and statistics of its own."""
    spec = network_spec(name.split(",")[0], CLASSES, dropout=0.0, **NETS[name])
    if name.endswith("centre"):
        spec = replace(spec, kernel_transform=False)
    net = Supernet(spec, 1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            noise = torch.rand(value.shape, generator=generator)
            if ".matrices." in name or (value.ndim == 1 and value.is_floating_point()):
                value.add_(noise, alpha=0.2)
    return net


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> Supernet:
    return make(request.param)


@pytest.fixture
def small() -> Supernet:
    return make("ofa-small")


def subnets(net: Supernet) -> list[Subnet]:
    space = net.spec.space
    return [space.smallest, space.sample(rng(0)), space.largest]


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(0)).double()


def learn(logits: Tensor) -> None:
    F.cross_entropy(logits, torch.arange(len(logits))).backward()


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in net.named_parameters()
    }


def owners(net: nn.Module) -> set[int]:
    return {value.untyped_storage().data_ptr() for value in net.state_dict().values()}


@pytest.mark.parametrize("mode", [True, False])
def test_it_computes_what_the_supernet_and_the_extracted_network_compute(
    net: Supernet, mode: bool
) -> None:
    net.train(mode)
    for subnet in subnets(net):
        before = {name: value.clone() for name, value in net.named_buffers()}
        bound, alone, twin = net.bind(subnet), extract(net, subnet), copy.deepcopy(net)
        assert bound.training is mode and type(bound) is type(alone) is StaticNetwork
        assert bound.specs == alone.specs
        logits = bound(images())
        assert torch.equal(logits, twin(images(), subnet))
        torch.testing.assert_close(logits, alone(images()))
        moved = [not torch.equal(value, before[name]) for name, value in net.named_buffers()]
        assert any(moved) is mode
        state = twin.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_it_has_no_memory_of_its_own(net: Supernet) -> None:
    for subnet in subnets(net):
        bound = net.bind(subnet)
        assert owners(bound) <= owners(net)
        assert all(p.is_leaf and p.requires_grad for p in bound.parameters())


def test_its_gradients_add_up_in_the_supernets(net: Supernet) -> None:
    for subnet in subnets(net):
        learn(net(images(), subnet))
    expected = gradients(net)
    net.zero_grad(set_to_none=False)
    memory = {name: value.grad for name, value in net.named_parameters()}
    for subnet in subnets(net):
        learn(net.bind(subnet)(images()))
    for name, value in gradients(net).items():
        torch.testing.assert_close(value, expected[name], msg=name)
        assert memory[name] is None or net.get_parameter(name).grad is memory[name], name
    assert all(value.any() for name, value in expected.items() if name.endswith("conv.weight"))


def test_it_continues_with_what_the_supernet_learned(net: Supernet) -> None:
    optimizer = make_optimizer(net, 1e-4, 0.9)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    subnet = subnets(net)[1]
    bound = net.bind(subnet)
    for _ in range(2):  # a second pass through the same kernel matrices
        before = bound.eval()(images())
        learn(bound.train()(images()))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        after = bound.eval()(images())
        assert not torch.allclose(before, after)
        assert torch.equal(after, net.eval()(images(), subnet))


def test_kept_layers_serve_all_subnets(net: Supernet) -> None:
    kept, space, layers = {}, net.spec.space, 0
    for seed in range(12):
        subnet = space.sample(rng(seed))
        bound = net.bind(subnet, kept)
        layers += len(bound.specs)
        assert torch.equal(bound(images(2)), net(images(2), subnet))
    count = len(kept)
    assert count < 0.6 * layers, "subnets share layers"
    drawn = space.sample(rng(3))
    again = net.bind(drawn, kept)
    assert len(kept) == count
    found = {id(again.get_submodule(spec.name)) for spec in again.specs}
    assert found <= set(map(id, kept.values()))
    with torch.no_grad():
        assert not any(p.requires_grad for p in net.bind(drawn, kept).parameters())
    assert all(p.requires_grad for p in net.bind(drawn, kept).parameters())
    assert not net.eval().bind(drawn, kept).stem.training


def test_the_supernet_remembers_nothing_of_it(small: Supernet) -> None:
    before = set(vars(small))
    learn(small.bind(small.active)(images()))
    assert set(vars(small)) == before
    twin = copy.deepcopy(small)
    twin.zero_grad(set_to_none=False)
    state = {name: value.clone() for name, value in small.state_dict().items()}
    old = gradients(small)
    learn(twin.bind(twin.active)(images()))
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    assert all(torch.equal(value, old[name]) for name, value in gradients(small).items())


def test_its_copy_learns_alone(small: Supernet) -> None:
    alone = copy.deepcopy(small.bind(small.spec.space.smallest))
    assert not owners(alone) & owners(small)
    learn(alone(images()))
    assert all(p.grad.any() for name, p in alone.named_parameters() if name.endswith("conv.weight"))
    assert not any(value.any() for value in gradients(small).values())


def test_without_grad_mode_nothing_learns(small: Supernet) -> None:
    with torch.no_grad():
        bound = small.bind(small.spec.space.smallest)
    assert not bound(images()).requires_grad
    assert all(p.grad is None for p in small.parameters())


def test_frozen_parameters_stay_frozen(small: Supernet) -> None:
    small.requires_grad_(False).classifier.requires_grad_(True)
    bound = small.bind(small.spec.space.smallest)
    learn(bound(images()))
    learned = {name for name, value in small.named_parameters() if value.grad is not None}
    assert learned == {"classifier.weight", "classifier.bias"}


def test_the_supernets_own_pass_needs_no_care_for_gradients(small: Supernet) -> None:
    subnet = small.spec.space.smallest
    learn(small(images(), subnet))
    expected = gradients(small)
    loss = F.cross_entropy(small(images(), subnet), torch.arange(4))
    small.zero_grad()  # to None, between the passes
    loss.backward()
    assert all(torch.equal(value, expected[name]) for name, value in gradients(small).items())


def test_gradients_that_are_gone_are_not_missed_in_silence(net: Supernet) -> None:
    bound = net.bind(net.spec.space.smallest)
    loss = F.cross_entropy(bound(images()), torch.arange(4))
    net.zero_grad()  # to None
    with pytest.raises(TrainingError, match="set_to_none"):
        loss.backward()
    learn(net.bind(net.spec.space.smallest)(images()))


def test_modules_say_what_they_are(net: Supernet) -> None:
    for subnet in subnets(net):
        bound, alone = net.bind(subnet), extract(net, subnet)
        if not any(isinstance(module, ElasticKernel) for module in bound.modules()):
            assert repr(bound) == repr(alone)
        for name, module in alone.named_modules():
            assert not isinstance(module, ElasticKernel | Supernet)
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                assert repr(module) == repr(bound.get_submodule(name)) or ".depthwise." in name


def test_hooks_of_the_supernets_layers_see_its_passes() -> None:
    net = Supernet(network_spec("compofa-small", CLASSES, width_mult=0.25))
    seen = []
    for name in ("stem", "stages.0.1.depthwise.conv", "dropout"):
        net.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.append(name))
    for run in (net.bind(net.active), lambda x: net(x, net.active)):
        run(torch.zeros(2, 3, 12, 12))
        assert seen == ["stem", "stages.0.1.depthwise.conv", "dropout"]
        seen.clear()


def test_what_the_weights_do_not_hold_is_refused(small: Supernet) -> None:
    stages = small.spec.space.smallest.stages
    with pytest.raises(SpaceError, match="stage 1 block 1"):
        small.bind(Subnet(16, (((9, 3),) * 2, *stages[1:])))
