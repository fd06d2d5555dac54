import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compofa.errors import CheckpointError
from compofa.io.checkpoint import load_weights
from compofa.networks.zoo import network_spec
from compofa.nn.elastic import transform_kernel
from compofa.nn.supernet import Supernet

SIDE = 16
State = dict[str, Tensor]


def make(net_id: str, seed: int = 0, width_mult: float = 0.1) -> Supernet:
    """Return a supernet whose weights, statistics and matrices all tell it from another seed's."""
    net = Supernet(network_spec(net_id, 5, width_mult=width_mult, resolutions=(SIDE,)), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            value.fill_(seed + 1)
        elif name.endswith("running_var"):
            value.add_(noise.abs(), alpha=0.2)
        elif value.ndim == 1 or ".matrices." in name:
            value.add_(noise, alpha=0.1)
    return net.eval()


def state_of(net: nn.Module) -> State:
    return {name: value.clone() for name, value in net.state_dict().items()}


def as_ofa(net: Supernet, block: str = "mobile_inverted_conv", matrices: bool = True) -> State:
    """Return the weights of ``net`` by the names that Once-for-All gives them."""
    parts = {
        "expand.conv.weight": "inverted_bottleneck.conv.conv.weight",
        "depthwise.conv.weight": "depth_conv.conv.conv.weight",
        "depthwise.matrices.5": "depth_conv.conv.7to5_matrix",
        "depthwise.matrices.3": "depth_conv.conv.5to3_matrix",
        "project.conv.weight": "point_linear.conv.conv.weight",
    }
    tops = {"stem": "first_conv", "final_expand": "final_expand_layer", "mix": "feature_mix_layer"}
    result = {}
    for name, value in net.state_dict().items():
        top, _, rest = name.partition(".")
        if top == "classifier":
            renamed = f"classifier.linear.{rest}"
        elif top == "first":  # the first block is not elastic: nothing is nested twice
            rest = rest.replace("depthwise", "depth_conv").replace("project", "point_linear")
            renamed = f"blocks.0.{block}.{rest}"
        elif top == "stages":
            stage, position, part = rest.split(".", 2)
            part = parts.get(part, part)
            part = re.sub(r"^expand\.bn", "inverted_bottleneck.bn.bn", part)
            part = re.sub(r"^depthwise\.bn", "depth_conv.bn.bn", part)
            part = re.sub(r"^project\.bn", "point_linear.bn.bn", part)
            part = re.sub(r"^se\.", "depth_conv.se.fc.", part)
            renamed = f"blocks.{1 + 4 * int(stage) + int(position)}.{block}.{part}"
        else:
            renamed = f"{tops[top]}.{rest}"
        if matrices or not renamed.endswith("_matrix"):
            result[renamed] = value.clone()
    return result


def assert_same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("block", ["mobile_inverted_conv", "conv"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("net_id", ["ofa-small", "compofa-elastic-small", "compofa-small"])
def test_published_names_are_read(net_id: str, prefix: str, block: str) -> None:
    source, net = make(net_id, 1), make(net_id, 2)
    state = {prefix + name: value for name, value in as_ofa(source, block).items()}
    assert len(state) == len(source.state_dict())
    load_weights(net, state)
    assert_same(state_of(net), state_of(source))


@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema", "weights", None])
def test_files_hold_the_weights_under_several_keys(tmp_path: Path, key: str | None) -> None:
    source, net = make("ofa-small", 1), make("ofa-small", 2)
    state = as_ofa(source)
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "file")
    load_weights(net, tmp_path / "file")
    assert_same(state_of(net), state_of(source))


def test_own_names_are_read() -> None:
    source, net = make("ofa-small", 1), make("ofa-small", 2)
    load_weights(net, source.state_dict())
    assert_same(state_of(net), state_of(source))


def test_lacking_matrices_are_the_identity() -> None:
    source, net = make("compofa-elastic-small", 1), make("compofa-elastic-small", 2)
    load_weights(net, as_ofa(source, matrices=False))
    found = {name: value for name, value in net.state_dict().items() if ".matrices." in name}
    assert len(found) == 2 * 20
    assert all(torch.equal(value, torch.eye(len(value))) for value in found.values())
    rest = {name: value for name, value in state_of(net).items() if name not in found}
    assert_same(rest, {name: source.state_dict()[name] for name in rest})


def test_matrices_are_applied_to_the_kernels_of_a_fixed_kernel_network() -> None:
    source, net = make("compofa-elastic-small", 1), make("compofa-small", 2)
    load_weights(net, as_ofa(source))
    for subnet in (net.spec.space.smallest, net.spec.space.largest):
        with torch.no_grad():
            torch.testing.assert_close(
                net(images(), subnet), source(images(), subnet), atol=1e-5, rtol=1e-5
            )
    seven = source.stages[0][0].depthwise.conv.weight
    plain = seven[..., 2:5, 2:5]
    assert not torch.allclose(net.stages[0][0].depthwise.conv.weight, plain, atol=1e-3)


def test_without_matrices_a_fixed_kernel_network_gets_the_centre() -> None:
    source, net = make("compofa-elastic-small", 1), make("compofa-small", 2)
    load_weights(net, as_ofa(source, matrices=False))
    for stage, border in enumerate((2, 1, 2, 2, 1)):
        inner = slice(border, 7 - border)
        expected = source.stages[stage][3].depthwise.conv.weight[..., inner, inner]
        assert torch.equal(net.stages[stage][3].depthwise.conv.weight, expected)


def test_a_matrix_below_the_fixed_kernel_is_not_needed() -> None:
    # A stage that is fixed to 5x5 uses the 7to5 matrix, and never the 5to3 one.
    source, net = make("compofa-elastic-small", 1), make("compofa-small", 2)
    load_weights(net, as_ofa(source))
    layer = source.stages[1][0].depthwise
    expected = transform_kernel(layer.conv.weight, layer.matrices["5"], 5)
    torch.testing.assert_close(net.stages[1][0].depthwise.conv.weight, expected)


def plain_elastic(seed: int) -> Supernet:
    """Return an elastic-kernel network without kernel transforms."""
    spec = network_spec("compofa-elastic-small", 5, width_mult=0.1, resolutions=(SIDE,))
    return Supernet(replace(spec, kernel_transform=False), seed)


def test_identity_matrices_are_dropped_where_there_are_none() -> None:
    source, net = make("compofa-elastic-small", 1), plain_elastic(2)
    state = as_ofa(source)
    for name in state:
        if name.endswith("_matrix"):
            state[name] = torch.eye(len(state[name]))
    load_weights(net, state)
    assert torch.equal(net.stages[2][1].depthwise.conv.weight, state_of(source)[
        "stages.2.1.depthwise.conv.weight"
    ])  # fmt: skip


def test_learned_matrices_cannot_be_dropped() -> None:
    net = plain_elastic(2)
    before = state_of(net)
    with pytest.raises(CheckpointError, match=r"40 extra: stages\.0\.0\.depthwise\.matrices"):
        load_weights(net, as_ofa(make("compofa-elastic-small", 1)))
    assert_same(state_of(net), before)


def test_a_net_of_fewer_kernels_takes_what_it_needs() -> None:
    spec = network_spec("ofa-small", 5, width_mult=0.1, resolutions=(SIDE,))
    net = Supernet(replace(spec, space=spec.space.restrict(kernel=(3, 5)))).eval()
    source = make("ofa-small", 1)
    load_weights(net, as_ofa(source))
    for subnet in (net.spec.space.smallest, net.spec.space.largest):
        with torch.no_grad():
            torch.testing.assert_close(
                net(images(), subnet), source(images(), subnet), atol=1e-5, rtol=1e-5
            )


def test_half_precision_weights_are_read() -> None:
    source, net = make("compofa-elastic-small", 1), make("compofa-small", 2)
    state = as_ofa(source)
    halves = {n: v.half() if not n.endswith("matrix") and v.ndim else v for n, v in state.items()}
    load_weights(net, halves)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.equal(net.stem.conv.weight, state["first_conv.conv.weight"].half().float())


def test_counters_of_batches_may_be_lacking() -> None:
    source, net = make("ofa-small", 1), make("ofa-small", 2)
    state = {n: v for n, v in as_ofa(source).items() if not n.endswith("num_batches_tracked")}
    load_weights(net, state)
    assert net.stem.bn.num_batches_tracked == 0
    assert torch.equal(net.stem.conv.weight, source.stem.conv.weight)


# --- what does not fit ---


def test_every_misfit_is_listed_and_the_net_stays_as_it_was() -> None:
    net = make("ofa-small", 2)
    before, state = state_of(net), as_ofa(make("ofa-small", 1))
    del state["blocks.3.mobile_inverted_conv.point_linear.bn.bn.bias"]
    state["blocks.21.mobile_inverted_conv.point_linear.bn.bn.bias"] = torch.zeros(3)
    state["surplus"] = torch.zeros(3)
    state["first_conv.bn.bias"] = torch.zeros(9)
    state["classifier.linear.bias"][2] = float("nan")
    state["first_conv.conv.weight"][0, 0, 0, 0] = float("inf")
    state["first_conv.bn.running_var"][1] = -1e-3
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, state)
    message = str(caught.value)
    assert re.search(r"missing: stages\.0\.2\.project\.bn\.bias", message)
    assert re.search(r"extra: .*\bsurplus\b", message)
    assert re.search(r"misshapen: stem\.bn\.bias \(.*\[8\].*\[9\]\)", message)
    assert re.search(r"finite.*: stem\.conv\.weight, classifier\.bias", message)
    assert re.search(r"negative.*: stem\.bn\.running_var", message)
    assert "\n" not in message
    assert_same(state_of(net), before)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("7to5_matrix", r"matrix.*25.*\[3, 3\]"),
        ("conv.conv.weight", "misshapen: stages.2.1.depthwise.conv.weight"),
    ],
)
def test_misshapen_kernels_are_refused(part: str, message: str) -> None:
    net = make("compofa-small", 2)
    before, state = state_of(net), as_ofa(make("compofa-elastic-small", 1))
    state[f"blocks.10.mobile_inverted_conv.depth_conv.conv.{part.removeprefix('conv.')}"] = (
        torch.zeros(3, 3)
    )
    with pytest.raises(CheckpointError, match=message):
        load_weights(net, state)
    assert_same(state_of(net), before)


@pytest.mark.parametrize("shape", [(7, 3), (9, 7), (1, 1), (6, 6)])
def test_kernels_of_an_odd_shape_are_not_cut_to_fit(shape: tuple[int, int]) -> None:
    net, state = make("compofa-small", 2), as_ofa(make("compofa-small", 1))
    name = "blocks.1.mobile_inverted_conv.depth_conv.conv.conv.weight"
    state[name] = torch.zeros(*state[name].shape[:2], *shape)
    with pytest.raises(CheckpointError, match=r"misshapen: stages\.0\.0\.depthwise\.conv\.weight"):
        load_weights(net, state)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"first_conv.conv.weight": 3},
        {"first_conv.conv.weight": None, "x": torch.zeros(2)},
        {1: torch.zeros(2)},
        {"stem.conv.weight": torch.zeros(2, device="meta")},
        {"stem.conv.weight": torch.zeros(2, 2).to_sparse()},
    ],
)
def test_what_is_not_a_state_dict_is_refused(state: dict) -> None:
    net = make("compofa-small")
    before = state_of(net)
    with pytest.raises(CheckpointError, match="tensors"):
        load_weights(net, state)
    assert_same(state_of(net), before)


def test_weights_of_another_network_are_refused() -> None:
    # A wider net, and one that holds only kernels smaller than those wanted.
    for net_id, other in (
        ("compofa-small", make("compofa-small", width_mult=0.25)),
        ("ofa-small", make("compofa-small")),
    ):
        net = make(net_id)
        before = state_of(net)
        with pytest.raises(CheckpointError, match=r"\d+ misshapen"):
            load_weights(net, other.state_dict())
        assert_same(state_of(net), before)


def test_weights_of_another_program_are_refused_in_one_short_line(tmp_path: Path) -> None:
    torch.save({"state_dict": nn.Sequential(nn.Linear(3, 4)).state_dict()}, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"file .* missing: .*…; 2 extra") as e:
        load_weights(make("compofa-small"), tmp_path / "file")
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 1000
