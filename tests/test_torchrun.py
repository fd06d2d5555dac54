"""Two workers by torch.distributed (gloo), started by torchrun."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engines import BOUND_S, COLLECT, HERE, LONGEST_S, TRAIN, EngineTests
from test_trained import tiny_checkpoint

from compofa.io.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("few_digits")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class TestTorchrun(EngineTests):
    @staticmethod
    def launcher(*options: str) -> list[str]:
        run = ["torch.distributed.run", "--nproc-per-node", "2"]
        return [*run, "--master-port", str(free_port()), *options]

    def test_a_killed_worker_ends_the_job_which_resumes(self, folder: Path, whole: Path) -> None:
        done = self.start(folder, f"--die 6 mark {TRAIN} --save-minutes 0")
        assert done.status != 0 and "epoch 1/2" in done.err
        saved = load_checkpoint(folder / "runs" / "run" / "compound-1" / "last.pt").training
        assert 0 < saved["trainer"]["tally"]["steps"] < 3, "within an epoch of three steps"
        assert time.time() - (folder / "mark").stat().st_mtime < BOUND_S
        done = self.start(folder, f"{TRAIN} --resume")
        assert done.status == 0, done.err
        self.same_weights(folder, whole)

    def test_collecting_loses_nothing(self, tmp_path: Path) -> None:
        from nas.cli.tools import main

        tiny_checkpoint(tmp_path / "tiny.pt")
        done = self.start(tmp_path, f"--die 4 mark {COLLECT}")
        assert done.status != 0 and (tmp_path / "mark").exists()
        file = tmp_path / "records.jsonl"
        kept = file.read_text()
        assert len(kept.splitlines()) == 6, "three rounds of two"
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert main(COLLECT.split()) == 0
            found = file.read_text()
            file.unlink()
            assert main(COLLECT.split()) == 0
        assert found.startswith(kept) and file.read_text() == found, "the file of one worker"

    def test_restarts_survive_a_death(self, folder: Path, whole: Path) -> None:
        """Without a word about resuming in the command."""
        done = self.start(folder, f"--die 5 mark {TRAIN}", "--max-restarts", "1")
        assert done.status == 0, done.err
        assert (folder / "mark").exists()
        assert done.err.count("epoch 1/2: loss") == 1, "what was saved is not done again"
        self.same_weights(folder, whole)

    def test_a_worker_that_hangs_ends_the_other(self, folder: Path) -> None:
        """Without a launcher that would end it: after the time that was given, in one line."""
        command = [sys.executable, str(HERE / "worker.py"), "--stop", "2", "mark", *TRAIN.split()]
        given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
        first, hung = (
            subprocess.Popen(
                [*command, "--collective-timeout", "5"],
                cwd=folder,
                env=os.environ | given | {"RANK": rank, "PYTHONPATH": str(HERE.parent)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        )
        try:
            told = first.communicate(timeout=LONGEST_S)[1]
            waited = time.time() - (folder / "mark").stat().st_mtime
        finally:
            for process in (first, hung):
                process.kill()
                process.communicate()
        assert first.returncode == 1 and 4 < waited < 40
        last = told.splitlines()[-1]
        assert last.startswith("train_ofa_net.py: error: ") and "0 of 2" in last
        assert "another rank died or timed out" in last and "resume" in last
