"""What must hold for every engine: real jobs of two workers, some of which are killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from worker import steps

from compofa.distributed.backend import SingleProcess
from compofa.io.checkpoint import load_checkpoint
from compofa.training.config import TrainConfig
from compofa.training.run import train

HERE = Path(__file__).parent
NETS = ("compofa-small", "ofa-small")
TRAIN = (
    "train --name run --epochs 2 --width-mult 0.1 --image-size 8,12 --batch-size 15 --lr 0.05 "
    "--calibration-images 30 --validate-every 1 --dynamic-batch-size 2 --device cpu --quiet "
    "--teacher-path teacher.pt --ema 0.9 --mixup 0.2 --balanced-sampling --clip-grad-norm 5"
)
COLLECT = (
    "collect --samples 8 --resolutions 8,12 --calibration-images 30 --device cpu --quiet "
    "--output records.jsonl --net=tiny.pt"
)
LONGEST_S = 240
"""Seconds after which a job hangs, on a busy machine."""
BOUND_S = 60
"""Seconds in which a job must have ended after a worker's death."""


class Job(NamedTuple):
    status: int
    out: str
    err: str


class EngineTests:
    """Tests of an engine; a subclass says how its launcher starts two ranks."""

    @staticmethod
    def launcher(*options: str) -> list[str]:
        """Return the launcher's module and arguments, up to the script."""
        raise NotImplementedError

    @classmethod
    def start(cls, folder: Path, words: str, *options: str) -> Job:
        """Run ``worker.py`` with ``words`` in two workers, within ``folder``."""
        command = [sys.executable, "-m", *cls.launcher(*options), str(HERE / "worker.py")]
        done = subprocess.run(
            [*command, *words.split()],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(HERE.parent)},
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST_S,
        )
        return Job(done.returncode, done.stdout, done.stderr)

    @pytest.fixture(scope="class")
    @classmethod
    def teacher(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("teacher")
        config = TrainConfig(
            task="teacher", epochs=1, warmup_epochs=0, image_size=(8,), batch_size=45,
            width_mult=0.1, calibration_images=30,
        )  # fmt: skip
        return train(config, folder, bar=False).best

    @pytest.fixture
    def folder(self, tmp_path: Path, teacher: Path) -> Path:
        (tmp_path / "teacher.pt").write_bytes(teacher.read_bytes())
        return tmp_path

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Path:
        """The folder of a run of two workers that was never interrupted."""
        folder = tmp_path_factory.mktemp("whole")
        (folder / "teacher.pt").write_bytes(teacher.read_bytes())
        done = cls.start(folder, TRAIN)
        assert done.status == 0, done.err
        (folder / "out").write_text(done.out)
        (folder / "err").write_text(done.err)
        return folder

    def test_half_a_batch_each_is_a_whole_one(self, tmp_path: Path) -> None:
        """The gradient of the mean over all images: for coupled and free choices, four steps."""
        done = self.start(tmp_path, f"steps found 11 {' '.join(NETS)}")
        assert done.status == 0, done.err
        ranks = [torch.load(tmp_path / f"found{r}", weights_only=True) for r in range(2)]
        for net in NETS:
            alone = steps(SingleProcess(), net, 22)
            for name, value in alone["weights"].items():
                for found in ranks:
                    torch.testing.assert_close(
                        found[net]["weights"][name], value, rtol=1e-5, atol=1e-7, msg=name
                    )
            moved = max(
                float((value - alone["begun"][name]).abs().max())
                for name, value in alone["weights"].items()
            )
            assert moved > 1e-4, "a thousand times the tolerance"
            one, two = (found[net] for found in ranks)
            assert one["stats"]["loss"] == pytest.approx(alone["stats"]["loss"], rel=1e-5)
            assert one["stats"]["top1"] == pytest.approx(alone["stats"]["top1"])
            assert one["stats"]["loss"] == two["stats"]["loss"], "of all workers"
            assert one["figures"] == two["figures"]
            for name, figures in alone["figures"].items():
                assert one["figures"][name] == pytest.approx(figures, rel=1e-3)
        half, full = (ranks[0][key]["weights"] for key in ("half", NETS[0]))
        apart = max(float((half[name] - value).abs().max()) for name, value in full.items())
        assert 0 < apart < 1e-4, "half precision on the way, and no more than that"

    def test_a_real_run(self, whole: Path) -> None:
        digests = [(whole / f"digest-{rank}").read_text() for rank in range(2)]
        assert digests[0] == digests[1], "the same weights on both workers"
        assert (whole / "out").read_text().count("next: python eval") == 1
        assert (whole / "err").read_text().count("epoch 1/2: loss") == 1
        run = whole / "runs" / "run" / "compound-1"
        assert {path.name for path in run.iterdir()} == {
            "best.pt", "last.pt", "previous.pt", "config.json", "metrics.jsonl", "summary.json",
            "tensorboard",
        }  # fmt: skip
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
        assert len(list((run / "tensorboard").iterdir())) == 1
        assert load_checkpoint(run / "last.pt").training["workers"] == 2

    def same_weights(self, folder: Path, whole: Path) -> None:
        mine, theirs = (
            load_checkpoint(f / "runs" / "run" / "compound-1" / "last.pt") for f in (folder, whole)
        )
        averages = [net.training["trainer"]["average"] for net in (mine, theirs)]
        for found, expected in ((mine.weights, theirs.weights), averages):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert torch.equal(found[name], value), name
