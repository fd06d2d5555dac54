import importlib.util
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calls import called
from few import AfterEpoch
from torch import nn

from compofa.cli import train as command
from compofa.data import Normalisation, import_torchvision
from compofa.errors import CheckpointError, ConfigError
from compofa.io.checkpoint import load_checkpoint
from compofa.nn.supernet import Supernet
from compofa.training import external
from compofa.training.config import TrainConfig
from compofa.training.external import ExternalTeacher, load_teacher
from compofa.training.plan import plan
from compofa.training.run import train

pytestmark = pytest.mark.usefixtures("few_digits")

SETTINGS = {
    "task": "compound", "epochs": 2, "heuristic": "2:3,3:4", "width_mult": 0.1, "image_size": (8,),
    "eval_size": 8, "batch_size": 45, "dynamic_batch_size": 1, "calibration_images": 30,
    "validate_every": 2, "lr": 0.05,
}  # fmt: skip
OTHER = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Mean(nn.Module):
    """Classifies by the mean of each channel."""

    def __init__(self, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head = nn.Linear(3, classes)
        self.head.weight.data = torch.randn(classes, 3, generator=generator)
        self.head.bias.data.zero_()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training
        return self.head(images.mean((2, 3)))


@pytest.fixture
def start(tmp_path: Path) -> str:
    """Initial weights of the supernet, so that no teacher is trained for them."""
    spec = TrainConfig(**SETTINGS).resolved().network(10)
    torch.save(Supernet(spec, seed=1).state_dict(), tmp_path / "start.pt")
    return str(tmp_path / "start.pt")


@pytest.fixture
def squeezenet(tmp_path: Path) -> str:
    """The file of a classifier of torchvision for ten classes that takes 32 pixels and more."""
    torch.manual_seed(0)
    network = import_torchvision().models.squeezenet1_1(weights=None, num_classes=10)
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "squeeze.pth")
    return str(tmp_path / "squeeze.pth")


# --- images ---


def test_images_are_converted_to_the_teachers_normalisation() -> None:
    raw = torch.rand(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))

    def by(norm: Normalisation) -> torch.Tensor:
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (norm.mean, norm.std))
        return (raw - mean) / std

    student = Normalisation((0.1, 0.2, 0.3), (0.9, 0.8, 0.7))
    network = Mean().eval()
    teacher = ExternalTeacher(network, OTHER).teaches(student)
    torch.testing.assert_close(teacher(by(student)), network(by(OTHER)))
    same = ExternalTeacher(network).teaches(student)
    assert torch.equal(same(by(student)), network(by(student)))
    assert not teacher.training and not teacher.state_dict().keys() & {"scale", "shift"}


def test_images_are_resized_for_a_teacher_of_one_size() -> None:
    seen = []

    class Sees(Mean):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(images.shape[-1])
            return super().forward(images)

    teacher = ExternalTeacher(Sees(), size=16).teaches(OTHER)
    teacher(torch.zeros(1, 3, 8, 8))
    teacher(torch.zeros(1, 3, 16, 16))
    assert seen == [16, 16]


# --- teachers of torchvision and timm ---


def test_a_classifier_of_torchvision(squeezenet) -> None:
    teacher = load_teacher("torchvision:squeezenet1_1", squeezenet, tuple("0123456789"))
    assert teacher.normalisation == Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.manual_seed(0)
    wanted = import_torchvision().models.squeezenet1_1(weights=None, num_classes=10).eval()
    images = torch.randn(2, 3, 32, 32)
    found = teacher.teaches(teacher.normalisation)(images)
    assert torch.equal(found, wanted(images))


def test_weights_of_safetensors(squeezenet, tmp_path) -> None:
    torch_files = pytest.importorskip(
        "safetensors.torch", reason="safetensors, of the extra 'export', is not installed"
    )
    state = load_teacher("torchvision:squeezenet1_1", squeezenet, tuple("0123456789")).network
    torch_files.save_file(state.state_dict(), tmp_path / "net.safetensors")
    again = load_teacher(
        "torchvision:squeezenet1_1", str(tmp_path / "net.safetensors"), tuple("0123456789")
    )
    for name, value in again.network.state_dict().items():
        assert torch.equal(value, state.state_dict()[name])


def test_a_classifier_of_timm(tmp_path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm, of the extra 'timm', is not installed")
    import_torchvision()
    import timm

    network = timm.create_model("test_vit", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "vit.pt")
    teacher = load_teacher("timm:test_vit", str(tmp_path / "vit.pt"), ("a", "b", "c"))
    assert teacher.normalisation.mean == tuple(network.pretrained_cfg["mean"])
    assert teacher.size == network.pretrained_cfg["input_size"][-1], "it takes no other size"
    images = torch.randn(2, 3, teacher.size, teacher.size)
    found = teacher.teaches(teacher.normalisation)(images)
    assert torch.equal(found, network.eval()(images))
    with pytest.raises(ConfigError, match=r"1000.*--teacher-path"):
        load_teacher("timm:test_vit", None, ("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"test_vit"):
        load_teacher("timm:test_vi", None, ("a", "b", "c"))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("resnet50", "timm:NAME"),
        ("keras:resnet50", "timm:NAME"),
        ("torchvision:", "timm:NAME"),
        ("torchvison:resnet50", "did you mean torchvision"),
        ("torchvision:resnet81", "did you mean resnet18"),
        ("torchvision:fasterrcnn_resnet50_fpn", "classifiers"),
        ("torchvision:resnet18", "--teacher-path"),
    ],
)
def test_bad_names(name, named) -> None:
    with pytest.raises(ConfigError, match=named):
        load_teacher(name, None, ("a", "b", "c"))


def test_timm_is_an_extra(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        external.importlib.util, "find_spec", lambda name: None if name == "timm" else found(name)
    )
    with pytest.raises(ConfigError, match=r"compofa\[timm\]"):
        load_teacher("timm:resnet18", None, ("a", "b"))


def test_bad_weights(squeezenet, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.1\.weight"):
        load_teacher("torchvision:squeezenet1_1", squeezenet, ("a", "b"))
    with pytest.raises(CheckpointError, match="nowhere"):
        load_teacher("torchvision:squeezenet1_1", str(tmp_path / "nowhere.pt"), ("a", "b"))
    pytest.importorskip("safetensors", reason="of the extra 'export', is not installed")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="bad"):
        load_teacher("torchvision:squeezenet1_1", str(tmp_path / "bad.safetensors"), ("a", "b"))


# --- training ---


def losses(folder: Path) -> list[float]:
    text = (folder / "compound-1" / "metrics.jsonl").read_text()
    return [json.loads(line)["train"]["loss"] for line in text.splitlines()]


def test_a_module_teaches_and_is_needed_again(start, tmp_path) -> None:
    """An interrupted run equals an uninterrupted one to the bit, with the same teacher only."""
    config = TrainConfig(**SETTINGS, init_path=start)
    whole = train(config, tmp_path / "whole", bar=False, teacher=Mean())
    other = train(config, tmp_path / "other", bar=False, teacher=Mean(seed=1))
    assert losses(tmp_path / "whole") != losses(tmp_path / "other")

    class Stop(Exception):
        pass

    def stop(epoch: int) -> None:
        raise Stop

    part = tmp_path / "part"
    with pytest.raises(Stop):
        train(config, part, bar=False, teacher=Mean(), callbacks=[AfterEpoch(stop)])
    for wrong in (None, Mean(seed=1), nn.Identity()):
        with pytest.raises(ConfigError, match="teacher"):
            train(config, part, bar=False, resume=True, teacher=wrong)
    resumed = train(config, part, bar=False, resume=True, teacher=Mean())
    weights, again = (load_checkpoint(result.last) for result in (whole, resumed))
    assert all(torch.equal(value, again.weights[name]) for name, value in weights.weights.items())
    assert not torch.equal(
        load_checkpoint(other.last).weights["classifier.weight"], again.weights["classifier.weight"]
    )
    assert weights.training["config"]["teacher"] == "module:Mean"
    assert weights.training["origins"]["teacher"][0] == "module:Mean"


def test_a_named_teacher_on_the_command_line(
    start, squeezenet, tmp_path, capsys, monkeypatch, caplog
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    words = [
        "--task", "compound", "--heuristic", "2:3,3:4", "--width-mult", "0.1", "--image-size", "32",
        "--batch-size", "45", "--dynamic-batch-size", "1", "--calibration-images", "30", "--epochs",
        "1", "--init-path", start, "--device", "cpu", "--quiet", "--teacher",
        "torchvision:squeezenet1_1", "--output", "run",
    ]  # fmt: skip
    done = called(command.main, [*words, "--teacher-path", squeezenet], capsys)
    assert done.status == 0, done.err
    assert "torchvision:squeezenet1_1" in caplog.text and "0.485" in caplog.text
    origin = load_checkpoint("run/compound-1/last.pt").training["origins"]["teacher"]
    assert Path(origin[0]) == Path("squeeze.pth").absolute() or origin[0] == squeezenet
    Path("moved").mkdir()
    Path(squeezenet).rename("moved/squeeze.pth")
    done = called(command.main, [*words, "--teacher-path", "moved/squeeze.pth", "--resume"], capsys)
    assert done.status == 0, done.err
    done = called(command.main, [*words, "--teacher-path", start, "--resume"], capsys)
    assert done.status == 1 and "--teacher-path" in done.err
    done = called(command.main, [*words, "--output", "new"], capsys)
    assert done.status == 1 and "1000" in done.err and not Path("new").exists()


def test_other_classes_and_sizes_are_refused(start, tmp_path) -> None:
    config = TrainConfig(**SETTINGS, init_path=start)
    with pytest.raises(ConfigError, match=r"\[2, 10\].*\[2, 4\]"):
        train(config, tmp_path / "run", bar=False, teacher=Mean(4))
    with pytest.raises(ConfigError, match="8 pixels"):
        train(config, tmp_path / "run", bar=False, teacher=nn.Conv2d(3, 10, 9))
    assert not list((tmp_path / "run").glob("**/*.pt"))


def test_a_chain_begins_with_its_own_largest_network() -> None:
    """Which the later phases start from, whoever teaches them; only an own one replaces it."""
    chain = TrainConfig(task="progressive", teacher_path="mine.pt")
    assert [phase.task for phase in plan(chain)][:2] == ["kernel", "depth"]
    taught = plan(replace(chain, teacher="torchvision:resnet18"))
    assert [phase.task for phase in taught][:2] == ["teacher", "kernel"]
    assert [phase.teacher_path for phase in taught][:2] == [None, "mine.pt"]


@pytest.mark.parametrize(
    "settings",
    [{"task": "teacher"}, {"task": "supernet"}, {"kd_ratio": 0.0}],
)
def test_where_nothing_is_taught(settings) -> None:
    with pytest.raises(ConfigError, match="--teacher: expected none"):
        TrainConfig(**{"teacher": "timm:resnet18", **settings}).resolved()
