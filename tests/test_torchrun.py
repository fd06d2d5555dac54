"""Two workers by torch.distributed (gloo), started by torchrun."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engines import HERE, LONGEST_S, TRAIN, EngineTests

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
        assert "--resume" in last
