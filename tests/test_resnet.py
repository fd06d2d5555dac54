"""ResNet50D: elastic widths, a stem that may lose a layer, stages of unequal depth."""

import copy
import json
import logging
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from few import changed, same
from sklearn.utils import Bunch
from torch import Tensor

from compofa.cli.evaluate import main as evaluate
from compofa.cli.tools import main as tools
from compofa.cli.train import main as train
from compofa.errors import CheckpointError, ConfigError, SpaceError, TableError
from compofa.io.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from compofa.io.convert import save_as
from compofa.io.export import export, fold_bn, subnet_card
from compofa.io.formats.mmrazor import to_choices
from compofa.io.formats.names import from_ours, recognise, to_ours
from compofa.io.open import open_network, recognise_network
from compofa.io.records import EvalRecord
from compofa.networks.families import subnet_from_config
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.families.resnet50d import RESNET50D, RESNET50D_SMALL_IMAGES
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout, macs, params
from compofa.networks.network_spec import FixedNetwork, network_from_json
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import network_spec
from compofa.nn.calibrate import calibrate
from compofa.nn.extract import extract
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.space.arrays import SubnetArrays
from compofa.space.choice import Choice
from compofa.space.coupling import parse_coupling
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig
from compofa.training.recipes import KERNEL, SUPERNET
from nas.accuracy.fit import fit_accuracy
from nas.cost.base import macs_cost, params_cost
from nas.cost.fit import fit_network
from nas.cost.lookup import TableCost, layer_key
from nas.cost.measured import space_layers
from nas.search.search import search
from nas.tables import read_subnets, require_members, write_subnets

FREE = RESNET50D.free_space()
COMPOUND = RESNET50D.compound_space()
PART = COMPOUND.restrict(depth=(0, 2), width=(0, 2), resolutions=(96, 128))


@pytest.fixture(scope="module")
def net() -> Supernet:
    """A tiny supernet whose every weight matters, BN's included."""
    net = Supernet(network_spec("ofa-resnet50-small", 5, width_mult=0.1, dropout=0.0), 1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if ".bn." in name and value.ndim == 1:
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
                value.mul_(0.2 if "conv3.bn.weight" in name else 1)  # or logits grow to hundreds
    return net


def images(n: int = 6, side: int = 12) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))


def samples(space: SearchSpace, n: int = 5) -> list[Subnet]:
    return [space.smallest, space.largest, *(space.sample(rng(seed)) for seed in range(n))]


# --- the space ---


def test_sizes() -> None:
    assert FREE.size == 2 * (9 + 27 + 81) ** 3 * (81 + 243 + 729) * 3**6
    assert COMPOUND.size == 2 * 3**4 * 3**6
    assert PART.size == 2 * 2**4 * 2**6 * 2
    # The stem's depth, four stages of a depth and six blocks at most, six widths, the resolution.
    assert len(FREE.genes) == 1 + 4 * (1 + 6) + 6 + 1
    assert len(COMPOUND.genes) == 5 + 6 + 1


@pytest.mark.parametrize("space", [FREE, COMPOUND, PART], ids=["free", "compound", "part"])
def test_genes_arrays_and_subnets_are_one(space: SearchSpace) -> None:
    genes = space.sample_genes(rng(1), 100)
    arrays = space.arrays(genes)
    subnets = list(space.subnets_of(arrays))
    assert [space.decode(row) for row in genes] == subnets
    assert (np.stack([space.encode(subnet) for subnet in subnets]) == genes).all()
    assert all(space.contains(subnet) for subnet in subnets)
    assert same(arrays, space.arrays_of(subnets))
    for row, subnet in enumerate(subnets):
        assert arrays.outer[row].tolist() == list(subnet.outer)
        assert arrays.depths[row].tolist() == list(subnet.depths)
    elastic = [place for place, c in enumerate(space.outer) if len(c.values) > 1][::-1]
    for gene, column in zip(space.genes, genes.T, strict=True):
        if "width" in gene.options[0]:
            values = arrays.outer[:, elastic.pop()]
            assert [gene.options[choice]["width"] for choice in column] == values.tolist()


def test_enumeration_yields_every_subnet_once() -> None:
    subnets = list(PART.enumerate())
    assert len(subnets) == PART.size == len(set(subnets))
    assert {PART.smallest, PART.largest} <= set(subnets)


def test_the_smallest_and_the_largest() -> None:
    assert FREE.smallest.to_config() == {"d": [0] * 5, "r": 224, "w": [0] * 6, "e": [
        *(0.2, 0.2, 0, 0), *(0.2, 0.2, 0, 0), *(0.2, 0.2, 0.2, 0.2, 0, 0), *(0.2, 0.2, 0, 0)
    ]}  # fmt: skip
    assert COMPOUND.largest == FREE.largest
    assert FREE.largest.to_config()["d"] == [2] * 5
    assert FREE.largest.to_config()["e"] == [0.35] * 18


def test_the_coupling_is_of_depth_and_expand_ratio() -> None:
    for subnet in samples(COMPOUND, 20):
        config = subnet.to_config()
        for extra, stage in zip(config["d"][1:], subnet.stages[1:], strict=True):
            assert {expand for _, expand in stage} == {(0.2, 0.25, 0.35)[extra]}
    own = RESNET50D.compound_space(parse_coupling("0:0.25,2:0.35"))
    assert [stage.depths for stage in own.stages] == [(0, 1), (2, 4), (2, 4), (4, 6), (2, 4)]
    with pytest.raises(SpaceError, match="expected depths from 0 to 2, got 3"):
        RESNET50D.compound_space(parse_coupling("3:0.25"))
    with pytest.raises(SpaceError, match="kernel"):
        network_spec("ofa_resnet50", elastic_kernel=True)


def test_simple_means_the_networks_own_coupling() -> None:
    config = TrainConfig(net="ofa-resnet50-small", heuristic="simple").resolved()
    assert config.network(10).space.stages == COMPOUND.stages
    with pytest.raises(ConfigError, match="unknown heuristic ''"):
        TrainConfig(net="ofa-resnet50-small", heuristic="").resolved()


def test_configs_of_ofa_come_back() -> None:
    for subnet in samples(FREE, 20):
        config = json.loads(json.dumps(subnet.to_config()))
        assert {key: np.size(value) for key, value in config.items()} == (
            {"d": 5, "e": 18, "w": 6, "r": 1}
        )
        assert subnet_from_config(config) == subnet
        junk = {**config, "e": [value or 0.2 for value in config["e"]]}
        assert subnet_from_config(junk) == subnet


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"e": [0.2] * 20}, "e: expected 18 numbers, got 20"),
        ({"d": [0, 0, 0, 0]}, "d: expected 5 numbers, got 4"),
        ({"d": [1, 0, 0, 0, 0]}, "stage 1: d: expected 0 or 2, got 1"),
        ({"d": [0, 3, 0, 0, 0]}, "stage 2: d: expected 0 or 1 or 2, got 3"),
        ({"w": [0, 0]}, "w: expected 6 numbers, got 2"),
        ({"w": [0, 0, 0.5, 0, 0, 0]}, "w: expected whole numbers, got 0.5"),
        ({"w": None}, "w: expected finite numbers"),
    ],
)
def test_forms_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        subnet_from_config({**FREE.smallest.to_config(), **change})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(SpaceError, match=r"\be\b"):
        subnet_from_config({"d": [0] * 5, "w": [0] * 6})
    with pytest.raises(SpaceError, match="ks"):
        subnet_from_config({"d": [0] * 5, "e": [0.2] * 18})


def test_members_of_other_spaces_are_refused() -> None:
    largest = FREE.largest
    assert "width 6: expected 0 or 1 or 2, got 3" in FREE.faults(
        replace(largest, outer=(0, 0, 0, 0, 0, 3))
    )
    assert FREE.faults(replace(largest, outer=())) == ["width choices: expected 6, got 0"]
    with pytest.raises(SpaceError, match=r"6 elastic widths.* 0"):
        layout(RESNET50D, replace(largest, outer=()))
    with pytest.raises(SpaceError, match="width 1: expected an index from 0 to 2, got 3"):
        layout(RESNET50D, replace(largest, outer=(3,) * 6))
    narrow = changed(FREE.arrays_of([largest]), outer=np.zeros((1, 0), dtype=int))
    with pytest.raises(SpaceError, match=r"6 outer.* 0 outer"):
        FREE.genes_of(narrow)
    with pytest.raises(SpaceError, match=r"5 stages and 6 choices.* 5 and 2"):
        replace(FREE, outer=FREE.outer[:2])
    with pytest.raises(SpaceError, match="depth"):
        FREE.restrict(depth=(3,))


# --- networks ---


def test_a_subnet_is_chosen_as_in_once_for_all(net: Supernet) -> None:
    net = copy.copy(net)
    subnet = net.spec.space.sample(rng(3))
    config = subnet.to_config()
    assert net.set_active_subnet(**config) == subnet
    assert net.set_active_subnet(d=2, e=0.35, w=2) == net.spec.space.largest.at(subnet.resolution)
    assert net.set_active_subnet(d=0).to_config()["d"] == [0] * 5
    assert net.set_active_subnet(d=[2, 0, 1, 2, 0], w=[0, 1, 2, 0, 1, 2]).outer == (0, 1, 2) * 2
    assert net.active.depths == (1, 2, 3, 6, 2)
    assert net.set_active_subnet(e=[0.2, 0.25, 0.35, 0.2]).stages[3] == ((3, 0.35),) * 6
    assert net.spec.space.contains(net.sample_active_subnet(3))
    for choice, message in (
        ({"d": 1}, "stage 1 depth: expected 0 or 2, got 1"),
        ({"d": [0, 5, 0, 0, 0]}, "stage 2 depth: expected 0 or 1 or 2, got 5"),
        ({"e": 0.3}, r"stage 2 block 1 expand.*: expected 0\.2 or 0\.25 or 0\.35, got 0\.3"),
        ({"w": 3}, "width 1, width 2, width 3, width 4 and 2 more: expected 0 or 1 or 2, got 3"),
        ({"w": [0, 1]}, "w: expected 1 or 6 numbers, got 2"),
        ({"e": [0.2] * 20}, "e: expected 1, 4 or 18 numbers, got 20"),
        ({"ks": 5}, "ks: .*d, e, w, r"),
    ):
        with pytest.raises(SpaceError, match=message):
            net.set_active_subnet(**choice)
    with pytest.raises(SpaceError, match="w: expected one of ks, e, d, r"):
        Supernet(network_spec("compofa-small", 2, width_mult=0.1)).set_active_subnet(w=1)


def test_extracted_networks_compute_what_the_supernet_computes(net: Supernet) -> None:
    for subnet in samples(net.spec.space):
        static = extract(net, subnet)
        with torch.no_grad():
            torch.testing.assert_close(static(images()), net(images(), subnet))
        layers = layout(net.spec.backbone, subnet, 5)
        assert params(layers) == sum(p.numel() for p in static.parameters())


def test_training_reaches_the_weights_of_the_subnet_alone(net: Supernet) -> None:
    net = copy.deepcopy(net).train()
    net(images(), net.spec.space.smallest).sum().backward()
    classifier = net.classifier.weight.grad.abs().sum(0) > 0
    width = layout(net.spec.backbone, net.spec.space.smallest, 5)[-1].in_channels
    assert classifier[:width].all() and not classifier[width:].any() and width < len(classifier)
    assert net.stages[0][0].conv.weight.grad is None  # depth 0 leaves the residual layer out
    last = net.stages[4][2].conv1.conv.weight.grad
    assert last is None or not last.any()


def test_blocks_begin_as_their_input() -> None:
    spec = network_spec("ofa-resnet50-small", 5, width_mult=0.2)
    net = Supernet(spec).eval()
    first, second = net.stages[1][0], net.stages[1][1]
    assert first.conv3.bn.weight.all() and not second.conv3.bn.weight.any()
    x = images(2).relu().mean(1, keepdim=True).expand(-1, second.conv1.conv.in_channels, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(second(x), x)


def test_calibration_does_not_depend_on_batches(net: Supernet) -> None:
    subnet = net.spec.space.sample(rng(5))
    expected = extract(net, subnet).train()(images(8))
    whole = calibrate(net, [images(8)], subnet)
    with torch.no_grad():
        torch.testing.assert_close(whole(images(8)), expected, atol=1e-3, rtol=1e-3)
    parts = calibrate(net, [images(8)[:3], images(8)[3:]], subnet).state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts[name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("groups", [(), (0.25,)])
def test_sorting_keeps_full_and_trained_widths(net: Supernet, groups: tuple[float, ...]) -> None:
    other = copy.deepcopy(net)
    sort_channels(other, groups)
    block, before = other.stages[4][0], net.stages[4][0]
    assert not torch.equal(block.conv2.conv.weight, before.conv2.conv.weight)
    space = net.spec.space
    same = [space.largest, *(samples(space.restrict(expand=groups), 3) if groups else ())]
    with torch.no_grad():
        for subnet in same:
            torch.testing.assert_close(other(images(), subnet), net(images(), subnet))
        if not groups:
            importance = block.conv3.conv.weight.abs().sum((0, 2, 3))
            assert (importance.diff() <= 1e-6).all()
            least = space.smallest
            assert not torch.allclose(other(images(), least), net(images(), least), rtol=1e-2)


def test_folding_and_exporting(net: Supernet, tmp_path: Path) -> None:
    subnet = net.spec.space.sample(rng(7)).at(13)  # odd sides: the shortcut's pool rounds up
    static = extract(net, subnet)
    with torch.no_grad():
        folded = fold_bn(static)
        torch.testing.assert_close(folded(images(2, 13)), static(images(2, 13)), atol=1e-4, rtol=0)
    card = subnet_card(net.spec, subnet)
    assert subnet_from_config(card["subnet"]) == subnet
    for to in ("torchscript", "safetensors"):
        assert export(static, tmp_path / to, to, card, fold=to == "torchscript") <= 1e-4


# --- definitions and other programs ---


def test_definitions_come_back() -> None:
    for net_id in ("ofa_resnet50", "compofa-resnet50-small"):
        spec = network_spec(net_id, 7)
        for one in (spec, spec.largest_only()):
            assert NetworkSpec.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert spec.largest_only().space.size == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outer": [[0, 3]] * 6}, "6 elastic widths of 3 values"),
        ({"outer": [[0]] * 5}, "5 stages and 6 choices"),
        ({"outer": [[-1]] * 6}, "outer: .* 0 to 15"),
        ({"outer": 3}, "outer: expected list"),
        ({"outer": []}, "5 stages and 6 choices"),
    ],
)
def test_damaged_definitions_are_refused(change: dict[str, Any], message: str) -> None:
    data = network_spec("ofa_resnet50").to_json()
    with pytest.raises(SpaceError, match=f"not a network definition: .*{message}"):
        NetworkSpec.from_json({**data, "space": {**data["space"], **change}})
    plain = network_spec("compofa").to_json()
    with pytest.raises(SpaceError, match="not a network definition"):
        NetworkSpec.from_json({**plain, "space": {**plain["space"], **change, "outer": [[0]]}})


@pytest.mark.parametrize(("stage", "name", "value"), [(1, "kernel", 5), (0, "expand", 2)])
def test_values_that_a_config_does_not_hold_are_refused(stage: int, name: str, value: int) -> None:
    data = network_spec("ofa_resnet50").to_json()
    data["space"]["stages"][stage]["choices"][name] = [value]
    with pytest.raises(SpaceError, match=rf"{name} in stage {stage + 1}.*\[{value}\]"):
        NetworkSpec.from_json(data)


def test_names_of_once_for_all(reference_data: Path) -> None:
    text = (reference_data / "vectors" / "reference_logits.json").read_text()
    published = json.loads(text)["ofa_resnet50"]["shapes"]
    assert recognise(published) == "ofa"
    ours = to_ours(published, 4)
    assert from_ours(ours, 4, "ofa") == published
    plain = {k.replace("conv.conv", "conv").replace("bn.bn", "bn"): v for k, v in published.items()}
    assert to_ours({f"module.{k}": v for k, v in plain.items()}, 4) == ours
    with pytest.raises(CheckpointError, match="mmrazor"):
        from_ours(ours, 4, "mmrazor")


def test_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    spec = network_spec("ofa-resnet50-small", 5)
    made = Checkpoint(spec, Supernet(spec, 3).state_dict(), tuple("abcde"), dataset="digits")
    save_as(tmp_path / "ofa.pth", made, "ofa")
    opened = open_network(tmp_path / "ofa.pth")
    kind, back = opened.format, opened.checkpoint
    assert (kind, back.network, back.classes) == ("ofa", spec, made.classes)
    for name, value in made.weights.items():
        assert value.numpy().tobytes() == back.weights[name].numpy().tobytes()
    with pytest.raises(CheckpointError, match="mmrazor"):
        save_as(tmp_path / "razor.pth", made, "mmrazor")
    assert [path.name for path in tmp_path.iterdir()] == ["ofa.pth"]
    torch.save({"state_dict": from_ours(made.weights, 6, "ofa")}, tmp_path / "plain.pth")
    assert open_network(tmp_path / "plain.pth").spec.backbone == spec.backbone
    assert recognise_network(made.weights).backbone.name == "resnet50d_small_images"
    with pytest.raises(ConfigError, match="MMRazor"):
        to_choices(FREE.largest, RESNET50D)


def test_records_carry_widths() -> None:
    record = EvalRecord(FREE.sample(rng(0)), 1.0, 2.0, 3, 4, 5, "n", "d", "test", 6, 0, "c", "cpu")
    assert EvalRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_tasks_that_were_never_published_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"task kernel: .*width"):
        KERNEL.within(FREE)
    assert SUPERNET.within(FREE) is FREE


# --- costs ---


@pytest.mark.parametrize("cost", [(macs_cost, macs), (params_cost, params)])
def test_counts_equal_the_layout(cost: tuple[Callable, Callable]) -> None:
    many, one = cost
    for table, sides in ((RESNET50D, (97, 224)), (RESNET50D_SMALL_IMAGES.scaled(0.25), (16,))):
        space = table.free_space(sides)
        arrays = space.arrays(space.sample_genes(rng(0), 100))
        expected = [one(layout(table, subnet, 10)) for subnet in space.subnets_of(arrays)]
        counted = many(table, 10)
        assert counted(arrays).tolist() == expected
        assert counted(space.arrays_of([space.largest])) == one(layout(table, space.largest, 10))
    with pytest.raises(SpaceError, match=r"6 choices.* 0"):
        counted(changed(arrays, outer=arrays.outer[:, :0]))
    with pytest.raises(SpaceError, match="0 to 2, got 3"):
        counted(changed(arrays, outer=arrays.outer + 1))


class Wide:
    """A made-up accuracy that rises with every choice, elastic widths most."""

    name, unit, error = "wide", "top-1 %", "made up"

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        blocks = arrays.blocks["expand"].sum(axis=1) + (arrays.blocks["expand"] > 0).sum(axis=1)
        return (
            50
            + 2 * arrays.outer @ [0.2, 0.4, 1, 1, 1, 0.9]
            + 0.3 * blocks
            + arrays.resolutions / 100
        )

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        return np.ones(len(arrays.resolutions))


def test_evolution_finds_what_enumeration_finds() -> None:
    cost, budgets = macs_cost(RESNET50D), [4e8, 6e8]
    exact = search(PART, Wide(), cost, budgets)
    found = search(PART, Wide(), cost, budgets, enumerate_up_to=0)
    for best, one in zip(exact, found, strict=True):
        assert best.exact and not one.exact
        assert one.accuracy >= best.accuracy - 0.05
        assert one.cost == macs(layout(RESNET50D, one.subnet)) <= one.budget


def test_a_predictor_fitted_on_records_knows_widths() -> None:
    arrays = PART.arrays(PART.sample_genes(rng(0), 80))
    model = fit_accuracy(arrays, Wide().predict(arrays))
    fresh = PART.arrays(PART.sample_genes(rng(1), 200))
    assert np.abs(model.predict(fresh) - Wide().predict(fresh)).mean() < 0.15
    assert model.std(fresh).shape == (200,)


def test_tables_come_back(tmp_path: Path) -> None:
    arrays = FREE.arrays(FREE.sample_genes(rng(2), 30))
    write_subnets(tmp_path / "t.csv", arrays, FREE.config_format, {"top1": [1.5] * 30})
    assert (tmp_path / "t.csv").read_text().startswith("d,e,w,r,top1\n")
    back, columns = read_subnets(tmp_path / "t.csv", ["top1"])
    assert same(arrays, require_members(back, FREE, "t"))
    assert columns["top1"].tolist() == [1.5] * 30
    with pytest.raises(TableError, match="t: expected numbers of"):
        require_members(back, MOBILENET_V3.free_space(), "t")
    for text, message in (
        ("d,e,w,r\n0 0 0,0.2,0,224\n", "d: expected 5 numbers, got 3"),
        (f"d,e,w,r\n1 0 0 0 0,{'0.2 ' * 18},{'0 ' * 6},224\n", "line 2: d: .*stage 1"),
        (f"d,e,w,r\n0 0 0 0 0,{'0.2 ' * 18},{'4 ' * 6},224\n", "line 2: width 1: expected 0 or"),
        (f"d,e,w,r\n0 0 0 0 0,{'0.5 ' * 18},{'0 ' * 6},224\n", "line 2: .*expand: expected"),
        ("d,e,r\n0 0 0 0 0,0.2,224\n", "missing ks"),
    ):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(TableError, match=message):
            require_members(read_subnets(tmp_path / "t.csv")[0], FREE, "t")


WIDTHS = ((2,), (0, 1), (0,), (0, 2), (1, 2), (0, 1, 2))


def test_every_layer_of_a_space_is_known_before_timing() -> None:
    space = RESNET50D.free_space((64,)).restrict(width=(0, 2))
    for part in (space, replace(space, outer=tuple(Choice("width", values) for values in WIDTHS))):
        keys = {layer_key(layer) for layer in space_layers(RESNET50D, part, 10)[64]}
        for subnet in samples(part, 10):
            layers = layout(RESNET50D, subnet, 10)
            assert {layer_key(layer) for layer in layers} <= keys
            named: dict[str, LayerSpec] = {}
            for layer in layers:  # a key names one shape
                one = replace(layer, name="")
                assert named.setdefault(layer_key(layer), one) == one


def test_whole_networks_are_not_fitted() -> None:
    with pytest.raises(TableError, match="networks of one width to fit, got resnet50d: time its"):
        fit_network(FREE.arrays(FREE.sample_genes(rng(0), 60)), np.ones(60), RESNET50D)


def test_tables_of_layers_sum_up(tmp_path: Path) -> None:
    space = RESNET50D.compound_space(resolutions=(64,)).restrict(depth=(0, 2), width=(1, 2))
    layers = space_layers(RESNET50D, space, 10)[64]
    lines = [f"{layer_key(s)}:\n  count: 1\n  mean: {(s.macs + 1) / 1e6:.9f}\n" for s in layers]
    (tmp_path / "64_lookup_table.yaml").write_text("".join(lines))
    cost = TableCost(tmp_path, RESNET50D, 10)
    arrays = space.arrays(space.sample_genes(rng(0), 50))
    expected = [
        sum((s.macs + 1) / 1e6 for s in layout(RESNET50D, subnet, 10))
        for subnet in space.subnets_of(arrays)
    ]
    np.testing.assert_allclose(cost(arrays), expected, rtol=1e-7)


# --- commands ---


def test_commands_take_it_from_training_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sklearn.datasets.load_digits()
    few = Bunch(images=data.images[:150], target=data.target[:150])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)
    monkeypatch.chdir(tmp_path)
    quick = shlex.split(
        "--net compofa-resnet50-small --width-mult 0.1 --epochs 1 --image-size 8 --batch-size 45 "
        "--calibration-images 30 --device cpu --quiet --output run"
    )
    try:
        for task in ("teacher", "compound"):
            assert train(["--task", task, *quick]) == 0
        assert train(["--task", "kernel", *quick]) == 1
        assert "kernel, expand, width" in capsys.readouterr().err
        best = "run/compound-1/best.pt"
        assert (
            evaluate(["--net", best, "--samples", "2", "--calibration-images", "30", "--quiet"])
            == 0
        )
        header, *rows = Path("results.csv").read_text().splitlines()
        assert header.startswith("d,e,w,r,top1") and len(rows) == 2
        assert tools(["convert", best, "net.pth", "--to", "ofa"]) == 0
        assert tools(["convert", "net.pth", "net.pt", "--to", "compofa"]) == 0
        Path("subnet.json").write_text(json.dumps(FREE.sample(rng(1)).to_config()))
        assert tools(["convert", "subnet.json", "again.json", "--to", "ofa"]) == 0
        assert Path("again.json").read_text().strip() == Path("subnet.json").read_text()
        assert tools(["convert", "subnet.json", "a.yaml", "--to", "mmrazor"]) == 1
        assert "MMRazor has no resnet50d" in capsys.readouterr().err
        assert tools(["convert", best, "net.pth", "--to", "mmrazor"]) == 1
        assert "mmrazor has no names" in capsys.readouterr().err
        first, second = (load_checkpoint(path) for path in (best, "net.pt"))
        assert all(torch.equal(v, second.weights[k]) for k, v in first.weights.items())
        subnet = json.dumps(first.network.space.sample(rng(0)).at(8).to_config())
        assert tools(["export", best, subnet, "--to", "safetensors", "--no-calibrate"]) == 0
        assert tools(["export", best, subnet.replace("0.2", "3"), "--to", "safetensors"]) == 1
        assert "not in space" in capsys.readouterr().err
    finally:
        logging.captureWarnings(False)


def test_a_subnet_becomes_a_network_of_its_own(net: Supernet, tmp_path: Path) -> None:
    for subnet in (net.spec.space.smallest.at(12), net.spec.space.largest.at(12)):
        static, fixed = extract(net, subnet), FixedNetwork.of(net.spec, subnet)
        assert network_from_json(json.loads(json.dumps(fixed.to_json()))) == fixed
        assert (fixed.subnet.depths, fixed.subnet.outer) == (subnet.depths, subnet.outer)
        save_checkpoint(tmp_path / "net.pt", Checkpoint(fixed, static.state_dict(), image_size=12))
        with torch.no_grad():
            again = load_checkpoint(tmp_path / "net.pt").build()
            torch.testing.assert_close(again(images()), static(images()))
    for change, message in (
        ({"downsample": False}, "a residual of the same shape"),
        ({"residual": False}, "a residual in every bottleneck"),
        ({"se_channels": 8}, "expansion and SE in inverted blocks alone"),
    ):
        data = fixed.to_json()
        next(x for x in data["layers"] if x["name"] == "stages.2.0").update(change)
        with pytest.raises(SpaceError, match=message):
            network_from_json(data)
