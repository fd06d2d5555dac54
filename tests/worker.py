"""What the tests of several workers start in each of them: a command on a few digits.

``worker.py [--die N MARK] COMMAND…`` with a command of ``train`` and its options, ``collect``
(``python -m nas collect``), or ``steps FILE`` (a few steps, the weights written to FILE). With
``--die`` the last worker is killed (with ``--stop`` stopped) at its N-th step or measurement, once:
MARK is made then.
"""

import os
import signal
import sys
import time
from pathlib import Path

import sklearn.datasets
import torch
from sklearn.utils import Bunch

from compofa.cli import nas, train
from compofa.data import load_dataset
from compofa.evaluate import Evaluator
from compofa.extract import extract
from compofa.supernet import Supernet
from compofa.training.backends import workers
from compofa.training.config import TrainConfig
from compofa.training.trainer import Trainer


def few_digits() -> None:
    """150 digits, of which 90 to train on, as in the other tests."""
    data = sklearn.datasets.load_digits()
    few = Bunch(images=data.images[:150], target=data.target[:150])
    sklearn.datasets.load_digits = lambda: few


def fatal(how: int, when: int, mark: Path) -> None:
    """Let the last worker get a signal at a step or measurement, counted from 1."""
    calls = []

    def deadly(real):
        def call(self, *args, **keywords):
            calls.append(None)
            rank, size = (int(os.environ.get(f"HOROVOD_{n}") or os.environ.get(t, 0))
                          for n, t in (("RANK", "RANK"), ("SIZE", "WORLD_SIZE")))  # fmt: skip
            if len(calls) == when and rank == size - 1 and not mark.exists():
                mark.write_text(str(time.time()))
                os.kill(os.getpid(), how)
            return real(self, *args, **keywords)

        return call

    Trainer.train_step = deadly(Trainer.train_step)
    Evaluator.measure = deadly(Evaluator.measure)


def steps(path: Path, net: str, batch_size: int, **settings: object) -> None:
    """Train one epoch with frozen BN statistics; every worker writes its weights."""
    with workers() as backend:
        config = TrainConfig(
            net=net, batch_size=batch_size, image_size=(8, 12), dropout=0.0, epochs=1,
            calibration_images=30, width_mult=0.25, scale_lr=False, lr=0.05, **settings,
        ).resolved()  # fmt: skip
        splits = load_dataset("digits")
        spec = config.network(len(splits.classes))
        teacher = extract(Supernet(spec, seed=99).eval(), spec.space.largest)
        net = Supernet(spec, config.seed)
        trainer = Trainer(config, net, teacher, splits, backend)
        net.train = lambda mode=True: Supernet.train(net, False)  # half a batch has other moments
        stats = trainer.train_epoch(0, bar=False)
        figures = trainer.validate()
        found = {"weights": net.state_dict(), "stats": vars(stats), "figures": figures}
        torch.save(found, path.with_name(f"{path.name}{backend.rank}"))


def main() -> int:
    torch.set_num_threads(1)
    few_digits()
    words = sys.argv[1:]
    if words[0] in ("--die", "--stop"):
        how = signal.SIGKILL if words[0] == "--die" else signal.SIGSTOP
        fatal(how, int(words[1]), Path(words[2]))
        words = words[3:]
    command, *words = words
    if command == "train":
        return train.main(words)
    if command == "collect":
        return nas.main(["collect", *words])
    path, net, batch_size, *rest = words
    settings = dict(word.split("=") for word in rest)
    steps(Path(path), net, int(batch_size), **{k: v == "True" for k, v in settings.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
