import io
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from compofa.errors import CheckpointError, CompofaError
from compofa.io.checkpoint import (
    FORMAT,
    VERSION,
    Checkpoint,
    file_hash,
    load_checkpoint,
    load_weights,
    read_safely,
    save_checkpoint,
)
from compofa.model_zoo import ofa_net
from compofa.networks.zoo import network_spec
from compofa.nn.supernet import Supernet

CLASSES = ("cat", "dog", "eel")


@cache
def checkpoint() -> Checkpoint:
    spec = network_spec("compofa-small", len(CLASSES), width_mult=0.1, resolutions=(16, 24))
    return Checkpoint(
        network=spec,
        weights=Supernet(spec, 3).state_dict(),
        classes=CLASSES,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 0.5, 0.25),
        dataset="zoo",
        data_path="/data/zoo",
        image_size=16,
        figures={"largest": {"top1": 98.5}},
        training={"epoch": 3, "momentum": [torch.ones(2)]},
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "net.pt", checkpoint())
    return tmp_path / "net.pt"


def refused(path: Path, message: str | None = None) -> None:
    """Check that a file is refused as what it is, in one line, wherever it is given."""
    for use in (load_checkpoint, lambda path: load_weights(some_net(), path)):
        with pytest.raises(CheckpointError, match=message) as caught:
            use(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1200


@cache
def some_net() -> Supernet:
    return Supernet(checkpoint().network)


# --- what is written is read ---


def test_everything_comes_back(saved: Path) -> None:
    found, wanted = load_checkpoint(saved), checkpoint()
    for name in ("network", "classes", "mean", "std", "dataset", "data_path", "image_size"):
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.figures == wanted.figures
    assert found.training["epoch"] == 3
    assert torch.equal(found.training["momentum"][0], torch.ones(2))
    assert found.weights.keys() == wanted.weights.keys()
    assert all(torch.equal(found.weights[name], wanted.weights[name]) for name in wanted.weights)


def test_training_resolutions_come_back_and_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    save_checkpoint(path, replace(checkpoint(), resolutions=(16, 24)))
    assert load_checkpoint(path).resolutions == (16, 24)
    for wrong in ((16, 24.5), (16, True), (2,)):
        save_checkpoint(path, replace(checkpoint(), resolutions=wrong))
        with pytest.raises(CheckpointError, match=r"resolutions|image size"):
            load_checkpoint(path)


def test_the_network_is_built_ready_for_use(saved: Path) -> None:
    source = Supernet(checkpoint().network, 3).eval()
    net = load_checkpoint(saved).build()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not net.training
    assert torch.equal(net(x), source(x))


def test_weights_alone_are_read_from_a_checkpoint(saved: Path) -> None:
    net = Supernet(checkpoint().network, 9)
    load_weights(net, saved)
    wanted = checkpoint().weights
    assert all(torch.equal(value, wanted[name]) for name, value in net.state_dict().items())


def test_numpy_figures_are_written_as_plain_numbers(tmp_path: Path) -> None:
    odd = replace(checkpoint(), figures={"top1": np.float64(1.5)}, mean=tuple(np.ones(3)))
    save_checkpoint(tmp_path / "net.pt", odd)
    found = load_checkpoint(tmp_path / "net.pt")
    assert found.figures == {"top1": 1.5}
    assert found.mean == (1.0, 1.0, 1.0)


def test_the_hash_tells_files_apart(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, content in zip(paths, (b"x", b"x", b"y"), strict=True):
        path.write_bytes(content)
    hashes = [file_hash(path) for path in paths]
    assert hashes[0] == hashes[1] != hashes[2]
    assert [len(text) for text in hashes] == [16] * 3


# --- writing is all or nothing ---


def test_a_failing_writer_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompofaError, match="No space left on device"):
        save_checkpoint(saved, checkpoint())
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_what_cannot_be_written_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError, match="function"):
        save_checkpoint(saved, replace(checkpoint(), training={"f": lambda: 0}))
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


# --- files that are no checkpoint ---


def test_truncated_files(saved: Path) -> None:
    whole = saved.read_bytes()
    lengths = [*range(0, 64, 7), *range(64, len(whole), len(whole) // 40), len(whole) - 1]
    for length in lengths:
        saved.write_bytes(whole[:length])
        refused(saved)


def test_truncated_files_of_the_old_format(tmp_path: Path) -> None:
    # The published files are of this format: one pickle after the other, then the numbers.
    buffer = io.BytesIO()
    state = {"state_dict": {"first_conv.conv.weight": torch.zeros(8, 3, 3, 3)}}
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    whole, path = buffer.getvalue(), tmp_path / "file"
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="file"):
            read_safely(path)
    path.write_bytes(whole)
    assert list(read_safely(path)) == ["state_dict"]


def zip_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear reader")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("epoch,top1\n1,2\n"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(3000)),
    "zip of something else": zip_of_something_else,
    "plain pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": {"a": 1}})),
    "folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "list": lambda path: torch.save([1, 2], path),
    "model": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "empty mapping": lambda path: torch.save({}, path),
    "empty weights": lambda path: torch.save({"state_dict": {}}, path),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_files(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path / "file")
    refused(tmp_path / "file", "file")


def test_a_name_no_system_takes_is_nothing_there() -> None:
    refused(Path("a" * 500), "aaa")
    refused(Path("a\0b"), "a.*b")


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["top", "weights", "training"])
def test_pickles_that_would_run_code_do_not(tmp_path: Path, place: str, zipped: bool) -> None:
    marker, path = tmp_path / "it ran", tmp_path / "file"
    data: Any = {"format": FORMAT, "version": VERSION, "weights": {}, "training": {}}
    if place == "top":
        data = Trap(marker)
    else:
        data[place] = {"x": Trap(marker)}
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    refused(path, "getattr" if place == "weights" else None)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the trap must be live, or this test shows nothing"


# --- checkpoints that do not fit ---


def test_a_mark_is_needed(tmp_path: Path) -> None:
    torch.save({"state_dict": dict(checkpoint().weights)}, tmp_path / "file")
    with pytest.raises(CheckpointError, match="load_weights"):
        load_checkpoint(tmp_path / "file")


def test_newer_versions_are_refused(saved: Path) -> None:
    data = read_safely(saved)
    torch.save({**data, "version": VERSION + 1}, saved)
    with pytest.raises(CheckpointError, match=f"version {VERSION}.* {VERSION + 1}"):
        load_checkpoint(saved)


def test_a_checkpoint_of_another_network_is_refused(saved: Path) -> None:
    spec = network_spec("compofa-small", 10, width_mult=0.1)
    net = Supernet(spec)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"2 misshapen: classifier\.weight"):
        load_weights(net, saved)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_weights_that_do_not_fit_the_definition_are_refused(saved: Path) -> None:
    data = read_safely(saved)
    data["weights"].pop("stem.conv.weight")
    torch.save(data, saved)
    with pytest.raises(CheckpointError, match=r"1 missing: stem\.conv\.weight"):
        load_checkpoint(saved).build()


WRONG = [None, -1, 0.5, float("nan"), float("inf"), 10**400, True, "x", b"x", [], [None], [[]]]
WRONG += [{}, {"a": 1}, (), 1j, torch.zeros(2)]


def places(data: Any, at: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value that decides something, one of each kind of list."""
    if at:
        yield at
    if isinstance(data, dict) and at not in (("weights",), ("figures",), ("training",)):
        for key, value in data.items():
            yield from places(value, (*at, key))
    elif isinstance(data, list) and data:
        yield from places(data[0], (*at, 0))


def changed(data: Any, at: tuple, value: Any) -> Any:
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[at[0]] = value if len(at) == 1 else changed(copy[at[0]], at[1:], value)
    return copy


SENSIBLE = {
    ("data_seed",): (-1, 10**400),
    ("validation_images",): (None, -1, 10**400),
    ("network", "space", "stages", 0, "coupling"): (None,),
    ("network", "kernel_transform"): (True,),
    ("network", "dropout"): (0.5,),
    ("network", "width_mult"): (0.5,),
    ("classes",): ([],),
    ("figures",): ({}, {"a": 1}),
    ("training",): (None, {}, {"a": 1}),
    ("weights",): ({}, {"a": 1}),
    ("mean", 0): (-1, 0.5),
    ("std", 0): (0.5,),
}
"""Values of WRONG that are none: they fit the field (weights are checked when the net is built)."""
TEXTS = [("classes", 0), ("dataset",), ("data_path",), ("network", "space", "name")]


def held(data: Any, at: tuple) -> Any:
    for key in at:
        data = data[key]
    return data if isinstance(data, list) else None


def test_values_of_a_wrong_type_are_refused_wherever_they_stand(saved: Path) -> None:
    data = {**read_safely(saved), "weights": {}}  # which are not looked at here, and slow to write
    path, tried = saved.parent / "wrong", 0
    for at in places(data):
        for value in WRONG:
            fits = [repr(good) for good in SENSIBLE.get(at, ("x",) if at in TEXTS else ())]
            if repr(value) in fits or value == held(data, at):
                continue
            torch.save(changed(data, at, value), path)
            with pytest.raises(CheckpointError) as caught:
                load_checkpoint(path)
                pytest.fail(f"{at} = {value!r} was taken")
            assert "\n" not in str(caught.value)
            tried += 1
    assert tried > 400


def test_every_field_is_needed(saved: Path) -> None:
    data = {**read_safely(saved), "weights": {}}
    for key in data:
        torch.save({name: value for name, value in data.items() if name != key}, saved)
        with pytest.raises(CheckpointError):
            load_checkpoint(saved)


def test_weights_of_a_wrong_type_are_refused_when_the_net_is_built(saved: Path) -> None:
    data = read_safely(saved)
    for value in (None, 0.5, [[]], torch.zeros(2), torch.zeros(8, 3, 3, 3).to_sparse()):
        torch.save(changed(data, ("weights", "stem.conv.weight"), value), saved)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(saved).build()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["a", "b"]}, "classes: .*3.* 2"),
        ({"std": [1.0, 0.0, 1.0]}, "means"),
        ({"mean": [1.0, 0.0]}, "means"),
        ({"mean": [1.0, 0.0, 1e8]}, "means"),
        ({"image_size": 4}, "image size"),
        ({"figures": {"a": b"x"}}, r"net\.pt"),
    ],
)
def test_values_that_do_not_fit_together_are_named(
    saved: Path, change: dict[str, Any], message: str
) -> None:
    torch.save({**read_safely(saved), **change}, saved)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved)


# --- other files ---


def test_networks_without_shipped_weights_say_how_to_load_some() -> None:
    with pytest.raises(CheckpointError, match="load_weights"):
        ofa_net("compofa-small", pretrained=True)


def test_saving_takes_tensors_of_any_layout(tmp_path: Path) -> None:
    def view(value: Tensor) -> Tensor:
        if value.ndim == 4:
            return value.contiguous(memory_format=torch.channels_last).requires_grad_()
        return value

    weights = {name: view(value.clone()) for name, value in checkpoint().weights.items()}
    save_checkpoint(tmp_path / "net.pt", replace(checkpoint(), weights=weights))
    found = load_checkpoint(tmp_path / "net.pt").weights
    assert all(torch.equal(found[name], checkpoint().weights[name]) for name in found)
    assert all(value.is_contiguous() and not value.requires_grad for value in found.values())
