"""``train_ofa_net.py``: train a teacher or a supernet."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from compofa.cli.common import Parser, add_backend_options, int_list, join_ranks, log_on_main, run
from compofa.data.catalog import DATASETS
from compofa.errors import ConfigError
from compofa.networks.zoo import NETWORKS
from compofa.training.config import KD_TYPES, TrainConfig
from compofa.training.recipes import TASKS

if TYPE_CHECKING:
    from compofa.training.run import RunResult

RESUME = {"always": True, "auto": None, "never": False}
PROG = "train_ofa_net.py"
DESCRIPTION = """\
Train one network that holds many. Without further options a task trains on scikit-learn's
handwritten digits, in minutes on a CPU:

  train_ofa_net.py --task teacher                     the largest network, first
  train_ofa_net.py --task compound --fixed_kernel     the 243 networks of CompOFA, from it
  train_ofa_net.py --task progressive                 Once-for-All's networks, in six phases
  train_ofa_net.py --task supernet                    the same at once, by the sandwich rule
  train_ofa_net.py --task finetune --init-path compofa-digits --subnet smallest
                                                      one of the networks, by itself

The phases of progressive are tasks too, each from the best checkpoint of the one before: teacher,
kernel, depth --phase 1 and 2, expand --phase 1 and 2. --resume goes on within the chain; --epochs
and the like hold for each of its phases.

On ImageNet the defaults are those of the published runs:

  train_ofa_net.py --task teacher  --dataset imagenet --data-path DIR
  train_ofa_net.py --task compound --dataset imagenet --data-path DIR --phase 1
  train_ofa_net.py --task compound --dataset imagenet --data-path DIR --phase 2

Several workers, each with a part of every step's images, one a GPU:

  torchrun --nproc-per-node 4 train_ofa_net.py ...
  horovodrun -np 4 python train_ofa_net.py ...

Each phase leaves best.pt, last.pt, config.json, metrics.jsonl, summary.json and TensorBoard
files in runs/NAME/PHASE. SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 (a scheduler's notice) and Ctrl-C save
and exit with 128 and the signal's number; --resume goes on.
Evaluate a checkpoint with eval_sampled_config.py --net PATH.
"""


def parser() -> Parser:
    """Build the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    what = p.add_argument_group("what to train")
    what.add_argument(
        "--task", default="compound", metavar="TASK", help=f"one of {', '.join(TASKS)}"
    )
    what.add_argument("--phase", type=int, default=1, help="phase of the task")
    what.add_argument(
        "--net",
        metavar="ID",
        help=f"one of {', '.join(NETWORKS)}; by default the usual one of data set and task",
    )
    what.add_argument(
        "--fixed-kernel",
        action=argparse.BooleanOptionalAction,
        help="keep each stage's kernel size fixed; by default as the network's name says",
    )
    what.add_argument(
        "--heuristic",
        metavar="COUPLING",
        help="coupling of depth and width: simple (the network's own), none, or pairs such as "
        "2:3,3:4,4:6 (ResNet50D: 0:0.2,1:0.25,2:0.35)",
    )
    what.add_argument(
        "--width-mult",
        type=float,
        metavar="X",
        help="width multiplier; by default the network's own",
    )
    data = p.add_argument_group("data")
    data.add_argument(
        "--dataset", default="digits", metavar="NAME", help=f"one of {', '.join(DATASETS)}"
    )
    data.add_argument(
        "--data-path",
        metavar="DIR",
        help="its folder; of your own images class folders, in train/ and val/ or to be split",
    )
    data.add_argument(
        "--image-size",
        type=int_list,
        metavar="R[,R…]",
        help="resolutions in pixels; each step draws one",
    )
    data.add_argument("--eval-size", type=int, metavar="R", help="resolution to validate at")
    data.add_argument(
        "--validation-images", type=int, metavar="N", help="training images held out to validate on"
    )
    data.add_argument(
        "--workers", type=int, default=0, help="data-loading processes; photographs want several"
    )
    how = p.add_argument_group("how to train (defaults come from the recipe of the data set)")
    how.add_argument("--epochs", type=int)
    how.add_argument(
        "--lr", type=float, help="peak learning rate at this batch size, for one worker"
    )
    how.add_argument(
        "--scale-lr",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="multiply it by the number of workers",
    )
    how.add_argument("--warmup-epochs", type=int)
    how.add_argument("--batch-size", type=int, help="images a step and worker")
    how.add_argument(
        "--dynamic-batch-size", type=int, metavar="N", help="subnets whose gradients a step sums"
    )
    how.add_argument("--momentum", type=float, default=0.9)
    how.add_argument("--weight-decay", type=float)
    how.add_argument("--label-smoothing", type=float)
    how.add_argument("--dropout", type=float)
    how.add_argument(
        "--teacher-path",
        metavar="FILE",
        help="checkpoint to learn from, of any format; by default the run's own teacher. With "
        "--resume where it is now, as --init-path",
    )
    how.add_argument(
        "--init-path", metavar="FILE", help="checkpoint to start from; by default the predecessor's"
    )
    how.add_argument(
        "--subnet",
        metavar="JSON",
        help="with --task finetune, which network of --init-path to train by itself: "
        '{"ks", "e", "d", "r"} as JSON, a file with it, largest or smallest',
    )
    how.add_argument(
        "--kd-ratio", type=float, default=1.0, help="weight of the distillation loss; 0 for none"
    )
    how.add_argument("--kd-type", default="ce", help=f"distillation loss: {' or '.join(KD_TYPES)}")
    how.add_argument("--validate-every", type=int, metavar="N", help="epochs between validations")
    how.add_argument(
        "--calibration-images",
        type=int,
        default=2000,
        metavar="N",
        help="training images to measure BN statistics on",
    )
    where = p.add_argument_group("where and how long")
    where.add_argument("--name", help="name of the run; by default DATASET-NET")
    where.add_argument("--output", metavar="DIR", help="folder of the run; by default runs/NAME")
    where.add_argument(
        "--resume",
        nargs="?",
        const="always",
        default="never",
        choices=RESUME,
        metavar="auto",
        help="go on after the last saved step, exactly; with auto begin if nothing was saved",
    )
    where.add_argument(
        "--save-minutes",
        type=float,
        default=30.0,
        metavar="M",
        help="minutes between saves within an epoch; epochs and signals to stop save, too",
    )
    where.add_argument(
        "--max-skipped",
        type=int,
        default=20,
        metavar="N",
        help="steps in a row that may be skipped for a loss or gradient that is no finite number",
    )
    where.add_argument(
        "--overwrite", action="store_true", help="begin again where a run already is"
    )
    where.add_argument("--seed", type=int, default=0, help="of every random choice")
    where.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    where.add_argument(
        "--amp",
        action="store_true",
        help="compute in reduced precision (bfloat16 where the device has it)",
    )
    where.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads; by default 1 for small images"
    )
    where.add_argument(
        "--price", type=float, metavar="P", help="price of a device hour: report the cost"
    )
    where.add_argument("--power", type=float, metavar="W", help="watts of a device: report CO2")
    where.add_argument("--quiet", action="store_true", help="no progress bars")
    together = p.add_argument_group("with several workers")
    add_backend_options(together)
    together.add_argument(
        "--fp16-allreduce", action="store_true", help="send gradients in half precision"
    )
    return p


def _main(argv: Sequence[str] | None) -> None:
    args = parser().parse_args(argv)
    import torch
    from tqdm.contrib.logging import logging_redirect_tqdm

    from compofa.training.chain import plan, train_task
    from compofa.training.stopping import on_signals

    if args.task == "finetune" and args.init_path:
        _read_single(args)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
    config = TrainConfig(**values)

    with logging_redirect_tqdm(), on_signals() as stop, join_ranks(args) as workers:
        if args.overwrite and workers.restarts:
            raise ConfigError(
                "--overwrite: expected none where workers are started again (torchrun "
                "--max-restarts, elastic Horovod), which could not tell the old run from the new"
            )

        def attempt(again: bool) -> RunResult:
            log_on_main(workers)  # after a death another one may be the first
            last = workers.local_main_first(lambda: plan(config))[-1]
            usual = f"{args.dataset}-{last.net or args.task}"
            return train_task(
                config,
                args.output or Path("runs") / (args.name or usual),
                resume=None if again else RESUME[args.resume],
                overwrite=args.overwrite,
                bar=not args.quiet,
                backend=workers,
                stop=stop,
            )

        result = workers.run_elastic(attempt)
        if workers.is_main:
            _report(result)


def _report(result: RunResult) -> None:
    for name, figures in result.figures.items():
        print(f"{name} subnet: {figures['top1']:.2f} % top-1 on the validation images")
    spent = ", ".join(
        f"{value:.4g} {name.replace('_', ' ')}" for name, value in result.cost.items()
    )
    print(f"spent {spent}; best checkpoint: {result.best}")
    print(f"next: {shlex.join(['python', 'eval_sampled_config.py', '--net', str(result.best)])}")


def _read_single(args: argparse.Namespace) -> None:
    """Read ``--subnet``, and take the image size from it or from the checkpoint."""
    from compofa.cli.evaluate import read_subnet
    from compofa.networks.zoo import open_checkpoint

    checkpoint = open_checkpoint(args.init_path)[1]
    network, size = checkpoint.network, checkpoint.image_size
    if network.elastic and args.subnet not in (None, "largest", "smallest"):
        subnet = read_subnet(args.subnet, network.space, size)
        args.subnet, size = json.dumps(network.space.to_config(subnet)), subnet.resolution
    args.image_size = args.image_size or (size,)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(_main, argv, PROG)
