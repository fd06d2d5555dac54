"""Commands called as functions, and what came of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest


class Outcome(NamedTuple):
    status: int | str | None
    out: str
    err: str


def called(
    main: Callable[[Sequence[str]], int], argv: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> Outcome:
    """Return the exit status of a command, argparse's too, and what it printed."""
    try:
        status = main(argv)
    except SystemExit as end:
        status = end.code
    return Outcome(status, *capsys.readouterr())
