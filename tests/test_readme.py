"""README.md and docs/*.md: every command and code block runs, on tiny data; every link resolves.

The pages share one working folder, in order, so that a command finds what an earlier one wrote. A
command that several pages show is run once. ``<!-- not run: REASON -->`` before a block exempts it.
"""

import multiprocessing
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from few import shrink_digits
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
LAUNCHER = re.compile(r"torchrun (?:--nproc-per-node \d+ )?|horovodrun .*?(?=python )")
HEAVY = [
    "compofa.io.export", "compofa.training.run", "matplotlib.figure", "pytest", "scipy.optimize",
    "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard",
]  # fmt: skip
TRAIN = (
    "--epochs 1 --batch-size 256 --width-mult 0.25 --calibration-images 8 --dynamic-batch-size 1 "
    "--device cpu --quiet --image-size"
)
EVALUATE = "--calibration-images 16 --device cpu --quiet"
QUICK = {
    "compofa-digits --samples 60": "compofa-digits --samples 50 --resolutions 16",
    "phone/measure.py": "phone/measure.py --rounds 1 --repeats 2 --threads 1",
    "--all": "--samples 1",
    "--samples 5 ": "--samples 1 ",
    "--samples 500": "--samples 24 --calibration-images 8",
    "16 --samples 40": "16 --samples 24",
    "--net compofa --resolutions 160": "--net compofa-small --resolutions 16",
    "--net compofa --target-hardware tables --resolutions 160": "--net compofa-small "
    "--target-hardware tables --resolutions 16 --accuracy-predictor predictor.npz",
}


class Command(NamedTuple):
    page: str
    line: str


def blocks(page: Path) -> Iterator[re.Match]:
    return (block for block in BLOCK.finditer(page.read_text()) if not block["reason"])


def commands() -> list[Command]:
    """Return the Python commands of all pages, each once, those of launchers as one process."""
    found: dict[str, str] = {}
    for page in PAGES:
        for block in blocks(page):
            for line in block["text"].splitlines() if not block["language"] else ():
                line = line.split("  #")[0].strip()
                if line.startswith(("torchrun", "horovodrun")):
                    line = "python " + LAUNCHER.sub("", line, count=1).removeprefix("python ")
                if line.startswith("python "):
                    found.setdefault(line, page.name)
    return [Command(page, line) for line, page in found.items()]


def tiny(command: str) -> list[str]:
    """Return the words of a command, cut down to seconds."""
    for slow, quick in QUICK.items():
        command = f"{command} ".replace(slow, quick).strip()
    script, *words = shlex.split(command)[1:]
    if script == "train_ofa_net.py":
        words += [*TRAIN.split(), "32" if "DIR" in words else "8"]
        words += [] if "--resume" in words else ["--overwrite"]
        if "finetune" in words:  # its network is that of a checkpoint
            place = words.index("--width-mult")
            del words[place : place + 2]
    elif script == "eval_sampled_config.py":
        chosen = {"--samples", "--subnet"} & {*words}
        words += [*EVALUATE.split(), *([] if chosen else ["--samples", "1"])]
    elif script == "run_NAS.py":
        measured = any(word.endswith(".pt") for word in words) and "--samples" not in words
        words += ["--quiet", *(["--samples", "24"] if measured else [])]
    elif "benchmarks.scale" in words:
        words += ["--read", "297"]
    return [str(ROOT / script) if (ROOT / script).is_file() else script, *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with what the commands name: class folders in DIR."""
    path = tmp_path_factory.mktemp("readme")
    generator = np.random.default_rng(0)
    for part, images in (("train", 8), ("val", 2)):
        for name in ("cat", "dog"):
            place = path / "DIR" / part / name
            place.mkdir(parents=True)
            for index in range(images):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{index}.png")
    return path


def test_every_script_is_shown():
    scripts = {command.line.split()[1] for command in commands()}
    assert scripts >= {"train_ofa_net.py", "eval_sampled_config.py", "run_NAS.py", "-m"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_read(page):
    fences = re.findall(r"^```", page.read_text(), re.MULTILINE)
    assert len(fences) == 2 * len(BLOCK.findall(page.read_text()))


def python(words, folder, said):
    """Do what ``python WORDS`` does in ``folder``; what it prints goes to the file ``said``.

    The digits are few; the rest is as in a new process.
    """
    shrink_digits()
    os.chdir(folder)
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def test_commands_run_in_their_order(folder, tmp_path):
    context = multiprocessing.get_context("forkserver")  # one that imported this for all of them
    context.set_forkserver_preload(HEAVY)
    teacher = "python train_ofa_net.py --task teacher"
    for page, line in [Command("", teacher), *commands()]:  # else a whole teacher is trained
        process = context.Process(target=python, args=(tiny(line), folder, tmp_path / "said"))
        process.start()
        process.join()
        said = (tmp_path / "said").read_text()
        assert process.exitcode == 0, f"{page}: {line}: {said[-400:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for block in blocks(page):
        if block["language"] == "python" and page.name != "extending.md":  # has its own test
            exec(compile(block["text"], page.name, "exec"), {})


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"(?:^|`| {4})make ([a-z]+)", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), (page.name, target)


def test_reference_builds(tmp_path):
    """One package that loads its names lazily, and one that imports them."""
    pytest.importorskip("pdoc")
    build = [sys.executable, ROOT / "tools" / "api_reference.py", tmp_path]
    subprocess.run([*build, "compofa.data", "compofa.space"], check=True, cwd=ROOT)
    assert "load_dataset" in (tmp_path / "compofa" / "data.html").read_text()
    assert (tmp_path / "compofa" / "space" / "genes.html").exists()


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert [(entry["year"], len(entry["authors"])) for entry in citation["references"]] == [
        (2021, 4),
        (2020, 5),
    ]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL),
                          re.MULTILINE)  # fmt: skip
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_resolve(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
