import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compofa.cli.tools import main
from compofa.data.catalog import IMAGENET_NORMALISATION
from compofa.errors import CheckpointError, SpaceError
from compofa.io.checkpoint import Checkpoint
from compofa.io.convert import save_as
from compofa.io.formats.names import from_ours, from_slots
from compofa.io.formats.net_config import to_net_config
from compofa.io.formats.specialised import SpecialisedFiles, find_specialised
from compofa.io.open import open_network, recognise_network
from compofa.io.zoo import published_id
from compofa.model_zoo import ofa_net, ofa_specialized
from compofa.networks.layout import macs, params
from compofa.networks.network_spec import FixedNetwork
from compofa.networks.published import RESNETS, SPECIALISED, specialised
from compofa.networks.zoo import NETWORKS, PUBLISHED, network_spec
from compofa.nn.build import build
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet

ROOT = Path(__file__).parent.parent
NOTE10 = "note10_lat@8ms_top1@71.4_finetune@25"
CPU = "cpu_lat@10ms_top1@71.1_finetune@25"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("COMPOFA_DOWNLOADS", "http://127.0.0.1:1/ofa")
    return tmp_path / "hub" / "checkpoints"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(list(words))
    return status, *capsys.readouterr()


def fill(network: nn.Module) -> dict[str, Tensor]:
    """Give a network weights and statistics that tell it from others."""
    generator = torch.Generator().manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.add_(torch.rand(value.shape, generator=generator))
        elif value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=generator), alpha=0.02)
    return network.state_dict()


def put(hub: Path, net_id: str) -> StaticNetwork:
    """Put the weights of a network, as Once-for-All publishes them, where a download goes."""
    network, _ = ofa_specialized(net_id)
    slots = max(network.depths)
    state = from_slots(from_ours(fill(network), slots, "ofa"))
    path = hub / "ofa_specialized" / net_id.replace("@", "-") / "init"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": state}, path)
    return network.eval()


# --- the table ---


def test_the_table_is_that_of_the_published_configurations(reference_data: Path) -> None:
    folders = {p.parent.name: p for p in (reference_data / "specialized").glob("*/net.config")}
    assert {row.folder for row in SPECIALISED.values() if row.network} == set(folders)
    assert len(folders) == 50
    for name, path in folders.items():
        published = SpecialisedFiles(path, path.with_name("init"), path.with_name("run.config"))
        assert SPECIALISED[name].network == published.network(), name


def test_ids_say_what_was_published() -> None:
    assert len(SPECIALISED) == 58
    row = specialised(NOTE10)
    assert (row.top1, row.target, row.finetuned_epochs) == (71.4, "8 ms on note10", 25)
    row = specialised("v100_gpu64-11ms_top1-76.1_finetune-25")
    assert row.net_id == "v100_gpu64@11ms_top1@76.1_finetune@25"
    assert row.target == "11 ms on v100, batch 64"
    row = specialised(RESNETS[0])
    assert (row.top1, row.target, row.finetuned_epochs) == (79.8, "4.1B MACs", 0)
    assert all(70 < row.top1 < 81 and row.target for row in SPECIALISED.values())


def test_macs_are_those_that_ids_name() -> None:
    named = 0
    for row in SPECIALISED.values():
        match = re.match(r"flops@(\d+)M", row.net_id)
        if match:
            named += 1
            assert round(macs(row.network.layers) / 1e6) == int(match[1])
    assert named == 3


def test_counts_are_those_of_the_built_network() -> None:
    for net_id in (NOTE10, CPU):
        network, size = ofa_specialized(net_id)
        layers = specialised(net_id).network.layers
        assert network.specs == layers
        assert layers[0].in_size == size
        assert params(layers) == sum(p.numel() for p in network.parameters())
        assert network.eval()(torch.zeros(1, 3, size, size)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("net_id", "hint"),
    [
        ("note10_lat@9ms_top1@71.4_finetune@25", NOTE10),
        ("note10_lat-8ms_top1-71.4", NOTE10),
        ("flops@390M_top1@79.1", "flops@389M_top1@79.1_finetune@75"),
        ("@", "python -m compofa zoo"),
    ],
)
def test_an_unknown_id_names_the_nearest(net_id: str, hint: str, hub: Path) -> None:
    for use in (ofa_specialized, open_network):
        with pytest.raises(SpaceError, match=re.escape(hint)) as caught:
            use(net_id)
        assert "\n" not in str(caught.value)


# --- weights ---


@pytest.mark.parametrize("net_id", [NOTE10, CPU])
def test_weights_that_were_put_there_are_used(net_id: str, hub: Path) -> None:
    source = put(hub, net_id)
    for name in (net_id, net_id.replace("@", "-")):
        network, size = ofa_specialized(name, pretrained=True)
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
        assert not network.training
        with torch.no_grad():
            assert torch.equal(network(images), source(images))
    opened = open_network(net_id)
    path, checkpoint = opened.path, opened.checkpoint
    assert path.name == "init" and path.with_name("init.sha256").is_file()
    assert checkpoint.figures == {"published": {"top1": specialised(net_id).top1}}
    assert (checkpoint.dataset, checkpoint.image_size) == ("imagenet", size)
    assert checkpoint.mean == (0.485, 0.456, 0.406)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="SHA-256"):
        ofa_specialized(net_id, pretrained=True)


def test_without_a_network_the_error_says_what_to_put_where(hub: Path) -> None:
    names = ("init",)
    for net_id, first in ((NOTE10, names[0]), (RESNETS[0], "net.config")):
        folder = net_id.replace("@", "-")
        with pytest.raises(CheckpointError, match="Connection refused") as caught:
            ofa_specialized(net_id, pretrained=True)
        assert f"http://127.0.0.1:1/ofa/ofa_specialized/{folder}/{first}" in str(caught.value)
        assert str(hub / "ofa_specialized" / folder / first) in str(caught.value)
        assert list((hub / "ofa_specialized" / folder).iterdir()) == []
    with pytest.raises(CheckpointError, match=r"net\.config"):
        ofa_specialized(RESNETS[0])
    assert set(PUBLISHED) < set(NETWORKS)
    for net_id, name in PUBLISHED.items():
        with pytest.raises(CheckpointError, match=re.escape(str(hub / name))):
            ofa_net(net_id, pretrained=True)


def test_a_network_of_the_table_may_come_with_its_configuration(hub: Path) -> None:
    put(hub, NOTE10)
    folder = hub / "ofa_specialized" / NOTE10.replace("@", "-")
    assert find_specialised(folder) is None  # its weights alone
    (folder / "net.config").write_text("not looked at")
    ofa_specialized(NOTE10, pretrained=True)


def test_the_configuration_of_a_resnet_comes_with_its_weights(
    hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = network_spec("ofa_resnet50", resolutions=(64,))
    wanted = FixedNetwork.of(spec, spec.space.smallest)
    source = build(wanted)
    checkpoint = Checkpoint(wanted, fill(source), dataset="imagenet", image_size=64)
    save_as(hub / "ofa_specialized" / RESNETS[-1].replace("@", "-"), checkpoint, "ofa")
    network, size = ofa_specialized(RESNETS[-1], pretrained=True)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert size == 64 and torch.equal(network(images), source.eval()(images))
    assert ofa_specialized(RESNETS[-1])[0].specs == wanted.layers
    _, out, _ = run(capsys, "zoo", "--like", RESNETS[-1])
    counts = [f"{macs(wanted.layers) / 1e6:.1f}M", f"{params(wanted.layers) / 1e6:.2f}M"]
    assert out.split()[-4:] == [*counts, "64", "downloaded"]
    config = hub / "ofa_specialized" / RESNETS[-1].replace("@", "-") / "net.config"
    config.write_text("oops")
    config.with_name("net.config.sha256").unlink()
    for pretrained in (False, True):
        with pytest.raises(CheckpointError, match=r"delete \S+net\.config .*to download it again"):
            ofa_specialized(RESNETS[-1], pretrained)


def test_a_published_supernet_is_read_as_what_its_id_says(hub: Path) -> None:
    net_id = "ofa_proxyless_d234_e346_k357_w1.3"
    source = Supernet(ofa_net(net_id).spec, seed=5)
    (hub / "ofa_nets").mkdir(parents=True)
    torch.save({"state_dict": from_ours(source.state_dict(), 4, "ofa")}, hub / "ofa_nets" / net_id)
    net = ofa_net(net_id, pretrained=True)
    assert net.spec == source.spec and not net.training
    wanted = source.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("net_id", ["compofa", "compofa-elastic"])
def test_published_compofa_weights(net_id: str, hub: Path) -> None:
    """As its trainer wrote them: kernels of 7 at all depthwise layers, and an optimiser's state."""
    stored = Supernet(network_spec("compofa-elastic", 1000), seed=5)
    state = from_ours(fill(stored), 4, "ofa")
    if net_id == "compofa":
        state = {name: value for name, value in state.items() if "matrix" not in name}
    optimizer = torch.optim.SGD(stored.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    path = hub / PUBLISHED[net_id]
    path.parent.mkdir(parents=True)
    torch.save(
        {"epoch": 119, "best_acc": 75.9, "optimizer": optimizer.state_dict(), "state_dict": state},
        path,
    )
    opened = open_network(net_id)
    assert opened.spec == network_spec(net_id, 1000) and opened.path == path
    assert opened.normalisation == IMAGENET_NORMALISATION
    name = "stages.1.0.depthwise.conv.weight"
    kept, found = stored.state_dict()[name], opened.network.state_dict()[name]
    assert torch.equal(found, kept if net_id == "compofa-elastic" else kept[..., 1:-1, 1:-1])
    assert published_id(path) == net_id and published_id(path.with_name("x")) is None
    assert recognise_network(opened.checkpoint.weights) == opened.spec  # wherever it is copied


# --- other classes ---


def test_other_numbers_of_classes_get_a_new_classifier(hub: Path) -> None:
    source = put(hub, NOTE10).state_dict()
    network, size = ofa_specialized(NOTE10, pretrained=True, classes=5)
    images = torch.zeros(1, 3, size, size)
    assert not network.training and network(images).shape == (1, 5)
    for name, value in network.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(value, source[name]), name
    again = ofa_specialized(NOTE10, pretrained=True, classes=5)[0].classifier.weight
    assert torch.equal(network.classifier.weight, again) and again.std() > 0
    other = open_network(NOTE10).with_classes(["a", "b", "c", "d", "e"], seed=1)
    assert not torch.equal(other.network.classifier.weight, again)
    assert other.classes == tuple("abcde") and other.checkpoint.figures == {}
    assert ofa_specialized(NOTE10, classes=5)[0].classifier.out_features == 5

    kept = ofa_net("compofa-digits", pretrained=True)
    assert kept.spec.classes == 10
    same = ofa_net("compofa-digits", pretrained=True, classes=10)
    assert torch.equal(same.classifier.weight, kept.classifier.weight)
    net = ofa_net("compofa-digits", pretrained=True, classes=5)
    assert net.spec.classes == net.classifier.out_features == 5
    small = net(torch.zeros(1, 3, 16, 16), net.spec.space.smallest)
    assert small.shape == (1, 5) and not net.training
    with pytest.raises(SpaceError, match="classes"):
        ofa_net("compofa-digits", pretrained=True, classes=0)


def test_the_same_classes_in_another_order_keep_their_outputs() -> None:
    opened = open_network("compofa-digits")
    assert opened.with_classes(opened.classes) is opened
    turned = opened.with_classes(opened.classes[::-1])
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(turned.network(images), opened.network(images).flip(1))
    assert turned.checkpoint.weights.keys() == opened.checkpoint.weights.keys()
    assert turned.classes == opened.classes[::-1]


# --- doors ---


def test_torch_hub_loads_them(hub: Path) -> None:
    load = {"repo_or_dir": str(ROOT), "source": "local"}
    network, size = torch.hub.load(model="ofa_specialized", net_id=NOTE10, **load)
    assert isinstance(network, StaticNetwork) and size == 160
    net = torch.hub.load(model="ofa_net", net_id="compofa-digits", pretrained=True, **load)
    assert isinstance(net, Supernet) and not net.training


def test_torch_hub_has_the_entry_points_of_once_for_all(hub: Path) -> None:
    load = {"repo_or_dir": str(ROOT), "source": "local"}
    supernets = {
        "ofa_supernet_resnet50": "ofa_resnet50",
        "ofa_supernet_mbv3_w10": "ofa_mbv3_d234_e346_k357_w1.0",
        "ofa_supernet_mbv3_w12": "ofa_mbv3_d234_e346_k357_w1.2",
        "ofa_supernet_proxyless": "ofa_proxyless_d234_e346_k357_w1.3",
    }
    macs = ("4_1", "3_7", "3_0", "2_4", "1_8", "1_2", "0_9", "0_6")
    networks = {f"resnet50D_MAC_{m}B": f"@{m.replace('_', '.')}B_" for m in macs}
    scope = runpy.run_path(str(ROOT / "hubconf.py"))
    listed = [name for name, value in scope.items() if callable(value) and name[0] != "_"]
    own = {"ofa_net", "ofa_specialized", "ofa_specialized_get"}
    assert {*listed} == {*supernets, *networks, *own} and len(listed) == 13 + 2
    for name, net_id in supernets.items():
        with pytest.raises(CheckpointError, match=re.escape(PUBLISHED[net_id])):
            torch.hub.load(model=name, **load)
    for name, part in networks.items():
        with pytest.raises(CheckpointError, match=r"net\.config") as caught:
            torch.hub.load(model=name, **load)
        assert part.replace("@", "-") in str(caught.value)
    net = torch.hub.load(model="ofa_supernet_mbv3_w10", pretrained=False, classes=7, **load)
    assert net.spec.classes == 7 and net.training
    assert torch.hub.load(model="ofa_specialized_get", **load) is not None


def test_torch_hub_loads_published_weights(hub: Path) -> None:
    spec = network_spec("ofa_resnet50", resolutions=(64,))
    wanted = FixedNetwork.of(spec, spec.space.smallest)
    network = build(wanted)
    checkpoint = Checkpoint(wanted, fill(network), dataset="imagenet", image_size=64)
    save_as(hub / "ofa_specialized" / RESNETS[-1].replace("@", "-"), checkpoint, "ofa")
    load = {"repo_or_dir": str(ROOT), "source": "local"}
    found, size = torch.hub.load(model="resnet50D_MAC_0_6B", **load)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert size == 64 and torch.equal(found(images), network.eval()(images))
    build_by_id = torch.hub.load(model="ofa_specialized_get", **load)
    assert build_by_id(NOTE10)[1] == 160


def test_the_list(hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(hub, NOTE10)
    status, out, _ = run(capsys, "zoo")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert all(row.net_id in lines for row in SPECIALISED.values())
    words = lines[NOTE10].split()
    assert words == [
        NOTE10,
        "71.4",
        "8",
        "ms",
        "on",
        "note10",
        "75.8M",
        "3.76M",
        "160",
        "downloaded",
    ]
    states = {lines[name].split()[-1] for name in (NOTE10, CPU, "compofa-digits", "ofa-small")}
    assert len(states) == 4, "on disk, to download, shipped, to train"
    assert lines["compofa"].split()[-1] == lines[CPU].split()[-1]
    status, out, _ = run(capsys, "zoo", "--like", "NOTE10")
    assert status == 0 and out.count("note10_lat@") == 8 and "pixel" not in out
    status, _, err = run(capsys, "zoo", "--like", "nosuch")
    assert status == 1 and err.count("\n") == 1 and "'nosuch'" in err


def test_a_network_of_the_zoo_converts(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = put(hub, NOTE10)
    out = tmp_path / "out"
    assert run(capsys, "convert", NOTE10, str(out), "--to", "ofa")[0] == 0
    files = find_specialised(out)
    assert files is not None and files.network() == specialised(NOTE10).network
    state = torch.load(out / "init", weights_only=True)["state_dict"]
    assert list(map(np.shape, state.values())) == list(map(np.shape, network.state_dict().values()))
    assert to_net_config(files.network())["name"] == "MobileNetV3"
