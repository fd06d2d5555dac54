"""Optimisers, mixing, moving averages and clipping: what is off by default in every recipe."""

import copy
import math
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from few import AfterEpoch
from torch import Tensor, nn

from compofa.data import load_dataset
from compofa.distributed.backend import SingleProcess
from compofa.errors import CheckpointError, ConfigError, StoppedError
from compofa.io.checkpoint import load_checkpoint
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig
from compofa.training.optim import StepGuard, make_optimizer
from compofa.training.optimizers import OPTIMIZERS, OptimizerKind
from compofa.training.regularisation import averaged, mix
from compofa.training.run import train
from compofa.training.shutdown import Stopping
from compofa.training.tasks import distillation_loss
from compofa.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("few_digits")

SMALL: dict[str, Any] = {
    "net": "ofa-small",
    "task": "supernet",
    "image_size": (8,),
    "batch_size": 30,
    "epochs": 2,
    "calibration_images": 30,
    "width_mult": 0.1,
    "warmup_epochs": 0,
    "dynamic_batch_size": 2,
}
"""Two epochs of three steps."""

ALL: dict[str, Any] = {
    "optimizer": "adamw",
    "auto_augment": "randaugment",
    "random_erasing": 0.3,
    "mixup": 0.2,
    "cutmix": 1.0,
    "balanced_sampling": True,
    "ema": 0.9,
    "clip_grad_norm": 1.0,
}


class Pair(SingleProcess):
    """Two ranks, of which the other has the same numbers plus one."""

    size = 2

    def all_reduce(self, values: Tensor) -> None:
        values += values + 1

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def make_trainer(backend: Any = None, teacher: nn.Module | None = None, **settings: Any) -> Trainer:
    config = TrainConfig(**{**SMALL, **settings}).resolved()
    net = Supernet(config.network(10), config.seed).train()
    trainer = Trainer(config, net, teacher, load_dataset("digits"), backend)
    trainer._set_learning_rate(0)
    return trainer


def batch(seed: int = 0, n: int = 15, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator)
    return images, torch.randint(10, (n,), generator=generator)


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Compare nested data, tensors to the bit, and all but times."""
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one.keys() - {"seconds", "digest"}:
            assert_same(one[key], other[key], f"{where}/{key}")
    else:
        assert one == other, where


# --- optimisers ---


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("adamw", lambda groups: torch.optim.AdamW(groups, lr=0.01)),
        (
            "rmsprop",
            lambda groups: torch.optim.RMSprop(groups, 0.01, alpha=0.9, eps=0.0316, momentum=0.8),
        ),
    ],
)
def test_steps_are_those_of_torch(name, reference):
    torch_layer = nn.Linear(3, 2)
    layer = copy.deepcopy(torch_layer)
    groups = [
        {"params": [torch_layer.weight], "weight_decay": 0.1},
        {"params": [torch_layer.bias], "weight_decay": 0.0},
    ]
    theirs, ours = reference(groups), make_optimizer(layer, 0.1, 0.8, name)
    for group in ours.param_groups:
        group["lr"] = 0.01
    before = layer.weight.detach().clone()
    for seed in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        for each, optimizer in ((layer, ours), (torch_layer, theirs)):
            optimizer.zero_grad(set_to_none=False)
            each(x).square().sum().backward()
            optimizer.step()
        if name == "adamw" and seed == 0:  # decoupled: the decay is no part of the gradient
            move = layer.weight.detach() - before * (1 - 0.01 * 0.1)
            torch.testing.assert_close(move.abs(), torch.full_like(move, 0.01), rtol=1e-3, atol=0)
    assert torch.equal(layer.weight, torch_layer.weight)
    assert torch.equal(layer.bias, torch_layer.bias)


def test_a_weight_without_a_gradient_follows_adamws_first_moment():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = make_optimizer(layer, 0.0, None, "adamw")
    optimizer.param_groups[0]["lr"] = 1.0
    layer.weight.grad.fill_(4.0)
    m = v = 0.0
    for step in range(1, 6):
        before, gradient = layer.weight.item(), float(layer.weight.grad)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        expected = -m / (1 - 0.9**step) / math.sqrt(v / (1 - 0.999**step))
        assert layer.weight.item() - before == pytest.approx(expected, rel=1e-4)
        optimizer.zero_grad(set_to_none=False)


def imagenet(**settings: Any) -> TrainConfig:
    return TrainConfig(dataset="imagenet", data_path="x", **settings).resolved()


def test_the_defaults_of_each_optimiser():
    sgd = imagenet(task="teacher", batch_size=256)
    assert (sgd.lr, sgd.momentum, sgd.weight_decay) == (2.6 * 256 / 2048, 0.9, 3e-5)
    adamw = imagenet(task="teacher", batch_size=4096, optimizer="adamw")
    assert (adamw.momentum, adamw.weight_decay) == (None, 0.05)
    assert adamw.lr == pytest.approx(4e-3)
    for batch_size in (64, 1024):
        small = imagenet(task="teacher", optimizer="adamw", batch_size=batch_size)
        assert small.lr == pytest.approx(2e-3), "no lower for small batches"
    compound = imagenet(optimizer="adamw")
    assert compound.lr == pytest.approx(2e-3 * 0.08 / 2.6), "the same fraction as with SGD"
    rmsprop = imagenet(task="teacher", optimizer="rmsprop")
    assert (rmsprop.momentum, rmsprop.weight_decay) == (0.9, 1e-5)
    assert rmsprop.lr == pytest.approx(0.064 / 4)
    given = imagenet(optimizer="adamw", lr=0.1, weight_decay=0.2)
    assert (given.lr, given.weight_decay) == (0.1, 0.2)


@pytest.mark.parametrize(("name", "factor"), [("sgd", 2), ("rmsprop", 2), ("adamw", math.sqrt(2))])
def test_learning_rates_of_two_ranks(name, factor):
    assert make_trainer(Pair(), optimizer=name, lr=0.1).peak_lr == pytest.approx(0.1 * factor)
    assert make_trainer(Pair(), optimizer=name, lr=0.1, scale_lr=False).peak_lr == 0.1


def test_an_optimiser_is_one_row(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "adam", OptimizerKind("Adam", lr=1e-3, batch=1024, sqrt=True))
    trainer = make_trainer(optimizer="adam")
    before = state(trainer.net)
    trainer.train_step(*batch(), 0)
    assert type(trainer.state.optimizer) is torch.optim.Adam
    assert trainer.config.weight_decay == 1e-4, "the recipe's"
    assert not torch.equal(trainer.net.classifier.weight, before["classifier.weight"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_damaged_optimiser_state_is_refused(name):
    trainer = make_trainer(optimizer=name)
    trainer.train_step(*batch(), 0)
    good = trainer.state.state_dict()
    first = good["trainer"]["optimizer"]["state"][0]
    for key in first:
        for damaged in (None, torch.zeros(2, 1)):
            bad = copy.deepcopy(good)
            tensors = bad["trainer"]["optimizer"]["state"][0]
            tensors.pop(key)
            if damaged is not None:
                tensors[key] = damaged
            with pytest.raises(CheckpointError, match=key):
                make_trainer(optimizer=name).state.load_state_dict(bad)
    make_trainer(optimizer=name).state.load_state_dict(good)


# --- refused where it cannot apply ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adamw", "momentum": 0.9}, ("--momentum", "adamw")),
        ({"optimizer": "adam"}, ("--optimizer", "sgd", "adamw", "rmsprop", "'adam'")),
        ({"auto_augment": "trivialaugment"}, ("--auto-augment", "randaugment", "8 pixels")),
        ({"auto_augment": "autoaugment"}, ("--auto-augment", "randaugment", "'autoaugment'")),
        ({"crop_scale": 0.5}, ("--crop-scale", "digits")),
        ({"color_jitter": 0.0}, ("--color-jitter", "digits")),
        ({"ema": 1.0}, ("--ema", "1.0")),
        ({"mixup": -1.0}, ("--mixup", "-1.0")),
        ({"random_erasing": 2.0}, ("--random-erasing", "2.0")),
        ({"clip_grad_norm": float("nan")}, ("--clip-grad-norm", "nan")),
    ],
)
def test_settings_that_cannot_apply_are_refused(settings, words):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**SMALL, **settings).resolved()
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_all_settings_apply_to_photographs():
    more = {"crop_scale": 0.5, "color_jitter": 0.4, "auto_augment": "trivialaugment"}
    imagenet(**ALL | more)
    with pytest.raises(ConfigError, match="24 pixels"):
        imagenet(image_size=(24, 32), auto_augment="trivialaugment")


# --- mixing ---


def test_without_mixing_nothing_changes():
    images, targets = batch()
    mixed, labels = mix(images, targets, 10, TrainConfig(), 0)
    assert mixed is images and labels is targets


def test_mixup_mixes_neighbours_and_labels_alike():
    images, targets = batch()
    before = torch.get_rng_state()
    mixed, labels = mix(images, targets, 10, TrainConfig(mixup=1.0), 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert labels.shape == (15, 10) and torch.allclose(labels.sum(1), torch.ones(15))
    hot = F.one_hot(targets, 10).float()
    other = hot.roll(1, 0)
    apart = (targets != targets.roll(1)).nonzero()[0]
    share = float((labels * hot)[apart].sum())
    assert 0 < share < 1
    torch.testing.assert_close(labels, share * hot + (1 - share) * other)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    again = mix(images, targets, 10, TrainConfig(mixup=1.0), 3)
    assert torch.equal(again[0], mixed) and torch.equal(again[1], labels)
    assert not torch.equal(mix(images, targets, 10, TrainConfig(mixup=1.0), 4)[0], mixed)


def test_cutmix_mixes_labels_by_area():
    images, targets = batch(size=16)
    mixed, labels = mix(images, targets, 10, TrainConfig(cutmix=1.0), 2)
    pasted = (mixed != images).any(1)
    assert torch.equal(mixed.movedim(1, -1)[pasted], images.roll(1, 0).movedim(1, -1)[pasted])
    share = 1 - float(pasted[0].float().mean())
    assert 0 < share < 1
    hot = F.one_hot(targets, 10).float()
    torch.testing.assert_close(labels, share * hot + (1 - share) * hot.roll(1, 0))


def test_one_of_both_is_drawn():
    images, targets = batch()
    kinds = set()
    for seed in range(12):
        mixed, labels = mix(images, targets, 10, TrainConfig(mixup=1.0, cutmix=1.0), seed)
        if bool((labels.max(1).values < 1).any()):
            kinds.add("cutmix" if bool((mixed == images).any()) else "mixup")
    assert kinds == {"mixup", "cutmix"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_mixed_labels_is_the_mixture_of_losses(smoothing):
    logits, targets = torch.randn(15, 10, generator=torch.Generator().manual_seed(0)), batch()[1]
    hot = F.one_hot(targets, 10).float()
    labels = 0.7 * hot + 0.3 * hot.roll(1, 0)
    loss = distillation_loss(logits, labels, None, label_smoothing=smoothing)
    parts = [
        distillation_loss(logits, t, None, label_smoothing=smoothing)
        for t in (targets, targets.roll(1))
    ]
    torch.testing.assert_close(loss, 0.7 * parts[0] + 0.3 * parts[1])


def test_teacher_and_subnets_see_the_mixed_images():
    config = TrainConfig(**SMALL | {"task": "compound", "net": "compofa-small"}).resolved()
    largest = Supernet(config.network(10), 9).eval()
    teacher = extract(largest, config.network(10).space.largest)
    trainer = make_trainer(
        teacher=teacher, task="compound", net="compofa-small", mixup=1.0, lr=0.0, dropout=0.0
    )
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    run = trainer.run
    trainer.run = lambda images, subnet: seen.append(images) or run(images, subnet)
    images, targets = batch()
    for step in (5, 5, 6):
        trainer.train_step(images, targets, step)
    assert all(torch.equal(seen[0], other) for other in seen[:6]), "the teacher and two subnets"
    assert not torch.equal(seen[0], images) and not torch.equal(seen[0], seen[6])


def test_ranks_mix_differently(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "compofa.training.trainer.mix",
        lambda images, targets, classes, config, seed: seen.append(seed) or (images, targets),
    )
    for rank in (0, 1, 1):
        backend = Pair()
        backend.rank = rank
        make_trainer(backend, mixup=1.0).train_step(*batch(), 0)
    assert seen[0] != seen[1] == seen[2]


def test_a_prediction_of_the_larger_share_is_correct():
    trainer = make_trainer(mixup=1.0, lr=0.0, dynamic_batch_size=1)
    images, targets = batch()
    _, labels = mix(images, targets, 10, TrainConfig(mixup=1.0), 0)
    trainer.run = lambda images, subnet: labels * trainer.net.classifier.weight.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compofa.training.trainer.mix", lambda *args: (images, labels))
        weight = trainer.net.classifier.weight.data
        weight.fill_(1.0)
        assert trainer.train_step(images, targets, 0)[1:].tolist() == [15, 15]


# --- the moving average ---


def expected_average(values: list[Tensor], decay: float) -> Tensor:
    average = values[0].double()
    for n, value in enumerate(values[1:], 1):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * value.double()
    return average


def test_the_average_has_its_closed_form():
    net = nn.BatchNorm2d(2)
    average = averaged(net, 0.3)
    values: dict[str, list[Tensor]] = {}
    for step in range(8):
        with torch.no_grad():
            for value in net.state_dict().values():
                value.copy_(value * 0 + step**2)
        average.update_parameters(net)
        for name, value in net.state_dict().items():
            values.setdefault(name, []).append(value.clone())
    for name, value in average.module.state_dict().items():
        if name == "num_batches_tracked":
            assert value.dtype == torch.int64 and value == 49
        else:
            torch.testing.assert_close(value.double(), expected_average(values[name], 0.3))


def test_the_average_follows_the_steps_that_are_taken():
    trainer = make_trainer(ema=0.5, lr=0.05)
    seen = []
    for step in range(4):
        images, targets = batch(step)
        if step == 2:
            images[0, 0, 0, 0] = float("nan")
            before = state(trainer.state.evaluated)
        trainer.train_step(images, targets, step)
        if step == 2:
            assert trainer.state.skipped == 1
            assert_same(state(trainer.state.evaluated), before)
        else:
            seen.append(state(trainer.net))
    for name in ("classifier.weight", "stem.conv.weight", "stem.bn.running_var"):
        expected = expected_average([each[name] for each in seen], 0.5)
        found = trainer.state.evaluated.state_dict()[name]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(found, seen[-1][name])


def test_the_average_is_validated(monkeypatch):
    for ema in (0.0, 0.9):
        trainer, seen = make_trainer(ema=ema), []
        real = trainer.evaluator.accuracy
        monkeypatch.setattr(
            trainer.evaluator,
            "accuracy",
            lambda n, s, real=real, seen=seen: seen.append(n) or real(n, s),
        )
        trainer.train_step(*batch(), 0)
        trainer.validate()
        assert {id(net) for net in seen} == {id(trainer.state.evaluated)}
        assert (trainer.state.evaluated is trainer.net) == (ema == 0)


def test_ranks_average_the_statistics_of_the_average_and_keep_their_own():
    trainer = make_trainer(Pair(), ema=0.9)
    trainer.train_step(*batch(), 0)
    run_state = trainer.state
    before = {id(net): state(net) for net in (trainer.net, run_state.evaluated)}
    with run_state.merged():
        saved = copy.deepcopy(run_state.state_dict())
        for net in (trainer.net, run_state.evaluated):
            found, own = net.stem.bn.running_mean, before[id(net)]["stem.bn.running_mean"]
            torch.testing.assert_close(found, own + 0.5)
    for net in (trainer.net, run_state.evaluated):
        assert_same(state(net), before[id(net)])
    other = make_trainer(Pair(), ema=0.9)
    other.state.load_state_dict({"trainer": saved["trainer"], "progress": saved["progress"]}, 2)
    assert_same(state(other.state.evaluated), before[id(run_state.evaluated)])


def test_a_state_without_the_average_is_refused():
    saved = make_trainer().state.state_dict()
    with pytest.raises(CheckpointError, match="average"):
        make_trainer(ema=0.9).state.load_state_dict(saved)


# --- clipping ---


def test_gradients_are_scaled_down_to_the_norm():
    layer = nn.Linear(2, 1)
    make_optimizer(layer, 0.0, 0.0)
    guard = StepGuard(layer)

    def after(gradient: list[float], **settings: float) -> list[float]:
        layer.weight.grad.copy_(torch.tensor([gradient[:2]]))
        layer.bias.grad.fill_(gradient[2])
        assert guard.passes(**settings) == math.isfinite(sum(gradient))
        return [*layer.weight.grad[0].tolist(), layer.bias.grad.item()]

    assert after([2.0, 3.0, 6.0]) == [2, 3, 6]
    assert after([2.0, 3.0, 6.0], max_norm=7.0) == [2, 3, 6]
    assert after([2.0, 3.0, 6.0], max_norm=3.5) == pytest.approx([1, 1.5, 3])
    assert after([2.0, float("inf"), 6.0], max_norm=3.5) == [2, math.inf, 6]


def test_a_clipped_step():
    trainer = make_trainer(clip_grad_norm=0.01, lr=2.0, momentum=0.0, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in trainer.net.parameters()]
    trainer.train_step(*batch(), 0)
    moves = [p.detach() - b for p, b in zip(trainer.net.parameters(), before, strict=True)]
    norm = torch.linalg.vector_norm(torch.cat([move.flatten() for move in moves]).double())
    assert float(norm) == pytest.approx(2.0 * 0.01, rel=1e-4)


# --- all at once ---


def test_with_everything_on_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    config = TrainConfig(**SMALL, **ALL)
    whole = train(config, tmp_path / "whole", bar=False)
    stop = Stopping()
    with suppress(StoppedError):  # after the first step of the second epoch
        train(
            config, tmp_path / "cut", bar=False, stop=stop,
            callbacks=[AfterEpoch(lambda done: setattr(stop, "requested", signal.SIGTERM))],
        )  # fmt: skip
    cut = load_checkpoint(tmp_path / "cut" / "supernet-1" / "last.pt")
    assert cut.training["trainer"]["tally"]["steps"] == 1
    resumed = train(config, tmp_path / "cut", resume=True, bar=False)
    last = load_checkpoint(whole.last)
    for name in ("best", "last"):
        mine, theirs = (vars(load_checkpoint(getattr(r, name))) for r in (resumed, whole))
        assert_same(mine, theirs, name)
    average = last.training["trainer"]["average"]
    best = load_checkpoint(whole.best)
    assert average["n_averaged"] == 6
    assert best.figures["epoch"] == 2, "so that both files are of the same step"
    for name, value in best.weights.items():
        assert torch.equal(value, average[f"module.{name}"]), name
    assert not torch.equal(best.weights["classifier.weight"], last.weights["classifier.weight"])


def test_with_everything_on_loader_workers_change_nothing():
    here, there = (make_trainer(**ALL, workers=workers) for workers in (0, 2))
    losses = [trainer.train_epoch(0, bar=False)["loss"] for trainer in (here, there)]
    assert losses[0] == losses[1]
    assert_same(state(here.state.evaluated), state(there.state.evaluated))
