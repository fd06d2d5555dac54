"""Collecting accuracy records: what is drawn, and what an interruption leaves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_trained import tiny_checkpoint

from compofa.data import load_dataset
from compofa.distributed.backend import SingleProcess
from compofa.errors import ConfigError, DataError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint, save_checkpoint
from compofa.io.open import OpenedNetwork, open_network
from compofa.io.records import read_records
from compofa.networks.zoo import network_spec
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Subnet
from nas.accuracy.collect import collect, draw_subnets

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> OpenedNetwork:
    return open_network(tiny_checkpoint(tmp_path_factory.mktemp("net") / "tiny.pt"))


class Interruption(Exception):
    """In place of KeyboardInterrupt, which would end the tests where it is not expected."""


class Stops(Evaluator):
    """An evaluator that is interrupted."""

    left = 3

    def measure(self, *args: object, **kwargs: object) -> object:
        if self.left == 0:
            raise Interruption
        self.left -= 1
        return super().measure(*args, **kwargs)


def evaluator(kind: type[Evaluator] = Evaluator, **options: object) -> Evaluator:
    return kind(load_dataset("digits"), **{"calibration_images": 20, **options})


@pytest.fixture
def subnets(trained: OpenedNetwork) -> list[Subnet]:
    space = trained.spec.space.restrict(resolutions=(8, 12))
    return draw_subnets(space, 8, 0)


@pytest.fixture
def run(trained, subnets):
    """Collect eight records to a file with some evaluator."""

    def call(path: Path, measures: Evaluator | None = None, count: int = 8) -> list:
        return collect(trained, "tiny", subnets[:count], measures or evaluator(), path, bar=False)

    return call


def test_the_draw_begins_with_the_extremes_and_can_be_extended(trained):
    space = trained.spec.space.restrict(resolutions=(8, 12))
    long = draw_subnets(space, 30, 4)
    assert long[:4] == [
        space.largest.at(12), space.smallest.at(12), space.largest.at(8), space.smallest.at(8),
    ]  # fmt: skip
    assert len(set(long)) == 30 and all(space.contains(subnet) for subnet in long)
    assert draw_subnets(space, 12, 4) == long[:12] and draw_subnets(space, 3, 4) == long[:3]
    assert draw_subnets(space, 30, 5) != long
    assert draw_subnets(space, 10**6, 4) == list(space.enumerate())


def test_a_record_a_line_by_rising_resolution(run, subnets, trained, tmp_path):
    records = run(tmp_path / "new" / "r.jsonl")
    assert [record.subnet for record in records] == subnets
    lines = (tmp_path / "new" / "r.jsonl").read_text().splitlines()
    sizes = [json.loads(line)["r"] for line in lines]
    assert sizes == sorted(sizes) and len(sizes) == 8
    assert {record.checkpoint for record in records} == {trained.digest}
    assert {(r.part, r.dataset, r.calibration_images) for r in records} == {
        ("validation", "digits", 20)
    }
    assert sorted(map(str, records)) == sorted(map(str, read_records(tmp_path / "new" / "r.jsonl")))


@pytest.mark.parametrize("cut", ["", '{"ks": [3, 3', "half of the last", "no line end"])
def test_an_interrupted_collection_continues(run, tmp_path, cut):
    whole = run(tmp_path / "whole.jsonl")
    path = tmp_path / "parts.jsonl"
    with pytest.raises(Interruption):
        run(path, evaluator(Stops))
    before = path.read_text()
    assert len(before.splitlines()) == 3
    if cut == "half of the last":
        path.write_text(before[:-40])
    elif cut == "no line end":
        path.write_text(before[:-1])
    else:
        path.write_text(before + cut)
    again = evaluator(Stops)
    again.left = 6 if cut == "half of the last" else 5
    assert run(path, again) == whole
    assert again.left == 0, "nothing is measured twice"
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_longer_collection_keeps_what_is_there(run, tmp_path):
    path = tmp_path / "r.jsonl"
    first = run(path, count=5)
    before = path.read_text()
    assert run(path, count=8)[:5] == first
    assert path.read_text().startswith(before)
    after = path.read_text()
    never = evaluator(Stops)
    never.left = 0
    assert run(path, never, count=5) == first and path.read_text() == after


def test_records_of_something_else_are_refused(run, tmp_path, trained, subnets):
    path = tmp_path / "r.jsonl"
    run(path, count=1)
    before = path.read_text()
    other = replace(trained, checkpoint=replace(trained.checkpoint, digest="0123"))
    with pytest.raises(DataError, match=f"checkpoint 0123.*checkpoint {trained.digest}"):
        collect(other, "tiny", subnets, evaluator(), path, bar=False)
    with pytest.raises(DataError, match=r"test images of digits.*validation images"):
        run(path, evaluator(part="test"))
    with pytest.raises(DataError, match=r"calibrated on 21, got one .* calibrated on 20"):
        run(path, evaluator(calibration_images=21))
    assert path.read_text() == before


def test_workers_that_have_read_different_checkpoints_do_not_collect(trained, subnets, tmp_path):
    class Beside(SingleProcess):
        """A worker beside one that opened the file when a training had saved again."""

        def gather(self, value: object) -> list:
            return [value, "0123" if value == trained.digest else value]

    path = tmp_path / "r.jsonl"
    with pytest.raises(ConfigError, match="checkpoint"):
        collect(trained, "tiny", subnets, evaluator(), path, bar=False, backend=Beside())
    assert not path.exists()


def test_a_file_of_something_else_is_left_alone(run, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(DataError, match=r"r\.jsonl, line 1: not an evaluation record"):
        run(path)
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'


@pytest.mark.parametrize("text", ["something precious\n", "no line end", '{"ks": [3]}\n'])
def test_a_file_of_one_foreign_line_is_left_alone(run, tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=r"notes\.txt, line 1: not an evaluation record"):
        run(path)
    assert path.read_text() == text


def test_a_file_of_one_half_line_begins_again(run, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"ks": [3, 3, 0')
    assert len(run(path, count=2)) == 2 == len(read_records(path))


def test_records_that_are_there_twice_are_kept_once(run, tmp_path, caplog):
    """As two processes that collected to one file at once have left it."""
    path = tmp_path / "r.jsonl"
    whole = run(path)
    lines = path.read_text().splitlines(True)
    twice = [*lines[:5], *(line.replace('"top1": ', '"top1": 1') for line in lines[2:4]), lines[0]]
    path.write_text("".join(twice))
    never = evaluator(Stops)
    never.left = 3
    assert run(path, never) == whole and never.left == 0
    assert path.read_text() == "".join(lines)
    assert "3 duplicate record" in caplog.text


def test_wide_subnets_go_on_after_a_torn_line(tmp_path):
    spec = network_spec("ofa-resnet50-small", 10, width_mult=0.1, resolutions=(8,))
    wide = Checkpoint(spec, Supernet(spec, seed=0).state_dict(), dataset="digits", image_size=8)
    save_checkpoint(tmp_path / "wide.pt", wide)
    opened = open_network(tmp_path / "wide.pt")
    subnets, path = draw_subnets(spec.space, 3, 0), tmp_path / "r.jsonl"

    def call() -> list:
        return collect(opened, "wide", subnets, evaluator(), path, bar=False)

    whole = call()
    text = path.read_text()
    path.write_text(text[:-30])
    assert call() == whole
    assert path.read_text() == text
