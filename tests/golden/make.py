"""Make the golden files: ``python tests/golden/make.py losses`` or ``... files``.

``losses.json`` is made anew when a change of the numbers is wanted, and the commit says why. The
files of ``v0.1`` were written by the first version, are never made again, and every later version
must read them; a version that writes another form freezes its own in a folder of its own.
"""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY: dict[str, Any] = {
    "epochs": 2,
    "image_size": (8, 12),
    "batch_size": 30,
    "calibration_images": 30,
    "validate_every": 2,
    "threads": 1,
}
"""Six steps on 90 digits."""
TASKS: dict[str, dict[str, Any]] = {
    "progressive": {"task": "progressive", "width_mult": 0.1},
    "compound": {"task": "compound", "width_mult": 0.1},
    "compound-2": {"task": "compound", "phase": 2, "width_mult": 0.1},
    "elastic": {"task": "compound", "net": "compofa-elastic-small", "width_mult": 0.1},
    "supernet": {"task": "supernet", "width_mult": 0.1},
    "finetune": {"task": "finetune", "subnet": "smallest"},
}
"""Each begins in the folder of those before it, as far as it needs what they trained."""


RESUMABLE: dict[str, Any] = {**TINY, "task": "supernet", "width_mult": 0.1}
"""A run without a teacher's file."""


def machine() -> dict[str, str]:
    """Return what the last bits of a loss depend on."""
    import torch

    return {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}


def curves(folder: Path) -> dict[str, list[float]]:
    """Train every task for six steps and return the mean loss of each epoch, by phase."""
    from compofa.training.config import TrainConfig
    from compofa.training.run import train

    found = {}
    for name, settings in TASKS.items():
        output = folder / ("compound" if name == "compound-2" else name)
        more = {}
        if settings["task"] == "compound":
            more = {"teacher_path": str(folder / "progressive/teacher/best.pt")}
        elif name == "finetune":
            more = {"init_path": str(folder / "compound/compound-1/best.pt")}
        result = train(TrainConfig(**TINY, **settings, **more), output, bar=False)
        phases = [result.best.parent]
        if name == "progressive":
            phases = sorted(path for path in output.iterdir() if path.is_dir())
        for phase in phases:
            lines = (phase / "metrics.jsonl").read_text().splitlines()
            losses = [json.loads(line)["train"]["loss"] for line in lines]
            validation = json.loads(lines[-1])["validation"].values()
            found[f"{name}/{phase.name}"] = losses + [figures["loss"] for figures in validation]
    return found


def genes(network: str) -> list[list[int]]:
    """Return the genes of eight subnets that seed 0 draws from a network's space."""
    from compofa.networks.zoo import network_spec

    space = network_spec(network, resolutions=(160, 192, 224)).space
    return space.sample_genes(np.random.default_rng(0), 8).tolist()


def predictions(folder: Path) -> dict[str, list[float]]:
    """Return what the models of a folder say of its subnets, and the shipped ones of theirs."""
    from compofa.io.records import read_records
    from nas.accuracy.predictor import load_accuracy_model
    from nas.cost.devices import load_cost
    from nas.search import pipeline
    from nas.tables import read_subnets

    subnets = [record.subnet for record in read_records(folder / "supernet.jsonl")[:5]]
    small = pipeline.named_space("compofa-small", None, (8, 12))[1].arrays_of(subnets)
    large = read_subnets(folder / "pareto.csv", [])[0]
    backbone, space, classes = pipeline.named_space("compofa", None)
    found = {"own top1": load_accuracy_model(folder / "accuracy.npz").predict(small)}
    found["shipped top1"] = load_accuracy_model("compofa").predict(large)
    for name in (folder / "latency.npz", "note10", "v100-b64"):
        found[f"{Path(name).stem} ms"] = load_cost(name, backbone, classes, space=space)(large)
    return {name: np.round(values, 6).tolist() for name, values in found.items()}


def make_losses() -> None:
    """Write ``losses.json``."""
    from few import shrink_digits

    shrink_digits()
    with tempfile.TemporaryDirectory() as folder:
        data = {"machine": machine(), "curves": curves(Path(folder))}
    (HERE / "losses.json").write_text(json.dumps(data, indent=1) + "\n")


def make_genes() -> None:
    """Write ``genes.json``."""
    from compofa.networks.zoo import NETWORKS

    lines = [f'"{name}": {json.dumps(genes(name))}' for name in NETWORKS]
    (HERE / "genes.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def coarse(value: Any) -> Any:
    """Return nested data with tensors of few different numbers, which compress well."""
    import torch

    if isinstance(value, torch.Tensor):
        return (value * 8).round() / 8 if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: coarse(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(coarse(item) for item in value)
    return value


def make_files(folder: Path) -> None:
    """Write one file of every form, and ``expected.json`` with what reading each must give."""
    from few import shrink_digits

    from compofa.cli import evaluate, tools
    from compofa.errors import StoppedError
    from compofa.io.open import open_network
    from compofa.io.tensors import checksum, read_safely, write_tensors
    from compofa.training.config import TrainConfig
    from compofa.training.run import train
    from compofa.training.shutdown import Stopping
    from nas.cli import search
    from nas.cli import tools as nas
    from nas.cost import measured as measuring
    from nas.cost.timing import Settings

    shrink_digits()
    folder.mkdir()
    work = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    os.chdir(work)
    expected: dict[str, Any] = {"weights": {}, "printed": {}}

    def freeze(path: Path, name: str) -> None:
        """Keep a checkpoint, its numbers coarse and whatever it says otherwise as it is."""
        write_tensors(path, coarse(read_safely(path)))
        (folder / f"{name}.xz").write_bytes(lzma.compress(path.read_bytes(), preset=9))
        expected["weights"][name] = checksum(dict(open_network(path).checkpoint.weights))

    def said(name: str, main: Callable[[list[str]], int], *argv: str) -> None:
        out = io.StringIO()
        with redirect_stdout(out):
            assert main(list(argv)) == 0, argv
        expected["printed"][name] = out.getvalue()

    best: dict[str, Path] = {}
    for task, net, name in (
        ("compound", None, "supernet.pt"),
        ("supernet", "ofa-resnet50-small", "resnet50.pt"),
        ("supernet", "ofa-proxyless-small", "proxyless.pt"),
    ):
        config = TrainConfig(**TINY, task=task, net=net, width_mult=0.1)
        best[name] = train(config, name, bar=False).best.absolute()
        shutil.copy(best[name], work / f"copy-of-{name}")
        freeze(best[name], name)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from few import AfterEpoch

    stop = Stopping()
    with suppress(StoppedError):  # after the first step of the second epoch
        train(
            TrainConfig(**RESUMABLE), "begun", bar=False, stop=stop,
            callbacks=[AfterEpoch(lambda done: setattr(stop, "requested", signal.SIGTERM))],
        )  # fmt: skip
    freeze(work / "begun/supernet-1/last.pt", "resumable.pt")
    for text in ("config.json", "metrics.jsonl"):
        shutil.copy(work / "begun/supernet-1" / text, folder)
    single = TrainConfig(
        **TINY, task="finetune", subnet="smallest", init_path="copy-of-supernet.pt"
    )
    best["finetuned.pt"] = train(single, "single", bar=False).best.absolute()
    freeze(best["finetuned.pt"], "finetuned.pt")
    for to, name in (("ofa", "once-for-all.pth"), ("mmrazor", "mmrazor.pth")):
        said(f"convert {to}", tools.main, "convert", str(best["supernet.pt"]), name, "--to", to)
        freeze(work / name, name)
    single = str(best["finetuned.pt"])  # which freezing has made coarse
    said("convert single", tools.main, "convert", single, "specialised", "--to", "ofa")
    shutil.copytree("specialised", folder / "specialised")
    init = folder / "specialised/init"
    init.with_name("init.xz").write_bytes(lzma.compress(init.read_bytes(), preset=9))
    init.unlink()
    said("export", tools.main, "export", single, "--to", "safetensors", "--output", "exported.st")
    (folder / "exported.st.xz").write_bytes(lzma.compress(Path("exported.st").read_bytes()))
    shutil.copy("exported.st.json", folder)

    for net in ("supernet", "resnet50", "proxyless"):
        said(
            f"collect {net}", nas.main, "collect", "--net", f"copy-of-{net}.pt",
            "--samples", "40" if net == "supernet" else "3", "--calibration-images", "30",
            "--resolutions", "8", "12", "--output", f"{net}.jsonl", "--quiet",
        )  # fmt: skip
        shutil.copy(f"{net}.jsonl", folder)
    said(
        "fit-accuracy",
        nas.main,
        "fit-accuracy",
        "--input",
        "supernet.jsonl",
        "--output",
        "accuracy.npz",
    )
    said("eval", evaluate.main, "--net", "copy-of-supernet.pt", "--samples", "3",
         "--calibration-images", "30", "--output", "evaluated.csv", "--quiet")  # fmt: skip
    shutil.copy("evaluated.csv", folder)
    said("search", search.main, "--target-hardware", "note10", "--output", "found")
    for path in ("results.csv", "subnet_20.json"):
        shutil.copy(Path("found") / path, folder)
    rng = np.random.default_rng(0)
    rows = (Path("found") / "pareto.csv").read_text().splitlines()
    (folder / "pareto.csv").write_text("\n".join(rows[:20]) + "\n")
    table = ["ks,e,d,r,latency_ms"] + [
        ",".join([*row.split(",")[1:5], f"{20 + rng.normal():.3f}"]) for row in rows[1:120]
    ]
    Path("latency.csv").write_text("\n".join(table) + "\n")
    said(
        "fit-latency", nas.main, "fit-latency", "--input", "latency.csv", "--output", "latency.npz"
    )
    for name in ("accuracy", "latency"):
        for suffix in (".npz", ".json"):
            shutil.copy(name + suffix, folder)
    with patch.object(
        measuring, "Settings", partial(Settings, rounds=1, visit_ms=0.01, networks=3)
    ):
        said("measure", nas.main, "measure", "--net", "compofa-small", "--resolutions", "32",
             "--output", "tables", "--quiet")  # fmt: skip
    shutil.copy("tables/32_lookup_table.yaml", folder)
    shutil.copy(next(Path("cache").rglob("latency-*.jsonl")), folder / "timings.jsonl")
    expected["predictions"] = predictions(folder)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    what = {"losses": make_losses, "genes": make_genes, "files": lambda: make_files(HERE / "v0.1")}
    what[sys.argv[1]]()
