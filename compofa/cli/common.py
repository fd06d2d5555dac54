"""What the commands share: option spelling, logging, and errors in one line."""

from __future__ import annotations

import argparse
import ctypes
import io
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from compofa.errors import CompofaError, OtherWorkerError, StoppedError
from compofa.io.untrusted import printable

if TYPE_CHECKING:
    from compofa.distributed.backend import Backend

_log = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """Takes ``--data-path`` and ``--data_path`` alike, shows defaults, and errs in one line.

    For all options, ``type=float`` takes finite numbers only, and texts and paths that begin with
    ``~`` begin with the home folder, also in ``--output=~/runs``, which a shell leaves as it is.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.register("type", None, _expanded)
        self.register("type", Path, lambda text: Path(_expanded(text)))
        self.register("type", float, _finite)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after turning underscores in option names into hyphens."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = map(self._hyphens, words[:end])
        return super().parse_known_args(words, namespace)

    def _hyphens(self, word: str) -> str:
        """Return an option as it was added, and any other word as it is."""
        name, equals, value = word.partition("=")
        known = name.replace("_", "-")
        return known + equals + value if known in self._option_string_actions else word

    def error(self, message: str) -> NoReturn:
        """End with one line and exit status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the layout of descriptions, and names defaults that are worth naming."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


def _expanded(text: str) -> str:
    """Return a text with the home folder in place of a ``~`` that it begins with."""
    found = os.path.expanduser(text)
    if found.startswith("~/") or found == "~":
        raise argparse.ArgumentTypeError(f"expected a home folder, got {text!r} and no HOME")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def sizes(text: str) -> tuple[int, ...]:
    """Read resolutions: ``128``, or several with commas, ``128,160,192``."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected pixels such as 224 or 128,160,192, got {text!r}"
        ) from None


def add_workers(group: argparse._ArgumentGroup) -> None:
    """Add the options of commands that several workers may run together."""
    from compofa.distributed.backend import BACKENDS, TIMEOUT_S

    group.add_argument(
        "--backend",
        metavar="ENGINE",
        help=f"one of {', '.join(BACKENDS)}, to insist on it; by default the one whose launcher "
        "(torchrun, horovodrun, mpirun) started the command",
    )
    group.add_argument(
        "--collective-timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="S",
        help="seconds after which a worker that does not answer ends the job",
    )


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[Backend]:
    """Join the other workers, if any."""
    from compofa.distributed.backend import workers

    cuda = args.device.startswith("cuda")
    _end_with_launcher()
    with workers(args.backend, args.collective_timeout, cuda) as backend:
        only_main_speaks(backend)
        if args.backend is None and backend.size == 1:
            _warn_of_tasks()
        yield backend


def _end_with_launcher() -> None:
    """Let Linux send SIGTERM when torchrun ends: when it is killed, its workers would live on."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _warn_of_tasks() -> None:
    """Warn of tasks that Slurm starts side by side and that know nothing of each other."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    if "SLURM_PROCID" in os.environ and tasks.isdecimal() and int(tasks) > 1:
        _log.warning(
            "Slurm has %s tasks here, but this one works by itself, and the others would do the "
            "same again: start workers that share the work with torchrun, one torchrun a machine",
            tasks,
        )


def only_main_speaks(backend: Backend) -> None:
    """Let workers other than the first log nothing but warnings."""
    for name in ("compofa", "nas"):
        logging.getLogger(name).setLevel(logging.NOTSET if backend.is_main else logging.WARNING)


class _Printable(logging.Formatter):
    """Lines of the log as a terminal may show them, whatever names from files stand in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the text of a record."""
        return "\n".join(map(printable, super().format(record).split("\n")))


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, prog: str) -> int:
    """Call ``main``, turning what a user can mend into one line and exit status 1.

    A run that a signal ended has 128 and the signal's number: 143 for SIGTERM, 130 for Ctrl-C, and
    141 for output to a pipe that nobody reads any more.

    Returns:
        The exit status.
    """
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_Printable())
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    logging.captureWarnings(True)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that is not UTF-8 can be printed, too
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _status(main, argv, prog)
    except SystemExit as end:  # of the parser, which may have printed its help
        end.code = _flushed(prog, end.code or 0)
        raise
    status = _flushed(prog, status)
    if status == 0:
        _leave()
    return status


def _status(
    main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, prog: str
) -> int:
    """Call ``main`` and return the exit status; what went wrong is said."""
    try:
        main(argv)
    except OtherWorkerError:
        return 1
    except StoppedError as error:
        _say(f"{prog}: {error}")
        return error.status
    except CompofaError as error:
        _say(f"{prog}: error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        _say(f"{prog}: interrupted")
        return 130
    except RuntimeError as error:
        # Torch raises this wherever the process is when one of its data workers is killed.
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
        return 1
    except BrokenPipeError:
        return 141
    except OSError as error:  # a disk, a limit or permissions, wherever it was met
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _say(f"{prog}: error: {where}{error.strerror or error}")
        return 1
    return 0


def _flushed(prog: str, status: int) -> int:
    """Send off what was printed; returns the exit status, another one where that failed."""
    if sys.stdout is None:
        return status
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # what is left goes nowhere, lest the interpreter's end complains
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return status or 141
        _say(f"{prog}: error: cannot write to the standard output: {error.strerror or error}")
        return status or 1
    return status


def _say(line: str) -> None:
    """Write a line to the standard error, if there is one that takes it."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"{printable(line)}\n")


def _leave() -> None:
    """End here a worker that torchrun started, without the interpreter's own end.

    A thread of gloo that still lets go of a tensor while the interpreter ends is ended by it in the
    midst of C++, which aborts the process: a job that was done would count as failed. It was two of
    some fifty resumed runs on a busy machine.
    """
    from compofa.distributed.backend import launcher

    if launcher(os.environ) == "torch":
        sys.stderr.flush()
        os._exit(0)
