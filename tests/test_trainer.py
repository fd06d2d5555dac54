import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from compofa.data import BrokenImages, DataSplits, load_dataset
from compofa.errors import CheckpointError, DataError
from compofa.nn.extract import extract
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Subnet
from compofa.training.config import TrainConfig
from compofa.training.optim import learning_rate
from compofa.training.trainer import Trainer, seeded

SMALL = {"image_size": (8, 12), "batch_size": 30, "epochs": 2, "calibration_images": 30}


@pytest.fixture
def digits(few_digits: None) -> DataSplits:
    return load_dataset("digits")


def make_trainer(splits: DataSplits, teacher: bool = True, **settings: object) -> Trainer:
    config = TrainConfig(**{**SMALL, **settings}).resolved()
    spec = config.network(len(splits.classes))
    largest = Supernet(spec, seed=99).eval() if teacher else None
    network = extract(largest, spec.space.largest) if largest else None
    return Trainer(config, Supernet(spec, config.seed), network, splits)


def make_batch(n: int = 6, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, size, size, generator=generator)
    return images, torch.randint(10, (n,), generator=generator)


def gradients_of(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Let the optimiser, when it is called, note the gradients and leave the weights alone."""
    seen: dict[str, torch.Tensor] = {}

    def note() -> None:
        for name, parameter in trainer.net.named_parameters():
            seen[name] = parameter.grad.clone()

    monkeypatch.setattr(trainer.state.optimizer, "step", note)
    return seen


def same(one: Supernet, other: Supernet) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in mine.items())


# --- a step ---


@pytest.mark.parametrize("kind", ["ce", "mse"])
def test_a_step_sums_the_gradients_of_its_subnets(digits, monkeypatch, kind):
    trainer = make_trainer(
        digits, dropout=0.0, dynamic_batch_size=3, kd_ratio=0.5, kd_type=kind, net="compofa-small"
    )
    images, targets = make_batch()
    images = images.double()  # BN of a few pixels amplifies the rounding of single precision
    trainer.net.double().train()
    trainer.teacher.double()
    before = copy.deepcopy(trainer.net)
    seen = gradients_of(trainer, monkeypatch)
    figures = trainer.train_step(images, targets, step=5)

    expected = {name: torch.zeros_like(p) for name, p in before.named_parameters()}
    subnets = trainer.subnets_at(5)
    assert len(set(subnets)) == 3
    teacher = trainer.teacher(images).detach()
    losses, right = [], 0
    for subnet in subnets:
        network = extract(before, subnet).double()  # plain layers: nothing elastic takes part
        logits = network(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        soft = F.mse_loss(logits, teacher)
        if kind == "ce":
            soft = -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss = (loss + 0.5 * soft) * 2 / 1.5
        loss.backward()
        for name, parameter in network.named_parameters():
            part = tuple(slice(0, length) for length in parameter.shape)
            expected[name][part] += parameter.grad
        losses.append(loss.item())
        right += int((logits.argmax(1) == targets).sum())
    assert seen.keys() == expected.keys()
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert figures.tolist() == pytest.approx([sum(losses) / 3, right, 18], rel=1e-4)
    assert all(not p.grad.any() for p in trainer.net.parameters()), "ready for the next step"


def watch(trainer: Trainer, see: Callable[[torch.Tensor, Subnet], None]) -> None:
    """Show what the trainer runs: images and subnet."""
    run = trainer.run

    def watched(images: torch.Tensor, subnet: Subnet) -> torch.Tensor:
        see(images, subnet)
        return run(images, subnet)

    trainer.run = watched


def test_each_subnet_of_a_step_has_its_own_dropout_from_the_seed(digits, monkeypatch):
    images, targets = make_batch()
    masks: list[torch.Tensor] = []

    def run(seed: int, step: int) -> Trainer:
        trainer = make_trainer(digits, dropout=0.5, dynamic_batch_size=2, seed=seed)
        trainer.net.dropout.register_forward_hook(
            lambda module, args, out: masks.append((out != 0).clone())
        )
        trainer.net.train()
        trainer.train_step(images, targets, step)
        return trainer

    run(1, 0), run(1, 0), run(1, 1), run(2, 0)
    assert torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])
    for other in (masks[1], masks[4], masks[6]):
        assert not torch.equal(masks[0], other)


def test_without_distillation_the_teacher_is_not_asked(digits):
    trainer = make_trainer(digits, kd_ratio=0.0)
    trainer.teacher.register_forward_pre_hook(lambda module, args: pytest.fail("asked"))
    trainer.net.train()
    trainer.train_step(*make_batch(), 0)


def test_reduced_precision_on_a_cpu(digits):
    trainer = make_trainer(digits, amp=True, dynamic_batch_size=1)
    kinds: list[torch.dtype] = []
    for network in (trainer.net, trainer.teacher):
        network.stem.conv.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    trainer.net.train()
    before = copy.deepcopy(trainer.net)
    trainer._set_learning_rate(0)
    loss = trainer.train_step(*make_batch(), 0)[0]
    assert kinds == [torch.bfloat16] * 2
    assert torch.isfinite(loss) and not same(before, trainer.net)
    for name, value in trainer.net.state_dict().items():
        assert torch.isfinite(value).all(), name
        assert value.dtype in (torch.float32, torch.int64), name


# --- what a step draws ---


def test_subnets_come_from_the_space_the_seed_and_the_step(digits):
    trainer = make_trainer(digits, dynamic_batch_size=3)
    space = trainer.net.spec.space
    drawn = [trainer.subnets_at(step) for step in range(40)]
    assert all(len(subnets) == 3 for subnets in drawn)
    flat = [subnet for subnets in drawn for subnet in subnets]
    assert all(space.contains(subnet) for subnet in flat)
    for stage in range(5):
        assert {subnet.depths[stage] for subnet in flat} == {2, 3, 4}
    assert len(set(flat)) > 80 and drawn[3] == trainer.subnets_at(3)
    other = make_trainer(digits, dynamic_batch_size=3, seed=1)
    assert other.subnets_at(3) != drawn[3]


def test_one_resolution_a_step_and_the_drawn_subnets_run(digits):
    trainer = make_trainer(digits, dynamic_batch_size=2, batch_size=10, image_size=(8, 12, 16))
    seen: list[tuple[int, object]] = []
    trainer.teacher.register_forward_pre_hook(
        lambda module, args: seen.append((args[0].shape[-1], "teacher"))
    )
    watch(trainer, lambda images, subnet: seen.append((images.shape[-1], subnet)))
    trainer.train_epoch(1, bar=False)
    steps = [seen[start : start + 3] for start in range(0, len(seen), 3)]
    assert len(steps) == trainer.steps == 9
    for position, step in enumerate(steps):
        assert len({size for size, _ in step}) == 1, "one resolution for all of a step"
        assert [who for _, who in step] == ["teacher", *trainer.subnets_at(9 + position)]
    assert {size for size, _ in seen} == {8, 12, 16}


def test_the_learning_rate_of_every_step(digits, monkeypatch):
    trainer = make_trainer(digits, epochs=3, warmup_epochs=1, lr=0.4)
    rates: list[float] = []
    monkeypatch.setattr(
        trainer,
        "train_step",
        lambda images, targets, step: (
            rates.append((step, *(g["lr"] for g in trainer.state.optimizer.param_groups)))
            or torch.ones(3)
        ),
    )
    for epoch in range(3):
        metrics = trainer.train_epoch(epoch, bar=epoch == 1)
    assert trainer.steps == 3
    expected = [learning_rate(step, 9, 3, 0.4) for step in range(9)]
    assert rates == [(step, rate, rate) for step, rate in enumerate(expected)]
    assert (metrics["lr"], metrics["loss"], metrics["top1"]) == (expected[-1], 1, 100)


# --- reproducibility ---


def test_same_seed_same_weights_whatever_the_global_seeds(digits):
    def run(seed: int, disturbance: int) -> Trainer:
        random.seed(disturbance)
        np.random.seed(disturbance)  # noqa: NPY002
        torch.manual_seed(disturbance)
        trainer = make_trainer(digits, seed=seed, dynamic_batch_size=1)
        states = random.getstate(), np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
        metrics = trainer.train_epoch(0, bar=False)
        trainer.validate()
        assert random.getstate() == states[0]
        assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), states[2])
        assert np.isfinite(metrics["loss"]) and metrics["images_per_s"] > 0
        return trainer

    one, two, other = run(0, 1), run(0, 2), run(1, 1)
    assert same(one.net, two.net)
    assert not same(one.net, other.net)


def test_seeded_leaves_the_generator_as_it_was():
    before = torch.get_rng_state()
    with seeded(3, torch.device("cpu")):
        first = torch.rand(2)
    with seeded(3, torch.device("cpu")):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_any_number_of_workers_gives_the_same_weights(digits):
    here = make_trainer(digits, workers=0, dynamic_batch_size=1)
    there = make_trainer(digits, workers=2, dynamic_batch_size=1)
    losses = [trainer.train_epoch(0, bar=False)["loss"] for trainer in (here, there)]
    assert losses[0] == losses[1]
    assert same(here.net, there.net)
    assert here.validate() == there.validate()


# --- validation ---


def test_validation_leaves_the_supernet_alone(digits):
    trainer = make_trainer(digits)
    before = copy.deepcopy(trainer.net.train())
    figures = trainer.validate()
    assert list(figures) == ["smallest", "largest"]
    for figure in figures.values():
        assert figure.keys() == {"top1", "top5", "loss"}
        assert 0 <= figure["top1"] <= figure["top5"] <= 100
    assert trainer.net.training and same(before, trainer.net)
    assert trainer.evaluator.source is digits.validation, "never the test part"


def test_a_teacher_has_one_subnet_to_train_and_to_validate(digits):
    trainer = make_trainer(digits, teacher=False, task="teacher")
    assert list(trainer.validate()) == ["largest"]
    (subnet,) = trainer.subnets_at(0)
    assert subnet == trainer.net.spec.space.largest and subnet.depths == (4,) * 5
    assert isinstance(extract(trainer.net, subnet), StaticNetwork)


# --- broken images ---


@pytest.fixture
def photos(tmp_path: Path) -> DataSplits:
    for number, name in enumerate(("cat", "dog")):
        for part, each in (("train", 65), ("val", 5)):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(each):
                image = Image.new("RGB", (8, 8), (90 * number, i, 7))
                image.save(tmp_path / part / name / f"{i:02d}.png")
    return load_dataset("imagefolder", tmp_path, validation_images=10)


def photo_trainer(photos: DataSplits, **settings: object) -> Trainer:
    return make_trainer(
        photos,
        dataset="imagefolder",
        data_path="x",
        net="compofa-small",
        image_size=(8,),
        dynamic_batch_size=1,
        **settings,
    )


def damage(photos: DataSplits, indices: range) -> Iterator[str]:
    for index in indices:
        path = photos.train.path(index)
        Path(path).write_bytes(b"not an image")
        yield path


def test_broken_images_are_skipped_and_counted(photos, caplog):
    assert len(photos.train) == 120
    (broken,) = damage(photos, range(7, 8))
    trainer = photo_trainer(photos)
    shown = []
    watch(trainer, lambda images, subnet: shown.append(len(images)))
    trainer.train_epoch(0, bar=False)
    trainer.train_epoch(1, bar=False)
    assert list(trainer.state.broken.paths) == [broken]
    assert sorted(shown[:4]) == [29, 30, 30, 30] and sum(shown) == 2 * 119
    assert [record.getMessage().count(broken) for record in caplog.records] == [1]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_are_named_and_stop_the_run(photos, workers, caplog):
    broken = list(damage(photos, range(20, 22)))
    trainer = photo_trainer(photos, workers=workers)
    with pytest.raises(DataError, match="2 of 120"):
        trainer.train_epoch(0, bar=False)
    assert [sum(path in line for line in caplog.messages) for path in broken] == [1, 1]


def test_a_resumed_run_does_not_name_broken_images_again(photos, caplog, monkeypatch):
    (broken,) = damage(photos, range(7, 8))
    trainer = photo_trainer(photos)
    trainer.train_epoch(0, bar=False)
    resumed = photo_trainer(photos)
    resumed.state.load_state_dict(trainer.state.state_dict())
    assert list(resumed.state.broken.paths) == [broken]
    monkeypatch.setattr(BrokenImages, "limit", 0.5)
    resumed.evaluator.broken.add([(broken, "cut")])  # it may be a calibration image, too
    assert sum(broken in line for line in caplog.messages) == 1


def test_a_step_left_with_one_image_is_skipped(photos, monkeypatch):
    list(damage(photos, range(1)))
    trainer = photo_trainer(photos, batch_size=2)
    steps = []
    monkeypatch.setattr(
        trainer,
        "train_step",
        lambda images, targets, step: steps.append((step, len(images))) or torch.zeros(3),
    )
    trainer.train_epoch(0, bar=False)
    assert trainer.steps == 60 and len(steps) == 59
    assert {n for _, n in steps} == {2} and len({step for step, _ in steps}) == 59


@pytest.mark.parametrize("state", [{}, {"optimizer": 3, "scaler": {}}, {"optimizer": {}}])
def test_a_foreign_training_state_is_refused(digits, state):
    trainer = make_trainer(digits)
    with pytest.raises(CheckpointError, match="training state"):
        trainer.state.load_state_dict(state)
