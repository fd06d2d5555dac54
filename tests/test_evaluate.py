import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compofa.data import DataSplits, Normalisation, load_dataset
from compofa.errors import DataError, SpaceError
from compofa.evaluate import Accuracy, Evaluator, measure_accuracy
from compofa.io.records import EvalRecord, append_record, read_records, trim_records, write_csv
from compofa.networks.zoo import network_spec
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.plots import plot_accuracy
from compofa.seeds import rng


class Fixed(nn.Module):
    """Gives the logits that it is asked for: the images are the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        return images[:, :, 0, 0] * self.scale


@pytest.fixture
def digits(few_digits) -> DataSplits:
    return load_dataset("digits")


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return Supernet(network_spec("compofa-small", classes=10, resolutions=(8,)), seed=1).eval()


def as_images(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :, None, None]


# --- accuracy ---


def test_accuracy_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 12, generator=generator)
    targets = torch.randint(12, (40,), generator=generator)
    network = Fixed().train()
    found = measure_accuracy(
        network, [(as_images(part), goal) for part, goal in zip(
            logits.split((25, 0, 15)), targets.split((25, 0, 15)), strict=True
        )]
    )  # fmt: skip
    ranks = (-logits.numpy()).argsort(1)
    hits = [list(rank).index(goal) for rank, goal in zip(ranks, targets.tolist(), strict=True)]
    probabilities = logits.double().softmax(1)[torch.arange(40), targets]
    assert found == Accuracy(
        top1=100 * sum(hit < 1 for hit in hits) / 40,
        top5=100 * sum(hit < 5 for hit in hits) / 40,
        images=40,
        loss=pytest.approx(-probabilities.log().mean().item(), rel=1e-5),
    )
    assert 0 < found.top1 < found.top5 < 100
    assert network.training, "as it was before"


def test_top5_of_three_classes_is_always_100():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    found = measure_accuracy(Fixed(), [(as_images(logits), torch.tensor([2, 2]))])
    assert (found.top1, found.top5) == (50, 100)


def test_no_images_is_an_error():
    with pytest.raises(DataError, match="images"):
        measure_accuracy(Fixed(), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_answers(value):
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, value], [value, value, value]])
    network = Fixed().train()
    with pytest.raises(DataError, match=r"logits.* 2 of 3"):
        measure_accuracy(network, [(as_images(logits), torch.tensor([0, 2, 0]))])
    assert network.training, "as it was before"


# --- the evaluator ---


def make_evaluator(splits: DataSplits, **options: object) -> Evaluator:
    return Evaluator(splits, **{"calibration_images": 40, "batch_size": 16, **options})


@pytest.mark.parametrize("part", ["validation", "test"])
def test_the_accuracy_is_that_of_the_calibrated_network(digits, supernet, part):
    evaluator = make_evaluator(digits, part=part)
    subnet = supernet.spec.space.sample(rng(4))
    found = evaluator.accuracy(supernet, subnet)
    # The same by other means: let the BN layers of a copy see the same images in training.
    (calibration,) = evaluator.calibration_batches(8)
    network = extract(supernet, subnet).train()

    def replace_statistics(module: nn.BatchNorm2d, args: tuple[torch.Tensor], out: object) -> None:
        n = args[0].numel() // args[0].shape[1]
        module.running_var.mul_((n - 1) / n)  # torch keeps the sample variance

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            hooks.append(module.register_forward_hook(replace_statistics))
    with torch.no_grad():
        network(calibration)
    network.eval()
    for hook in hooks:
        hook.remove()
    source = {"validation": digits.validation, "test": digits.test}[part]
    images = torch.from_numpy(source.images).float() / 255
    images = (images - digits.normalisation.mean[0]) / digits.normalisation.std[0]
    with torch.no_grad():
        logits = network(images)
    right = logits.argmax(1).numpy() == source.targets
    assert found.images == 30 == len(source)
    assert found.top1 == pytest.approx(100 * right.mean())
    loss = nn.functional.cross_entropy(logits, torch.from_numpy(source.targets))
    assert found.loss == pytest.approx(loss.item(), rel=1e-3)


def test_the_supernet_stays_and_figures_do_not_depend_on_the_order(digits, supernet):
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    space = supernet.spec.space
    subnets = [space.smallest, space.sample(rng(0)), space.largest.at(12)]
    one, other = make_evaluator(digits), make_evaluator(digits, batch_size=7)
    forward = [one.accuracy(supernet, subnet) for subnet in subnets]
    backward = [other.accuracy(supernet, subnet) for subnet in reversed(subnets)][::-1]
    for mine, theirs in zip(forward, backward, strict=True):
        assert mine == replace(theirs, loss=pytest.approx(mine.loss, rel=1e-4))
    assert all(torch.equal(v, before[name]) for name, v in supernet.state_dict().items())


def test_calibration_images_come_from_the_training_images_and_the_seed(digits):
    same, other = make_evaluator(digits, seed=1), make_evaluator(digits, seed=2)
    (images,) = same.calibration_batches(8)
    assert images.shape == (40, 3, 8, 8)
    pixels = np.round((images[:, 0].numpy() * 0.376 + 0.305) * 255).astype(np.uint8)
    training = {image.tobytes() for image in digits.train.images[:, 0]}
    assert all(np.ascontiguousarray(image).tobytes() in training for image in pixels)
    assert torch.equal(images, make_evaluator(digits, seed=1).calibration_batches(8)[0])
    assert not torch.equal(images, other.calibration_batches(8)[0])


def test_the_networks_own_normalisation_is_used(digits):
    own = make_evaluator(digits, normalisation=Normalisation((0.5,) * 3, (0.5,) * 3))
    (images,) = own.calibration_batches(8)
    assert images.min() == -1 and images.max() == 1
    batch, _ = next(iter(own.evaluation_batches(8)))
    assert batch.min() == -1 and batch.max() == 1


def test_a_record_says_what_was_measured(digits, supernet):
    subnet = supernet.spec.space.smallest
    record = make_evaluator(digits, part="test", seed=3).measure(supernet, subnet, "net", "abc")
    assert record.subnet == subnet and record.images == 30
    network = extract(supernet, subnet)
    assert record.params == sum(p.numel() for p in network.parameters())
    named = {
        "net": "net", "checkpoint": "abc", "dataset": "digits", "part": "test", "seed": 3,
        "calibration_images": 40, "device": "cpu",
    }  # fmt: skip
    assert {name: getattr(record, name) for name in named} == named
    assert 0 <= record.top1 <= record.top5 <= 100 and record.macs > record.params


def test_bad_requests(digits, supernet):
    with pytest.raises(SpaceError, match="image size"):
        make_evaluator(digits).measure(supernet, supernet.spec.space.smallest.at(7))
    no_training = replace(digits, train=digits.train.subset(np.arange(0)))
    with pytest.raises(DataError, match="calibration"):
        make_evaluator(no_training).accuracy(supernet, supernet.spec.space.smallest)


# --- records ---


@pytest.fixture
def records() -> list[EvalRecord]:
    space = network_spec("ofa-small").space
    return [
        EvalRecord(
            space.sample(rng(i)), 90 + i / 3, 99.5, 360, 10**6 + i, 10**5, "a,net", "digits",
            "test", 1000, i, "0123456789abcdef", "cpu",
        )
        for i in range(3)
    ]  # fmt: skip


def test_records_survive_the_file(tmp_path, records):
    path = tmp_path / "records.jsonl"
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
    first = json.loads(path.read_text().splitlines()[0])
    assert first["d"] == list(records[0].subnet.depths) and first["top1"] == 90


@pytest.mark.parametrize("net_id", ["ofa-small", "ofa-resnet50-small"])
def test_a_line_that_was_cut_off_is_left_out(tmp_path, records, net_id):
    path = tmp_path / "records.jsonl"
    space = network_spec(net_id).space
    records = [replace(each, subnet=space.sample(rng(i))) for i, each in enumerate(records)]
    for record in records:
        append_record(path, record)
    text = path.read_text()
    whole, last = text[: text.index("\n") + 1], text.splitlines(True)[1]
    for length in range(len(last) - 1):
        path.write_text(whole + last[:length])
        assert read_records(path) == records[:1]
    path.write_text(text[:-30])
    kept = read_records(path)
    assert kept == records[:2]
    trim_records(path, kept)
    append_record(path, records[2])
    assert path.read_text() == text
    path.write_text(text.replace('"top1"', '"top"', 1))
    with pytest.raises(DataError, match=r"records\.jsonl, line 1: .*top1"):
        read_records(path)


@pytest.mark.parametrize("end", ['{"a": ', "something", '{"ks": [3]}\n', '{"ks": [3, 3\n'])
def test_a_last_line_of_something_else_is_no_record_that_was_cut_off(tmp_path, records, end):
    path = tmp_path / "records.jsonl"
    append_record(path, records[0])
    path.write_text(path.read_text() + end)
    with pytest.raises(DataError, match=r"records\.jsonl, line 2: "):
        read_records(path)


def test_what_was_written_twice_is_read_once(tmp_path, records):
    path = tmp_path / "records.jsonl"
    other = replace(records[0], seed=9)
    for record in [*records, other, *records, replace(records[1], top1=1.0, device="cuda")]:
        append_record(path, record)
    assert read_records(path) == [*records, other]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", float("inf")), ("images", 1.5), ("images", -1), ("images", [1]),
        ("images", True), ("macs", float("nan")), ("params", "many"), ("top1", float("nan")),
        ("top1", float("inf")), ("top5", 100.5), ("top1", -1), ("top1", None), ("top1", 10**400),
        ("top5", 0.0),  # below top-1
        ("seed", None), ("net", 3), ("checkpoint", None), ("r", float("inf")),
    ],
)  # fmt: skip
def test_records_with_values_that_are_none(tmp_path, records, field, value):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({**records[0].to_json(), field: value}) + "\n")
    with pytest.raises(DataError, match=r"records\.jsonl, line 1: "):
        read_records(path)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"ks": 1}', "3"])
def test_what_is_no_record(tmp_path, text):
    with pytest.raises(DataError, match="record"):
        EvalRecord.from_json(json.loads(text))
    with pytest.raises(DataError, match=tmp_path.name):
        read_records(tmp_path)


def test_a_table_that_a_spreadsheet_reads(tmp_path, records):
    write_csv(tmp_path / "new" / "table.csv", records)
    with (tmp_path / "new" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and None not in rows[0]
    assert list(rows[0])[:8] == ["ks", "e", "d", "r", "top1", "top5", "images", "macs"]
    for row, record in zip(rows, records, strict=True):
        assert row["net"] == "a,net" and float(row["top1"]) == record.top1
        data = {**row, **{key: [int(v) for v in row[key].split()] for key in ("ks", "e", "d")}}
        assert EvalRecord.from_json({**data, "r": int(row["r"])}) == record


def test_the_legend_has_every_name_as_it_is(tmp_path, records):
    names = ["_x", "$a$", "a_$b", "\x1b[1m"]
    plot_accuracy(dict.fromkeys(names, records), tmp_path / "plot.svg", "$10^9")
    texts = re.findall("<!-- (.*?) -->", (tmp_path / "plot.svg").read_text("utf-8"))
    assert {"_x (3)", "$a$ (3)", "a_$b (3)", "\\x1b[1m (3)", "$10^9"} <= set(texts)


@pytest.mark.parametrize(("name", "start"), [("plot.png", b"\x89PNG"), ("plot.svg", b"<?xml")])
def test_pictures(tmp_path, records, name, start):
    path: Path = tmp_path / "docs" / name
    plot_accuracy({"random": records, "largest": records[:1]}, path, "Subnets")
    assert path.read_bytes().startswith(start) and path.stat().st_size > 5000
    assert [entry.name for entry in path.parent.iterdir()] == [name]
