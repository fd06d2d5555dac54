"""``run_NAS.py``: find the best subnets for a device's budgets."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compofa.cli.common import Parser, int_list, run
from compofa.errors import ConfigError, unknown_name
from compofa.io.locks import exclusive
from compofa.networks.backbone import Backbone
from compofa.networks.zoo import NETWORKS, entry
from compofa.space.search_space import SearchSpace
from nas.cli.search_table import heading_of, print_found, short
from nas.cli.search_zoo import show_specialised
from nas.cost.devices import DEVICES, find_device, load_cost
from nas.cost.objectives import column_names, require_quantity, split_quantity
from nas.cost.units import Amount
from nas.search import pipeline, results
from nas.search.evolution import extreme
from nas.search.folder import claim_folder
from nas.search.specialised import CostLoader
from nas.search.verify import CANDIDATES, weak_ranking

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
to it, unless --accuracy-predictor gives one. The best predicted subnets of each budget are measured
on the validation images, the most accurate one wins, and the winners are measured on the test
images.
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
        type=_amount,
        nargs="+",
        metavar="X",
        help="budgets in the device's unit, or with one, as in 20ms or 2MB (default: those of the "
        "published search, or four quantiles of the space). A budget that no subnet meets is "
        "skipped with a warning that names the least cost; it is an error if none can be met",
    )
    p.add_argument(
        "--limit",
        nargs="+",
        action="append",
        default=[],
        metavar="COST=X",
        help="bound on a cost of the found subnets, as in macs=300M, params=5M, memory=2MB, "
        "v100=9ms or DEVICE X; repeatable. k, M and G are powers of 1,000. A bound on the cost of "
        "--target-hardware itself, as in latency=20, is its budget",
    )
    p.add_argument(
        "--objectives",
        nargs="+",
        default=[],
        metavar="COST",
        help="costs to minimise together with that of --target-hardware, such as macs params "
        "memory; writes the Pareto set to objectives.csv",
    )
    p.add_argument(
        "--resolutions",
        type=int_list,
        nargs="+",
        metavar="R",
        help="input resolutions (default: 160 176 192 208 224; those that a checkpoint was "
        "trained at, five of them at most)",
    )
    p.add_argument(
        "--compare",
        nargs="+",
        metavar="NET",
        help="networks to compare it with, or none (default: its free space; none "
        "for a checkpoint, which takes free: its front is not shown, as nothing was trained on it)",
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
        help="folder of the results; those of the same network and device in it are replaced "
        "(default: runs/search-NET-DEVICE)",
    )
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="empty --output of the results of another search",
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
    own.add_argument(
        "--verify",
        type=int,
        default=CANDIDATES,
        metavar="K",
        help=f"measure the K best predicted subnets of each budget on the validation images, and "
        f"let the most accurate win (default: {CANDIDATES}); 0 trusts the predictor",
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


def _amount(text: str) -> Amount:
    try:
        return Amount.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _limits(args: argparse.Namespace) -> list[tuple[str, Amount]]:
    """Return the names and bounds of ``--limit``, given as ``COST=X`` or as ``COST X``.

    Raises:
        ConfigError: One is neither.
    """
    found = []
    for words in args.limit:
        rest = iter(words)
        for word in rest:
            name, equals, text = word.rpartition("=")
            if not equals:
                name, text = word, next(rest, "")
            try:
                found.append((name, Amount.parse(text)))
            except ConfigError as error:
                raise ConfigError(f"--limit {name}: {error}") from None
    return found


class Asked(NamedTuple):
    """What a search is asked for, in the units of the costs."""

    budgets: list[float]
    limits: list[tuple[Cost, float]]
    objectives: list[Cost]


def _asked(
    args: argparse.Namespace, cost: Cost, backbone: Backbone, space: SearchSpace, classes: int
) -> Asked:
    """Return the budgets, limits and objectives of the options; ``cost`` is that of the target.

    Raises:
        CompofaError: A cost is unknown or given twice, or an amount is not in a unit of its cost.
    """

    def other(name: str, option: str) -> Cost:
        _, device = split_quantity(name)
        if device == "latency":
            raise ConfigError(
                f"{option}: expected the name of a device, as in note10=20, for a latency beside "
                f"{cost.name}, got {name!r}"
            )
        found = load_cost(device, backbone, classes, space=space, progress=not args.quiet)
        return require_quantity(name, found)

    def amount_in(unit: str, amount: Amount, option: str) -> float:
        try:
            return amount.to(unit)
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from None

    budgets = [amount_in(cost.unit, each, "--constraints") for each in args.constraints or ()]
    limits: list[tuple[Cost, float]] = []
    for name, amount in _limits(args):
        option = f"--limit {name}"
        if not _is_target(name, args.target_hardware, cost):
            limited = other(name, "--limit")
            limits.append((limited, amount_in(limited.unit, amount, option)))
        elif budgets:
            raise ConfigError(
                f"{option}: expected budgets of {cost.name} once, got "
                f"{', '.join(f'{budget:g}' for budget in budgets)} and {amount.value:g}"
            )
        else:
            budgets = [amount_in(cost.unit, amount, option)]
    objectives = [other(name, "--objectives") for name in args.objectives]
    for costs in ([each for each, _ in limits], objectives):
        column_names([cost, *costs])  # refuses a cost that is given twice
    return Asked(budgets, limits, objectives)


def _run_search(args: argparse.Namespace, targets: Sequence[pipeline.Target]) -> pipeline.Outcome:
    """Search the targets as the options say."""
    first = targets[0]
    asked = _asked(args, first.cost, first.backbone, first.space, first.classes)
    return pipeline.run_search(
        targets, asked.budgets or _budgets(args, first), limits=asked.limits,
        objectives=asked.objectives, seed=args.seed,
    )  # fmt: skip


def _is_target(name: str, target: str, cost: Cost) -> bool:
    """Whether a limit is on the cost of the target itself: by its quantity, or by its device."""
    quantity, device = split_quantity(name)
    entry = find_device(device)
    same = device == target or (entry is not None and entry is find_device(target))
    return name == cost.quantity or (same and quantity in ("", cost.quantity))


def _named_target(args: argparse.Namespace, net: str) -> pipeline.Target:
    backbone, space, classes = pipeline.named_space(net, args.width_mult, args.resolutions)
    accuracy = pipeline.accuracy_model(args.accuracy_predictor or net, backbone.width_mult)
    cost = _cost(args, backbone, space, classes)
    weak = weak_ranking(accuracy) or ""
    return pipeline.Target(
        net, backbone, classes, space, accuracy, cost, weak, tuple(filter(None, [weak]))
    )


def _comparisons(args: argparse.Namespace) -> list[str]:
    wanted = args.compare or [FREE_SPACES.get(args.net, "none")]
    names = [name for name in wanted if name != "none"]
    for name in names:
        if name not in NETWORKS:
            raise ConfigError(f"--compare: {unknown_name('network', name, ['none', *NETWORKS])}")
    pipeline.require_distinct([args.net, *names])
    return names


def _budgets(args: argparse.Namespace, target: pipeline.Target) -> Sequence[float]:
    device = find_device(args.target_hardware)
    usual = device.budgets if device else ()
    if usual and args.net in FREE_SPACES and min(usual) >= extreme(target.space, target.cost)[1]:
        return usual
    return pipeline.usual_budgets(target)


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
    if not Path(args.net).suffix and not Path(args.net).exists():
        entry(args.net)  # raises at once, where the import of torch would take seconds
    if args.net not in NETWORKS or NETWORKS[args.net].shipped:
        from nas.cli.search_checkpoint import search_checkpoint

        outcome, loaders = search_checkpoint(args, output, _cost, _asked, _run_search), None
    else:
        args.resolutions = args.resolutions or pipeline.RESOLUTIONS
        nets = [args.net, *_comparisons(args)]
        first = _named_target(args, args.net)
        claim_folder(output, {"net": args.net, "device": first.cost.name}, args.overwrite)
        targets = [first, *(_named_target(args, net) for net in nets[1:])]
        outcome, loaders = _run_search(args, targets), _loaders(args, first.cost)
    paths = results.write_outcome(outcome, output)
    print_found(outcome)
    print(f"written to {output}: {', '.join(path.name for path in paths)}")
    if loaders:
        show_specialised(
            outcome, loaders, output, heading_of(outcome.costs[0]), lambda v: short(v, ".6g")
        )


def _loaders(args: argparse.Namespace, cost: Cost) -> list[CostLoader]:
    """Return how the costs of the budgets and of the limits are loaded for other backbones."""

    def loader(name: str) -> CostLoader:
        device = split_quantity(name)[1]
        return lambda backbone, space: load_cost(device, backbone, space=space, progress=False)

    names = [name for name, _ in _limits(args) if not _is_target(name, args.target_hardware, cost)]
    return [
        lambda backbone, space: _cost(args, backbone, space, 1000),
        *map(loader, names),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(search, argv, PROG)
