"""What a validation costs and shows, and on which devices a run may train."""

from typing import Any

import pytest
import torch

from compofa.data import load_dataset
from compofa.distributed.backend import SingleProcess
from compofa.errors import ConfigError
from compofa.evaluate import Evaluator, measure_accuracy
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.training import trainer as module
from compofa.training.config import TrainConfig
from compofa.training.device import check_device, is_available, sums_dtype
from compofa.training.trainer import RUNNING_STEPS, Trainer

pytestmark = pytest.mark.usefixtures("few_digits")


def make_trainer(bar: bool = False, backend: Any = None, **settings: Any) -> Trainer:
    small = {"image_size": (8,), "batch_size": 45, "width_mult": 0.1, "calibration_images": 30}
    config = TrainConfig(**{**small, **settings}).resolved()
    net = Supernet(config.network(10), config.seed)
    return Trainer(config, net, None, load_dataset("digits"), backend, bar)


# --- running statistics ---


def test_a_teacher_is_validated_with_its_own_statistics(monkeypatch):
    trainer = make_trainer(task="teacher", epochs=60)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in trainer.net.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 10)
    calibrated = trainer.validate()["largest"]["loss"]
    trainer.state.epoch = RUNNING_STEPS // trainer.steps
    monkeypatch.setattr(Evaluator, "calibration_batches", lambda *_: pytest.fail("read images"))
    found = trainer.validate()["largest"]["loss"]
    network = extract(trainer.net, trainer.net.spec.space.largest)
    batches = trainer.evaluator.evaluation_batches(8)
    assert found == measure_accuracy(network, batches).loss != calibrated
    assert trainer.net.training


def test_before_enough_steps_and_with_several_subnets_they_are_calibrated(monkeypatch):
    calls = []
    real = module.Evaluator.calibration_batches
    monkeypatch.setattr(
        Evaluator, "calibration_batches", lambda *args: calls.append(1) or real(*args)
    )
    early = make_trainer(task="teacher", epochs=60)
    early.state.epoch = RUNNING_STEPS // early.steps - 1
    early.validate()
    assert len(calls) == 1
    several = make_trainer(task="compound", epochs=60)
    several.state.epoch = 59
    several.validate()
    assert len(calls) == 3, "the smallest and the largest"


# --- bars ---


class Second(SingleProcess):
    """What rank 1 of two would see."""

    rank = 1


def test_bars_show_calibration_and_validation(capsys):
    make_trainer(bar=True).validate()
    shown = capsys.readouterr().err
    for part in ("calibration images:", "calibration:", "validation:", "block", "batch"):
        assert part in shown
    make_trainer().validate()
    make_trainer(bar=True, backend=Second()).validate()
    assert capsys.readouterr().err == ""


# --- devices ---


def test_a_device_that_is_missing_or_cannot_be_used_so(monkeypatch):
    for there in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=there: there)
        assert is_available("mps") is there
        if not there:
            with pytest.raises(ConfigError, match=r"--device.*'mps'.*no MPS"):
                check_device("mps")
    check_device("mps")
    with pytest.raises(ConfigError, match=r"--amp.*mps"):
        check_device("mps", amp=True)
    with pytest.raises(ConfigError, match=r"2 ranks.*mps"):
        check_device("mps", ranks=2)
    assert is_available("cpu") and not is_available("tpu") and not is_available("xla")


def test_sums_need_no_double_precision_on_mps(monkeypatch):
    assert sums_dtype(torch.device("mps")) == torch.float32
    assert sums_dtype(torch.device("cpu")) == torch.float64
    settings = {"task": "teacher", "epochs": 1, "warmup_epochs": 0}
    double = make_trainer(**settings).train_epoch(0, bar=False)
    monkeypatch.setattr(module, "sums_dtype", lambda device: torch.float32)
    single = make_trainer(**settings).train_epoch(0, bar=False)
    assert single["top1"] == double["top1"]
    assert single["loss"] == pytest.approx(double["loss"], rel=1e-6)
