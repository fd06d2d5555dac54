import itertools
import math
from dataclasses import astuple, fields, replace

import pytest
import torch
from torch import nn

from compofa.data import DATASETS
from compofa.errors import CompofaError, ConfigError
from compofa.networks.zoo import network_spec
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig
from compofa.training.journal import cost_report
from compofa.training.optim import learning_rate, make_optimizer
from compofa.training.recipes import IMAGENET, RECIPES, recipe_for, task_names
from compofa.training.tasks import distillation_loss, uniform

# --- the published numbers ---


def test_the_published_phases():
    # task, phase, subnets a step, epochs, base learning rate, warm-up, largest only, start, sorted
    own = ("supernet", "finetune")  # their numbers were chosen here
    assert [astuple(phase)[:9] for phase in IMAGENET.phases if phase.task not in own] == [
        ("teacher", 1, 1, 180, 2.6, 0, True, None, False),
        ("compound", 1, 4, 25, 0.08, 0, False, ("teacher", 1), True),
        ("compound", 2, 4, 120, 0.24, 5, False, ("compound", 1), False),
        ("kernel", 1, 1, 120, 2.6, 5, False, ("teacher", 1), False),
        ("depth", 1, 2, 25, 0.08, 0, False, ("kernel", 1), False),
        ("depth", 2, 2, 120, 0.24, 5, False, ("depth", 1), False),
        ("expand", 1, 4, 25, 0.08, 0, False, ("depth", 2), True),
        ("expand", 2, 4, 120, 0.24, 5, False, ("expand", 1), True),
    ]


def test_what_progressive_shrinking_varies():
    for recipe in RECIPES.values():
        chain = recipe.chain("progressive")
        assert [phase.folder for phase in chain] == [
            "teacher", "kernel-1", "depth-1", "depth-2", "expand-1", "expand-2",
        ]  # fmt: skip
        assert [dict(p.values) for p in chain[1:]] == [
            {"depth": depth, "expand": expand, "kernel": (3, 5, 7)}
            for depth, expand in (
                ((4,), (6,)),
                ((3, 4), (6,)),
                ((2, 3, 4), (6,)),
                ((2, 3, 4), (4, 6)),
                ((2, 3, 4), (3, 4, 6)),
            )
        ]
        assert [p.teacher for p in chain] == ["none"] + ["checkpoint"] * 5
        assert {p.sampler for p in chain} == {uniform}


@pytest.mark.parametrize(
    ("task", "phase", "expected"),
    [
        ("teacher", 1, {"epochs": 180, "warmup_epochs": 0, "dynamic_batch_size": 1, "lr": 0.325}),
        ("compound", 1, {"epochs": 25, "warmup_epochs": 0, "dynamic_batch_size": 4, "lr": 0.01}),
        ("compound", 2, {"epochs": 120, "warmup_epochs": 5, "dynamic_batch_size": 4, "lr": 0.03}),
        ("kernel", 1, {"epochs": 120, "warmup_epochs": 5, "dynamic_batch_size": 1, "lr": 0.325}),
        ("expand", 2, {"epochs": 120, "warmup_epochs": 5, "dynamic_batch_size": 4, "lr": 0.03}),
    ],
)
def test_imagenet_defaults(task, phase, expected):
    config = TrainConfig(task=task, phase=phase, dataset="imagenet", data_path="x").resolved()
    for name, value in expected.items():
        assert getattr(config, name) == pytest.approx(value), name
    common = {
        "batch_size": 256,
        "momentum": 0.9,
        "weight_decay": 3e-5,
        "label_smoothing": 0.1,
        "dropout": 0.1,
        "kd_ratio": 1.0,
        "kd_type": "ce",
        "calibration_images": 2000,
        "image_size": tuple(range(128, 225, 4)),
        "eval_size": 224,
        "net": "compofa-elastic"
        if task in ("teacher", "compound")
        else "ofa_mbv3_d234_e346_k357_w1.0",
    }
    assert {name: getattr(config, name) for name in common} == common
    space = config.network(1000).space
    if config.recipe_phase.free:
        assert space.size == ((3 * 3) ** 2 + (3 * 3) ** 3 + (3 * 3) ** 4) ** 5
        return
    assert space.size == (1 if task == "teacher" else 117**5)
    assert replace(config, fixed_kernel=True).network(1000).space.size == (
        1 if task == "teacher" else 243
    )


def test_every_data_set_has_a_recipe_with_every_task():
    assert RECIPES.keys() == DATASETS.keys()
    for name in DATASETS:
        recipe = recipe_for(name)
        assert [(p.task, p.number) for p in recipe.phases] == [
            (p.task, p.number) for p in IMAGENET.phases
        ]
        for phase in recipe.phases:
            assert phase.warmup_epochs < phase.epochs and phase.base_lr > 0
            assert recipe.phase(phase.task, phase.number) is phase
            if phase.starts_from is not None:
                recipe.phase(*phase.starts_from)


def test_channels_are_sorted_once_and_before_widths_vary():
    for recipe in RECIPES.values():
        compound = [p for p in recipe.phases if p.task == "compound"]
        assert [p.sort for p in compound] == [True, False]
        assert compound[0].starts_from == ("teacher", 1)
        expand = [p for p in recipe.phases if p.task == "expand"]
        assert [(p.starts_from, p.sort) for p in expand] == [
            (("depth", 2), True),
            (("expand", 1), True),
        ]
        assert [dict(recipe.phase(*p.starts_from).values)["expand"] for p in expand] == [
            (6,),
            (4, 6),
        ]


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"task": "tacher"}, ["'tacher'", "teacher, compound"]),
        ({"phase": 3}, ["compound", "phase 1 or 2", "3"]),
        ({"task": "teacher", "phase": 2}, ["teacher", "phase 1", "2"]),
        ({"net": "resnet"}, ["'resnet'", "compofa-small"]),
        ({"dataset": "digit"}, ["'digit'", "digits, cifar10"]),
        ({"heuristic": "complex"}, ["'complex'", "simple, none"]),
        ({"heuristic": "2:3,2:4"}, ["2:3,2:4"]),
        ({"dataset": "imagenet"}, ["--data-path: "]),
        ({"image_size": (8, 4)}, ["image size", "8 to 2048", "4"]),
        ({"eval_size": 7}, ["image size", "8 to 2048", "7"]),
        ({"kd_type": "kl"}, ["--kd-type: "]),
        ({"lr": math.nan}, ["--lr: "]),
        ({"epochs": 5, "warmup_epochs": 6}, ["--warmup-epochs: "]),
        ({"batch_size": 1}, ["--batch-size: "]),
        (
            {"task": "x", "net": "y", "dataset": "z"},
            ["task 'x'", "network 'y'", "data set 'z'"],
        ),
        (
            {"epochs": -1, "momentum": 1.0, "dropout": 1.0, "workers": -1, "kd_ratio": -0.5},
            ["--epochs", "--momentum", "--dropout", "--workers", "--kd-ratio"],
        ),
    ],
)
def test_faulty_settings_are_all_reported(settings, messages):
    with pytest.raises(CompofaError) as caught:
        TrainConfig(**settings).resolved()
    text = str(caught.value)
    assert "\n" not in text
    for message in messages:
        assert message in text
    flags = [word for word in text.replace(";", " ").split() if word.startswith("--")]
    assert len(flags) == sum(message.startswith("--") for message in messages), text


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (2, 1), (3, 2), (40, 2)])
def test_a_short_run_shortens_the_default_warm_up(epochs, warmup):
    assert TrainConfig(task="teacher", epochs=epochs).resolved().warmup_epochs == warmup


@pytest.mark.parametrize("batch_size", [64, 128, 2048])
def test_learning_rate_follows_the_batch(batch_size):
    config = TrainConfig(dataset="imagenet", data_path="x", task="teacher", batch_size=batch_size)
    assert config.resolved().lr == pytest.approx(2.6 * batch_size / 2048)
    assert replace(config, lr=0.5).resolved().lr == 0.5


def test_resolved_settings_are_complete_and_stay():
    config = TrainConfig(image_size=(16, 8, 8)).resolved()
    may_miss = {
        "data_path", "fixed_kernel", "heuristic", "width_mult", "teacher_path", "init_path",
        "subnet", "validation_images", "price", "power", "color_jitter", "patience",
        "teacher",
    }  # fmt: skip
    assert {f.name for f in fields(config) if getattr(config, f.name) is None} <= may_miss
    assert config.image_size == (8, 16) and config.eval_size == 16
    assert config.resolved() == config
    assert config.changes_since(config.to_json()) == []


def test_changes_are_named_but_not_those_that_do_not_matter():
    before = TrainConfig().resolved().to_json()
    now = TrainConfig(lr=0.7, seed=3, workers=2, price=1.0, device="cuda").resolved()
    assert now.changes_since(before) == [
        f"lr: {before['lr']} then, 0.7 now",
        "seed: 0 then, 3 now",
    ]


# --- the learning rate ---


def test_learning_rate_of_every_step():
    rates = [learning_rate(step, 10, 3, 0.8) for step in range(10)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    cosine = [0.4 * (1 + math.cos(math.pi * k / 7)) for k in range(7)]
    assert rates[3:] == pytest.approx(cosine)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[3:]))
    assert rates[-1] == pytest.approx(0.8 * 0.5 * (1 + math.cos(6 * math.pi / 7)))
    assert learning_rate(10, 10, 3, 0.8) == pytest.approx(0)
    assert rates == [learning_rate(step, 10, 3, 0.8) for step in range(10)]


def test_learning_rate_without_and_with_nothing_but_warm_up():
    assert learning_rate(0, 4, 0, 0.1) == pytest.approx(0.1)
    assert learning_rate(2, 4, 0, 0.1) == pytest.approx(0.05)
    assert [learning_rate(s, 2, 2, 0.3) for s in (0, 1)] == pytest.approx([0.1, 0.2])


# --- the optimiser ---


def test_biases_and_normalisation_are_not_decayed():
    net = Supernet(network_spec("ofa-small", classes=3))
    optimizer = make_optimizer(net, 0.5, 0.9)
    decayed, plain = (group["params"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0]
    norms = {id(p) for m in net.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    biases = {id(p) for n, p in net.named_parameters() if n.rsplit(".")[-1] == "bias"}
    assert {id(p) for p in plain} == norms | biases
    assert len(decayed) + len(plain) == len(list(net.parameters()))
    assert {id(p) for p in decayed}.isdisjoint(norms | biases)
    assert all(group["nesterov"] for group in optimizer.param_groups)


def test_a_step_of_the_optimiser():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
        layer.bias.fill_(3.0)
    optimizer = make_optimizer(layer, weight_decay=0.1, momentum=0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.2
    layer(torch.tensor([[4.0, 5.0]])).sum().backward()
    optimizer.step()
    # Nesterov's first step: gradient + momentum * gradient, the decay being part of the gradient.
    weight = torch.tensor([[1 - 0.2 * 1.5 * 4.1, -2 - 0.2 * 1.5 * (5 - 0.2)]])
    torch.testing.assert_close(layer.weight.data, weight)
    torch.testing.assert_close(layer.bias.data, torch.tensor([3 - 0.2 * 1.5]))


def test_momentum_may_be_zero():
    assert not make_optimizer(nn.Linear(2, 1), 0.0, 0.0).param_groups[0]["nesterov"]


# --- the loss ---

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]])
TARGETS = torch.tensor([0, 2])
TEACHER = torch.tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 2.0]])


def by_hand(smoothing: float) -> tuple[float, float, float]:
    """Cross entropy, soft cross entropy and mean squared difference, in plain arithmetic."""
    hard = soft = square = 0.0
    for logits, target, teacher in zip(
        LOGITS.tolist(), TARGETS.tolist(), TEACHER.tolist(), strict=True
    ):
        logs = [v - math.log(sum(map(math.exp, logits))) for v in logits]
        weights = [(1 - smoothing) * (k == target) + smoothing / 3 for k in range(3)]
        hard -= sum(w * v for w, v in zip(weights, logs, strict=True)) / 2
        total = sum(map(math.exp, teacher))
        soft -= sum(math.exp(t) / total * v for t, v in zip(teacher, logs, strict=True)) / 2
        square += sum((a - b) ** 2 for a, b in zip(logits, teacher, strict=True)) / 6
    return hard, soft, square


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_loss_by_hand(smoothing, ratio, kind):
    hard, soft, square = by_hand(smoothing)
    expected = (hard + ratio * (soft if kind == "ce" else square)) * 2 / (1 + ratio)
    if ratio == 0:
        expected = hard  # no distillation: the plain loss, as without a teacher
    loss = distillation_loss(LOGITS, TARGETS, TEACHER, ratio, kind, smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    plain = distillation_loss(LOGITS, TARGETS, None, ratio, kind, smoothing)
    assert plain.item() == pytest.approx(hard, rel=1e-5)


# --- what a run cost ---


def test_cost_report():
    # Strubell et al., 2019: 1.58 x kWh x 0.954 lbs.
    report = cost_report(2 * 3600, "cuda:1", price=2.5, power=300)
    assert report == {
        "gpu_hours": 2,
        "cost": 5,
        "co2_lbs": pytest.approx(0.6 * 1.58 * 0.954),
    }
    assert cost_report(1800, "cpu", None, None) == {"cpu_hours": 0.5}


def test_tasks_of_the_command_line():
    assert task_names() == (
        "teacher", "compound", "kernel", "depth", "expand", "supernet", "finetune", "progressive",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=", ".join(task_names())):
        IMAGENET.phase("kernal")
