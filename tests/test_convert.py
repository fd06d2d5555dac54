import json
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_weights import as_ofa, make
from torch import Tensor, nn

from compofa.errors import CheckpointError, CompofaError, ConfigError, SpaceError
from compofa.io.checkpoint import (
    Checkpoint,
    file_hash,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from compofa.io.convert import save_as
from compofa.io.formats import mmrazor
from compofa.io.formats.names import FORMATS, from_ours, recognise, to_ours
from compofa.io.open import open_network
from compofa.networks.families import backbone
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.zoo import NETWORKS, network_spec
from compofa.nn.build import build
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.subnet import Subnet

NETS = {
    "compofa_fixed_nomatrix": "compofa",
    "compofa_elastic_matrix": "compofa-elastic",
    "ofa_mbv3_w1.0": "ofa_mbv3_d234_e346_k357_w1.0",
    "ofa_mbv3_w1.2": "ofa_mbv3_d234_e346_k357_w1.2",
    "ofa_proxyless_w1.3": "ofa_proxyless_d234_e346_k357_w1.3",
}
State = dict[str, Tensor]


def assert_same_bits(a: State, b: State) -> None:
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert value.shape == b[name].shape
        assert value.numpy().tobytes() == b[name].numpy().tobytes(), name


def checkpoint(net_id: str = "compofa-elastic-small", half: bool = False) -> Checkpoint:
    net = make(net_id, 1)
    made = Checkpoint(
        net.spec, net.state_dict(), tuple("abcde"), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "digits",
        image_size=16, figures={"validation": {"largest": {"top1": 9.5}}},
    )  # fmt: skip
    return made.slim() if half else made


# --- names ---


@pytest.mark.parametrize("key", NETS)
def test_names_and_shapes_are_those_of_the_published_files(key: str, reference_data: Path) -> None:
    text = (reference_data / "vectors" / "reference_logits.json").read_text()
    published = {name: list(shape) for name, shape in json.loads(text)[key]["shapes"].items()}
    assert recognise(published) == "ofa"
    ours = to_ours(published, 4)
    assert recognise(ours) == "compofa"
    assert from_ours(ours, 4, "ofa") == published
    razor = from_ours(ours, 4, "mmrazor")
    assert recognise(razor) == "mmrazor"
    assert to_ours(razor, 4) == ours
    if key != "compofa_fixed_nomatrix":  # whose files store larger kernels than its space has
        state = Supernet(network_spec(NETS[key])).state_dict()
        made = from_ours(state, 4, "ofa")
        assert {name: list(value.shape) for name, value in made.items()} == published


def test_names_of_mmrazor() -> None:
    state = dict.fromkeys(make("ofa-small").state_dict())
    names = set(from_ours(state, 4, "mmrazor"))
    body = "architecture.backbone."
    assert names > {
        f"{body}first_conv.conv.weight",
        f"{body}layer1.0.depthwise_conv.conv.weight",
        f"{body}layer1.0.linear_conv.bn.running_mean",
        f"{body}layer2.3.expand_conv.conv.weight",
        f"{body}layer3.0.se.conv1.conv.weight",
        f"{body}layer3.0.se.conv2.conv.bias",
        f"{body}layer6.3.depthwise_conv.conv.trans_matrix_7to5",
        f"{body}layer6.3.depthwise_conv.conv.trans_matrix_5to3",
        f"{body}last_conv.final_expand_layer.bn.weight",
        f"{body}last_conv.feature_mix_layer.conv.weight",
        "architecture.head.fc.weight",
        "architecture.head.fc.bias",
    }
    assert all(name.startswith((body, "architecture.head.fc.")) for name in names)


@pytest.mark.parametrize("block", ["mobile_inverted_conv", "conv"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("net_id", ["compofa-elastic-small", "ofa-proxyless-small"])
def test_both_block_names_nested_or_not(net_id: str, block: str, prefix: str) -> None:
    net = make(net_id, 1)
    state = {prefix + name: value for name, value in as_ofa(net, block).items()}
    assert_equal(to_ours(state, 4), net.state_dict())  # nested, as supernets are
    flat = {re.sub(r"\b(conv|bn)\.\1\.", r"\1.", name): value for name, value in state.items()}
    assert flat.keys() != state.keys()
    assert_equal(to_ours(flat, 4), net.state_dict())


def assert_equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


# --- files ---


@pytest.mark.parametrize(("first", "second"), list(product(FORMATS, FORMATS)))
@pytest.mark.parametrize("half", [False, True])
def test_every_pair_of_formats_and_back(
    first: str, second: str, half: bool, tmp_path: Path
) -> None:
    original = checkpoint(half=half)
    start = original
    for step, to in enumerate((first, second, first, "compofa")):
        save_as(tmp_path / f"{step}", start, to)
        opened = open_network(tmp_path / f"{step}")
        kind, start = opened.format, opened.checkpoint
        assert kind == to and start.digest == file_hash(tmp_path / f"{step}")
    assert_same_bits(dict(start.weights), dict(original.weights))
    assert replace(start, weights={}) == replace(original, weights={})
    a, b = (torch.load(tmp_path / n, weights_only=True) for n in "02")
    key = "weights" if first == "compofa" else "state_dict"
    assert_same_bits(a[key], b[key])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("to", ["compofa", "mmrazor"])
@pytest.mark.parametrize("matrices", [False, True])
@pytest.mark.parametrize("net_id", ["compofa-elastic-small", "ofa-proxyless-small"])
def test_files_of_others_come_back_bit_for_bit(
    wrap: Callable[[State], Any], to: str, matrices: bool, net_id: str, tmp_path: Path
) -> None:
    spec = network_spec(net_id, 5)
    state = from_ours(Supernet(spec, 3).state_dict(), 4, "ofa")
    if not matrices:
        state = {name: value for name, value in state.items() if "_matrix" not in name}
    torch.save(wrap(state), tmp_path / "in.pth")
    read = open_network(tmp_path / "in.pth", arch=net_id).checkpoint
    save_as(tmp_path / "there", read, to)
    there = open_network(tmp_path / "there").checkpoint
    save_as(tmp_path / "back", there, "ofa")
    back = torch.load(tmp_path / "back", weights_only=True)
    assert_same_bits(back["state_dict"], state)


def test_weights_of_mmrazor_are_used_like_any(tmp_path: Path) -> None:
    source = make("compofa-elastic-small", 1)
    save_as(tmp_path / "razor.pth", Checkpoint(source.spec, source.state_dict()), "mmrazor")
    net = make("compofa-elastic-small", 2)
    load_weights(net, tmp_path / "razor.pth")
    assert_equal(net.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    "net_id",
    [
        "compofa",
        "compofa-elastic",
        "ofa_mbv3_d234_e346_k357_w1.2",
        "ofa_proxyless_d234_e346_k357_w1.3",
        "compofa-small",
    ],
)
@pytest.mark.parametrize("to", ["ofa", "mmrazor"])
def test_the_network_of_plain_weights_is_recognised(net_id: str, to: str, tmp_path: Path) -> None:
    spec = network_spec(net_id, 7)
    state = from_ours(Supernet(spec).state_dict(), 4, to)
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    assert open_network(tmp_path / "file.pth").spec == spec


def test_resuming_is_kept_only_within_this_library(tmp_path: Path) -> None:
    made = replace(checkpoint(), training={"step": 3})
    save_as(tmp_path / "ours", made, "compofa")
    assert load_checkpoint(tmp_path / "ours").training == {"step": 3}
    save_as(tmp_path / "ofa", made, "ofa")
    assert open_network(tmp_path / "ofa").checkpoint.training is None


def resnet(path: Path) -> None:
    torch.save({"state_dict": {"input_stem.0.conv.conv.weight": torch.zeros(8, 3, 3, 3)}}, path)


def proxyless(path: Path) -> None:
    state = as_ofa(make("ofa-small", width_mult=0.6))
    torch.save({"state_dict": state | {"feature_mix_layer.bn.weight": torch.ones(3)}}, path)


def depthless(path: Path) -> None:
    state = as_ofa(make("ofa-small", width_mult=0.25))
    torch.save({k: v for k, v in state.items() if not k.startswith("blocks.20.")}, path)


def other(path: Path) -> None:
    torch.save(nn.Linear(2, 3).state_dict(), path)


def scalar(path: Path) -> None:
    torch.save({"first_conv.conv.weight": torch.tensor(1.0)}, path)


def truncated(path: Path) -> None:
    save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:-5000])


def unnamed(path: Path) -> None:
    state = from_ours(checkpoint().weights, 4, "ofa")
    torch.save({"state_dict": state, "compofa": {"format": "compofa-checkpoint"}}, path)


@pytest.mark.parametrize(
    ("make_file", "message"),
    [
        (resnet, r"stem\.conv\.weight \[8"),
        (proxyless, r"stem\.conv\.weight \[16, "),
        (depthless, r"\d+ missing: stages\.4\.3\."),
        (other, r"\bweight\b"),
        (scalar, "no convolutions"),
        (truncated, r"file\.pth"),
        (unnamed, "version"),
        (lambda path: torch.save({}, path), "empty"),
        (lambda path: torch.save([1], path), "list"),
        (lambda path: path.write_text("hello"), r"file\.pth"),
        (lambda path: None, r"file\.pth"),
    ],
)
def test_files_that_are_no_weights(
    make_file: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    make_file(tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_network(tmp_path / "file.pth")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_what_has_no_name_elsewhere_is_refused(tmp_path: Path) -> None:
    made = checkpoint()
    odd = replace(made, weights={**made.weights, "first_conv.conv.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="mmrazor"):
        save_as(tmp_path / "file", odd, "mmrazor")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        for to in FORMATS:
            with pytest.raises(CompofaError, match="file: File too large"):
                save_as(tmp_path / "file", checkpoint(), to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


# --- subnets of MMRazor ---


def test_published_subnets(reference_data: Path) -> None:
    first, second = (
        mmrazor.read_subnet(reference_data / "mmrazor" / f"OFA_SUBNET_NOTE8_LAT{n}.yaml")
        for n in (22, 31)
    )
    assert (first.resolution, first.depths) == (140, (2, 2, 2, 2, 2))
    assert first.stages[1:3] == (((5, 3), (5, 3)), ((7, 4), (3, 3)))
    assert (second.resolution, second.depths) == (152, (2, 2, 3, 3, 4))
    for subnet in (first, second):
        assert mmrazor.from_choices(yaml.safe_load(mmrazor.dump(subnet))) == subnet


@pytest.mark.parametrize("latency", [22, 31])
def test_written_keys_are_those_of_published_files(latency: int, reference_data: Path) -> None:
    path = reference_data / "mmrazor" / f"OFA_SUBNET_NOTE8_LAT{latency}.yaml"
    published = yaml.safe_load(path.read_text())
    written = mmrazor.to_choices(mmrazor.read_subnet(path))
    assert not written.keys() - published.keys()
    # One file has ratios of squeezes for a stage without any.
    assert all(key.endswith("_se") for key in published.keys() - written.keys())
    differing = {key for key in written if written[key] != published[key]}
    assert not {key for key in differing if not key.endswith("_se")} - inactive(published)


def inactive(choices: dict[str, Any]) -> set[str]:
    past = set()
    for key in choices:
        parts = key.split(".")
        if len(parts) == 5:
            depth = choices[".".join([*parts[:3], "depth"])]["chosen"]
            past |= {key} if int(parts[3]) >= depth else set()
    return past


@pytest.mark.parametrize(
    "net_id", [name for name, row in NETWORKS.items() if not row.shipped and "resnet" not in name]
)
def test_subnets_come_back(net_id: str) -> None:
    spec = network_spec(net_id)
    generator = rng(0)
    for _ in range(20):
        subnet = spec.space.sample(generator)
        text = mmrazor.dump(subnet, spec.backbone)
        assert mmrazor.from_choices(yaml.safe_load(text), spec.backbone) == subnet


def choices() -> dict[str, Any]:
    return mmrazor.to_choices(MOBILENET_V3.free_space().sample(rng(0)))


def test_a_checkpoint_whose_weights_do_not_fit_is_named(tmp_path: Path) -> None:
    spec = network_spec("compofa-small", 3, width_mult=0.1)
    weights = dict(build(spec).state_dict())
    for name in [*weights][::2]:
        weights[f"{name}.{'other' * 9}"] = weights.pop(name)
    weights = {name: value[..., None] for name, value in weights.items()}
    save_checkpoint(tmp_path / "misfit.pt", Checkpoint(spec, weights))
    with pytest.raises(CheckpointError, match=r"misfit\.pt .* extra:") as e:
        open_network(tmp_path / "misfit.pt")
    assert len(str(e.value).removeprefix(str(tmp_path))) < 700


def test_missing_keys_are_named() -> None:
    data = choices()
    del data["backbone.layers.3.0.kernel_size"], data["backbone.layers.6.1.expand_ratio"]
    with pytest.raises(ConfigError, match=r"2 missing: .*3\.0\.kernel_size, .*6\.1\.expand_ratio$"):
        mmrazor.from_choices(data)
    data = choices()
    data["input_shape"] = {"choosen": 224}
    del data["backbone.layers.4.depth"]
    with pytest.raises(ConfigError, match=r"2 missing: .*layers\.4\.depth, input_shape$"):
        mmrazor.from_choices(data, source="a.yaml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone.layers.2.depth", 9, "depth"),
        ("backbone.layers.2.0.kernel_size", 4, "4"),
        ("backbone.layers.2.0.kernel_size", "x", "kernel_size"),
        ("backbone.layers.2.0.kernel_size", [3, 5], "kernel_size.* 2"),
        ("backbone.layers.2.out_channels", 32, "out_channels: .*24.*32"),
        ("input_shape", [224, 192], "input_shape"),
        ("input_shape", [], "input_shape"),
    ],
)
def test_wrong_values(key: str, value: Any, message: str) -> None:
    with pytest.raises((ConfigError, SpaceError), match=message) as caught:
        mmrazor.from_choices({**choices(), key: {"chosen": value}})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "", "!!python/object/apply:os.getcwd []"])
def test_files_that_are_no_subnets(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.yaml: ") as caught:
        mmrazor.read_subnet(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(CompofaError, match="No such file"):
        mmrazor.read_subnet(tmp_path / "b.yaml")


def test_a_subnet_of_another_width_is_refused() -> None:
    subnet = Subnet(224, MOBILENET_V3.free_space().smallest.stages)
    data = mmrazor.to_choices(subnet, backbone("mobilenet_v3", 1.2))
    with pytest.raises(ConfigError, match=r"first_channels: .*16.*24"):
        mmrazor.from_choices(data)
