"""Runs that die, for tests/test_death.py: a warm process that forks a run for each line it reads.

A line is JSON: ``argv`` of ``train_ofa_net.py``, ``log`` (a file for what it says) and maybe
``die``, which says where a ``signal`` comes: ``after`` seconds from outside, or ``at`` a place
below, the ``count``-th time it is reached, to the whole process ``group`` if so. The
answer is the exit status and the seconds that it took, of which after the signal.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from few import shrink_digits

import compofa.data.datasets
import compofa.io.tensors
import compofa.training.run
from compofa.cli import train
from compofa.evaluate import Evaluator
from compofa.training.journal import Journal
from compofa.training.trainer import Trainer


def warm_up() -> None:
    """Import what a run would import later, a second's worth: the first optimiser does, too."""
    import tensorboard.summary.writer.record_writer  # noqa: F401

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])


class Fate:
    """Sends this process, or its group, a signal at a place."""

    def __init__(self, at: str, count: int, number: int, mark: Path, group: bool) -> None:
        self.left, self.number, self.mark, self.group = count, number, mark, group
        owner, name, before = PLACES[at]
        real = getattr(owner, name)
        setattr(owner, name, before(self, real))

    def strike(self, here: bool = True) -> None:
        self.left -= here
        if here and self.left == 0:
            self.mark.write_text(str(time.time()))
            os.kill(-os.getpid() if self.group else os.getpid(), self.number)


def on_entry(fate: Fate, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        fate.strike()
        return real(*args, **keywords)

    return call


def on_exit(fate: Fate, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **keywords: Any) -> Any:
        result = real(*args, **keywords)
        fate.strike()
        return result

    return call


def replacing(name: str, after: bool) -> Callable[[Fate, Callable[..., Any]], Callable[..., Any]]:
    """Strike before or after a file called ``name`` takes its place."""

    def before(fate: Fate, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any) -> None:
            here = Path(target).name == name
            fate.strike(here and not after)
            real(source, target)
            fate.strike(here and after)

        return call

    return before


def half_written(fate: Fate, real: Callable[..., Any]) -> Callable[..., Any]:
    """Strike when half of a checkpoint is written."""

    def call(path: Any, writer: Callable[[Any], None], *rest: Any) -> None:
        class Half:
            def __init__(self, file: Any) -> None:
                self.file = file

            def write(self, data: Any) -> None:
                self.file.write(data[: len(data) // 2])
                self.file.flush()
                fate.strike()
                self.file.write(data[len(data) // 2 :])

        real(path, lambda file: writer(Half(file)), *rest)

    return call


def torn_line(fate: Fate, real: Callable[..., Any]) -> Callable[..., Any]:
    """Strike when half a line of metrics is written."""

    def call(journal: Journal, metrics: Any) -> None:
        if fate.left == 1:
            with journal.path.open("a") as file:
                file.write(json.dumps(metrics)[:20])
        fate.strike()
        real(journal, metrics)

    return call


PLACES: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "data": (compofa.data.datasets, "stratified_split", on_entry),
    "settings": (os, "replace", replacing("config.json", False)),
    "begun": (os, "replace", replacing("config.json", True)),
    "step": (Trainer, "train_step", on_entry),
    "step taken": (Trainer, "update", on_exit),
    "within the optimiser": (torch.Tensor, "add_", on_entry),
    "half a checkpoint": (compofa.io.tensors, "write_atomic", half_written),
    "checkpoint written": (os, "replace", replacing("last.pt", False)),
    "previous linked": (os, "replace", replacing("previous.pt", False)),
    "previous kept": (os, "replace", replacing("previous.pt", True)),
    "checkpoint in place": (os, "replace", replacing("last.pt", True)),
    "best in place": (os, "replace", replacing("best.pt", True)),
    "metrics": (Journal, "write", torn_line),
    "validation": (Evaluator, "accuracy", on_entry),
    "summary": (os, "replace", replacing("summary.json", False)),
}


def child(order: dict[str, Any]) -> int:
    handle = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.setsid()
    die = order.get("die", {})
    if "at" in die:
        mark = Path(order["log"] + ".mark")
        Fate(die["at"], die["count"], die["signal"], mark, die.get("group", False))
    return train.main(order["argv"])


def serve() -> None:
    shrink_digits(100)
    warm_up()
    for line in sys.stdin:
        order, started = json.loads(line), time.time()
        mark = Path(order["log"] + ".mark")
        mark.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = child(order)
            except BaseException:  # noqa: BLE001, a forked process must end here
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        die = order.get("die", {})
        if "after" in die:
            time.sleep(die["after"])
            mark.write_text(str(time.time()))
            os.killpg(pid, die["signal"])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended = time.time()
        late = ended - float(mark.read_text()) if mark.exists() else None
        answer = {"status": status, "seconds": ended - started, "late": late}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    serve()
