"""What the tests of several workers start in each of them: a command on a few digits.

``worker.py [--die N MARK] COMMAND…`` with a command of ``train`` and its options, ``collect``
(``python -m nas collect``), or ``steps FILE BATCH_SIZE NET…`` (a few steps; what they lead to is
written to FILE). With ``--die`` the last of several workers is killed at its N-th step or
measurement, once: MARK is made then; with ``--die-first`` the first is, and with ``--stop`` the
last is stopped. Training leaves a digest of each worker's weights.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from few import shrink_digits

from compofa.cli import train
from compofa.data import load_dataset
from compofa.distributed.backend import Backend
from compofa.distributed.launch import detect_backend, process_group
from compofa.evaluate import Evaluator
from compofa.nn.extract import extract
from compofa.nn.supernet import Supernet
from compofa.training.config import TrainConfig
from compofa.training.trainer import Trainer
from nas.cli import tools as nas

RANK = {"horovod": "HOROVOD_RANK", "torch": "RANK", "none": "NONE"}
SIZE = {"horovod": "HOROVOD_SIZE", "torch": "WORLD_SIZE", "none": "NONE"}


def rank_and_size() -> tuple[int, int]:
    engine = detect_backend(os.environ)
    return int(os.environ.get(RANK[engine], 0)), int(os.environ.get(SIZE[engine], 1))


def fatal(how: str, when: int, mark: Path) -> None:
    """Let a worker get a signal at a step or measurement, counted from 1."""
    calls = []

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            calls.append(None)
            rank, size = rank_and_size()
            chosen = size > 1 and rank == (0 if how == "--die-first" else size - 1)
            if chosen and len(calls) == when and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGSTOP if how == "--stop" else signal.SIGKILL)
            return real(*args, **keywords)

        return call

    Trainer.train_step = deadly(Trainer.train_step)
    Evaluator.measure = deadly(Evaluator.measure)


def leave_digests() -> None:
    """Let every worker write what weights it ends with."""
    real = Trainer.validate

    def validate(self: Trainer) -> Any:
        tensors = self.net.state_dict().values()
        digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors))
        Path(f"digest-{self.backend.rank}").write_text(digest.hexdigest())
        return real(self)

    Trainer.validate = validate


def steps(backend: Backend, net: str, batch_size: int, **settings: Any) -> dict[str, Any]:
    """Train one epoch with frozen BN statistics, and validate."""
    config = TrainConfig(
        net=net, batch_size=batch_size, image_size=(8, 12), dropout=0.0, epochs=1, lr=0.05,
        calibration_images=30, width_mult=0.1, scale_lr=False, **settings,
    ).resolved()  # fmt: skip
    splits = load_dataset("digits")
    spec = config.network(len(splits.classes))
    teacher = extract(Supernet(spec, seed=99).eval(), spec.space.largest)
    net = Supernet(spec, config.seed)
    begun = {name: value.clone() for name, value in net.state_dict().items()}
    trainer = Trainer(config, net, teacher, splits, backend)
    net.train = lambda mode=True: Supernet.train(net, False)  # half a batch has other moments
    stats = trainer.train_epoch(0, bar=False)
    weights = net.state_dict()
    return {"begun": begun, "weights": weights, "stats": vars(stats), "figures": trainer.validate()}


def main() -> int:
    torch.set_num_threads(1)
    shrink_digits()
    words = sys.argv[1:]
    if words[0] in ("--die", "--die-first", "--stop"):
        fatal(words[0], int(words[1]), Path(words[2]))
        words = words[3:]
    command, *words = words
    if command == "train":
        leave_digests()
        return train.main(words)
    if command == "collect":
        return nas.main(["collect", *words])
    with process_group() as backend:
        found = {net: steps(backend, net, int(words[1])) for net in words[2:]}
        found["half"] = steps(backend, words[2], int(words[1]), fp16_allreduce=True)
        torch.save(found, f"{words[0]}{backend.rank}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
