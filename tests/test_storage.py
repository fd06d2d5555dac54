"""Failing storage: damaged files are detected, and earlier content survives."""

import errno
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch

from compofa.errors import CheckpointError, CompofaError
from compofa.io import atomic as files
from compofa.io import tensors as tensorfile
from compofa.io.checkpoint import Checkpoint, as_data, file_hash, load_checkpoint, save_checkpoint
from compofa.io.tensors import CHECKSUM, checksum, read_safely, short_hash
from compofa.networks.zoo import network_spec


@cache
def checkpoint(seed: int = 0) -> Checkpoint:
    """A small checkpoint; whether its weights fit the network is checked elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"layer{i}.weight": torch.randn(4, 3, generator=generator) for i in range(3)}
    return Checkpoint(
        network=network_spec("compofa-small", 2),
        weights={**weights, "steps": torch.tensor(7), "half": weights["layer0.weight"].half()},
        classes=("cat", "dog"),
        image_size=16,
        figures={"largest": {"top1": 98.5}},
        training={"momentum": {0: torch.randn(9, generator=generator)}, "lr": 0.1, "none": None},
    )


def content(path: Path) -> str:
    return checksum(as_data(load_checkpoint(path)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "last.pt", checkpoint())
    return tmp_path / "last.pt"


def test_the_hash_is_of_the_loaded_bytes(saved, tmp_path, monkeypatch):
    wanted, first = content(saved), file_hash(saved)
    save_checkpoint(tmp_path / "next.pt", checkpoint(1))

    def beside_a_training(file: BinaryIO) -> str:
        digest = short_hash(file)
        os.replace(tmp_path / "next.pt", saved)
        return digest

    monkeypatch.setattr(tensorfile, "short_hash", beside_a_training)
    found = load_checkpoint(saved)
    assert (found.digest, checksum(as_data(found))) == (first, wanted)
    monkeypatch.undo()
    assert load_checkpoint(saved).digest == file_hash(saved) != first
    assert found.slim().digest == "", "no file holds that"


def test_a_file_that_is_written_to_while_it_is_read_is_refused(saved, monkeypatch):
    def beside_another_program(file: BinaryIO) -> str:
        digest = short_hash(file)
        with saved.open("r+b") as other:
            other.seek(0, os.SEEK_END)
            other.write(b"\0")
        return digest

    monkeypatch.setattr(tensorfile, "short_hash", beside_another_program)
    with pytest.raises(CheckpointError, match=r"last.pt"):
        load_checkpoint(saved)


def damaged(whole: bytes, generator: np.random.Generator) -> Iterator[bytes]:
    """Yield hundreds of damaged files: truncated, with changed bytes, lost or swapped blocks."""
    for length in generator.choice(len(whole), 150, replace=False):
        yield whole[:length]
    for count in (1, 1, 1, 1, 2, 8):
        for _ in range(80):
            file = bytearray(whole)
            for at in generator.integers(len(whole), size=count):
                file[at] ^= int(generator.integers(1, 256))
            yield bytes(file)
    for _ in range(60):
        start, length = generator.integers(len(whole)), generator.integers(1, 600)
        yield whole[:start] + bytes(len(whole[start : start + length])) + whole[start + length :]
        yield whole[:start] + whole[start + length :]
        yield whole[:start] + whole[start : start + length] + whole[start:]


@pytest.mark.parametrize("sealed", [True, False], ids=["with checksum", "as earlier versions"])
def test_damage_is_detected_or_harmless(saved: Path, sealed: bool) -> None:
    data = as_data(checkpoint())
    if not sealed:
        torch.save(data, saved)
    whole, wanted = saved.read_bytes(), checksum(data)
    refused = harmless = silent = 0
    for file in damaged(whole, np.random.default_rng(0)):
        saved.write_bytes(file)
        try:
            assert content(saved) == wanted, "wrong content, and not a word"
            harmless += 1
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
            silent += loads_in_torch(file)
    assert refused + harmless == 810
    assert silent > 50, "torch alone takes many of them, or this test shows little"
    assert harmless > 10, "bytes of the archive's padding decide nothing"


def loads_in_torch(file: bytes) -> bool:
    try:
        torch.load(io.BytesIO(file), weights_only=True)
    except Exception:  # noqa: BLE001 (whatever it raises)
        return False
    return True


def test_the_checksum_covers_names_types_shapes_and_values() -> None:
    base = {"a": torch.zeros(2, 3), "b": [1, 2.0, "x", None, True, b"y"], "c": {"d": ()}}
    others = [
        {**base, "a": torch.zeros(3, 2)},
        {**base, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**base, "a": -torch.zeros(2, 3)},
        {**base, "b": [1, 2.0, "x", None, True, "y"]},
        {**base, "b": [1, 2, "x", None, True, b"y"]},
        {**base, "b": [1, 2.0, "x", None, 1, b"y"]},
        {**base, "b": (1, 2.0, "x", None, True, b"y")},
        {**base, "c": {"d": []}},
        {**base, "c": {"e": ()}},
        {"a": base["a"], "b": [*base["b"], "c"], "d": ()},
        {"b": base["b"], "a": base["a"], "c": base["c"]},
    ]
    sums = [checksum(data) for data in (base, *others)]
    assert len(set(sums)) == len(sums)
    strided = torch.zeros(3, 2).t()
    assert checksum({**base, "a": strided}) == sums[0], "how memory is laid out is no content"
    assert checksum(dict(base)) == sums[0]


def test_files_of_earlier_versions_are_read(saved: Path) -> None:
    shipped = Path(__file__).parent.parent / "checkpoints" / "compofa-digits.pt"
    assert CHECKSUM not in torch.load(shipped, weights_only=True), "it is one of them"
    assert load_checkpoint(shipped).build().spec.classes == 10
    assert CHECKSUM in torch.load(saved, weights_only=True)
    assert CHECKSUM not in read_safely(saved), "who reads it need not know of it"


def test_archives_without_crcs_are_read(saved: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": {"a": torch.ones(3)}}, saved)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_safely(saved)["state_dict"]["a"], torch.ones(3))


# --- the previous file ---


def test_the_previous_file_is_kept(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for seed in range(3):
        save_checkpoint(last, checkpoint(seed), previous)
        assert content(last) == checksum(as_data(checkpoint(seed)))
        assert previous.exists() == (seed > 0)
    assert content(previous) == checksum(as_data(checkpoint(1)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_both_names_may_be_one_file(saved: Path) -> None:
    # A run was killed after it moved the last file and before it renamed the new one.
    previous = saved.with_name("previous.pt")
    os.link(saved, previous)
    save_checkpoint(saved, checkpoint(1), previous)
    assert content(saved) == checksum(as_data(checkpoint(1)))
    assert content(previous) == checksum(as_data(checkpoint(0)))
    assert len(list(saved.parent.iterdir())) == 2


def test_without_hard_links_the_previous_file_is_kept_too(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    previous = saved.with_name("previous.pt")
    save_checkpoint(saved, checkpoint(1), previous)
    assert content(saved) == checksum(as_data(checkpoint(1)))
    assert content(previous) == checksum(as_data(checkpoint(0)))


def test_drafts_of_killed_processes_are_removed(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts: list[str] = []

    def killed(*_: object) -> None:
        drafts.extend({path.name for path in saved.parent.iterdir()} - {"last.pt"})
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, checkpoint(1), saved.with_name("previous.pt"))
    assert len(drafts) == 2, "the new file and the link to the old one"
    for name in drafts:
        (saved.parent / name).touch()
    files.remove_drafts(saved.parent)
    assert [path.name for path in saved.parent.iterdir()] == ["last.pt"]
    assert content(saved) == checksum(as_data(checkpoint()))


# --- full disks and read-only folders ---


@contextmanager
def small_disk(folder: Path, size: str = "64k") -> Iterator[Path]:
    """A disk of a given number of bytes."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk cannot be mounted here (needs root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        last, previous = disk / "last.pt", disk / "previous.pt"
        save_checkpoint(last, checkpoint(), previous)
        for room in range(0, 40_000, 4096):  # full immediately, and after part of the file
            used = sum(path.stat().st_blocks * 512 for path in disk.iterdir())
            filler = disk / "filler"
            filler.write_bytes(bytes(max(0, 64 * 1024 - used - room)))
            before = sorted(path.name for path in disk.iterdir())
            big = {"weights": {"w": torch.ones(15_000)}}
            for data in (big, {"weights": {"w": torch.ones(9 * 1024 + room // 16)}}):
                with pytest.raises(CompofaError, match="No space left") as caught:
                    save_checkpoint(last, Checkpoint(checkpoint().network, **data), previous)
                assert "\n" not in str(caught.value)
                assert sorted(path.name for path in disk.iterdir()) == before
                assert content(last) == checksum(as_data(checkpoint()))
            filler.unlink()
        save_checkpoint(last, checkpoint(1), previous)
        assert content(last) == checksum(as_data(checkpoint(1)))


@pytest.mark.parametrize("limit", [0, 1, 1000, 4096, 8000])
def test_a_limit_on_file_sizes_keeps_the_last_file(saved: Path, limit: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(CompofaError) as caught:
            save_checkpoint(saved, larger(), saved.with_name("previous.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(caught.value).endswith(f"{saved}: File too large")
    assert content(saved) == checksum(as_data(checkpoint()))
    assert [path.name for path in saved.parent.iterdir()] == ["last.pt"]


def larger() -> Checkpoint:
    return Checkpoint(checkpoint().network, {"w": torch.ones(3000)})


@contextmanager
def nobody() -> Iterator[None]:
    """Run as a user without root's permissions."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_written_keeps_the_last_file(saved: Path) -> None:
    folder = saved.parent
    modes = {path: path.stat().st_mode for path in (folder, *folder.parents)}
    try:
        for path, mode in modes.items():
            if not mode & 0o001:  # a private temporary folder
                path.chmod(mode | 0o001)
        folder.chmod(0o555)
        with nobody(), pytest.raises(CompofaError) as caught:
            save_checkpoint(saved, larger(), folder / "previous.pt")
    finally:
        for path, mode in modes.items():
            if path.stat().st_mode != mode:
                path.chmod(mode)
    assert str(caught.value).endswith(f"{saved}: Permission denied")
    assert content(saved) == checksum(as_data(checkpoint()))
    assert [path.name for path in folder.iterdir()] == ["last.pt"]
