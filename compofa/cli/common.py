"""What the commands share: option spelling, logging, and errors in one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from compofa.errors import CompofaError, OtherWorkerError, StoppedError

if TYPE_CHECKING:
    from compofa.workers import Backend


class Parser(argparse.ArgumentParser):
    """Takes ``--data-path`` and ``--data_path`` alike, shows defaults, and errs in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse after turning underscores in option names into hyphens."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([_hyphens(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """End with one line and exit status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the layout of descriptions, and names defaults that are worth naming."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


def _hyphens(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


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
    from compofa.workers import BACKENDS, TIMEOUT_S

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
    from compofa.workers import workers

    cuda = args.device.startswith("cuda")
    with workers(args.backend, args.collective_timeout, cuda) as backend:
        only_main_speaks(backend)
        yield backend


def only_main_speaks(backend: Backend) -> None:
    """Let workers other than the first log nothing but warnings."""
    for name in ("compofa", "nas"):
        logging.getLogger(name).setLevel(logging.NOTSET if backend.is_main else logging.WARNING)


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None, prog: str) -> int:
    """Call ``main``, turning what a user can mend into one line and exit status 1.

    A run that a signal ended has 128 and the signal's number: 143 for SIGTERM, 130 for Ctrl-C.

    Returns:
        The exit status.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    try:
        main(argv)
    except OtherWorkerError:
        return 1
    except StoppedError as error:
        sys.stderr.write(f"{prog}: {error}\n")
        return error.status
    except CompofaError as error:
        sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        return 130
    except RuntimeError as error:
        # Torch raises this wherever the process is when one of its data workers is killed.
        if not str(error).startswith("DataLoader worker"):
            raise
        sys.stderr.write(f"{prog}: error: {' '.join(str(error).split())}\n")
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    _leave()
    return 0


def _leave() -> None:
    """End here a worker that torchrun started, without the interpreter's own end.

    A thread of gloo that still lets go of a tensor while the interpreter ends is ended by it in the
    midst of C++, which aborts the process: a job that was done would count as failed. It was two of
    some fifty resumed runs on a busy machine.
    """
    from compofa.workers import launcher

    if launcher(os.environ) == "torch":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
