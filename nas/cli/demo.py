"""``make demo``: train, evaluate and search on a small data set, in minutes on two cores."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from compofa.cli.common import Parser, run
from compofa.cli.evaluate import choose_subnets, print_table
from compofa.io.locks import exclusive
from compofa.training.config import TrainConfig
from nas.cli import search

PROG = "nas.cli.demo"
DESCRIPTION = """\
Train the largest network (the teacher) and then a fixed-kernel compound supernet on scikit-learn's
handwritten digits, evaluate its smallest, its largest and ten random subnets on the test images,
and plot accuracy against multiply-accumulates. Then measure the accuracy of some subnets and the
speed of this CPU, search for the best subnet within several latency budgets, and measure
those found.
"""


def _main(argv: Sequence[str] | None) -> None:
    p = Parser(prog=PROG, description=DESCRIPTION)
    p.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the results")
    p.add_argument(
        "--epochs", type=int, help="epochs of the compound phase (default: the recipe's)"
    )
    p.add_argument("--seed", type=int, default=0, help="random seed")
    p.add_argument("--no-search", action="store_true", help="stop after the evaluation")
    p.add_argument(
        "--samples", type=int, default=60, help="number of subnets to measure for the search"
    )
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    args = p.parse_args(argv)
    with exclusive(args.output, folder=True):
        _demo(args)


def _demo(args: argparse.Namespace) -> None:
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from compofa.data import load_dataset
    from compofa.evaluate import Evaluator
    from compofa.io.checkpoint import load_checkpoint, save_checkpoint
    from compofa.io.records import write_csv
    from compofa.plots import plot_accuracy
    from compofa.training.adviser import Adviser
    from compofa.training.context import RunContext
    from compofa.training.run import train_phase

    started = time.perf_counter()
    config = TrainConfig(fixed_kernel=True, seed=args.seed, epochs=args.epochs).resolved()
    shutil.rmtree(args.output / "teacher", ignore_errors=True)
    with logging_redirect_tqdm():
        context = RunContext(args.output, Adviser(config, args.output), bar=not args.quiet)
        result = train_phase(config, context, overwrite=True)
    path = args.output / "compofa-digits.pt"
    save_checkpoint(path, load_checkpoint(result.best).slim())
    checkpoint = load_checkpoint(path)
    supernet, space = checkpoint.build(), checkpoint.network.space
    random = [
        subnet
        for subnet in choose_subnets(space, 12, args.seed)
        if subnet not in (space.smallest, space.largest)
    ][:10]
    evaluator = Evaluator(load_dataset("digits"), "test", seed=args.seed)
    records = [
        evaluator.measure(supernet, subnet, str(path), checkpoint.digest)
        for subnet in tqdm(
            [space.smallest, space.largest, *random],
            desc="subnets",
            disable=args.quiet,
            leave=False,
        )
    ]
    print(f"\n{records[0].images} test images, not used in training:\n")
    print_table(records, ["smallest", "largest", *(f"random {i + 1}" for i in range(10))])
    write_csv(args.output / "subnets.csv", records)
    picture = args.output / "accuracy_vs_macs.png"
    groups = {"random": records[2:], "smallest": records[:1], "largest": records[1:2]}
    plot_accuracy(groups, picture, "Subnets of one compound supernet, scikit-learn digits, test")
    print(f"\ncheckpoint  {path}\ntable       {args.output / 'subnets.csv'}")
    print(
        f"picture     {picture}\ntrained and evaluated in {time.perf_counter() - started:.0f} s\n"
    )
    if args.no_search:
        return
    words = ["--net", str(path), "--target-hardware", "cpu", "--seed", str(args.seed)]
    words += ["--samples", str(args.samples), "--output", str(args.output / "search")]
    search.search(words + ["--quiet"] * args.quiet)
    print(f"time        {time.perf_counter() - started:.0f} s in all")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    from compofa.distributed.threads import cpu_threads

    with cpu_threads(1):
        return run(_main, argv, PROG)


if __name__ == "__main__":
    raise SystemExit(main())
