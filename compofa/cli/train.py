"""``train_ofa_net.py``: train a teacher or a supernet."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from compofa.cli.common import (
    Parser,
    add_backend_options,
    int_list,
    join_ranks,
    log_on_main,
    run,
    say,
)
from compofa.errors import ConfigError
from compofa.training.config import TrainConfig, flag
from compofa.training.config_file import RUN_NAMES, read_config_file
from compofa.training.options import GROUPS, RANKS, RUN
from compofa.training.recipes import task_names

if TYPE_CHECKING:
    from compofa.io.open import OpenedNetwork
    from compofa.training.run import RunResult

RESUME = {"always": True, "auto": None, "never": False}
PROG = "train_ofa_net.py"
DESCRIPTION = """\
Train a supernet, its teacher, or one of its subnets. By default on scikit-learn's handwritten
digits, in minutes on a CPU:

  train_ofa_net.py --task teacher
      the largest network
  train_ofa_net.py --task compound --fixed-kernel
      CompOFA's 243 subnets, from the teacher
  train_ofa_net.py --init-path ID --dataset imagefolder --data-path DIR
      a trained supernet for your own classes
  train_ofa_net.py --task finetune --init-path ID --subnet smallest
      one subnet as a plain network
  train_ofa_net.py --task progressive
      Once-for-All's progressive shrinking
  train_ofa_net.py --task supernet
      one stage with the sandwich rule

tasks: {tasks}

progressive runs the teacher, kernel, depth (phases 1 and 2) and expand (phases 1 and 2), which are
also tasks of their own. Each starts from the best checkpoint of the one before; options such as
--epochs apply to each, and --resume continues with the unfinished one.

On ImageNet the defaults are those of the published runs:

  train_ofa_net.py --task teacher --dataset imagenet --data-path DIR
  train_ofa_net.py --phase 1 --dataset imagenet --data-path DIR
  train_ofa_net.py --phase 2 --dataset imagenet --data-path DIR

Distributed training, one rank per GPU:

  torchrun --nproc-per-node 4 train_ofa_net.py ...
  horovodrun -np 4 python train_ofa_net.py ...

Each phase writes best.pt, last.pt, config.json, metrics.jsonl, summary.json and TensorBoard event
files to runs/NAME/PHASE. On SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or Ctrl-C the run saves a checkpoint
and exits with 128 plus the signal number; --resume continues from it. Evaluate a checkpoint with
eval_sampled_config.py --net PATH.
"""


def parser() -> Parser:
    """Build the parser: an option per field of :class:`TrainConfig`, and those of the command."""
    p = Parser(
        prog=PROG,
        usage=f"{PROG} [--task TASK] [--dataset NAME] [option ...]",
        description=DESCRIPTION.format(tasks=", ".join(task_names())),
    )
    groups = {title: p.add_argument_group(title) for title in GROUPS}
    types = get_type_hints(TrainConfig)
    for setting in fields(TrainConfig):
        default = None if setting.name == "device" else setting.default
        groups[setting.metadata["group"]].add_argument(
            flag(setting.name), default=default, help=setting.metadata["help"],
            **_parsing(types[setting.name], setting.default, setting.metadata["metavar"]),
        )  # fmt: skip
    add = groups[RUN].add_argument
    add(
        "--config",
        metavar="FILE",
        help="settings in TOML, YAML or JSON, by the names of the options, such as the config.json "
        "of a run; options on the command line replace them",
    )
    add("--name", help="name of the run (default: DATASET-NET; for imagefolder, FOLDER-NET)")
    add("--output", metavar="DIR", help="folder of the run (default: runs/NAME)")
    add(
        "--resume",
        nargs="?",
        const="always",
        default="never",
        choices=RESUME,
        metavar="auto",
        help="continue the unfinished run in --output, to the bit, with its own settings; those "
        "given again must be the same, or may change (docs/resume.md). auto starts a new run if "
        "there is none",
    )
    add("--overwrite", action="store_true", help="replace an existing run")
    add("--quiet", action="store_true", help="hide progress bars")
    add_backend_options(groups[RANKS])
    return p


def _parsing(hint: Any, default: Any, metavar: str | None) -> dict[str, Any]:
    """Return what ``add_argument`` needs to parse values of a type."""
    kind = next((arg for arg in get_args(hint) if arg is not type(None)), hint)
    if kind is bool:
        return {"action": "store_true" if default is False else argparse.BooleanOptionalAction}
    if kind in (int, float):
        return {"type": kind, "metavar": metavar}
    return {"metavar": metavar} if kind is str else {"type": int_list, "metavar": metavar}


def options_page() -> str:
    """Return ``docs/options.md``: the options of the command as Markdown tables."""
    lines = [
        f"# Options of {PROG}",
        "",
        "Generated from the command; see `tests/test_cli_train.py`.",
    ]
    for group in parser()._action_groups[2:]:  # after the positional arguments and --help
        title = (group.title or "").capitalize()
        lines += ["", f"## {title}", "", "| option | default | |", "|---|---|---|"]
        for action in group._group_actions:
            names = ", ".join(f"`{name}`" for name in action.option_strings)
            shown = action.default is not None and action.default is not False
            default = f"`{action.default}`" if shown else ""
            lines.append(f"| {names} | {default} | {action.help} |")
    return "\n".join(lines) + "\n"


def given_settings(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse arguments.

    Returns:
        The options of the command, and the settings that were given: those of ``--config``, and on
        top of them those on the command line.

    Raises:
        ConfigError: The file of ``--config`` cannot be used.
    """
    unset = object()
    names = [setting.name for setting in fields(TrainConfig)]
    args = parser().parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    given = {} if args.config is None else read_config_file(args.config)
    given |= {name: getattr(args, name) for name in names if getattr(args, name) is not unset}
    for name in RUN_NAMES:
        value = given.pop(name, None)
        setattr(args, name, getattr(args, name) or value)
    return args, given


def _main(argv: Sequence[str] | None) -> None:
    args, given = given_settings(argv)
    import torch
    from tqdm.contrib.logging import logging_redirect_tqdm

    from compofa.training.run import train
    from compofa.training.shutdown import on_signals

    initial = None
    if given.get("task") == "finetune" and given.get("init_path"):
        initial = _open_initial(given, RESUME[args.resume] is True)
    usual = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    config = TrainConfig(**(usual | given))
    args.device = config.device
    output = args.output or (Path("runs") / args.name if args.name else None)

    with logging_redirect_tqdm(), on_signals() as stop, join_ranks(args) as backend:
        if args.overwrite and backend.restarts:
            raise ConfigError(
                "--overwrite: expected none if the launcher restarts ranks (torchrun "
                "--max-restarts, elastic Horovod): a restart would overwrite the run itself"
            )

        def attempt(restarted: bool) -> RunResult:
            log_on_main(backend)  # after a restart another rank may be rank 0
            return train(
                config,
                output,
                resume=None if restarted else RESUME[args.resume],
                overwrite=args.overwrite,
                bar=not args.quiet,
                backend=backend,
                stop=stop,
                initial=initial,
                given=given,
            )

        result = backend.run_elastic(attempt)
        if backend.is_main:
            _report(result)


def _report(result: RunResult) -> None:
    from compofa.training.commands import evaluate_command

    for name, figures in result.figures.items():
        print(f"{name} subnet: {figures['top1']:.2f} % top-1 on the validation images")
    spent = ", ".join(
        f"{value:.4g} {name.replace('_', ' ')}" for name, value in result.cost.items()
    )
    print(f"spent {spent}; best checkpoint: {result.best}")
    say(f"next: {evaluate_command(result.best)}")


def _open_initial(given: dict[str, Any], resumed: bool) -> OpenedNetwork:
    """Open ``init_path``, read ``subnet``, and take ``image_size`` from them if it is not given."""
    from compofa.cli.networks import read_subnet
    from compofa.io.open import open_network

    opened = open_network(given["init_path"])
    network, size = opened.spec, opened.image_size
    subnet = given.get("subnet")
    if network.elastic and subnet not in (None, "largest", "smallest"):
        found = read_subnet(subnet, network.space, size)
        given["subnet"], size = json.dumps(network.space.to_config(found)), found.resolution
    if not resumed:
        given["image_size"] = given.get("image_size") or (size,)
    return opened


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(_main, argv, PROG)
