"""Workers, as threads where the engine does not matter: what all of them do together."""

from __future__ import annotations

import copy
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from worker import steps

from compofa.cli.train import main
from compofa.data import (
    Batch,
    BrokenImages,
    DataSplits,
    calibration_loader,
    dataset_info,
    load_dataset,
)
from compofa.distributed.backend import Backend, SingleProcess
from compofa.distributed.launch import detect_backend, process_group
from compofa.errors import (
    CheckpointError,
    CompofaError,
    ConfigError,
    DataError,
    OtherWorkerError,
    StoppedError,
)
from compofa.evaluate import Evaluator
from compofa.networks.zoo import network_spec
from compofa.nn.calibrate import calibrate
from compofa.nn.supernet import Supernet
from compofa.seeds import rng
from compofa.training import trainer
from compofa.training.config import TrainConfig
from compofa.training.shutdown import Saver, Stopping
from compofa.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("few_digits")

TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
HOROVODRUN = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "HOROVOD_LOCAL_RANK": "0"}


class Thread(Backend):
    """A worker that is a thread of this process."""

    name = "threads"

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.local_rank, self.size = rank, rank, len(board)
        self.board, self.barrier = board, barrier

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.barrier.wait(20)
        found = list(self.board)
        self.barrier.wait(20)
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def all_reduce(self, values: Tensor) -> None:
        values.copy_(torch.stack(self.gather(values.clone())).sum(0))

    def close(self) -> None:
        pass


def together(size: int, call: Callable[[Backend], Any]) -> list[Any]:
    """Return what ``call`` returns, or the error it raises, on each of several ranks."""
    board, barrier = [None] * size, threading.Barrier(size)
    found: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            found[rank] = call(Thread(rank, board, barrier))
        except CompofaError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a worker waits for ever"
    return found


# --- who reads, and who says what went wrong ---


def test_worker_0_decides_for_all():
    assert together(3, lambda b: b.from_main(lambda: b.rank + 5)) == [5, 5, 5]


def fail(backend: Backend, *ranks: int) -> int:
    if backend.rank in ranks:
        raise DataError(f"of {backend.rank}")
    return backend.rank


def test_a_failure_is_said_once_and_ends_all():
    found = together(3, lambda b: b.from_main(lambda: fail(b, 0)))
    assert [type(error) for error in found] == [DataError, OtherWorkerError, OtherWorkerError]
    found = together(3, lambda b: b.local_main_first(lambda: fail(b, 1, 2)))
    assert [type(error) for error in found] == [OtherWorkerError, DataError, OtherWorkerError]
    assert together(3, lambda b: b.local_main_first(lambda: fail(b))) == [0, 1, 2]
    with pytest.raises(DataError):
        SingleProcess().from_main(lambda: fail(SingleProcess(), 0))


def test_a_machines_first_worker_goes_first():
    order: list[int] = []
    together(3, lambda b: b.local_main_first(lambda: order.append(b.rank)))
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_workers_that_see_other_data_are_refused():
    found = together(2, lambda b: b.require_same("images", (90, 30)))
    assert found == [None, None]
    found = together(2, lambda b: b.require_same("images", (90, 30 + b.rank)))
    assert isinstance(found[0], ConfigError) and isinstance(found[1], OtherWorkerError)
    assert "same images on all ranks, got [(90, 30), (90, 31)]" in str(found[0])


# --- gradients ---


def layers(seed: int) -> tuple[nn.Module, Tensor]:
    """A convolution whose gradients lie channels last, and a layer that no subnet used."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 5)).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for parameter in net[0].parameters():
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
    return net, net[0].weight.grad.clone()


@pytest.mark.parametrize("half", [False, True])
def test_notes_are_summed_on_the_way(half):
    def call(backend: Backend) -> list[float]:
        net, _ = layers(backend.rank)
        notes = [float(backend.rank == 1), 0.0]
        backend.average_gradients(net.parameters(), 1.0, half, notes)
        return notes

    assert together(3, call) == [[1.0, 0.0]] * 3


class Saved(NamedTuple):
    """What worker 0 would write to last.pt."""

    weights: dict[str, Tensor]
    state: dict[str, Any]


def train_three(
    stop_at: int | None = None, resumed: Saved | None = None, every_step: bool = False
) -> list[tuple[Trainer, dict[str, float] | None, Saved | None]]:
    """Train an epoch of five steps in three workers, the second of which may be asked to stop."""

    def call(backend: Backend) -> tuple[Trainer, dict[str, float] | None, Saved | None]:
        mine, stop, saved = make_trainer(backend, batch_size=6, dropout=0.0), Stopping(), []
        if resumed is not None:
            mine.net.load_state_dict(resumed.weights)
            mine.state.load_state_dict(copy.deepcopy(resumed.state), ranks=3)
        real = mine.train_step

        def train_step(images: Tensor, targets: Tensor, step: int) -> Tensor:
            if backend.rank == 1 and step + 1 == stop_at:
                stop.request(signal.SIGTERM)
            return real(images, targets, step)

        def write() -> None:
            saved[:] = [copy.deepcopy(Saved(mine.net.state_dict(), mine.state.state_dict()))]

        mine.train_step = train_step
        saver = Saver(write, Path("last.pt"), 0 if every_step else 1000, stop)
        stats = None
        with stop.deferred(), suppress(StoppedError):
            stats = mine.train_epoch(0, bar=False, saver=saver)
        if stats is not None:
            write()
        return mine, stats, *saved

    return together(3, call)


def test_all_workers_stop_at_the_step_at_which_one_was_asked_to():
    found = train_three(stop_at=3)
    assert [(mine.state.tally.steps, stats) for mine, stats, _ in found] == [(3, None)] * 3
    one, two, _ = (saved for _, _, saved in found)
    tally = one.state["trainer"]["tally"]
    assert (tally["steps"], tally["images"]) == (3, 54), "worker 0 saves what all have counted"
    assert [each["tally"]["images"] for each in one.state["trainer"]["ranks"]] == [18] * 3
    for name, value in one.weights.items():
        assert torch.equal(two.weights[name], value), name
    alone = make_trainer(batch_size=6)
    alone.state.load_state_dict(one.state, ranks=3)
    assert alone.state.tally.steps == 9, (
        "one worker has three times the steps to go for the same images"
    )
    assert alone.state.tally.images == 54


@pytest.fixture(scope="module")
def uninterrupted(few_digits: None) -> list[tuple[Trainer, dict[str, float], Saved]]:
    return train_three()


def assert_same_end(
    found: list[tuple[Trainer, dict[str, float], Saved]],
    whole: list[tuple[Trainer, dict[str, float], Saved]],
) -> None:
    """Compare, to the bit, what three workers have at the end of the epoch."""
    for (_, metrics, saved), (_, other_metrics, other) in zip(found, whole, strict=True):
        assert metrics | {"images_per_s": 0} == other_metrics | {"images_per_s": 0}
        for name, value in other.weights.items():
            assert torch.equal(saved.weights[name], value), name
        mine, theirs = (s.state["trainer"]["tally"] | {"seconds": 0} for s in (saved, other))
        assert mine == theirs and saved.state["trainer"]["ranks"] == []


def test_saves_within_an_epoch_change_no_bit(uninterrupted):
    assert_same_end(train_three(every_step=True), uninterrupted)


@pytest.mark.parametrize("stop_at", [1, 3, 5])
@pytest.mark.parametrize("every_step", [False, True])
def test_three_workers_go_on_to_the_same_bits(uninterrupted, stop_at, every_step):
    """From within the epoch, and from its last step, where there is none left to take."""
    stopped = train_three(stop_at, every_step=every_step)
    assert [stats for _, stats, _ in stopped] == [None] * 3
    found = train_three(resumed=stopped[0][2], every_step=every_step)
    assert_same_end(found, uninterrupted)


def test_three_workers_go_on_after_the_epoch_was_counted(uninterrupted):
    """As where they were asked to stop while they validated."""
    saved = uninterrupted[0][2]
    assert saved.state["trainer"]["tally"]["steps"] == 5 and saved.state["trainer"]["ranks"] == []
    found = train_three(resumed=saved)
    assert_same_end(found, uninterrupted)
    assert [metrics["images_per_s"] for _, metrics, _ in found] == [pytest.approx(
        saved.state["trainer"]["tally"]["images"] / saved.state["trainer"]["tally"]["seconds"]
    )] * 3  # fmt: skip


def test_a_state_of_a_version_that_saved_means_only_is_gone_on_with(uninterrupted):
    saved = train_three(stop_at=3)[0][2]
    del saved.state["trainer"]["ranks"]
    for (_, metrics, end), (_, _, other) in zip(
        train_three(resumed=saved), uninterrupted, strict=True
    ):
        assert end.state["trainer"]["tally"]["images"] == other.state["trainer"]["tally"]["images"]
        assert metrics["loss"] == pytest.approx(uninterrupted[0][1]["loss"])
        for name, value in other.weights.items():
            torch.testing.assert_close(end.weights[name], value, msg=name)


@pytest.mark.parametrize("harm", ["shape", "missing", "type"])
def test_a_damaged_state_of_a_worker_is_refused(harm):
    saved = train_three(stop_at=1)[0][2]
    for rank in saved.state["trainer"]["ranks"]:
        buffers = rank["buffers"]
        name = next(iter(buffers))
        if harm == "missing":
            del buffers[name]
        else:
            buffers[name] = torch.zeros(1) if harm == "shape" else 3
    for error in train_three(resumed=saved):
        assert isinstance(error, CheckpointError) and "cannot be resumed" in str(error)


@pytest.mark.parametrize("half", [False, True])
def test_gradients_are_averaged_by_images(half):
    shares = [1.0, 0.5, 0.0]

    def call(backend: Backend) -> tuple[float, nn.Module]:
        net, _ = layers(backend.rank)
        return backend.average_gradients(net.parameters(), shares[backend.rank], half), net

    found = together(3, call)
    own = [layers(rank)[1] for rank in range(3)]
    expected = (1.0 * own[0] + 0.5 * own[1]) / 1.5
    for total, net in found:
        assert total == pytest.approx(1.5)
        torch.testing.assert_close(
            net[0].weight.grad, expected, rtol=2e-3 if half else 1e-6, atol=1e-3 if half else 1e-7
        )
        assert torch.equal(net[0].weight.grad, found[0][1][0].weight.grad)
        assert net[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
        assert not net[1].weight.grad.any()


def test_without_images_there_is_no_step():
    net, before = layers(1)
    assert together(2, lambda b: b.average_gradients(net.parameters(), 0.0)) == [0, 0]
    assert torch.equal(net[0].weight.grad, before)


def test_running_statistics_are_averaged():
    def call(backend: Backend) -> nn.Module:
        norm = nn.BatchNorm2d(2)
        norm.running_mean.fill_(backend.rank)
        backend.average_buffers(norm)
        return norm

    for norm in together(3, call):
        assert norm.running_mean.tolist() == [1, 1] and norm.running_var.tolist() == [1, 1]
        assert norm.num_batches_tracked == 0


# --- a step, an epoch ---


def make_trainer(backend: Backend | None = None, **settings: Any) -> Trainer:
    config = TrainConfig(
        task="teacher", epochs=1, warmup_epochs=0, image_size=(8,), width_mult=0.1,
        **{"batch_size": 15, **settings},
    ).resolved()  # fmt: skip
    splits = load_dataset("digits")
    return Trainer(config, Supernet(config.network(10)), None, splits, backend)


def test_the_learning_rate_grows_with_the_workers():
    for scale, factor in ((True, 3), (False, 1)):
        for found in together(3, lambda b, scale=scale: make_trainer(b, scale_lr=scale)):
            assert found.peak_lr == pytest.approx(factor * found.config.lr)
            assert found.steps == 2, "90 images in steps of 45"
    base = make_trainer(batch_size=45)
    assert base.peak_lr == base.config.lr == pytest.approx(3 * make_trainer().config.lr)


@pytest.mark.parametrize("limit", [0.5, 0.02])
def test_broken_images_of_one_worker_do_not_stop_the_others(monkeypatch, limit):
    """It takes their steps; the images that any worker met count together."""

    def loader(source: Any, info: Any, **options: Any) -> list[Batch]:
        rank, rows = options["rank"], torch.arange(12).reshape(2, 6)[options["rank"]]
        images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
        few = 1 if rank == 1 else 6
        broken = ((f"{rank}.png", "cut"),)
        return [Batch(images[:few], rows[:few] % 10, 8, broken) for _ in range(90 // 12)]

    monkeypatch.setattr(trainer, "train_loader", loader)
    monkeypatch.setattr(BrokenImages, "limit", limit)

    def call(backend: Backend) -> Trainer:
        mine = make_trainer(backend, batch_size=6, dropout=0.0)
        mine.train_epoch(0, bar=False)
        return mine

    one, two = together(2, call)
    if limit < 0.5:  # each worker's own is less than 2 % of 90
        assert "2 of 90 images cannot be read" in str(one) and isinstance(two, OtherWorkerError)
        return
    assert set(one.state.broken.paths) == set(two.state.broken.paths) == {"0.png", "1.png"}
    weights = one.net.state_dict()
    begun = make_trainer().net.state_dict()
    for name, value in two.net.named_parameters():
        assert torch.equal(weights[name], value), name
    assert not torch.equal(weights["classifier.weight"], begun["classifier.weight"])


@pytest.mark.parametrize("environment", [TORCHRUN, HOROVODRUN], ids=["torch", "horovod"])
def test_one_process_of_an_engine_gives_the_same_bits(environment, monkeypatch):
    if environment is HOROVODRUN:
        pytest.importorskip("horovod.torch", reason="Horovod is not installed: make horovod")
    alone = steps(SingleProcess(), "compofa-small", 30)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with process_group() as backend:
        assert backend.name == detect_backend(environment) and backend.is_main
        found = steps(backend, "compofa-small", 30)
    assert found["figures"] == alone["figures"]
    for name, value in alone["weights"].items():
        assert torch.equal(found["weights"][name], value), name


# --- calibration and evaluation ---


@pytest.fixture(scope="module")
def splits(few_digits: None) -> DataSplits:
    return load_dataset("digits")


@pytest.mark.parametrize("n_images", [40, 2])  # of two images the third worker gets none
def test_workers_share_the_calibration_images(splits, n_images):
    options = {"resolution": 8, "batch_size": 7, "seed": 3, "n_images": n_images}
    info = dataset_info("digits")
    whole = torch.cat([b.images for b in calibration_loader(splits.train, info, **options)])
    parts = [
        [b.images for b in calibration_loader(
            splits.train, info, rank=rank, world_size=3, **options)]
        for rank in range(3)
    ]  # fmt: skip
    merged = torch.empty_like(whole)
    for rank, part in enumerate(parts):
        if part:
            merged[rank::3] = torch.cat(part)
    assert sum(len(image) for part in parts for image in part) == n_images
    assert torch.equal(merged, whole)

    spec = network_spec("compofa-small", 10, width_mult=0.25)
    net, subnet = Supernet(spec, 5), spec.space.sample(rng(0, "subnet"))
    alone = calibrate(net, [whole], subnet).state_dict()
    shared = together(3, lambda b: calibrate(net, parts[b.rank], subnet, b).state_dict())
    for found in shared:
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(found[name], shared[0][name]), name


def test_calibrating_on_nothing_fails_everywhere():
    net = Supernet(network_spec("compofa-small", 10, width_mult=0.1))
    found = together(2, lambda b: calibrate(net, [], net.active, b))
    assert [type(error) for error in found] == [DataError, DataError]


def test_accuracy_is_that_of_all_images(splits):
    spec = network_spec("compofa-small", 10, width_mult=0.25, resolutions=(8,))
    net, subnet = Supernet(spec, 5), spec.space.largest.at(8)

    def measure(backend: Backend | None) -> Any:
        return Evaluator(splits, calibration_images=40, backend=backend).accuracy(net, subnet)

    alone, shared = measure(None), together(7, measure)
    assert alone.images == 30
    for found in shared:
        assert found == shared[0] and found.images == 30
        assert found.top1 == alone.top1 and found.top5 == alone.top5
        assert found.loss == pytest.approx(alone.loss, rel=1e-3)  # variances near 0


# --- which engine ---


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        ({}, "none"),
        (TORCHRUN, "torch"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "none"),  # some clusters set these for everything
        (HOROVODRUN, "horovod"),
        ({"HOROVOD_ELASTIC": "1"}, "horovod"),
        ({"OMPI_COMM_WORLD_RANK": "3"}, "horovod"),
        (TORCHRUN | HOROVODRUN, "horovod"),
    ],
)
def test_the_environment_says_which_engine(environment, engine):
    assert detect_backend(environment) == engine


@pytest.mark.parametrize(
    ("environment", "words", "expected"),
    [
        ({}, "--backend mpi", "backend: expected none, horovod, torch, got 'mpi'"),
        ({}, "--backend torch", "backend torch: expected to be started with torchrun"),
        ({}, "--backend horovod", "backend horovod: expected to be started with horovodrun"),
        (TORCHRUN, "--backend horovod", "got torch's"),
        (TORCHRUN, "--backend none", "backend none: expected"),
        (HOROVODRUN, "", "make horovod"),
        ({}, "--collective-timeout 0", "timeout of collectives: expected seconds above 0, got 0"),
        (TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "2"}, "--overwrite", "--overwrite: expected"),
    ],
)
def test_an_engine_that_cannot_be_had_is_one_line(
    environment, words, expected, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([*words.split(), "--device", "cpu", "--epochs", "1"]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and expected in told
    assert list(tmp_path.iterdir()) == []


def test_each_worker_has_its_own_gpu(monkeypatch):
    for count, expected in ((4, ["cuda:0", "cuda:1", "cuda:2"]), (1, ["cuda:0"] * 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert together(3, lambda b: b.device("cuda")) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = together(3, lambda b: b.local_main_first(lambda: b.device("cuda")))
    assert isinstance(found[2], ConfigError) and "got 2 GPUs for local rank 2" in str(found[2])
    assert isinstance(together(2, lambda b: b.device("cuda:1"))[0], ConfigError)
    assert SingleProcess().device("cuda:1") == "cuda:1"


# --- going on ---


def test_resume_auto_begins_where_there_is_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [
        "--task",
        "teacher",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
        "--image-size",
        "8",
        "--batch-size",
        "45",
        "--width-mult",
        "0.1",
        "--calibration-images",
        "30",
        "--device",
        "cpu",
        "--quiet",
        "--name",
        "x",
        "--resume",
    ]
    assert main(words) == 1 and "nothing to resume" in capsys.readouterr().err
    assert main([*words, "auto"]) == 0
    last = tmp_path / "runs" / "x" / "teacher" / "last.pt"
    before = last.read_bytes()
    assert main([*words, "auto"]) == 0
    assert last.read_bytes() == before, "it was over"


def test_runs_from_before_these_settings_can_go_on():
    config = make_trainer().config
    earlier = config.to_json()
    del earlier["scale_lr"], earlier["fp16_allreduce"]
    assert config.changes_since(earlier) == []
    changed = make_trainer(scale_lr=False).config
    assert changed.changes_since(earlier) == ["scale_lr: True then, False now"]


def test_other_workers_drop_other_units(monkeypatch):
    seeds: dict[int, list[int]] = {0: [], 1: []}
    trainers = together(2, lambda b: make_trainer(b, dropout=0.5))
    real = trainer.seeded
    for mine in trainers:
        rank = mine.backend.rank
        monkeypatch.setattr(
            trainer,
            "seeded",
            lambda seed, device, r=rank: seeds[r].append(seed) or real(seed, device),
        )
        monkeypatch.setattr(mine, "update", lambda weight, loss: None)
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        mine.train_step(images, torch.arange(4), 7)
    assert len(seeds[0]) == len(seeds[1]) == 1 and seeds[0] != seeds[1]
    assert [t.subnets_at(7) for t in trainers] == [make_trainer().subnets_at(7)] * 2
