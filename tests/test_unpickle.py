"""Checkpoints of other programs are read safely, with placeholders for unknown objects."""

import argparse
import collections
import io
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hostile import rezip

from compofa.cli import tools
from compofa.errors import CheckpointError, TableError
from compofa.io.checkpoint import load_weights, weights_in
from compofa.io.formats.names import from_ours
from compofa.io.open import open_network
from compofa.io.tensors import read_safely
from compofa.io.unpickle import Skipped
from compofa.networks.zoo import network_spec
from compofa.nn.supernet import Supernet
from nas.accuracy.ofa_predictor import PublishedPredictor, read_published

ZIPPED = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "older format"])


@cache
def source() -> Supernet:
    return Supernet(network_spec("compofa-elastic-small", 3, width_mult=0.1), 1)


@cache
def theirs(to: str = "ofa") -> dict[str, torch.Tensor]:
    return from_ours(source().state_dict(), 4, to)


def save(data: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(data, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_loads(path: Path | dict) -> None:
    net = Supernet(source().spec, 2)
    load_weights(net, path)
    wanted = source().state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in net.state_dict().items())


class Hub(dict):
    """An object as training libraries save it, with state, slots and items."""

    def __init__(self) -> None:
        super().__init__(loss=[np.float32(0.5)] * 3)
        self.history = np.arange(3.0)
        self.more = {1, 2}


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def beside() -> dict[str, Any]:
    """Objects that programs save beside weights, of the real classes."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {
        "best_acc": np.float64(76.5),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, path=Path("x")),
        "logger": logging.getLogger("a program's"),
        "message_hub": Hub(),
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict(),
        "metrics": collections.defaultdict(list, {"top1": [1.5]}),
        "counts": collections.Counter("abca"),
        "rng": np.random.default_rng(0).bit_generator.state,
        "array": np.arange(6).reshape(2, 3),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "size": torch.Size([2, 3]),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "complex": 1j,
        "sparse": torch.eye(2).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "module": layer,
        "storage": torch.ones(2).untyped_storage(),
    }


@pytest.mark.filterwarnings("ignore")  # torch warns about the legacy format
@ZIPPED
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_beside_the_weights_are_placeholders(
    tmp_path: Path, zipped: bool, protocol: int, caplog: pytest.LogCaptureFixture
) -> None:
    data, path = {"state_dict": theirs(), **beside()}, tmp_path / "net.pth"
    if protocol > 3 and not zipped:
        del data["module"]  # which torch cannot save
    torch.save(data, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.INFO, "compofa"):
        found = read_safely(path)
    assert_loads(path)
    for name in ("best_acc", "args", "logger", "message_hub", "set", "sparse", "quantised"):
        assert isinstance(found[name], Skipped), name
    assert found["args"].name == "argparse.Namespace"
    assert found["epoch"] == 3 and found["size"] == (2, 3) and found["bytes"] == b"\x00\xff"
    assert found["metrics"] == {"top1": [1.5]}
    state = beside()["optimizer"]["state"][0]
    assert all(torch.equal(v, state[k]) for k, v in found["optimizer"]["state"][0].items())
    (message,) = [record.message for record in caplog.records if record.levelname == "INFO"][:1]
    assert "skipped" in message and "argparse.Namespace" in message and "\n" not in message


@ZIPPED
def test_a_checkpoint_with_objects_is_converted(
    tmp_path: Path, zipped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    save({"epoch": 1, "best_acc": np.float64(1), "state_dict": theirs()}, tmp_path / "a", zipped)
    argv = [str(tmp_path / "a"), str(tmp_path / "b"), "--to", "ofa", "--arch"]
    assert tools.main(["convert", *argv, "compofa-elastic-small"]) == 1
    assert "misshapen" in capsys.readouterr().err, "of another width, which is all that is wrong"


@ZIPPED
@pytest.mark.parametrize("place", ["beside", "weights", "wrapper", "key"])
@pytest.mark.parametrize("way", ["call", "state"])
def test_malicious_objects_are_placeholders(
    tmp_path: Path, zipped: bool, place: str, way: str
) -> None:
    marker, path = tmp_path / "it ran", tmp_path / "net.pth"
    trap: Any = Trap(marker)
    if way == "state":
        trap = collections.UserList([trap])
        trap.attribute = Trap(marker)
    data: dict[Any, Any] = {"state_dict": dict(theirs())}
    if place == "weights":
        data["state_dict"]["x"] = trap
    elif place == "key":
        data["state_dict"][Trap(marker)] = torch.zeros(1)
    else:
        data["model" if place == "wrapper" else "other"] = trap
    save(data, path, zipped)
    if place in ("weights", "key"):
        with pytest.raises(CheckpointError, match="tensors"):
            assert_loads(path)
    else:
        assert_loads(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the trap must be live, or this test shows nothing"


NASTY = {
    "an object's attributes": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00a"
    b"K\x01sb.",
    "class for a class": b"\x80\x02cbuiltins\ntype\n(X\x01\x00\x00\x00aK\x01tR.",
    "attribute of a module": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "old instance": b"(S'id'\nios\nsystem\n.",
    "number called": b"K\x01)R.",
    "items of a number": b"K\x01K\x02a.",
    "nothing there": b"0.",
    "marks": b"t.",
    "no end": b"\x80\x02K\x01",
    "memo": b"h\x07.",
    "distant memo": b"K\x01r\xff\xff\xff\xff.",
    "extension": b"\x82\x01.",
    "long text": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "long number": b"\x8b\xff\xff\xff\x7f.",
    "unhashable": b"}]K\x01s.",
    "rebuilt from numbers": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01))K\x00}tR.",
    "foreign id": b"\x80\x02(X\x04\x00\x00\x00fileX\x01\x00\x00\x00atQ.",
    "id": b"\x80\x02K\x01Q.",
    "buffer": b"\x80\x05\x97.",
}


@pytest.mark.parametrize("program", NASTY.values(), ids=NASTY.keys())
def test_unusual_pickle_programs_are_refused(tmp_path: Path, program: bytes) -> None:
    path = save({"state_dict": {}}, tmp_path / "net.pth")
    rezip(path, lambda name, data: program if name.endswith(".pkl") else data)
    with pytest.raises(CheckpointError) as caught:
        read_safely(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_names_from_a_file_are_harmless_on_a_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = b"\x1b[31m" + b"x" * 300
    path = save({"a": None}, tmp_path / "net.pth")
    program = b"\x80\x02}X\x01\x00\x00\x00ac" + name + b"\nb\ns."
    rezip(path, lambda record, data: program if record.endswith(".pkl") else data)
    with caplog.at_level(logging.INFO, "compofa"):
        assert isinstance(read_safely(path)["a"], Skipped)
    assert "\x1b" not in caplog.text and len(caplog.text) < 400


def test_endless_pickles_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compofa.io.unpickle._STEPS", 1000)
    path = save({"a": [None] * 2000}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="objects"):
        read_safely(path)
    copies = collections.OrderedDict([[i, i] for i in range(90)])
    pairs = b"".join(b"]q%c(K%cK%ce" % (9, i, i) for i in range(90))
    make = b"ccollections\nOrderedDict\nq\x01](" + pairs + b"eq\x02\x85q\x030"
    program = b"\x80\x02" + make + b"}X\x01\x00\x00\x00a](" + b"h\x01h\x03R" * 20 + b"es."
    rezip(path, lambda name, data: program if name.endswith(".pkl") else data)
    with pytest.raises(CheckpointError, match="objects"):
        read_safely(path)
    assert len(copies) == 90


@ZIPPED
def test_damage_within_the_pickle_ends_in_one_line(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "net.pth"
    data = {"a": torch.arange(6.0).view(2, 3), "b": [np.float64(1), argparse.Namespace(c=(1, 2))]}
    save(data, path, zipped)
    whole, generator, counts = path.read_bytes(), np.random.default_rng(0), collections.Counter()
    for _ in range(400):

        def damaged(content: bytes) -> bytes:
            at, bit = generator.integers(len(content)), generator.integers(8)
            return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]

        path.write_bytes(whole)
        if zipped:  # with a CRC that matches the change
            rezip(path, lambda name, part: damaged(part) if name.endswith(".pkl") else part)
        else:
            path.write_bytes(damaged(whole))
        try:
            read_safely(path)
            counts["taken"] += 1
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
            counts["refused"] += 1
    assert min(counts.values()) > 50, counts


# --- tensors ---


@ZIPPED
def test_tensors_of_every_type_and_layout_come_back(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(24.0)
    data: dict[str, Any] = {
        str(dtype): torch.tensor([0, 1, 1]).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8,
                      torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn)
    }  # fmt: skip
    data |= {
        "whole": base,
        "view": base[3:9].view(2, 3).t(),
        "last": base.view(4, 6).contiguous().to(memory_format=torch.contiguous_format)[1:],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "half": torch.ones(2, 3, 4, 4).half().to(memory_format=torch.channels_last),
    }
    if not zipped:
        del data["torch.uint16"], data["torch.float8_e4m3fn"]  # unknown to the legacy format
    found = read_safely(save(data, tmp_path / "net.pth", zipped))
    for name, value in data.items():
        assert found[name].dtype == value.dtype and found[name].stride() == value.stride(), name
        pair = [v.detach().flatten().view(torch.uint8) for v in (found[name], value)]
        assert torch.equal(*pair), name
        assert type(found[name]) is torch.Tensor and not found[name].requires_grad
    storage = found["whole"].untyped_storage().data_ptr()
    assert found["view"].untyped_storage().data_ptr() == storage, "stored once, held once"


@pytest.mark.parametrize(
    "change",
    [
        (b"K\x06", b"K\x07"),  # elements of the storage
        (b"K\x02K\x03\x86", b"K\x03K\x03\x86"),  # size
        (b"K\x03K\x01\x86", b"K\x04K\x01\x86"),  # stride
        (b"FloatStorage", b"HalfStorage"),
        (b"QK\x00", b"QK\x01"),  # offset
        (b"QK\x00", b"QJ\xff\xff\xff\xff"),
        (b"K\x02K\x03\x86", b"\x8a\x08\x00\x00\x00\x00\x00\x00\x00@K\x03\x86"),
        (b"K\x02K\x03\x86", b"K\x02K\x03K\x00\x87"),
    ],
)
@ZIPPED
def test_tensors_larger_than_their_storage_are_refused(
    tmp_path: Path, zipped: bool, change: tuple[bytes, bytes]
) -> None:
    path = save({"a": torch.arange(6.0).view(2, 3)}, tmp_path / "net.pth", zipped)
    if zipped:
        assert change[0] in zipfile.ZipFile(path).read("net/data.pkl")
        rezip(path, lambda name, data: data.replace(*change))
    else:
        path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(CheckpointError, match=r"net\.pth"):
        read_safely(path)


def test_the_legacy_format_must_match_its_storages(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0)}, buffer, _use_new_zipfile_serialization=False)
    whole, path = buffer.getvalue(), tmp_path / "net.pth"
    at = whole.index(struct.pack("<q", 6) + bytes(4))
    changes = {
        "another count": whole[:at] + struct.pack("<q", 5) + whole[at + 8 :],
        "no keys": whole[: whole.rindex(b"\x80\x02")] + pickle.dumps([], 2) + whole[at:],
        "another byte order": re.sub(rb"(?<=little_endianq.)\x88", b"\x89", whole),
        "a number less": whole[:-1],
        "a byte more": whole + b"0",
    }
    for name, content in changes.items():
        assert content != whole, name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"net\.pth"):
            read_safely(path)
            pytest.fail(name)


def test_an_archive_in_another_byte_order_is_refused(tmp_path: Path) -> None:
    path = save({"a": torch.ones(2)}, tmp_path / "net.pth")
    rezip(path, lambda name, data: b"big" if name.endswith("byteorder") else data)
    with pytest.raises(CheckpointError, match="byte order"):
        read_safely(path)


# --- wrappers ---


Wrap = Callable[[dict], dict]


def named(prefix: str) -> Wrap:
    return lambda state: {prefix + name: value for name, value in state.items()}


def key(name: str, **more: Any) -> Wrap:
    return lambda state: {name: state, **more}


WRAPPERS: dict[str, list[Wrap]] = {
    "nothing": [],
    "data parallel": [named("module.")],
    "compiled": [named("_orig_mod.")],
    "compiled in parallel": [named("_orig_mod."), named("module.")],
    "in parallel, compiled": [named("module."), named("_orig_mod.")],
    "an enclosing module": [named("model."), key("state_dict")],
    "all": [named("model."), named("_orig_mod."), named("module."), key("state_dict"), key("net")],
    "trainer's": [key("model_state_dict", epoch=1, optimizer_state_dict={"state": {}})],
    "timm's": [key("state_dict", arch="x", metric=np.float64(1))],
    "averaged": [named("module."), key("ema_state_dict")],
    "average and count": [
        lambda state: {"n_averaged": torch.tensor(3), **named("module.")(state)},
        key("ema"),
    ],
    "average within": [key("module", updates=3), key("ema"), key("model")],
    "with its loss": [named("model."), lambda state: {**state, "loss.weight": torch.ones(2)}],
    "compiled blocks": [
        lambda state: {n.replace("blocks.", "blocks._orig_mod."): v for n, v in state.items()},
        lambda state: {n.replace("stages.", "stages._orig_mod."): v for n, v in state.items()},
    ],
    "a module that is no mapping": [lambda state: {"weights": None, "model": state}],
}


@pytest.mark.parametrize("form", ["compofa", "ofa", "mmrazor"])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrappers_are_removed_in_every_format(tmp_path: Path, wrap: list[Wrap], form: str) -> None:
    data: dict = theirs(form)
    for around in wrap:
        data = around(data)
    assert_loads(data)
    assert_loads(save(data, tmp_path / "net.pth"))


def test_a_wrapped_file_is_recognised(tmp_path: Path) -> None:
    net = Supernet(network_spec("compofa-elastic-small", 3))
    data = {"model": {f"_orig_mod.module.{n}": v for n, v in net.state_dict().items()}}
    opened = open_network(save(data, tmp_path / "net.pth"))
    kind, checkpoint = opened.format, opened.checkpoint
    assert kind == "compofa" and checkpoint.network.classes == 3
    assert checkpoint.weights.keys() == net.state_dict().keys()


def test_a_published_predictor_may_be_wrapped(tmp_path: Path) -> None:
    shapes = PublishedPredictor.shapes()
    state = {f"module.{i}": torch.full(s, i + 1.0) for i, s in enumerate(shapes)}
    path = save({"model": state, "best_acc": np.float64(1)}, tmp_path / "acc.pth")
    found = read_published(path)
    assert found.layers[0][0].sum() == state["module.0"].sum()
    save({"model": {**state, "module.0": torch.eye(2).to_sparse()}}, path)
    with pytest.raises(TableError, match=r"acc\.pth"):
        read_published(path)


def test_the_first_of_several_mappings_is_used_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    first, second = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    with caplog.at_level(logging.INFO, "compofa"):
        found = weights_in("net.pth", {"state_dict_ema": second, "state_dict": first})
        assert found["a"] is first["a"]
        assert re.search(r"\bstate_dict, .*state_dict_ema", caplog.text)
        found = weights_in("net.pth", {"model.a": first["a"], "ema.a": second["a"]})
        assert found["a"] is first["a"]
    assert "'ema.a'" in caplog.text


def test_names_without_wrapper_prefix_are_kept() -> None:
    from compofa.io.weights import load_state

    with pytest.raises(CheckpointError, match=r"extra"):
        load_state(source(), {**named("module.")(theirs()), "x": torch.ones(1)})
