"""Shared by all commands: option parsing, logging, one-line errors and exit statuses."""

from __future__ import annotations

import argparse
import ctypes
import io
import logging
import math
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from compofa.cli.program import as_called
from compofa.errors import CompofaError, OtherWorkerError, StoppedError, did_you_mean
from compofa.io.untrusted import printable

if TYPE_CHECKING:
    from compofa.distributed.backend import Backend

_log = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """Argument parser with hyphens or underscores in option names and one-line errors.

    ``--data-path`` and ``--data_path`` are the same option, and help shows defaults. ``type=float``
    accepts finite numbers only. A leading ``~`` in a string or path expands to the home folder,
    including in ``--output=~/runs``, where a shell does not expand it.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.register("type", None, _expanded)
        self.register("type", Path, lambda text: Path(_expanded(text)))
        self.register("type", float, _finite)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after replacing underscores in option names by hyphens."""
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        words[:end] = map(self._hyphens, words[:end])
        return super().parse_known_args(words, namespace)

    def _hyphens(self, word: str) -> str:
        """Return an option with hyphens in its name, and any other word unchanged."""
        name, equals, value = word.partition("=")
        known = name.replace("_", "-")
        return known + equals + value if known in self._option_string_actions else word

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a value with choices; names the choices most like it."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message = f"{did_you_mean(str(value), map(str, action.choices))}{error.message}"
            raise

    def _options(self) -> list[str]:
        """Return the names of all options, with those of commands."""
        below = self._subparsers._group_actions if self._subparsers else []
        commands = [parser for action in below for parser in (action.choices or {}).values()]
        return [*self._option_string_actions, *(o for each in commands for o in each._options())]

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        hint = did_you_mean(words.split()[0].split("=")[0], self._options()) if unknown else ""
        text = f"{message}: {hint}".rstrip(": ") if hint else message
        self.exit(2, as_called(f"{self.prog}: error: {text} (see --help)\n"))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help of this terminal's width, with commands spelled as this process was called.

    Paragraphs of a description are wrapped and its indented lines, which are commands, kept. Words
    are not broken at hyphens, as in the names of networks. Defaults other than None, False, "" and
    [] are shown.
    """

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(as_called(prog), **kwargs)

    def add_usage(self, usage: str | None, *args: Any, **kwargs: Any) -> None:
        super().add_usage(usage and as_called(usage), *args, **kwargs)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for paragraph in as_called(text).split("\n\n"):
            commands = paragraph.startswith(" ")
            lines += paragraph.splitlines() if commands else _wrapped(paragraph, width)
            lines.append("")
        return "\n".join(indent + line for line in lines)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _wrapped(as_called(text), width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        quiet = (None, False, argparse.SUPPRESS)
        if action.default in ("", []) or any(action.default is value for value in quiet):
            return action.help
        return super()._get_help_string(action)


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def say(text: str, file: TextIO | None = None) -> None:
    """Print advice, with commands spelled as this process was called."""
    print(as_called(text), file=file)


def _expanded(text: str) -> str:
    """Return ``text`` with a leading ``~`` expanded to the home folder."""
    found = os.path.expanduser(text)
    if found.startswith("~/") or found == "~":
        raise argparse.ArgumentTypeError(f"cannot expand {text!r}: HOME is not set")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def int_list(text: str) -> tuple[int, ...]:
    """Parse comma-separated integers, such as ``128`` or ``128,160,192``.

    Raises:
        argparse.ArgumentTypeError: A part is not an integer.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected integers such as 224 or 128,160,192, got {text!r}"
        ) from None


def add_backend_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of commands that can run on several ranks."""
    from compofa.distributed.backend import TIMEOUT_S
    from compofa.distributed.launch import BACKENDS

    group.add_argument(
        "--backend",
        metavar="NAME",
        help=f"require one of {', '.join(BACKENDS)}; detected by default from the launcher "
        "(torchrun, horovodrun or mpirun)",
    )
    group.add_argument(
        "--collective-timeout",
        type=float,
        default=TIMEOUT_S,
        metavar="S",
        help="seconds to wait for another rank before the job fails",
    )


@contextmanager
def join_ranks(args: argparse.Namespace) -> Iterator[Backend]:
    """Join the process group of ``--backend``, ``--collective-timeout`` and ``--device``.

    Raises:
        ConfigError: See :func:`compofa.distributed.launch.process_group`.
    """
    from compofa.distributed.launch import process_group

    cuda = args.device.startswith("cuda")
    _die_with_launcher()
    with process_group(args.backend, args.collective_timeout, cuda) as backend:
        log_on_main(backend)
        if args.backend is None and backend.size == 1:
            _warn_about_slurm_tasks()
        yield backend


def _die_with_launcher() -> None:
    """Have Linux send SIGTERM when torchrun dies: if it is killed, its processes would live on."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _warn_about_slurm_tasks() -> None:
    """Warn if Slurm started several tasks that are not joined into one process group."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "")
    if "SLURM_PROCID" in os.environ and tasks.isdecimal() and int(tasks) > 1:
        _log.warning(
            "Slurm started %s tasks, but each runs on its own and repeats the same work: to share "
            "it, start one torchrun per machine",
            tasks,
        )


def log_on_main(backend: Backend) -> None:
    """Log warnings and errors only on ranks other than 0."""
    for name in ("compofa", "nas"):
        logging.getLogger(name).setLevel(logging.NOTSET if backend.is_main else logging.WARNING)


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters, which names from files may contain."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message of a record, escaped line by line, with commands as called."""
        return "\n".join(map(printable, as_called(super().format(record)).split("\n")))


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, prog: str) -> int:
    """Call ``main`` and report user errors in one line, without a traceback.

    Args:
        main: The command.
        argv: Its arguments; ``None`` for those of the process.
        prog: Name of the command, for messages.

    Returns:
        The exit status: 0, or 1 for an error. After a signal it is 128 plus the signal's number:
        143 for SIGTERM, 130 for Ctrl-C, and 141 for output to a closed pipe.
    """
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(_PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[lines])
    logging.captureWarnings(True)
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names may not be valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _status(main, argv, prog)
    except SystemExit as end:  # from the parser, which may have printed help
        end.code = _flushed(prog, end.code or 0)
        raise
    status = _flushed(prog, status)
    if status == 0:
        _exit_torchrun_process()
    return status


def _status(
    main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, prog: str
) -> int:
    """Call ``main``, report an error, and return the exit status."""
    try:
        main(argv)
    except OtherWorkerError:
        return 1
    except StoppedError as error:
        _print_error(f"{prog}: {error}")
        return error.status
    except CompofaError as error:
        _print_error(f"{prog}: error: {' '.join(str(error).split())}")
        return 1
    except KeyboardInterrupt:
        _print_error(f"{prog}: interrupted")
        return 130
    except RuntimeError as error:
        # Torch raises this anywhere in the main thread when a loader worker is killed.
        if not str(error).startswith("DataLoader worker"):
            raise
        _print_error(f"{prog}: error: {' '.join(str(error).split())}")
        return 1
    except BrokenPipeError:
        return 141
    except OSError as error:  # disk, limits or permissions, anywhere in the command
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        _print_error(f"{prog}: error: {where}{error.strerror or error}")
        return 1
    return 0


def _flushed(prog: str, status: int) -> int:
    """Flush stdout and return ``status``, or an error status if stdout cannot be written."""
    if sys.stdout is None:
        return status
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError):  # discard the rest, so that the interpreter's own flush succeeds
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return status or 141
        _print_error(f"{prog}: error: cannot write to stdout: {error.strerror or error}")
        return status or 1
    return status


def _print_error(line: str) -> None:
    """Write a line to stderr, if it is open."""
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(f"{printable(as_called(line))}\n")


def _exit_torchrun_process() -> None:
    """Exit a process that torchrun started, skipping interpreter shutdown.

    A gloo thread that releases a tensor during shutdown is terminated inside C++, which aborts the
    process, and a finished job counts as failed: 2 of about 50 resumed runs on a busy machine.
    """
    from compofa.distributed.launch import detect_backend

    if detect_backend(os.environ) == "torch":
        sys.stderr.flush()
        os._exit(0)
