"""Every command and the code of the README run, on tiny data where they name a folder."""

import multiprocessing
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from few import shrink_digits
from PIL import Image

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("python ")
]
HEAVY = [
    "compofa.io.export", "compofa.training.run", "matplotlib.figure", "pytest", "scipy.optimize",
    "sklearn.datasets", "torch._dynamo", "torch.utils.tensorboard",
]  # fmt: skip
COMMON = "--epochs 1 --batch-size 256 --width-mult 0.25 --calibration-images 8"
TRAIN = f"{COMMON} --dynamic-batch-size 1 --device cpu --quiet --image-size "
QUICK = {
    "--all": "--samples 1",
    "--samples 5": "--samples 1",
    "8 16 --samples 40": "8 --samples 24",
}


def tiny(command):
    """Return the words of a command, cut down to seconds."""
    for slow, quick in QUICK.items():
        command = command.replace(slow, quick)
    script, *words = shlex.split(command)[1:]
    if script == "train_ofa_net.py":
        words += (TRAIN + ("32" if "imagenet" in command else "8")).split()
        if "finetune" in words:  # its network is that of a checkpoint
            place = words.index("--width-mult")
            del words[place : place + 2]
    elif script == "eval_sampled_config.py":
        words += ["--calibration-images", "16", "--device", "cpu", "--quiet"]
        words += [] if "--samples" in words else ["--samples", "1"]
    elif script == "run_NAS.py":
        words += ["--quiet"]
    return [str(ROOT / script) if script.endswith(".py") else script, *words]


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


def test_the_readme_shows_commands():
    scripts = {command.split()[1] for command in COMMANDS}
    assert scripts >= {"train_ofa_net.py", "eval_sampled_config.py", "run_NAS.py"}


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
    teacher = "python train_ofa_net.py --task teacher --fixed_kernel --heuristic simple"
    for command in [teacher, *COMMANDS]:  # else the first command trains a whole teacher
        process = context.Process(target=python, args=(tiny(command), folder, tmp_path / "said"))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{command}: {(tmp_path / 'said').read_text()[-400:]}"


def test_the_code_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
