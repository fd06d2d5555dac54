import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from compofa.errors import DataError, SpaceError
from compofa.networks.zoo import network_spec
from compofa.nn.calibrate import calibrate
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.seeds import rng


def make_supernet(seed: int = 0, mode: bool = False) -> Supernet:
    """A small supernet whose BN layers hold statistics and affine weights that are not neutral."""
    net = Supernet(network_spec("compofa-elastic-small", classes=4), seed)
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, 0.5),
                (module.bias, -0.5),
                (module.running_mean, -1.0),
                (module.running_var, 0.5),
            ):
                values = torch.rand(tensor.shape, generator=generator) + low
                tensor.data.copy_(values)
    return net.train(mode)


def make_images(n: int, seed: int = 1) -> torch.Tensor:
    """Images whose mean and contrast drift, so that batches differ a lot from each other."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.linspace(-2, 2, n).view(n, 1, 1, 1)
    return torch.randn(n, 3, 16, 16, generator=generator) * (0.2 + drift.abs() / 4) + drift


def norms(network: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {k: m for k, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}


def inputs_of_norms(network: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """What every BN layer gets, in float64 NumPy, when all images pass in one batch."""
    seen, hooks = {}, []
    for name, norm in norms(network).items():

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].double().numpy().copy()

        hooks.append(norm.register_forward_pre_hook(keep))
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return make_supernet()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return make_images(48)


@pytest.fixture(scope="module")
def whole(supernet: Supernet, images: torch.Tensor) -> StaticNetwork:
    """The smallest subnet, calibrated on all images in one batch."""
    return calibrate(supernet, [images], supernet.spec.space.smallest)


@pytest.mark.parametrize("sizes", [(24, 24), (1, 47), (30, 11, 6, 1), (5,) * 9 + (3,), (48, 0)])
def test_statistics_do_not_depend_on_the_batches(supernet, images, whole, sizes):
    cut = calibrate(supernet, images.split(sizes), supernet.spec.space.smallest)
    for name, norm in norms(cut).items():
        expected = norms(whole)[name]
        for what in ("running_mean", "running_var"):
            mine, other = getattr(norm, what), getattr(expected, what)
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=f"{name} {what}")
    with torch.no_grad():
        torch.testing.assert_close(cut(images), whole(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("batch", [48, 7])
def test_statistics_are_those_of_the_activations(supernet, images, batch):
    subnet = supernet.spec.space.sample(rng(3))
    network = calibrate(supernet, images.split(batch), subnet)
    seen = inputs_of_norms(network, images)
    assert seen.keys() == norms(network).keys() and len(seen) == 2 + 3 * sum(subnet.depths) + 2
    for name, norm in norms(network).items():
        mean, var = seen[name].mean((0, 2, 3)), seen[name].var((0, 2, 3))
        np.testing.assert_allclose(norm.running_mean, mean, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(norm.running_var, var, rtol=1e-4, atol=1e-5, err_msg=name)


def test_variance_between_batches_counts(supernet, images):
    network = calibrate(supernet, images.split(8), supernet.spec.space.smallest)
    with torch.no_grad():
        outputs = supernet.stem.conv(images).double().numpy()
    pooled = outputs.var((0, 2, 3))
    within = np.mean([part.var((0, 2, 3)) for part in np.split(outputs, 6)], axis=0)
    assert (pooled / within).max() > 2, "the images must tell the two apart"
    np.testing.assert_allclose(network.stem.bn.running_var, pooled, rtol=1e-4)


def test_every_norm_puts_out_its_affine_weights_as_statistics(supernet, images, whole):
    outputs = {}
    hooks = [
        norm.register_forward_hook(
            lambda module, args, out, name=name: outputs.update({name: out.clone()})
        )
        for name, norm in norms(whole).items()
    ]
    with torch.no_grad():
        whole(images)
    for hook in hooks:
        hook.remove()
    for name, norm in norms(whole).items():
        var, mean = torch.var_mean(outputs[name].double(), (0, 2, 3), correction=0)
        expected = norm.weight.double() ** 2 * norm.running_var / (norm.running_var + norm.eps)
        torch.testing.assert_close(mean, norm.bias.double(), rtol=0, atol=1e-4, msg=name)
        torch.testing.assert_close(var, expected.double(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", [True, False])
def test_the_supernet_stays_as_it_is(images, mode):
    net = make_supernet(mode=mode)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    active = net.active
    network = calibrate(net, images.split(20), net.spec.space.sample(rng(0)))
    assert net.training is mode and net.active == active and not network.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    memory = {value.untyped_storage().data_ptr() for value in net.state_dict().values()}
    for name, value in network.state_dict().items():
        assert value.untyped_storage().data_ptr() not in memory, name


def test_global_generators_are_left_alone(supernet, images):
    states = random.getstate(), torch.get_rng_state()
    calibrate(supernet, images.split(24))
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_a_static_network_is_copied_and_the_active_subnet_is_the_default(images):
    net = make_supernet()
    net.set_active_subnet(d=2, ks=3)
    static = extract(net, net.active)
    before = {name: value.clone() for name, value in static.state_dict().items()}
    calibrated = calibrate(static, images.split(24))
    assert all(torch.equal(value, before[name]) for name, value in static.state_dict().items())
    assert not torch.equal(calibrated.stem.bn.running_mean, static.stem.bn.running_mean)
    with torch.no_grad():
        expected = calibrate(net, images.split(24))(images)
        torch.testing.assert_close(calibrated(images), expected, rtol=0, atol=0)


def test_only_statistics_change(supernet, images, whole):
    static = extract(supernet, supernet.spec.space.smallest)
    for name, value in static.state_dict().items():
        same = torch.equal(value, whole.state_dict()[name])
        assert same is not name.endswith(("running_mean", "running_var")), name


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 3, 16, 16)], iter(())])
def test_no_images(supernet, batches):
    with pytest.raises(DataError, match="images"):
        calibrate(supernet, batches)


@pytest.mark.parametrize("sizes", [(48,), (24, 24)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_activations_that_are_not_finite(images, sizes, value):
    net = make_supernet()
    net.state_dict()["first.project.conv.weight"].fill_(value)
    with pytest.raises(DataError, match=r"first\.project\.bn"):
        calibrate(net, images.split(sizes), net.spec.space.smallest)


def test_a_subnet_that_the_supernet_lacks(supernet, images):
    smallest = supernet.spec.space.smallest
    stages = (((3, 5),) * 2, *smallest.stages[1:])
    with pytest.raises(SpaceError, match="expected 3 or 4 or 6, got 5"):
        calibrate(supernet, [images], type(smallest)(16, stages))


def test_batches_may_be_a_stream(supernet, images, whole):
    stream = itertools.chain(images.split(24))
    network = calibrate(supernet, stream, supernet.spec.space.smallest)
    torch.testing.assert_close(
        network.final_expand.bn.running_var, whole.final_expand.bn.running_var, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("batch", [8, 3])
def test_channels_without_variance(supernet, batch):
    black = torch.zeros(8, 3, 16, 16)
    network = calibrate(supernet, black.split(batch))
    for name, norm in norms(network).items():
        assert torch.isfinite(norm.running_mean).all(), name
        assert (norm.running_var >= 0).all(), name
    assert not network.stem.bn.running_var.any()
    with torch.no_grad():
        assert torch.isfinite(network(black)).all()
