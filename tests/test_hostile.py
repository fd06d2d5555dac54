"""Hostile files, given where users give files: refused in one line, in little memory, never run."""

import gzip
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from compofa.cli import evaluate, tools, train
from compofa.data import load_dataset
from compofa.data.decoding import UnreadableImageError, decode_rgb
from compofa.errors import CheckpointError, CompofaError, DataError
from compofa.io import untrusted as plain
from compofa.io.checkpoint import Checkpoint, as_data, load_checkpoint, save_checkpoint
from compofa.io.records import read_records
from compofa.networks.zoo import network_spec
from compofa.training.journal import Journal
from nas.accuracy.predictor import MODELS
from nas.cli import search
from nas.cli import tools as nas

TOO_DEEP = "[" * 100_000 + "]" * 100_000
MOST_MEMORY = 100 << 20  # bytes that a refusal may take; the files claim far more

Write = Callable[[Path], object]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch) -> Callable[..., str]:
    """Run a command that must end in one line and leave nothing behind; returns the line."""
    monkeypatch.chdir(tmp_path)

    def call(main: Callable[[list[str]], int], *argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        status = main(list(argv))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
        out, err = capsys.readouterr()
        assert status == 1 and out == ""
        assert ": error: " in err and err.count("\n") == 1 and len(err) < 1000, err[:2000]
        assert sorted(tmp_path.rglob("*")) == before
        assert grown < MOST_MEMORY, f"{grown >> 20} MB"
        return err

    return call


# --- checkpoints ---


def rezip(path: Path, change: Callable[[str, bytes], bytes], method: int = 0) -> None:
    """Write an archive again with its records changed."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in records:
            archive.writestr(name, change(name, data))


def bomb(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(40 << 20)}}, path)  # 168 MB
    rezip(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20


def overlapping(path: Path) -> None:
    """An archive with one record under ten thousand names."""
    torch.save({"a": torch.zeros(10_000)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
        for index in range(10_000):
            again = zipfile.ZipInfo(f"archive/data/{index}")
            for key in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(again, key, getattr(largest, key))
            archive.filelist.append(again)
        archive._didModify = True


def declared(count: int) -> Write:
    """A tensor of 1,000 numbers that says it has ``count``."""

    def write(path: Path) -> None:
        torch.save({"state_dict": {"a": torch.arange(1000.0)}}, path)
        long, short = b"\x8a\x08" + struct.pack("<q", count), b"M\xe8\x03"
        rezip(path, lambda name, data: data.replace(short, long))

    return write


def declared_in_old_format(path: Path) -> None:
    torch.save({"a": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=False)
    long, short = b"\x8a\x08" + struct.pack("<q", 10**12), b"M\xe8\x03"
    path.write_bytes(path.read_bytes().replace(short, long))


def laughs(path: Path) -> None:
    """Ten lists in each other, each ten times: a small pickle of 10^30 values when gone through."""
    data: list[Any] = ["ha"] * 10
    for _ in range(30):
        data = [data] * 10
    torch.save({"state_dict": {}, "training": data}, path)


def deep(path: Path) -> None:
    """Lists in lists, more than anything that recurses can take; torch's pickler among it."""
    torch.save({"state_dict": {}, "x": None}, path)
    nested = b"]" * 100_000 + b"a" * 99_999
    rezip(path, lambda name, data: data.replace(b"N", nested) if name.endswith(".pkl") else data)


def outside(path: Path) -> None:
    """torch's oldest format: an archive whose members lie outside of it."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "../../outside", "/outside"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))


def trap(path: Path) -> None:
    torch.save({"state_dict": {"a": Trap(path.with_name("it ran"))}}, path)


def giant_network(path: Path) -> None:
    """A definition of 1.3 billion parameters, and no weights."""
    spec = network_spec("compofa", 1_000_000)
    torch.save(as_data(Checkpoint(network=spec, weights={})), path)


ONE = torch.zeros(10**6)
CHECKPOINTS: dict[str, tuple[Write, str]] = {
    "pickle that runs code": (trap, "names to dense tensors, got 'a': "),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "cannot be read"),
    "compressed": (bomb, "a compressed archive"),
    "one record many times": (overlapping, "bytes of content"),
    "10^12 declared": (declared(10**12), "cannot be read safely"),
    "a few more declared": (declared(1001), "cannot be read safely"),
    "10^12 declared, old format": (declared_in_old_format, "cannot be read safely"),
    "10^12 from one": (
        lambda path: torch.save({"state_dict": {"a": torch.zeros(1).expand(10**6, 10**6)}}, path),
        "content of far more bytes",
    ),
    "one tensor 1,000 times": (
        lambda path: torch.save({"state_dict": {str(i): ONE[:] for i in range(1000)}}, path),
        "content of far more bytes",
    ),
    "no numbers": (
        lambda path: torch.save({"state_dict": {"a": torch.empty(10**9, device="meta")}}, path),
        "names to dense tensors, got 'a': torch._utils",
    ),
    "billion laughs": (laughs, "content of far more bytes"),
    "deep": (deep, "nested too deeply"),
    "members outside": (outside, "cannot be read safely"),
    "giant network": (giant_network, "expected weights for 1,28"),
}


@pytest.mark.parametrize(("write", "message"), CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpoints(tmp_path, refused, write, message):
    path = tmp_path / "net.pt"
    write(path)
    assert message in refused(evaluate.main, "--net", str(path))
    assert not (tmp_path / "it ran").exists() and not Path("/outside").exists()


def test_a_trap_is_not_sprung_wherever_a_checkpoint_is_taken(tmp_path, refused):
    path = tmp_path / "net.pt"
    trap(path)
    run = tmp_path / "run" / "compound-1"
    run.mkdir(parents=True)
    trap(run / "last.pt")
    net = str(path)
    row = ",".join(["3 " * 20, "3 " * 20, "2 " * 5, "224"])
    (tmp_path / "in.csv").write_text(f"ks,e,d,r\n{row}\n")
    predict = ("--columns", "top1", "--input", "in.csv", "--output", "out.csv")
    for main, *argv in (
        (train.main, "--teacher-path", net, "--output", "out"),
        (train.main, "--task", "teacher", "--init-path", net, "--output", "out"),
        (train.main, "--resume", "--output", "run"),
        (evaluate.main, "--net", net),
        (search.main, "--net", net, "--target-hardware", "cpu", "--output", "out"),
        (search.main, "--accuracy-predictor", net, "--output", "out"),
        (tools.main, "export", net, "largest", "--to", "pt2"),
        (tools.main, "convert", net, "out.pt", "--to", "ofa"),
        (nas.main, "collect", "--net", net, "--output", "records.jsonl"),
        (nas.main, "predict", "--accuracy-predictor", net, *predict),
    ):
        refused(main, *argv)
    torch.load(path, weights_only=False)
    assert (tmp_path / "it ran").exists(), "the trap must be live, or this test shows nothing"


def test_deep_data_in_a_checkpoint_of_ours(tmp_path):
    path, data = tmp_path / "net.pt", 1
    for _ in range(150):
        data = [data]
    deep = Checkpoint(network_spec("compofa"), {}, figures={"a": data})
    with pytest.raises(ValueError, match="nested too deeply"):
        save_checkpoint(path, deep)
    torch.save(as_data(deep), path)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        load_checkpoint(path)


# --- YAML and JSON ---

YAML = {
    "aliases": "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(3)),
    "code": "!!python/object/apply:os.system ['touch it-ran']",
    "tag": "a: !custom 1",
    "deep": "a: " + "[" * 5000 + "]" * 5000,
    "number": "a: {mean: " + "9" * 5000 + "}",
    "key": "? [a, b]\n: 1",
    "keys": "? {a: b}\n: 1",
    "date": "a: 2001-99-99",
    "merge": "<<: 5",
    "bytes": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("text", YAML.values(), ids=YAML.keys())
def test_yaml(tmp_path, refused, text):
    folder = tmp_path / "tables"
    folder.mkdir()
    content = text if isinstance(text, bytes) else text.encode()
    (folder / "224_lookup_table.yaml").write_bytes(content)
    (tmp_path / "subnet.yaml").write_bytes(content)
    refused(search.main, "--latency-table", "tables", "--output", "out")
    refused(tools.main, "convert", "subnet.yaml", "out.json", "--to", "compofa")


JSON = {
    "deep": TOO_DEEP,
    "deep value": '{"ks": ' + TOO_DEEP + "}",
    "number": '{"r": ' + "9" * 5000 + "}",
    "infinity": '{"ks": [Infinity], "e": [3], "d": [2], "r": 224}',
    "text": '{"ks": "' + "3" * 100_000 + '", "e": 3, "d": 2}',
    "bytes": b"{\xff\xfe\x00",
}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON.keys())
def test_json(tmp_path, refused, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "subnet.json").write_bytes(content)
    refused(evaluate.main, "--net", "compofa-digits", "--subnet", "subnet.json")
    refused(tools.main, "convert", "subnet.json", "out.yaml", "--to", "mmrazor")
    (tmp_path / "records.jsonl").write_bytes(content + b"\n" + content + b"\n")
    refused(nas.main, "fit-accuracy", "--input", "records.jsonl", "--output", "model")
    with pytest.raises(DataError):
        read_records("records.jsonl")
    if isinstance(text, str):
        Path("metrics.jsonl").write_bytes(content + b"\n")
        Journal(tmp_path, 3).close()
        assert Path("metrics.jsonl").read_text() == "", "a line of something else is left out"


def test_texts_without_end(monkeypatch, refused):
    monkeypatch.setattr(plain.read_text, "__defaults__", (1000,))
    for argv in (["--net", "compofa-digits", "--subnet", "/dev/zero"],):
        assert "more than 1000 bytes" in refused(evaluate.main, *argv)


# --- tables and models ---


def npz(path: Path, **members: bytes | np.ndarray) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            if isinstance(data, np.ndarray):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, data)
                data = buffer.getvalue()
            archive.writestr(name.replace("__", "."), data)


def npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


HUGE = "{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }"
NPZ: dict[str, dict[str, Any]] = {
    "pickle": {"format__npy": np.array([Trap(Path("it ran"))], dtype=object)},
    "10^12 declared": {"format__npy": npy(HUGE)},
    "10^30 declared": {"format__npy": npy(HUGE.replace("000,)", "0" * 20 + ",)"))},
    "negative": {"format__npy": npy(HUGE.replace("(", "(-"))},
    "code": {"format__npy": npy(HUGE.replace("1000000000000", "__import__('os').getpid()"))},
    "brackets": {"format__npy": npy("(" * 9000)},
    "objects": {"format__npy": npy(HUGE.replace("<f8", "|O"))},
    "no array": {"x__npy": np.zeros(2), "format": b"1"},
    "bomb": {"format__npy": npy(HUGE.replace("1000000000000", "25000000")) + bytes(80_000_000)},
    "text": {"format__npy": b"1"},
}


@pytest.mark.parametrize("members", NPZ.values(), ids=NPZ.keys())
def test_npz(tmp_path, refused, members):
    npz(tmp_path / "model.npz", **members)
    refused(search.main, "--accuracy-predictor", "model.npz", "--output", "out")
    assert not (tmp_path / "it ran").exists()


def test_cards(tmp_path, refused):
    source = next(MODELS.glob("accuracy_*.npz"))
    (tmp_path / "model.npz").write_bytes(source.read_bytes())
    for text in (TOO_DEEP, "[]", '{"a": ' + "1" * 5000 + "}"):
        (tmp_path / "model.json").write_text(text)
        refused(search.main, "--accuracy-predictor", "model.npz", "--output", "out")


def test_tables_that_unpack_without_end(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("nas.tables.MAX_FILE_BYTES", 1 << 20)
    one_line, many = b"1 " * (4 << 20), b"ks,e,d,r,top1\n" + b"\n" * (8 << 20)
    for content in (one_line, many):
        with gzip.open(tmp_path / "table.csv.gz", "wb") as file:
            file.write(content)
        message = refused(nas.main, "fit-accuracy", "--input", "table.csv.gz", "--output", "model")
        assert "at most 1048576 bytes" in message


# --- images and data sets ---


def png(width: int, height: int) -> bytes:
    """Return a picture of a few bytes that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0"))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"


def test_images(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.jpg")
    assert decode_rgb(tmp_path / "good.jpg").size == (8, 8)
    (tmp_path / "large.jpg").write_bytes(png(100_000, 100_000))
    (tmp_path / "script.jpg").write_bytes(EPS)
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    os.symlink("/dev/zero", tmp_path / "zero.jpg")
    with Image.open(tmp_path / "script.jpg") as image:
        assert image.format == "EPS", "Pillow by itself takes it, and would start Ghostscript"
    for name in ("large", "script", "pipe", "loop", "zero", "absent"):
        with pytest.raises(UnreadableImageError):
            decode_rgb(tmp_path / f"{name}.jpg")


def test_folders_that_lead_back(tmp_path, refused):
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "1.png")
    os.symlink("..", tmp_path / "data" / "a" / "up")
    argv = ("--dataset", "imagefolder", "--data-path", "data", "--output", "out")
    assert "leads to the same folder again" in refused(train.main, "--task", "teacher", *argv)


def tar(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as archive:
        for member in members:
            archive.fileobj.write(member.tobuf(tarfile.GNU_FORMAT))
            archive.fileobj.write(bytes(512))
            archive.offset += 1024


def member(name: str, size: int = 9, kind: bytes = tarfile.REGTYPE, to: str = "") -> Any:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, to
    return info


TARS = {
    "outside": [member("../../a/1.png"), member("/etc/b/1.png")],
    "links": [member(f"{c}/1.png", 0, tarfile.SYMTYPE, "/etc/passwd") for c in "ab"],
    "devices": [member(f"{c}/1.png", 0, tarfile.CHRTYPE) for c in "ab"],
    "size": [member("a/1.png", 2**80), member("b/1.png")],
    "size below 0": [member("a/1.png", -(2**40)), member("b/1.png", -1)],
    "header": [member("a/1.png", 2**80, tarfile.XHDTYPE)],
    "headers": [member("x", 9, tarfile.GNUTYPE_LONGNAME)] * 5000,
}


@pytest.mark.parametrize("members", TARS.values(), ids=TARS.keys())
def test_tar_files(tmp_path, refused, members):
    tar(tmp_path / "data.tar", *members)
    argv = ("--dataset", "imagefolder", "--data-path", "data.tar", "--output", "out")
    refused(train.main, "--task", "teacher", "--image-size", "32", *argv)


def idx(values: np.ndarray, code: int = 8, shape: tuple[int, ...] | None = None) -> bytes:
    sides = shape or values.shape
    return bytes([0, 0, code, len(sides)]) + struct.pack(f">{len(sides)}I", *sides) + bytes(values)


IDX = {
    "huge": ("images-idx3", idx(np.zeros((20, 28, 28), np.uint8), shape=(2**31, 2**31, 28))),
    "type": ("images-idx3", idx(np.zeros((20, 28, 28), np.uint8), code=99)),
    "oblong": ("images-idx3", idx(np.zeros((20, 28, 27), np.uint8))),
    "few labels": ("labels-idx1", idx(np.zeros(5, np.uint8))),
    "wrong labels": ("labels-idx1", idx(np.full(20, 200, np.uint8))),
    "numbers": ("labels-idx1", idx(np.zeros(80, np.uint8), code=13, shape=(20,))),
}


@pytest.mark.parametrize(("part", "content"), IDX.values(), ids=IDX.keys())
def test_idx_files(tmp_path, part, content):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for which in ("train", "t10k"):
        images = idx(np.zeros((20, 28, 28), np.uint8))
        (folder / f"{which}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{which}-labels-idx1-ubyte").write_bytes(idx(np.arange(20, dtype=np.uint8) % 10))
    assert len(load_dataset("fashion-mnist", tmp_path, download=False).test) == 20
    (folder / f"train-{part}-ubyte").write_bytes(content)
    with pytest.raises(CompofaError) as caught:
        load_dataset("fashion-mnist", tmp_path, download=False)
    assert "\n" not in str(caught.value)


def test_plain_data_is_read(tmp_path):
    value = {"a": [1, 2.5, None, "x"]}
    assert plain.parse_json(json.dumps(value)) == plain.parse_yaml(json.dumps(value)) == value
    (tmp_path / "text").write_text("\ufeffä")
    assert plain.read_text(tmp_path / "text") == "ä"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("two\r\nlines\x00\x7f\x9b2J", r"two\r\nlines\x00\x7f\x9b2J"),
        ("a\u202egpj.exe\u2066\u2028", r"a\u202egpj.exe\u2066\u2028"),
        (os.fsdecode(b"z\xff"), r"z\udcff"),
        ("名前 é\u00a0\u200d 👩\u200d🔬 $x_1$ \\x1b", "名前 é\u00a0\u200d 👩\u200d🔬 $x_1$ \\x1b"),
    ],
)
def test_text_that_no_terminal_obeys(text, shown):
    assert plain.printable(text) == shown


def test_names_from_files_reach_the_terminal_as_escapes(tmp_path):
    (tmp_path / "a\x1b[2J.csv").write_text("ks,e,d,r\n")
    program = (
        "import logging, sys\nfrom nas.cli.tools import main, run\n"
        "run(lambda _: logging.getLogger('nas').info('%s\\nnext', sys.argv[1]), [], 'log')\n"
        "sys.exit(main(['predict', '--columns', 'macs', '--input', sys.argv[1], '--output', 'o']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a\x1b[2J.csv")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    first, second, third = done.stderr.splitlines()
    assert first.endswith(r"a\x1b[2J.csv") and second == "next" and r"a\x1b[2J.csv: ex" in third
    assert done.returncode == 1 and "\x1b" not in done.stderr
