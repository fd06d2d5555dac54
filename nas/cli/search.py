"""``run_NAS.py``: find the best subnets for a device's budgets."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compofa.cli.common import Parser, int_list, run
from compofa.errors import ConfigError
from compofa.io.locks import exclusive
from compofa.networks.backbone import Backbone
from compofa.networks.zoo import NETWORKS
from compofa.space.search_space import SearchSpace
from nas.cost.devices import DEVICES, load_cost
from nas.cost.objectives import column_names
from nas.search import pipeline, results
from nas.search.evolution import extreme

if TYPE_CHECKING:
    from nas.cost.base import Cost

PROG = "run_NAS.py"
log = logging.getLogger(__name__)
FREE_SPACES = {
    "compofa": "ofa_mbv3_d234_e346_k357_w1.0",
    "compofa-elastic": "ofa_mbv3_d234_e346_k357_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.0": "compofa",
    "ofa_mbv3_d234_e346_k357_w1.2": "none",
}
"""Network that each named network is compared with by default."""
DESCRIPTION = """\
Find the most accurate subnet for each latency budget of a device, and plot its Pareto front
together with that of the original Once-for-All space. Accuracy and latency come from models fitted
to published measurements; the held-out error of each is printed.

  run_NAS.py --target-hardware note10
  run_NAS.py --net compofa-elastic --target-hardware v100 --constraints 15 20 25
  run_NAS.py --net runs/digits-compofa-small/compound-1/best.pt --target-hardware cpu

For a trained checkpoint, the accuracy of random subnets is measured first and a predictor is fitted
to it, unless --accuracy-predictor gives one; the found subnets are measured at the end.
"""


def parser() -> Parser:
    """Build the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    p.add_argument(
        "--net",
        default="compofa",
        metavar="ID|FILE",
        help=f"{', '.join(NETWORKS)}, or a trained checkpoint",
    )
    p.add_argument(
        "--target-hardware",
        default="note10",
        metavar="DEVICE",
        help=f"{', '.join(DEVICES)}, a model's file or a folder of lookup tables",
    )
    p.add_argument(
        "--constraints",
        type=float,
        nargs="+",
        metavar="X",
        help="budgets in the device's unit (default: those of the published search, or four "
        "quantiles of the space). A budget that no subnet meets is skipped with a warning that "
        "names the least cost; it is an error if no budget can be met",
    )
    p.add_argument(
        "--limit",
        nargs=2,
        action="append",
        default=[],
        metavar=("DEVICE", "X"),
        help="bound on another cost of the found subnets, as in --limit flops 3e8; repeatable",
    )
    p.add_argument(
        "--objectives",
        nargs="+",
        default=[],
        metavar="DEVICE",
        help="costs to minimise together with that of --target-hardware, such as flops params; "
        "writes the Pareto set to objectives.csv",
    )
    p.add_argument(
        "--resolutions",
        type=int_list,
        nargs="+",
        metavar="R",
        help="input resolutions (default: 160 176 192 208 224; a checkpoint's own)",
    )
    p.add_argument(
        "--compare",
        nargs="+",
        metavar="NET",
        help="networks to compare it with, or none (default: its free space)",
    )
    p.add_argument(
        "--width-mult",
        type=float,
        metavar="X",
        help="width multiplier (default: the network's own). Fitted accuracy models serve widths "
        "within a factor of 1.25 of the measured one (1.0), with 1.5 points more uncertainty",
    )
    p.add_argument(
        "--latency-table", metavar="DIR", help="folder of lookup tables R_lookup_table.yaml"
    )
    p.add_argument(
        "--accuracy-predictor",
        metavar="FILE",
        help="accuracy predictor: .npz of fit-accuracy, or a published .pth (as for ofa_resnet50)",
    )
    p.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the results; those of an earlier search in it are replaced (default: "
        "runs/search-NET-DEVICE)",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed")
    p.add_argument(
        "--batch-size",
        type=int,
        default=0,
        metavar="N",
        help="images per batch when this machine is timed; 0 for 1 (cpu) or 64 (gpu)",
    )
    own = p.add_argument_group("with a trained checkpoint")
    own.add_argument("--data-path", "--imagenet-path", metavar="DIR", help="folder of its data set")
    own.add_argument(
        "--samples",
        type=int,
        default=80,
        metavar="N",
        help="number of subnets to measure for the predictor",
    )
    own.add_argument("--workers", type=int, default=0, help="number of loader workers")
    own.add_argument("--device", help="device to measure accuracy on: cpu or cuda")
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


def _cost(args: argparse.Namespace, backbone: Backbone, space: SearchSpace, classes: int) -> Cost:
    return load_cost(
        args.target_hardware,
        backbone,
        classes,
        table=args.latency_table,
        space=space,
        batch=args.batch_size,
        progress=not args.quiet,
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"--limit: expected DEVICE and a number, got {text!r}") from None


def _run_search(args: argparse.Namespace, targets: Sequence[pipeline.Target]) -> pipeline.Outcome:
    """Search the targets as the options say."""
    first = targets[0]

    def other(device: str) -> Cost:
        return load_cost(
            device, first.backbone, first.classes, space=first.space, progress=not args.quiet
        )

    limits = [(other(device), _number(most)) for device, most in args.limit]
    objectives = [other(device) for device in args.objectives]
    for costs in ([cost for cost, _ in limits], objectives):
        column_names([first.cost, *costs])  # refuses a cost that is given twice
    return pipeline.run_search(
        targets, _budgets(args, first), limits=limits, objectives=objectives, seed=args.seed
    )


def _named_target(args: argparse.Namespace, net: str) -> pipeline.Target:
    backbone, space, classes = pipeline.named_space(net, args.width_mult, args.resolutions)
    accuracy = pipeline.accuracy_model(args.accuracy_predictor or net, backbone.width_mult)
    cost = _cost(args, backbone, space, classes)
    return pipeline.Target(net, backbone, classes, space, accuracy, cost)


def _comparisons(args: argparse.Namespace) -> list[str]:
    wanted = args.compare or [FREE_SPACES.get(args.net, "none")]
    names = [name for name in wanted if name != "none"]
    unknown = [name for name in names if name not in NETWORKS]
    if unknown:
        raise ConfigError(
            f"--compare: unknown network {unknown[0]!r}, expected none or one of "
            f"{', '.join(NETWORKS)}"
        )
    pipeline.require_distinct([args.net, *names])
    return names


def _budgets(args: argparse.Namespace, target: pipeline.Target) -> Sequence[float]:
    if args.constraints:
        return args.constraints
    device = DEVICES.get(args.target_hardware)
    usual = device.budgets if device else ()
    if usual and args.net in FREE_SPACES and min(usual) >= extreme(target.space, target.cost)[1]:
        return usual
    return pipeline.usual_budgets(target)


def print_found(outcome: pipeline.Outcome) -> None:
    """Print the found subnets as a table, and the errors of cost and accuracy."""
    target, columns = outcome.targets[0], results.found_columns(outcome)
    measured = "".join(f"  {name.replace('_', ' '):>16}" for name in outcome.measured)
    unit = target.cost.unit
    heading = f"{'budget':>9}  {'cost ' + unit:>12}  {'top-1 %':>8}{measured}"
    print(f"{heading}  {'MACs':>12}  {'params':>10}  subnet")
    for row, found in enumerate(outcome.found):
        cells = "".join(f"  {values[row]:>16.2f}" for values in outcome.measured.values())
        print(
            f"{found.budget:>9g}  {found.cost:>12.6g}  {found.accuracy:>8.2f}{cells}  "
            f"{columns['macs'][row]:>12,}  {columns['params'][row]:>10,}  {found.subnet}"
        )
        if found.slack:
            print(f"{'':>9}  every subnet of {target.name} meets this budget: it is not binding")
    how = "all of them compared" if outcome.found[0].exact else "evolution"
    print(f"{target.space.size:.4g} subnets, {how}, {outcome.found[0].evaluated:,} evaluated")
    print(f"cost {target.cost.name}: {target.cost.error}")
    print(f"top-1 {target.accuracy.name}: {target.accuracy.error}")


def search(argv: Sequence[str] | None) -> None:
    """Parse the options, search, write the results and print them.

    Raises:
        CompofaError: An option or file is not usable.
    """
    args = parser().parse_args(argv)
    resolutions: Any = args.resolutions
    if resolutions is not None:
        args.resolutions = tuple(sorted({size for group in resolutions for size in group}))
    device = Path(str(args.target_hardware)).stem
    name = args.net if args.net in NETWORKS else pipeline.network_name(args.net)
    output = Path(args.output or f"runs/search-{name}-{device}")
    with exclusive(output, folder=True):
        _search(args, output)


def _search(args: argparse.Namespace, output: Path) -> None:
    """Search, write the results to ``output`` and print them."""
    if args.net not in NETWORKS or NETWORKS[args.net].shipped:
        from nas.cli.search_checkpoint import search_checkpoint

        outcome = search_checkpoint(args, output, _cost, _run_search)
    else:
        args.resolutions = args.resolutions or pipeline.RESOLUTIONS
        targets = [_named_target(args, net) for net in [args.net, *_comparisons(args)]]
        outcome = _run_search(args, targets)
    paths = results.write_outcome(outcome, output)
    print_found(outcome)
    print(f"written to {output}: {', '.join(path.name for path in paths)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(search, argv, PROG)
