"""``compofa``: all commands under one name, also as ``python -m compofa``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from compofa import __version__
from compofa.cli.common import Parser

PROG = "python -m compofa"
DESCRIPTION = """\
One trained network, many deployed ones. From photos in one folder per class to an exported network,
where ID is a network with published weights, which zoo lists, and NET is the best.pt that train
writes:

  python -m compofa train --init-path ID --dataset imagefolder --data-path DIR
  python -m compofa eval --net NET
  python -m compofa search --net NET --target-hardware cpu --output found
  python -m compofa export NET found/subnet_BUDGET.json --to onnx
  python -m compofa predict best.onnx IMAGE
"""


class Command(NamedTuple):
    """A command: the module whose ``main`` runs it, its help, and whether it shares that module."""

    module: str
    text: str
    shared: bool = True


_OURS, _NAS = "compofa.cli.tools", "nas.cli.tools"  # modules of nas load only when they are run
COMMANDS = {
    "train": Command("compofa.cli.train", "train a supernet, its teacher or one subnet", False),
    "eval": Command("compofa.cli.evaluate", "evaluate random or given subnets", False),
    "search": Command("nas.cli.search", "find the best subnets for a device's budgets", False),
    "export": Command(_OURS, "export a subnet to ONNX, torch.export, TorchScript or safetensors"),
    "convert": Command(_OURS, "convert weights or subnets to the format of another program"),
    "predict": Command(_OURS, "print the most probable classes of images"),
    "zoo": Command(_OURS, "list the named networks and where their weights are"),
    "devices": Command(_NAS, "list the devices that a search knows"),
    "estimate": Command(_NAS, "add predicted accuracy and costs to a table of subnets"),
    "sample": Command(_NAS, "write subnets to measure on a device, and a script for it"),
    "measure": Command(_NAS, "time the layers of a space on this machine"),
    "collect": Command(_NAS, "measure the accuracy of random subnets, to fit a predictor"),
    "fit-accuracy": Command(_NAS, "fit an accuracy predictor"),
    "fit-latency": Command(_NAS, "fit a latency model to measured networks"),
}
"""All commands by name."""


def parser() -> Parser:
    """Build the parser of the first word."""
    p = Parser(prog=PROG, usage=f"{PROG} COMMAND [option ...]", description=DESCRIPTION)
    p.add_argument("--version", action="version", version=f"compofa {__version__}")
    listed = p.add_subparsers(
        dest="command",
        required=True,
        metavar="COMMAND",
        title="commands, each with its own --help",
    )
    for name, command in COMMANDS.items():
        listed.add_parser(name, help=command.text, add_help=False)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in COMMANDS:
        parser().parse_args(words[:1])
        raise AssertionError("the parser exits")
    command = COMMANDS[words[0]]
    run = importlib.import_module(command.module).main
    return int(run(words if command.shared else words[1:]))
