"""Two workers by torch.distributed (gloo), started by torchrun."""

import socket
from pathlib import Path

import pytest
from engines import TRAIN, EngineTests

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

    def test_restarts_survive_two_deaths(self, folder: Path, whole: Path) -> None:
        """Before anything was saved, and after; without a word about resuming in the command."""
        done = self.start(folder, f"--die 2,5 mark {TRAIN}", "--max-restarts", "2")
        assert done.status == 0, done.err
        assert (folder / "mark").read_text() == "xx"
        assert done.err.count("epoch 1/2: loss") == 1, "what was saved is not done again"
        self.same_weights(folder, whole)
