"""``python -m tools.fit``: make the models in ``nas/models`` from published measurements."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from compofa.cli.common import Parser, run
from compofa.io.locks import exclusive

PROG = "python -m tools.fit"
DESCRIPTION = """\
Fit the models that ship in nas/models again. The folder of published measurements has the tables
that each model's card names, in accuracy/, latency/ and specialized/.

  python -m tools.fit accuracy DIR --output nas/models
  python -m tools.fit latency DIR --output nas/models --names note10 p40
"""


def _main(argv: Sequence[str] | None) -> None:
    p = Parser(prog=PROG, description=DESCRIPTION)
    p.add_argument("kind", choices=("accuracy", "latency"), help="which models")
    p.add_argument("published", type=Path, metavar="DIR", help="folder of published measurements")
    p.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the models")
    p.add_argument("--names", nargs="+", metavar="NAME", help="models to fit; all by default")
    args = p.parse_args(argv)
    from tools.fit import accuracy, latency

    module = accuracy if args.kind == "accuracy" else latency
    names = args.names or module.NAMES
    for name in names:
        if name not in module.NAMES:
            p.error(f"--names: expected some of {', '.join(module.NAMES)}, got {name}")
    with exclusive(args.output, folder=True):
        for name, model in zip(
            names, module.reproduce(args.published, args.output, names), strict=True
        ):
            print(f"{name}: {model.error}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(_main, argv, PROG)


if __name__ == "__main__":
    sys.exit(main())
