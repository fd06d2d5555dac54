"""What becomes of a run's metrics when it goes on: nothing that was measured is lost."""

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from compofa.errors import CompofaError
from compofa.training.journal import Journal
from compofa.training.run_folder import clear

STEPS = 3


def line(epoch: int, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "step": (epoch + 1) * STEPS, "train": {"loss": 2.0 - epoch}, **more}


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Metrics of four epochs of three steps, and what TensorBoard shows of them."""
    journal = Journal(tmp_path, 0, 0)
    for epoch in range(4):
        journal.write(line(epoch))
    journal.close()
    return tmp_path / "metrics.jsonl"


def go_on(path: Path, epoch: int = 4) -> list[int]:
    """Go on with an epoch; returns the epochs that the file has then."""
    Journal(path.parent, epoch, epoch * STEPS).close()
    return [json.loads(text)["epoch"] for text in path.read_text().splitlines()]


def shown(path: Path) -> list[int]:
    events = EventAccumulator(str(path.parent / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def asides(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.glob("metrics.d*"))


@pytest.mark.parametrize("damaged", [1, 2, 4])
def test_a_damaged_byte_costs_one_line_and_the_file_is_kept(metrics, caplog, damaged):
    lines = metrics.read_bytes().splitlines(True)
    lines[damaged - 1] = lines[damaged - 1].replace(b'"epoch"', b'"ep\xffch"')
    before = b"".join(lines)
    metrics.write_bytes(before)
    assert go_on(metrics) == [epoch for epoch in range(4) if epoch != damaged - 1]
    assert (metrics.parent / "metrics.damaged-1.jsonl").read_bytes() == before
    assert f"line {damaged}" in caplog.text and "metrics.damaged-1.jsonl" in caplog.text
    assert shown(metrics) == [3, 6, 9, 12], "TensorBoard's events are whole"
    caplog.clear()
    go_on(metrics)
    assert asides(metrics) == ["metrics.damaged-1.jsonl"] and caplog.text == "", "said once"
    metrics.write_text("[]\n")
    assert go_on(metrics) == [] and len(asides(metrics)) == 2
    clear(metrics.parent)
    assert asides(metrics) == []


@pytest.mark.parametrize("torn", [b'{"epoch": 4, "st', b"\xff\xfe", b"\0" * 50, b"12"])
def test_a_torn_last_line_is_dropped(metrics, caplog, torn):
    before = metrics.read_bytes()
    metrics.write_bytes(before + torn)
    assert go_on(metrics) == [0, 1, 2, 3]
    assert metrics.read_bytes() == before
    assert asides(metrics) == [] and caplog.text == ""


def test_a_last_line_that_lacks_only_its_end_is_whole(metrics):
    before = metrics.read_bytes()
    metrics.write_bytes(before[:-1])
    assert go_on(metrics) == [0, 1, 2, 3]
    assert metrics.read_bytes() == before


def test_epochs_that_come_again_are_dropped_in_both(metrics):
    assert go_on(metrics, 2) == [0, 1]
    assert shown(metrics) == [3, 6]
    assert asides(metrics) == [], "that is no damage"


def test_steps_of_another_number_of_workers_stay(metrics):
    """Two epochs of three steps are done; with more workers, they would be of one step each."""
    Journal(metrics.parent, 2, 2 * 1).close()
    assert shown(metrics) == [3, 6]


@pytest.mark.parametrize(
    "text",
    [
        "null", "7", "[]", '"epoch"', "{}", '{"epoch": 1}', '{"epoch": "1", "step": 3}',
        '{"epoch": 1, "step": null}', '{"epoch": 1.5, "step": 3}', '{"epoch": true, "step": 3}',
        '{"epoch": -1, "step": 3}', '{"epoch": Infinity, "step": 3}', '{"epoch": [1], "step": {}}',
        "", "[" * 9999,
    ],
)  # fmt: skip
def test_values_of_other_types_are_no_metrics(metrics, text):
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], text, *lines[2:], ""]))
    assert go_on(metrics) == [0, 2, 3]
    assert len(asides(metrics)) == 1


def test_what_cannot_be_read_is_one_line(metrics):
    metrics.unlink()
    metrics.mkdir()
    with pytest.raises(CompofaError, match=r"metrics\.jsonl"):
        go_on(metrics)
