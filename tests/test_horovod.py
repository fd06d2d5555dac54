"""Two workers by Horovod (gloo), started by horovodrun; ``make horovod`` installs it."""

import re
import sys
from pathlib import Path

import pytest
from engines import TRAIN, EngineTests

pytest.importorskip("horovod.torch", reason="Horovod is not installed: make horovod")
pytestmark = pytest.mark.usefixtures("few_digits")

HOSTS = "#!/bin/sh\necho localhost:1\necho 127.0.0.1:1\n"
ELASTIC = "--min-np 1 --max-np 2 --network-interface lo --host-discovery-script ./hosts"


class TestHorovod(EngineTests):
    @staticmethod
    def launcher(*options: str) -> list[str]:
        # env: horovodrun takes an option --net of the command for one of its own.
        command = ["env", "--", sys.executable]
        return ["horovod.runner.launch", "--gloo", "-np", "2", *options, *command]

    def test_an_elastic_job_survives_a_death(self, folder: Path) -> None:
        """That of worker 0: the other takes its place and goes on from the last saved epoch."""
        (folder / "hosts").write_text(HOSTS)
        (folder / "hosts").chmod(0o755)
        done = self.start(folder, f"--die-first 5 mark {TRAIN}", *ELASTIC.split())
        assert done.status == 0, done.err
        assert (folder / "mark").exists()
        assert done.err.count("epoch 1/2: loss") == 1, "what was saved is not done again"
        assert re.search(r"\b2 worker.*\b1\b", done.err)
        run = folder / "runs" / "run" / "compound-1"
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
        assert (run / "summary.json").exists()
