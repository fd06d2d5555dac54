import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compofa.errors import SpaceError
from compofa.model_zoo import ofa_net
from compofa.networks.layout import ConvSpec
from compofa.networks.zoo import network_spec
from compofa.nn.elastic import ElasticKernel, centre, transform_kernel
from compofa.nn.extract import build_static, extract
from compofa.nn.static import ConvBN, StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.subnet import Subnet

WIDTH, CLASSES = 0.25, 7
NETS = {
    "compofa": 64,
    "compofa-elastic": 64,
    "ofa_mbv3_d234_e346_k357_w1.0": 64,
    "compofa-small": 16,
    "compofa-elastic-small": 16,
    "ofa-small": 16,
}
"""Networks, here all of width 0.25, and the side of the images they are tried with."""


def make(net_id: str, seed: int = 0, dropout: float = 0.0) -> Supernet:
    """Return a supernet in which no weight or statistic is one that code could take for granted."""
    spec = network_spec(
        net_id, CLASSES, width_mult=WIDTH, resolutions=(NETS[net_id],), dropout=dropout
    )
    net = Supernet(spec, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.add_(noise.abs(), alpha=0.2)
            elif value.ndim == 1 or ".matrices." in name:
                value.add_(noise, alpha=0.1)
    return net


@pytest.fixture(params=NETS)
def net(request: pytest.FixtureRequest) -> Supernet:
    return make(request.param)


@pytest.fixture
def small() -> Supernet:
    return make("ofa-small")


def some_subnets(net: Supernet, count: int = 3) -> list[Subnet]:
    space = net.spec.space
    return [space.smallest, space.largest, *(space.sample(rng(seed)) for seed in range(count))]


def images(net: Supernet, n: int = 3, seed: int = 0) -> Tensor:
    side = net.spec.space.resolutions[0]
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the supernet is its subnets ---


def test_the_supernet_computes_what_the_extracted_network_computes(net: Supernet) -> None:
    net.eval()
    x = images(net)
    outputs = []
    for subnet in some_subnets(net):
        with torch.no_grad():
            outputs.append(net(x, subnet))
            torch.testing.assert_close(outputs[-1], extract(net, subnet)(x), atol=1e-5, rtol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 0.01, "smallest and largest must differ"


def test_training_mode_uses_and_updates_the_same_statistics(net: Supernet) -> None:
    for subnet in some_subnets(net, 1):
        static = extract(net, subnet)
        assert static.training
        before, x = state_of(net), images(net)
        torch.testing.assert_close(net(x, subnet), static(x), atol=1e-5, rtol=1e-5)
        after = net.state_dict()
        for name, value in static.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                active = slice(len(value))
                torch.testing.assert_close(after[name][active], value, atol=1e-5, rtol=1e-4)
                assert not torch.equal(after[name][active], before[name][active]), name
                rest = slice(len(value), None)
                assert torch.equal(after[name][rest], before[name][rest]), name


def filters_by_hand(depthwise: ElasticKernel, channels: int, kernel: int) -> Tensor:
    """Derive a smaller kernel as the reference words it: centre, flatten, ``out = M in``."""
    weight = depthwise.conv.weight[:channels]
    for size in (5, 3):
        if kernel <= size < weight.shape[-1]:
            flat = weight[:, 0, 1:-1, 1:-1].flatten(1)
            if str(size) in depthwise.matrices:
                flat = torch.einsum("ij,cj->ci", depthwise.matrices[str(size)], flat)
            weight = flat.view(channels, 1, size, size)
    return weight


def test_gradients_are_those_of_the_extracted_network(net: Supernet) -> None:
    net.double()  # in single precision a ReLU may stand open in one network and closed in the other
    for subnet in some_subnets(net, 1):
        static, x = extract(net, subnet), images(net).double()
        net.zero_grad()
        F.cross_entropy(net(x, subnet), torch.arange(len(x))).backward()
        F.cross_entropy(static(x), torch.arange(len(x))).backward()
        parameters = dict(net.named_parameters())
        expected = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for name, value in static.named_parameters():
            owner, _, leaf = name.rpartition(".conv.weight")
            module = net.get_submodule(owner) if not leaf else None
            if isinstance(module, ElasticKernel):
                inputs = [module.conv.weight, *module.matrices.values()]
                filters = filters_by_hand(module, len(value), value.shape[-1])
                found = torch.autograd.grad(filters, inputs, value.grad, allow_unused=True)
                names = [name, *(f"{owner}.matrices.{size}" for size in module.matrices)]
                for key, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        expected[key] = gradient
            else:
                expected[name][tuple(map(slice, value.shape))] = value.grad
        for name, value in parameters.items():
            actual = torch.zeros_like(value) if value.grad is None else value.grad
            assert torch.allclose(actual, expected[name], atol=1e-9), name
        assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


@pytest.mark.parametrize("mode", [True, False])
def test_a_batch_of_one_keeps_its_axis(small: Supernet, mode: bool) -> None:
    small.train(mode)
    assert small(images(small, 1)).shape == (1, CLASSES)
    static = small.get_active_subnet()
    assert static.eval()(images(small, 1)).shape == (1, CLASSES)


def test_images_of_any_side_are_taken(small: Supernet) -> None:
    small.eval()
    for side in (8, 13, 32):
        assert small(torch.zeros(2, 3, side, side)).shape == (2, CLASSES)


def test_dropout_acts_in_training_only() -> None:
    net = make("ofa-small", dropout=0.5)
    x = images(net)
    assert torch.equal(net.eval()(x), net(x))
    static = extract(net, net.active)
    assert torch.equal(static(x), static(x))
    assert static.dropout.p == 0.5
    torch.manual_seed(0)
    assert not torch.equal(net.train()(x), net(x))


def test_forward_refuses_what_the_weights_do_not_hold() -> None:
    net = make("compofa-small").eval()
    space = net.spec.space
    uncoupled = Subnet(16, (((3, 4),) * 2, *space.smallest.stages[1:]))
    assert not space.contains(uncoupled)
    with torch.no_grad():
        assert net(images(net), uncoupled).shape == (3, CLASSES), "the weights hold it all the same"
    for block in ((7, 3), (3, 5)):
        with pytest.raises(SpaceError, match="stage 1 block 1"):
            net(images(net), Subnet(16, ((block,) * 2, *space.smallest.stages[1:])))
        with pytest.raises(SpaceError, match="stage 1 block 1"):
            extract(net, Subnet(16, ((block,) * 2, *space.smallest.stages[1:])))


# --- kernels ---


def test_smaller_kernels_are_the_centre_times_a_matrix() -> None:
    weight = torch.randn(6, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(25, 25, generator=torch.Generator().manual_seed(1))
    by_hand = torch.stack([matrix @ channel[0, 1:6, 1:6].flatten() for channel in weight])
    torch.testing.assert_close(transform_kernel(weight, matrix, 5), by_hand.view(6, 1, 5, 5))
    assert torch.equal(transform_kernel(weight, None, 5), weight[..., 1:6, 1:6])
    assert torch.equal(transform_kernel(weight, torch.eye(25), 5), centre(weight, 5))
    assert torch.equal(centre(weight, 3), weight[..., 2:5, 2:5])


@pytest.fixture
def layer() -> ElasticKernel:
    spec = ConvSpec("depthwise", 1, 8, 8, 7, groups=8)
    layer = ElasticKernel(ConvBN(spec, eps=1e-5, momentum=0.1), (3, 5, 7))
    nn.init.normal_(layer.conv.weight, generator=torch.Generator().manual_seed(0))
    return layer


def test_identity_matrices_give_the_centre(layer: ElasticKernel) -> None:
    assert {name: value.shape for name, value in layer.matrices.items()} == {
        "5": (25, 25),
        "3": (9, 9),
    }
    for layer.kernel in (7, 5, 3):
        assert torch.equal(layer.filters(), centre(layer.conv.weight, layer.kernel))


def test_each_smaller_kernel_goes_through_the_one_above_it(layer: ElasticKernel) -> None:
    with torch.no_grad():
        layer.matrices["5"].mul_(2)
        layer.matrices["3"].mul_(3)
    weight = layer.conv.weight
    for layer.kernel, factor in ((7, 1), (5, 2), (3, 6)):
        torch.testing.assert_close(layer.filters(), factor * centre(weight, layer.kernel))


def test_a_fixed_kernel_network_stores_only_the_kernel_it_uses() -> None:
    net = make("compofa-small")
    kernels = [stage[0].depthwise.conv.weight.shape[-1] for stage in net.stages]
    assert kernels == [3, 5, 3, 3, 5]
    assert not any("matri" in name for name in net.state_dict())


def test_the_published_network_has_its_number_of_parameters() -> None:
    net = ofa_net("ofa_mbv3_d234_e346_k357_w1.0")
    assert sum(p.numel() for p in net.parameters()) == 7_678_880


# --- extraction ---


def test_extraction_shares_no_memory_and_leaves_the_supernet_alone(small: Supernet) -> None:
    small.eval()
    before, subnet = state_of(small), small.spec.space.largest
    static = small.get_active_subnet()
    owned = {value.untyped_storage().data_ptr() for value in small.state_dict().values()}
    assert not owned & {v.untyped_storage().data_ptr() for v in static.state_dict().values()}
    with torch.no_grad():
        for value in static.state_dict().values():
            value.fill_(3)
    assert same(before, small.state_dict())
    assert small.active == subnet
    assert not small.training
    assert all(p.grad is None and p.requires_grad for p in small.parameters())


def test_what_is_extracted_is_a_plain_network(small: Supernet) -> None:
    static = extract(small, small.spec.space.smallest)
    assert isinstance(static, StaticNetwork)
    assert {type(module).__module__.split(".")[0] for module in static.modules()} == {
        "compofa",
        "torch",
    }
    assert not any(isinstance(module, ElasticKernel | Supernet) for module in static.modules())
    assert all(parameter.requires_grad for parameter in static.parameters())
    assert all(parameter.is_leaf for parameter in static.parameters())


def test_the_extracted_network_keeps_the_type_of_numbers(small: Supernet) -> None:
    static = extract(small.double(), small.active)
    assert {p.dtype for p in static.parameters()} == {torch.float64}


@pytest.mark.parametrize("mode", [True, False])
def test_the_extracted_network_stands_in_the_same_mode(small: Supernet, mode: bool) -> None:
    assert extract(small.train(mode), small.active).training is mode
    assert small.get_active_subnet(preserve_weight=False).training is mode


def test_an_active_subnet_without_its_weights_is_initialised() -> None:
    small = make("ofa-small", seed=1)
    fresh = small.get_active_subnet(preserve_weight=False)
    assert same(state_of(fresh), state_of(small.get_active_subnet(preserve_weight=False)))
    assert {n: v.shape for n, v in fresh.state_dict().items()} == {
        n: v.shape for n, v in small.get_active_subnet().state_dict().items()
    }
    assert not torch.equal(fresh.classifier.weight, small.classifier.weight)
    assert (fresh.stem.bn.weight == 1).all()


def test_batch_normalisation_keeps_the_tables_numbers() -> None:
    spec = network_spec("ofa-small", CLASSES, resolutions=(16,))
    spec = replace(spec, backbone=replace(spec.backbone, bn_eps=1e-3, bn_momentum=0.05))
    net = Supernet(spec)
    for network in (net, build_static(spec, spec.space.smallest)):
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms
        assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.05)}


# --- randomness ---


def test_the_same_seed_gives_the_same_weights() -> None:
    spec = network_spec("ofa-small", CLASSES)
    torch.manual_seed(1)
    first = state_of(Supernet(spec, 5))
    torch.manual_seed(2)
    assert same(first, state_of(Supernet(spec, 5)))
    assert not same(first, state_of(Supernet(spec, 6)))


def test_initial_weights_are_he_normal_by_fan_out() -> None:
    net = Supernet(network_spec("compofa", 1000), 0)
    for conv in (net.mix.conv, net.final_expand.conv, net.stages[4][1].project.conv):
        assert conv.weight.std().item() == pytest.approx((2 / conv.out_channels) ** 0.5, rel=0.02)
    depthwise = net.stages[4][1].depthwise.conv.weight
    # The fan-out that the published programs take counts channels, not channels a group.
    assert depthwise.std().item() == pytest.approx((2 / (25 * len(depthwise))) ** 0.5, rel=0.05)
    assert net.classifier.weight.abs().max() <= 1280**-0.5
    assert not net.classifier.bias.any()


def test_nothing_touches_the_global_generators() -> None:
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    net = Supernet(network_spec("ofa-small", CLASSES, resolutions=(16,)))
    net.sample_active_subnet(0)
    net.get_active_subnet()
    net.get_active_subnet(preserve_weight=False)
    net.eval()(images(net))
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_sampling_sets_the_active_subnet(small: Supernet) -> None:
    drawn = small.sample_active_subnet(3)
    assert drawn == small.active == small.sample_active_subnet(np.random.default_rng(3))
    assert small.spec.space.contains(drawn)
    small.eval()
    assert torch.equal(small(images(small)), small(images(small), drawn))
    assert len({small.sample_active_subnet() for _ in range(3)}) > 1


# --- names ---


def test_unknown_networks_and_classes_are_refused() -> None:
    with pytest.raises(SpaceError, match=r"'resnet'.*compofa"):
        ofa_net("resnet")
    with pytest.raises(SpaceError, match=r"classes.* 0"):
        ofa_net("compofa", classes=0)
