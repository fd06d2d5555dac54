"""Damage every kind of file that commands read, and count what comes of it.

    PYTHONPATH=tests python -m fuzz --count 500 --seed 1
    PYTHONPATH=tests python -m fuzz --kind checkpoint --count 2000

Each kind is a whole file (those of ``golden/v0.1``, mostly), the function that commands read it
with, and whether a checksum covers it. What reading a damaged one comes to is one of ``OUTCOMES``;
the last two are faults, and so is a refusal of more than one line. ``test_fuzz.py`` runs a few of
each.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import logging
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import damaged
from PIL import Image

from compofa.cli import evaluate, tools
from compofa.cli.networks import read_subnet
from compofa.data.archives import TarFolder
from compofa.data.decoding import UnreadableImageError, decode_rgb
from compofa.data.folders import read_classes
from compofa.errors import CompofaError
from compofa.io.checkpoint import as_data, load_checkpoint
from compofa.io.download import check_file
from compofa.io.export import load_exported
from compofa.io.formats.mmrazor import dump
from compofa.io.formats.mmrazor import read_subnet as read_mmrazor
from compofa.io.locks import read_holder
from compofa.io.open import open_network
from compofa.io.records import read_records
from compofa.io.tensors import checksum
from compofa.networks.families import subnet_from_config
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.zoo import network_spec
from compofa.training.journal import Journal
from nas.accuracy.ofa_predictor import PublishedPredictor
from nas.accuracy.predictor import load_accuracy_model
from nas.cli import search
from nas.cli import tools as predict
from nas.cost.devices import load_cost
from nas.cost.lookup import read_table
from nas.cost.timing import Samples
from nas.search import pipeline
from nas.search.folder import listed_subnets
from nas.tables import read_subnets, require_members

FIRST = Path(__file__).parent / "golden" / "v0.1"
OUTCOMES = ("refused", "identical", "changed", "wrong", "traceback")
"""``changed`` is content that the file now legitimately has: a digit of a text, a pixel. It is
``wrong`` where a checksum should have told, or where no sound file could say such a thing."""


class WrongError(Exception):
    """Content that must not be taken for sound."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        make: Writes a sound one into an empty folder; returns the path of the part to damage.
        read: Reads it as commands do, and returns what tells one content from another.
        checked: Whether all of it is covered by a checksum.
        text: Whether to damage it as a text as well.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Hashable]
    checked: bool = False
    text: bool = False


# --- reading ---


def digest(*arrays: Any) -> str:
    content = hashlib.sha256()
    for array in arrays:
        content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()


def require(condition: Any, what: str) -> None:
    if not condition:
        raise WrongError(what)


def finite_weights(state: Any) -> None:
    for name, value in state.items():
        require(not value.is_floating_point() or bool(torch.isfinite(value).all()), name)
        require(not name.endswith("running_var") or bool((value >= 0).all()), name)


def whole_checkpoint(path: Path) -> Hashable:
    checkpoint = load_checkpoint(path)
    checkpoint.build()
    return checksum(as_data(checkpoint))


def foreign_checkpoint(path: Path) -> Hashable:
    checkpoint = open_network(path).checkpoint
    network = checkpoint.build()
    finite_weights(network.state_dict())
    return checksum({"w": dict(checkpoint.weights), "n": checkpoint.network.to_json()})


def specialised(path: Path) -> Hashable:
    return foreign_checkpoint(path.parent)


def records(path: Path) -> Hashable:
    found = read_records(path)
    for record in found:
        require(0 <= record.top1 <= record.top5 <= 100, f"top1 {record.top1}, top5 {record.top5}")
        require(min(record.images, record.macs, record.params) > 0, "counts")
    return json.dumps([record.to_json() for record in found], allow_nan=False)


def subnets(path: Path) -> Hashable:
    arrays, columns = read_subnets(path, ["top1"])
    space = pipeline.named_space("compofa", None, np.unique(arrays.resolutions).tolist())[1]
    arrays = require_members(arrays, space, path)
    require(np.isfinite(columns["top1"]).all(), "top1 that is no number")
    values = arrays.blocks.values()
    return digest(*values, arrays.depths, arrays.resolutions, arrays.outer, columns["top1"])


def subnet(path: Path) -> Hashable:
    return str(read_subnet(str(path), network_spec("compofa").space, 224))


def accuracy_model(path: Path) -> Hashable:
    model = load_accuracy_model(path.with_suffix(".npz"))
    rows = [record.subnet for record in read_records(FIRST / "supernet.jsonl")[:5]]
    arrays = pipeline.named_space("compofa-small", None, (8, 12))[1].arrays_of(rows)
    found, spread = model.predict(arrays), model.std(arrays)
    require(np.isfinite(found).all() and (spread >= 0).all(), f"predictions {found}, {spread}")
    return digest(found, spread) + f"{model.name} {model.error}"


def published(path: Path) -> Hashable:
    arrays, _ = read_subnets(FIRST / "pareto.csv", [])
    found = load_accuracy_model(path).predict(arrays)
    require(np.isfinite(found).all(), f"predictions {found}")
    return digest(found)


def latency_model(path: Path) -> Hashable:
    arrays, _ = read_subnets(FIRST / "pareto.csv", [])
    backbone, space, classes = pipeline.named_space("compofa", None)
    cost = load_cost(path.with_suffix(".npz"), backbone, classes, space=space)
    found = cost(arrays)
    require(np.isfinite(found).all() and (found > 0).all(), f"latencies {found}")
    return digest(found) + f"{cost.name} {cost.error}"


def table(path: Path) -> Hashable:
    found = read_table(path)
    values = np.array([*found.values()])
    require(np.isfinite(values).all() and (values >= 0).all(), "latencies")
    return json.dumps(found)


def timings(path: Path) -> Hashable:
    whole = json.loads((FIRST / "timings.jsonl").read_text().splitlines()[0])
    samples = Samples(path.parent, whole)
    values = [value for found in samples.values.values() for value in found]
    require(np.isfinite(values).all() and min(values, default=1) > 0, "timings")
    return json.dumps(samples.values)


def metrics(path: Path) -> Hashable:
    """Whole lines of earlier epochs stay; of a file with any other line a copy is kept."""
    before = path.read_bytes()
    *lines, torn = before.split(b"\n")
    wanted = [line for line in (*lines, torn) if 0 <= epoch_of(line) < 3]
    Journal(path.parent, 3).close()
    kept = path.read_bytes()
    require(kept == b"".join(line + b"\n" for line in wanted), "metrics lost")
    copies = [*path.parent.glob("metrics.damaged*")]
    if any(epoch_of(line) < 0 for line in lines):
        require([copy.read_bytes() for copy in copies] == [before], "no copy of damaged metrics")
    for copy in copies:
        copy.unlink()
    return kept


def sidecar(path: Path) -> Hashable:
    """The file beside it stays, and must be refused unless its checksum is still there."""
    check_file(path.with_suffix(""))
    return path.with_suffix("").read_bytes()


def lock(path: Path) -> Hashable:
    with path.open("rb") as file:
        return read_holder(file.fileno())


def earlier_search(path: Path) -> Hashable:
    """Files that the next search removes: of this folder, and none but subnets."""
    found = listed_subnets(path)
    for file in found:
        named = re.fullmatch(r"subnet_[\w.+-]+\.json", file.name)
        require(file.parent == path.parent and named, str(file))
    return tuple(sorted(file.name for file in found))


def epoch_of(line: bytes) -> int:
    """Return the epoch of a line of metrics, and -1 where it is none."""
    try:
        data = json.loads(line.decode())
        counts = [data[name] for name in ("epoch", "step")]
        whole = all(type(count) is int and 0 <= count < 2**60 for count in counts)
    except (ValueError, TypeError, LookupError, RecursionError):
        return -1
    return data["epoch"] if whole else -1


def image(path: Path) -> Hashable:
    found = decode_rgb(str(path))
    require(found.mode == "RGB" and min(found.size) > 0, found.mode)
    return (found.size, digest(np.asarray(found)))


def archive(path: Path) -> Hashable:
    """Contents are the images' own affair; which there are is the archive's."""
    classes, source = read_classes(TarFolder.open(path), None)
    names = [bytes(name) for name in source.paths]
    require(len(names) == 30, f"{len(names)} images of 30")
    return (classes, tuple(names), digest(source.targets))


def exported(path: Path) -> Hashable:
    path = path.with_name("exported.st")
    state = load_exported(path).state_dict()
    finite_weights(state)
    return checksum(dict(state))


# --- commands ---


def command(main: Callable[[list[str]], int], *argv: str, output: str = "") -> Callable:
    """Return a reader that gives a command the file, in a folder of its own.

    Args:
        main: The command.
        argv: Its arguments; ``FILE`` stands for the damaged one and ``FOLDER`` for its folder.
        output: What it writes.
    """

    def read(path: Path) -> Hashable:
        places = {"FILE": str(path), "FOLDER": str(path.parent)}
        words = [re.sub("FILE|FOLDER", lambda found: places[found[0]], word) for word in argv]
        out, err = io.StringIO(), io.StringIO()
        root = logging.getLogger()
        before, handlers, level = os.getcwd(), root.handlers[:], root.level
        root.handlers[:] = []
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                with redirect_stdout(out), redirect_stderr(err):
                    status = main(words)
                written = [*Path(folder).rglob("*")]
                if status == 0:
                    return digest_of(Path(folder) / output)
            finally:
                os.chdir(before)
                root.handlers[:] = handlers
                root.setLevel(level)
                logging.captureWarnings(False)
        require(status == 1, f"exit status {status}")
        require(not written, f"left behind: {written}")
        raise CompofaError(err.getvalue().removesuffix("\n").split("\n")[-1])

    return read


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- making ---


def frozen(name: str, *more: str) -> Callable[[Path], Path]:
    """Return a maker of a frozen file, with others that belong to it."""

    def make(folder: Path) -> Path:
        for part in (name, *more):
            source = FIRST / f"{part}.xz"
            target = folder / Path(part).name
            if source.exists():
                target.write_bytes(lzma.decompress(source.read_bytes()))
            else:
                shutil.copy(FIRST / part, target)
        return folder / Path(name).name

    return make


def unsealed(folder: Path) -> Path:
    """A checkpoint as earlier versions wrote it, and torch.save alone writes."""
    path = frozen("finetuned.pt")(folder)
    torch.save(as_data(load_checkpoint(path)), path)
    return path


def legacy(folder: Path) -> Path:
    """torch's format before archives, which has no checksums."""
    path = frozen("once-for-all.pth")(folder)
    data = torch.load(path, weights_only=True)
    torch.save(data, path, _use_new_zipfile_serialization=False)
    return path


def card_of(kind: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return frozen(f"{kind}.json", f"{kind}.npz")(folder)

    return make


def acc_predictor(folder: Path) -> Path:
    numbers = torch.Generator().manual_seed(0)
    shapes = PublishedPredictor.shapes()
    layers = {str(i): torch.rand(shape, generator=numbers) for i, shape in enumerate(shapes)}
    torch.save({"state_dict": layers}, folder / "acc_predictor.pth")
    return folder / "acc_predictor.pth"


def proxyless(name: str) -> Callable[[Path], Path]:
    """A specialised network as ProxylessNAS publishes them: NAME.json beside NAME.pth."""

    def make(folder: Path) -> Path:
        path = frozen("specialised/net.config", "specialised/init")(folder)
        size = json.loads((FIRST / "specialised" / "run.config").read_text())["image_size"]
        config = {**json.loads(path.read_text()), "resolution": size}
        (folder / "net.json").write_text(json.dumps(config))
        weights = torch.load(folder / "init", weights_only=True)["state_dict"]
        torch.save({"state_dict": weights}, folder / "net.pth")
        for part in ("net.config", "init"):
            (folder / part).unlink()
        return folder / name

    return make


def zipped(folder: Path) -> Path:
    path = folder / "pareto.csv.gz"
    path.write_bytes(gzip.compress((FIRST / "pareto.csv").read_bytes(), mtime=0))
    return path


def recorded(folder: Path) -> Path:
    (folder / "net").write_bytes(b"weights")
    check_file(folder / "net")
    return folder / "net.sha256"


def lock_file(folder: Path) -> Path:
    path = folder / ".net.pt.lock"
    path.write_text(json.dumps({"pid": 4711, "host": "node1", "since": "2026-01-02 03:04:05"}))
    return path


def eval_subnet(folder: Path) -> Path:
    frozen("supernet.pt")(folder)
    space = network_spec("compofa-small").space
    path = folder / "subnet.json"
    path.write_text(json.dumps(space.to_config(space.largest.at(16))))
    return path


def razor(folder: Path) -> Path:
    path = folder / "subnet.yaml"
    found = subnet_from_config(json.loads((FIRST / "subnet_20.json").read_text()))
    path.write_text(dump(found, MOBILENET_V3))
    return path


def timing_file(folder: Path) -> Path:
    identity = json.loads((FIRST / "timings.jsonl").read_text().splitlines()[0])
    path = Samples(folder, identity).path
    shutil.copy(FIRST / "timings.jsonl", path)
    return path


def metrics_file(folder: Path) -> Path:
    path = folder / "metrics.jsonl"
    line = json.loads((FIRST / "metrics.jsonl").read_text().splitlines()[0])
    path.write_text("".join(json.dumps({**line, "epoch": epoch}) + "\n" for epoch in range(3)))
    return path


def picture(name: str, mode: str = "RGB") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pixels = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).convert(mode).save(folder / name)
        return folder / name

    return make


def tar(folder: Path) -> Path:
    path = folder / "images.tar"
    content = picture("one.png")(folder).read_bytes()
    with tarfile.open(path, "w") as file:
        for index in range(30):
            member = tarfile.TarInfo(f"class{index % 3}/{index}.png")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


KINDS = {
    "checkpoint": Kind(frozen("finetuned.pt"), whole_checkpoint, checked=True),
    "resumable": Kind(frozen("resumable.pt"), whole_checkpoint, checked=True),
    "resnet": Kind(frozen("resnet50.pt"), whole_checkpoint, checked=True),
    "unsealed": Kind(unsealed, whole_checkpoint, checked=True),
    "once-for-all": Kind(frozen("once-for-all.pth"), foreign_checkpoint, checked=True),
    "mmrazor": Kind(frozen("mmrazor.pth"), foreign_checkpoint, checked=True),
    "legacy": Kind(legacy, foreign_checkpoint),
    "net.config": Kind(
        frozen("specialised/net.config", "specialised/init", "specialised/run.config"),
        specialised, text=True,
    ),
    "run.config": Kind(
        frozen("specialised/run.config", "specialised/init", "specialised/net.config"),
        specialised, text=True,
    ),
    "init": Kind(
        frozen("specialised/init", "specialised/net.config", "specialised/run.config"),
        specialised, checked=True,
    ),
    "proxyless json": Kind(proxyless("net.json"), foreign_checkpoint, text=True),
    "proxyless pth": Kind(proxyless("net.pth"), foreign_checkpoint, checked=True),
    "exported": Kind(frozen("exported.st", "exported.st.json"), exported),
    "exported card": Kind(frozen("exported.st.json", "exported.st"), exported, text=True),
    "records": Kind(frozen("supernet.jsonl"), records, text=True),
    "wide records": Kind(frozen("resnet50.jsonl"), records, text=True),
    "subnets": Kind(frozen("pareto.csv"), subnets, text=True),
    "subnets gz": Kind(zipped, subnets, checked=True),
    "subnet": Kind(frozen("subnet_20.json"), subnet, text=True),
    "subnet yaml": Kind(razor, lambda path: str(read_mmrazor(path, MOBILENET_V3)), text=True),
    "accuracy": Kind(frozen("accuracy.npz", "accuracy.json"), accuracy_model, checked=True),
    "accuracy card": Kind(card_of("accuracy"), accuracy_model, text=True),
    "published": Kind(acc_predictor, published, checked=True),
    "latency": Kind(frozen("latency.npz", "latency.json"), latency_model, checked=True),
    "latency card": Kind(card_of("latency"), latency_model, text=True),
    "lookup table": Kind(frozen("32_lookup_table.yaml"), table, text=True),
    "timings": Kind(timing_file, timings, text=True),
    "metrics": Kind(metrics_file, metrics, text=True),
    "sha256": Kind(recorded, sidecar, checked=True, text=True),
    "lock": Kind(lock_file, lock, text=True),
    "results": Kind(frozen("results.csv"), earlier_search, text=True),
    "jpeg": Kind(picture("a.jpg"), image),
    "png": Kind(picture("a.png"), image, checked=True),
    "png palette": Kind(picture("a.png", "P"), image, checked=True),
    "tiff": Kind(picture("a.tif"), image),
    "webp": Kind(picture("a.webp"), image),
    "bmp": Kind(picture("a.bmp"), image),
    "gif": Kind(picture("a.gif"), image),
    "tar": Kind(tar, archive),
    "eval": Kind(
        frozen("finetuned.pt"),
        command(evaluate.main, "--net", "FILE", "--quiet", output="results.csv"),
    ),
    "eval --subnet": Kind(
        eval_subnet,
        command(evaluate.main, "--net", "FOLDER/supernet.pt", "--subnet", "FILE", "--quiet",
                "--calibration-images", "30", output="results.csv"), text=True,
    ),
    "convert": Kind(
        frozen("once-for-all.pth"),
        command(tools.main, "convert", "FILE", "out.pt", "--to", "mmrazor", output="out.pt"),
        checked=True,
    ),
    "predict": Kind(
        frozen("pareto.csv"),
        command(predict.main, "predict", "--input", "FILE", "--columns", "macs", "--output",
                "out.csv", output="out.csv"), text=True,
    ),
    "run_NAS": Kind(
        frozen("latency.json", "latency.npz"),
        command(search.main, "--target-hardware", "FOLDER/latency.npz", "--compare", "none",
                "--resolutions", "160", "--constraints", "20", "--output", "found",
                output="found/results.csv"), text=True,
    ),
}  # fmt: skip


# --- what comes of it ---


@dataclass
class Result:
    """Outcomes of one kind, how each fault came about, and the slowest reading in seconds."""

    outcomes: Counter[str]
    faults: list[str]
    slowest: float = 0.0


def fuzz(name: str, count: int, seed: int = 0) -> Result:
    """Read ``count`` damaged files of a kind."""
    kind, result = KINDS[name], Result(Counter(), [])
    with tempfile.TemporaryDirectory() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = kind.make(Path(made))
        whole, wanted = path.read_bytes(), kind.read(path)
        for number in range(count):
            data = damaged(whole, f"{seed} {name} {number}", kind.text)
            path.write_bytes(data)
            began = time.monotonic()
            outcome, fault = outcome_of(kind, path, wanted)
            result.slowest = max(result.slowest, time.monotonic() - began)
            result.outcomes[outcome] += 1
            if fault:
                result.faults.append(f"{name} {number} (seed {seed}): {outcome}: {fault}")
    return result


def outcome_of(kind: Kind, path: Path, wanted: Hashable) -> tuple[str, str]:
    """Read a file; returns the outcome and, for a fault, what happened."""
    try:
        found = kind.read(path)
    except (CompofaError, UnreadableImageError) as error:
        long = "\n" in str(error) or len(str(error)) > 700 or not str(error).isprintable()
        return "refused", f"not one plain line: {str(error)[:300]!r}" if long else ""
    except WrongError as error:
        return "wrong", str(error)
    except Exception:  # noqa: BLE001 (whatever gets through is what is looked for)
        lines = traceback.format_exc().strip().split("\n")
        return "traceback", " | ".join(line.strip() for line in (*lines[-3:-1], lines[-1]))[:600]
    if found == wanted:
        return "identical", ""
    return ("wrong", "content under a checksum") if kind.checked else ("changed", "")


def main(argv: list[str] | None = None) -> int:
    """Print the counts of each kind; returns 1 where there are faults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=[*KINDS])
    parser.add_argument("--count", type=int, default=200, help="files per kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    total: Counter[str] = Counter()
    faults = []
    print(f"{'':14}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES) + "  slowest")
    for name in args.kind:
        result = fuzz(name, args.count, args.seed)
        total += result.outcomes
        faults += result.faults
        counts = "".join(f"{result.outcomes[outcome]:11}" for outcome in OUTCOMES)
        print(f"{name:14}{counts}  {result.slowest:6.2f} s", flush=True)
    print(f"{'all':14}" + "".join(f"{total[outcome]:11}" for outcome in OUTCOMES))
    print("\n".join(faults))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
