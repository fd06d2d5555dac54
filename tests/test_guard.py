"""Numbers that go wrong: steps with NaN or infinite losses, gradients or statistics."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compofa.cli.train import main
from compofa.data import load_dataset
from compofa.distributed.backend import SingleProcess
from compofa.errors import TrainingError
from compofa.io.checkpoint import load_checkpoint
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig
from compofa.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("few_digits")

SMALL: dict[str, Any] = {
    "net": "ofa-small",
    "task": "supernet",
    "image_size": (8,),
    "batch_size": 15,
    "epochs": 2,
    "calibration_images": 30,
    "width_mult": 0.1,
    "heuristic": "2:3",
    "lr": 0.05,
    "warmup_epochs": 0,
}
"""90 images: two epochs of six steps."""


def make_trainer(backend: Any = None, **settings: Any) -> Trainer:
    config = TrainConfig(**{**SMALL, **settings}).resolved()
    net = Supernet(config.network(10), config.seed)
    net.train()
    trainer = Trainer(config, net, None, load_dataset("digits"), backend)
    trainer._set_learning_rate(0)
    return trainer


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(15, 3, 8, 8, generator=generator)
    return images, torch.randint(10, (15,), generator=generator)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Weights, BN statistics and momentum."""
    found = {name: value.clone() for name, value in trainer.net.state_dict().items()}
    for index, kept in enumerate(trainer.state.optimizer.state.values()):
        found[f"momentum {index}"] = kept["momentum_buffer"].clone()
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def bad_pixel(trainer: Trainer, value: float) -> tuple[Tensor, Tensor]:
    images, targets = batch(1)
    images[3, 0, 2, 2] = value
    return images, targets


def bad_gradient(trainer: Trainer, value: float) -> tuple[Tensor, Tensor]:
    """The loss is fine, and one number of one gradient is not."""
    weight = trainer.net.classifier.bias

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient.index_fill(0, torch.tensor([2]), value)

    handle = weight.register_hook(spoil)
    return batch(1)


def bad_weight_in_backward(trainer: Trainer, value: float) -> tuple[Tensor, Tensor]:
    """The very last number of the first layer, whose gradient comes last."""
    weight = next(trainer.net.parameters())

    def spoil(gradient: Tensor) -> Tensor:
        handle.remove()
        gradient = gradient.clone()
        gradient[-1, -1, -1, -1] = value
        return gradient

    handle = weight.register_hook(spoil)
    return batch(1)


def bad_statistics(trainer: Trainer, value: float) -> tuple[Tensor, Tensor]:
    """Activations so large that their variance is infinite, and the loss a number."""
    images, targets = batch(1)
    return images * 1e25, targets


SPOILERS = [bad_pixel, bad_gradient, bad_weight_in_backward, bad_statistics]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda f: f.__name__)
def test_a_spoilt_step_leaves_no_trace(spoil: Callable[..., Any], value: float) -> None:
    trainer, twin = make_trainer(), make_trainer()
    for each in (trainer, twin):
        each.train_step(*batch(), step=0)
    before = state(trainer)
    figures = trainer.train_step(*spoil(trainer, value), step=1)
    assert equal(state(trainer), before)
    assert trainer.state.skipped == 1 and trainer.state.skipped_in_a_row == 1
    assert figures.tolist() == [0, 0, 0], "a NaN in the sums would spoil the epoch's figures"
    assert not any(parameter.grad.any() for parameter in trainer.net.parameters())
    for each in (trainer, twin):
        each.train_step(*batch(2), step=2)
    assert trainer.state.skipped == 1 and trainer.state.skipped_in_a_row == 0
    assert not equal(state(trainer), before) and equal(state(trainer), state(twin))


def test_a_run_of_spoilt_steps_is_an_error() -> None:
    trainer = make_trainer(max_skipped=3)
    for value in (1.0, float("nan"), float("nan"), 1.0, float("nan"), float("nan")):
        trainer.train_step(*bad_pixel(trainer, value), step=0)
    assert trainer.state.skipped == 4
    with pytest.raises(TrainingError, match="3 steps"):
        trainer.train_step(*bad_pixel(trainer, float("nan")), step=0)


class Pair(SingleProcess):
    """Two workers, of which the other has all gradients the same as this one, or spoilt."""

    size = 2
    spoilt = False

    def all_reduce(self, values: Tensor) -> None:
        values *= 2
        if self.spoilt:
            values[5] = float("nan")

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_all_workers_skip_what_one_of_them_spoils() -> None:
    pair = Pair()
    trainer = make_trainer(pair)
    trainer.train_step(*batch(), step=0)
    before = state(trainer)
    pair.spoilt = True
    trainer.train_step(*batch(1), step=1)
    assert equal(state(trainer), before) and trainer.state.skipped == 1
    pair.spoilt = False
    trainer.train_step(*batch(1), step=2)
    assert not equal(state(trainer), before) and trainer.state.skipped == 1


def test_a_gradient_scale_that_is_too_large_is_no_fault_unless_it_stays() -> None:
    trainer = make_trainer(max_skipped=2)
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = state(trainer)
    steps = 0
    while equal(state(trainer), before):
        trainer.train_step(*batch(), step=steps)
        steps += 1
        assert steps < 126
    assert steps > 2 and trainer.state.skipped == 0, "the scale came down, and that was all"
    trainer.state.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with pytest.raises(TrainingError):  # scales 4 and 2, then as if there were none
        for _ in range(10):
            trainer.train_step(*bad_pixel(trainer, float("nan")), step=0)
    assert trainer.state.skipped == 2


# --- in a run ---

ARGV = [
    "--task", "teacher", "--epochs", "3", "--image-size", "8", "--batch-size", "45", "--width-mult",
    "0.1", "--heuristic", "2:3", "--calibration-images", "30", "--lr", "0.05", "--validate-every",
    "1", "--quiet", "--device", "cpu", "--output", "run",
]  # fmt: skip
"""Two steps an epoch."""


@pytest.fixture
def spoil(monkeypatch, tmp_path) -> Callable[[set[int]], None]:
    """Let the losses of some steps be NaN."""
    monkeypatch.chdir(tmp_path)
    real = Trainer.train_step

    def choose(steps: set[int]) -> None:
        def train_step(self: Trainer, images: Tensor, targets: Tensor, step: int) -> Tensor:
            return real(self, images * (float("nan") if step in steps else 1), targets, step)

        monkeypatch.setattr(Trainer, "train_step", train_step)

    return choose


def test_skipped_steps_are_counted(spoil, capsys):
    spoil({1, 4, 5})
    assert main(ARGV) == 0, capsys.readouterr().err
    lines = [
        json.loads(text) for text in Path("run/teacher/metrics.jsonl").read_text().split("\n")[:-1]
    ]
    assert [line["train"]["skipped"] for line in lines] == [1, 0, 2]
    assert all(line["train"]["loss"] > 0 for line in lines[:2]), "the mean of the steps taken"
    assert json.loads(Path("run/teacher/summary.json").read_text())["skipped_steps"] == 3


def test_a_run_that_ends_keeps_the_last_good_state(spoil, capsys):
    spoil({3, 4, 5})
    assert main([*ARGV, "--max-skipped", "3"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train_ofa_net.py: error: ")
    for part in (
        "3 steps", "epoch 3, step 2 of 2", "run/teacher/last.pt", "--lr 0.005",
        "--config run/teacher/config.json", "--resume --output run --max-skipped 30",
    ):  # fmt: skip
        assert part in error
    last = load_checkpoint("run/teacher/last.pt")
    assert last.training["progress"]["epoch"] == 2
    assert all(value.isfinite().all() for value in last.weights.values())
    last.build()
    spoil(set())
    assert main([*ARGV, "--max-skipped", "4", "--resume"]) == 0
    assert json.loads(Path("run/teacher/summary.json").read_text())["skipped_steps"] == 1


def test_the_first_epoch_may_end_a_run(spoil, capsys):
    spoil({0, 1})
    assert main([*ARGV, "--max-skipped", "2"]) == 1
    error = capsys.readouterr().err
    assert "--lr" in error and "last.pt" not in error
    assert sorted(path.name for path in Path("run/teacher").glob("*.pt")) == []


def test_statistics_are_kept_whatever_their_type() -> None:
    trainer = make_trainer()
    trainer.train_step(*batch(), step=0)
    before = copy.deepcopy(dict(trainer.net.named_buffers()))
    assert {value.dtype for value in before.values()} == {torch.float32, torch.int64}
    trainer.guard.remember()
    for buffer in trainer.net.buffers():
        buffer += 1
    trainer.guard.restore()
    assert equal(dict(trainer.net.named_buffers()), before)
