"""Progressive shrinking, phase by phase and as a chain, and the sandwich rule."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from compofa.cli.train import main
from compofa.data import load_dataset
from compofa.errors import ConfigError, DataError
from compofa.io.checkpoint import file_hash, load_checkpoint
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.sorting import sort_channels
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.training import phase_run, run, start
from compofa.training.config import TrainConfig
from compofa.training.recipes import Phase, register_task
from compofa.training.run import plan, train
from compofa.training.tasks import Step, sandwich, uniform
from compofa.training.trainer import Trainer

SMALL: dict[str, Any] = {
    "image_size": (8,),
    "batch_size": 90,
    "epochs": 1,
    "dynamic_batch_size": 1,
    "calibration_images": 30,
    "width_mult": 0.1,
}
CHAIN = ["teacher", "kernel-1", "depth-1", "depth-2", "expand-1", "expand-2"]


pytestmark = pytest.mark.usefixtures("few_digits")


def make_trainer(**settings: Any) -> Trainer:
    config = TrainConfig(**{**SMALL, **settings}).resolved()
    net = Supernet(config.network(10), config.seed)
    return Trainer(config, net, None, load_dataset("digits"))


# --- what a phase samples ---


@pytest.mark.parametrize(
    ("task", "phase", "depths", "expands"),
    [
        ("kernel", 1, {4}, {6}),
        ("depth", 1, {3, 4}, {6}),
        ("depth", 2, {2, 3, 4}, {6}),
        ("expand", 1, {2, 3, 4}, {4, 6}),
        ("expand", 2, {2, 3, 4}, {3, 4, 6}),
    ],
)
def test_a_phase_trains_its_part_of_the_whole_network(task, phase, depths, expands):
    trainer = make_trainer(task=task, phase=phase, dynamic_batch_size=4)
    whole = network_spec("ofa-small", 10).space
    assert trainer.net.spec.space.size == whole.size, "the network is whole from the start"
    assert trainer.net.stages[0][0].depthwise.matrices.keys() == {"5", "3"}
    subnets = [subnet for step in range(30) for subnet in trainer.subnets_at(step)]
    assert {depth for subnet in subnets for depth in subnet.depths} == depths
    blocks = [block for subnet in subnets for stage in subnet.stages for block in stage]
    assert {expand for _, expand in blocks} == expands
    assert {kernel for kernel, _ in blocks} == {3, 5, 7}
    assert trainer.extremes["largest"] == trainer.net.spec.space.largest
    assert set(trainer.extremes["smallest"].depths) == {min(depths)}


@pytest.mark.parametrize("network", [{"net": "compofa-small"}, {"heuristic": "2:3,4:6"}])
@pytest.mark.parametrize("task", ["kernel", "progressive"])
def test_coupled_choices_cannot_be_shrunk_one_by_one(task, network):
    with pytest.raises(ConfigError, match="--heuristic none") as caught:
        plan(TrainConfig(task=task, **network))
    assert "\n" not in str(caught.value)
    assert plan(TrainConfig(task=task, net="compofa-elastic-small", heuristic="none"))


# --- sorting within groups ---


def shaken(net_id: str = "ofa-small") -> Supernet:
    """A supernet in evaluation mode with random biases and BN statistics."""
    net = Supernet(network_spec(net_id, classes=5, width_mult=0.5), seed=2).eval()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in net.state_dict().items():
        if name.endswith(("bn.weight", "running_var")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return net


@pytest.mark.parametrize("depth", [2, 4])
@pytest.mark.parametrize(("groups", "kept"), [((), {6}), ((6,), {6}), ((4, 6), {4, 6})])
def test_sorting_leaves_the_trained_widths_alone(groups, kept, depth):
    net = shaken()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    subnets = {e: net.set_active_subnet(d=depth, e=e, ks=[3, 5, 7, 5, 3]) for e in (3, 4, 6)}
    with torch.no_grad():
        before = {e: net(images, subnet) for e, subnet in subnets.items()}
        sort_channels(net, groups=groups)
        for expand, subnet in subnets.items():
            change = (net(images, subnet) - before[expand]).abs().max()
            assert bool(change < 1e-3) is (expand in kept), (expand, float(change))


def test_channels_are_sorted_within_their_group():
    net, free = shaken(), shaken()
    sort_channels(net, groups=(4, 6))
    sort_channels(free)
    for stages, others in zip(net.stages, free.stages, strict=True):
        for block, other in zip(stages, others, strict=True):
            weights = (b.project.conv.weight.abs().sum((0, 2, 3)) for b in (block, other))
            grouped, sorted_ = weights
            falls = grouped.diff() <= 0
            assert (sorted_.diff() <= 0).all() and (~falls).sum() <= 1, "one edge at most"
            torch.testing.assert_close(grouped.sort().values, sorted_.sort().values)


@pytest.mark.parametrize(
    ("task", "phase", "groups"),
    [("kernel", 1, None), ("depth", 2, None), ("expand", 1, (6,)), ("expand", 2, (4, 6))],
)
def test_when_channels_are_sorted(tmp_path, monkeypatch, task, phase, groups):
    net = make_trainer(task="supernet").net
    torch.save({"state_dict": net.state_dict()}, tmp_path / "x.pt")
    sorts = []
    monkeypatch.setattr(start, "sort_channels", lambda network, groups: sorts.append(groups))
    monkeypatch.setattr(start, "teacher_of", lambda *_: extract(net, net.active))
    config = TrainConfig(
        task=task, phase=phase, init_path=str(tmp_path / "x.pt"),
        teacher_path=str(tmp_path / "x.pt"), **SMALL,
    )  # fmt: skip
    train(config, tmp_path / "run", bar=False)
    assert sorts == ([] if groups is None else [groups])


# --- the chain ---


@pytest.fixture(scope="module")
def whole(few_digits: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, run.RunResult]:
    """A chain that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(TrainConfig(task="progressive", **SMALL), folder, bar=False)


def test_the_chain_trains_every_phase(whole):
    folder, result = whole
    assert sorted(path.name for path in folder.iterdir()) == sorted(CHAIN)
    assert result.best == folder / "expand-2" / "best.pt"
    configs = [json.loads((folder / name / "config.json").read_text()) for name in CHAIN]
    assert {config["config"]["net"] for config in configs} == {"ofa-small"}
    origins = [load_checkpoint(folder / name / "last.pt").training["origins"] for name in CHAIN]
    teacher = ["teacher/best.pt", file_hash(folder / "teacher" / "best.pt")]
    assert origins[0] == {} and [of["teacher"] for of in origins[1:]] == [teacher] * 5
    starts = [of["start"][0] for of in origins[1:]]
    assert starts == [f"{name}/best.pt" for name in CHAIN[:-1]]
    spaces = [load_checkpoint(folder / name / "best.pt").network.space for name in CHAIN]
    stages = [sum((3 * n) ** depth for depth in d) for n, d in ((1, (4,)), (1, (3, 4)))]
    stages += [sum((3 * n) ** depth for depth in (2, 3, 4)) for n in (1, 2, 3)]
    assert [space.size for space in spaces] == [1, *(size**5 for size in stages)], "what is trained"
    seconds = [json.loads((folder / n / "summary.json").read_text())["seconds"] for n in CHAIN]
    assert result.seconds == pytest.approx(sum(seconds))
    assert result.cost["cpu_hours"] == pytest.approx(sum(seconds) / 3600)


def test_each_phase_starts_from_the_one_before(tmp_path, whole):
    config = TrainConfig(**{**SMALL, "task": "depth", "phase": 2, "lr": 0.0})
    for name in ("teacher", "kernel-1", "depth-1"):
        (tmp_path / name).symlink_to(whole[0] / name)
    found = load_checkpoint(train(config, tmp_path, bar=False).last).weights
    before = load_checkpoint(whole[0] / "depth-1" / "best.pt").weights
    for name, value in before.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(found[name], value), name


class StopError(Exception):
    """What the test interrupts a chain with."""


def test_a_chain_is_resumed_where_it_was(tmp_path, whole, monkeypatch):
    config = TrainConfig(task="progressive", **SMALL)
    with monkeypatch.context() as patch:
        real = phase_run.save_checkpoint

        def stop(path: Path, *rest: Any) -> None:
            if path.parent.name == "depth-2":
                raise StopError
            real(path, *rest)

        patch.setattr(phase_run, "save_checkpoint", stop)
        with pytest.raises(StopError):
            train(config, tmp_path, bar=False)
    assert sorted(path.name for path in tmp_path.glob("*/last.pt")) == ["last.pt"] * 3
    with pytest.raises(ConfigError, match=r"teacher.*--resume"):
        train(config, tmp_path, bar=False)
    done = (tmp_path / "depth-1" / "last.pt").read_bytes()
    result = train(config, tmp_path, resume=True, bar=False)
    assert (tmp_path / "depth-1" / "last.pt").read_bytes() == done
    mine, other = (load_checkpoint(r.last).weights for r in (result, whole[1]))
    assert all(torch.equal(value, other[name]) for name, value in mine.items())


def test_overwriting_leaves_nothing_of_the_old_chain(tmp_path, monkeypatch):
    for name in CHAIN[1:]:
        (tmp_path / name).mkdir()
        for file in ("last.pt", "best.pt", "summary.json"):
            (tmp_path / name / file).write_text("old")

    def stop(*args: Any, **keywords: Any) -> None:
        raise StopError

    def files() -> list[str]:
        return [path.name for path in tmp_path.rglob("*") if path.is_file()]

    config = TrainConfig(task="progressive", **SMALL)
    with pytest.raises(DataError):  # what cannot begin takes nothing away
        train(replace(config, validation_images=10**6), tmp_path, overwrite=True, bar=False)
    assert len(files()) == 15
    monkeypatch.setattr(phase_run, "Journal", stop)
    with pytest.raises(StopError):
        train(config, tmp_path, overwrite=True, bar=False)
    assert files() == ["config.json"], "of the first phase"


def test_a_given_teacher_is_not_trained(whole):
    teacher = str(whole[0] / "teacher" / "best.pt")
    phases = plan(TrainConfig(task="progressive", teacher_path=teacher))
    assert [phase.recipe_phase.folder for phase in phases] == CHAIN[1:]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--task depth", ["kernel-1/best.pt", "--init-path", "--task kernel --phase 1"]),
        ("--task depth --phase 2", ["depth-1/best.pt", "--task depth --phase 1"]),
        ("--task expand --phase 2", ["expand-1/best.pt", "--task expand --phase 1"]),
        ("--task kernel --phase 2", ["kernel", "phase 1", "2"]),
        ("--task progressive --phase 2", ["progressive", "phase 1", "2"]),
        ("--task progressive --init-path x", ["--init-path: "]),
        ("--task progressive --resume", ["teacher/last.pt"]),
        ("--task progressive --net compofa-small", ["--heuristic none"]),
    ],
)
def test_bad_input_is_one_line(whole, tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    teacher = (
        [] if "progressive" in words else ["--teacher-path", str(whole[0] / "teacher/best.pt")]
    )
    small = ["--image-size", "8", "--width-mult", "0.1", "--device", "cpu", "--quiet", *teacher]
    assert main([*words.split(), *small]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(part in err for part in expected), err
    assert list(tmp_path.iterdir()) == []


# --- the sandwich rule ---


def test_the_subnets_of_the_sandwich_rule():
    trainer = make_trainer(task="supernet", dynamic_batch_size=None)
    assert trainer.config.dynamic_batch_size == 4 and trainer.phase.teacher == "self"
    space, middles = trainer.net.spec.space, set()
    for step in range(20):
        first, second, *others = trainer.subnets_at(step)
        assert (first, second) == (space.largest, space.smallest) and len(others) == 2
        middles.update(others)
        assert trainer.subnets_at(step) == [first, second, *others]
    assert len(middles) == 40
    for n in (1, 2, 3):
        assert len(sandwich(space, Step(0, 1, n, rng(0)))) == n


def test_the_largest_teaches_in_place(monkeypatch):
    trainer = make_trainer(task="supernet", dropout=0.0, dynamic_batch_size=4, width_mult=0.25)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 8, 8, generator=generator).double()
    targets = torch.randint(10, (6,), generator=generator)
    trainer.net.double().train()
    before, seen = copy.deepcopy(trainer.net), {}
    monkeypatch.setattr(
        trainer.state.optimizer,
        "step",
        lambda: seen.update({k: p.grad.clone() for k, p in trainer.net.named_parameters()}),
    )
    trainer.train_step(images, targets, step=3)

    total, soft = torch.zeros((), dtype=torch.float64), None
    for subnet in trainer.subnets_at(3):
        logits = before(images, subnet)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        if soft is None:  # the largest learns from the labels alone
            soft = logits.detach().softmax(1)
        else:
            loss = loss - (soft * logits.log_softmax(1)).sum(1).mean()
        total = total + loss
    total.backward()
    for name, parameter in before.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_a_supernet_is_trained_without_a_teacher(tmp_path):
    result = train(TrainConfig(task="supernet", **SMALL), tmp_path, bar=False)
    assert [path.name for path in tmp_path.iterdir()] == ["supernet-1"]
    assert result.figures.keys() == {"smallest", "largest"}
    assert load_checkpoint(result.last).training["origins"] == {}


# --- a task from outside the package ---


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Task ``late``: the largest subnet for the first half of the steps, then uniform samples."""

    def largest_first(space: Any, step: Step) -> list[Any]:
        return [space.largest] if step.index < step.total // 2 else uniform(space, step)

    monkeypatch.setattr("compofa.training.recipes.REGISTERED", [])
    register_task(
        Phase("late", 1, subnets=2, epochs=4, base_lr=0.8, sampler=largest_first, teacher="none")
    )


def test_a_registered_task_samples_by_step(late):
    trainer = make_trainer(task="late", batch_size=45, epochs=3, dynamic_batch_size=None)
    assert trainer.steps == 2 and trainer.config.dynamic_batch_size == 2
    largest = trainer.extremes["largest"]
    subnets = [trainer.subnets_at(step) for step in range(6)]
    assert subnets[:3] == [[largest]] * 3
    assert [len(each) for each in subnets[3:]] == [2, 2, 2]
    assert len({subnet for each in subnets[3:] for subnet in each}) > 3


@pytest.mark.parametrize("dataset", ["digits", "imagenet"])
def test_a_registered_task_is_named_like_any_other(late, dataset):
    assert TrainConfig(task="late", dataset=dataset, data_path="x").resolved().epochs == 4
    with pytest.raises(ConfigError, match="late: expected phase 1"):
        TrainConfig(task="late", phase=2, dataset=dataset, data_path="x").resolved()
    with pytest.raises(ConfigError, match="finetune, late, progressive"):
        TrainConfig(task="lat", dataset=dataset).resolved()


def test_a_registered_task_runs_and_resumes_from_the_command(late, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--image-size 8 --batch-size 45 --epochs 2 --width-mult 0.1 --calibration-images 30"
    words = ["--task", "late", *words.split(), "--device", "cpu", "--quiet", "--output", "run"]
    assert main(words) == 0, capsys.readouterr().err
    assert load_checkpoint("run/late-1/best.pt").network.space.size == 243
    assert main([*words, "--resume"]) == 0
    assert main([*words, "--resume", "--lr", "0.7"]) == 1
    assert "lr: " in capsys.readouterr().err


def test_a_registered_task_names_its_loss(late):
    """It gets the soft targets of the teacher, here of the first subnet of the step."""
    taught = []

    def loss(logits: Any, targets: Any, teacher_logits: Any, *settings: Any) -> Any:
        taught.append((teacher_logits is not None, settings))
        return logits.sum() * 0 + 2

    register_task(
        Phase("own", 1, subnets=3, epochs=1, base_lr=0.1, sampler=sandwich, loss=loss,
              teacher="self")
    )  # fmt: skip
    trainer = make_trainer(task="own", dynamic_batch_size=None, kd_ratio=0.5)
    trainer.net.train()
    found, *_ = trainer.train_step(torch.zeros(4, 3, 8, 8), torch.arange(4), step=0)
    assert found == 2
    assert taught == [(has_teacher, (0.5, "ce", 0.1)) for has_teacher in (False, True, True)]


@pytest.mark.parametrize("rows", [("late", 1), ("compound", 1), ("progressive", 1), ("own", 2)])
def test_a_task_is_registered_once_and_from_its_first_phase(late, rows):
    with pytest.raises(ConfigError, match=rows[0]):
        register_task(Phase(*rows, subnets=1, epochs=1, base_lr=0.1))
