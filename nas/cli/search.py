"""``run_NAS.py``: find the best subnets for a device's budgets."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compofa.cli.common import run
from compofa.errors import CompofaError, ConfigError, unknown_name
from compofa.io.locks import exclusive
from compofa.networks.backbone import Backbone
from compofa.networks.zoo import NETWORKS, network_spec
from compofa.space.search_space import SearchSpace
from nas.cli.networks import require_known
from nas.cli.search_options import PROG, limits_of, parser
from nas.cli.search_table import print_found
from nas.cli.search_zoo import show_specialised
from nas.cost.devices import find_device, load_cost
from nas.cost.objectives import column_names, require_quantity, split_quantity
from nas.cost.served import default_resolutions
from nas.cost.units import Amount
from nas.report import results
from nas.search import pipeline
from nas.search.comparisons import require_priced
from nas.search.evolution import extreme
from nas.search.folder import claim_folder
from nas.search.specialised import CostLoader
from nas.search.timed import time_found
from nas.search.verify import weak_ranking

if TYPE_CHECKING:
    from nas.cost.base import Cost

log = logging.getLogger(__name__)
COMPARED = {
    "compofa": "ofa_mbv3_d234_e346_k357_w1.0",
    "compofa-elastic": "ofa_mbv3_d234_e346_k357_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.0": "compofa",
}
"""Network that a named network is compared with by default; others with none."""


def _cost(args: argparse.Namespace, backbone: Backbone, space: SearchSpace, classes: int) -> Cost:
    return load_cost(
        args.target_hardware,
        backbone,
        classes,
        table=args.latency_table,
        space=space,
        batch=args.batch_size,
        progress=not args.quiet,
        runtime=args.runtime,
    )


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
    for name, amount in limits_of(args):
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


def _require_met(
    args: argparse.Namespace, cost: Cost, backbone: Backbone, space: SearchSpace, classes: int
) -> None:
    """Check that the options ask for something that a space has.

    Raises:
        CompofaError: As for :func:`_asked`, or no subnet is within the budgets and limits.
    """
    asked = _asked(args, cost, backbone, space, classes)
    pipeline.require_met(space, cost, asked.budgets, asked.limits)


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
    wanted = args.compare or [COMPARED.get(args.net, "none")]
    names = [name for name in wanted if name != "none"]
    for name in names:
        if name not in NETWORKS:
            raise ConfigError(f"--compare: {unknown_name('network', name, ['none', *NETWORKS])}")
    pipeline.require_distinct([args.net, *names])
    return names


def _compared(args: argparse.Namespace, names: Sequence[str]) -> list[pipeline.Target]:
    """Return the targets to compare with; those that nobody asked for may be left out."""
    targets = []
    for net in names:
        try:
            target = _named_target(args, net)
            require_priced(target.space, target.cost)
        except CompofaError as error:
            if args.compare:
                raise
            log.warning("not compared with %s: %s", net, error)
        else:
            targets.append(target)
    return targets


def _usual_resolutions(args: argparse.Namespace) -> tuple[int, ...]:
    """Return the network's usual resolutions, as far as device and accuracy predictor serve them.

    Raises:
        CompofaError: They serve none together, or one of them cannot be used.
    """
    table = network_spec(args.net, width_mult=args.width_mult).backbone
    accuracy = pipeline.accuracy_model(args.accuracy_predictor or args.net, table.width_mult)
    return default_resolutions(
        args.target_hardware, table, pipeline.usual_resolutions(table), accuracy.resolutions,
        args.latency_table,
    )  # fmt: skip


def _budgets(args: argparse.Namespace, target: pipeline.Target) -> Sequence[float]:
    device = find_device(args.target_hardware)
    usual = device.budgets if device else ()
    if usual and min(usual) >= extreme(target.space, target.cost)[1]:
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
    require_known(args.net)
    if args.net not in NETWORKS or NETWORKS[args.net].shipped:
        from nas.cli.search_checkpoint import search_checkpoint

        outcome, loaders = search_checkpoint(args, output, _cost, _require_met, _run_search), None
    else:
        args.resolutions = args.resolutions or _usual_resolutions(args)
        names = _comparisons(args)
        first = _named_target(args, args.net)
        claim_folder(output, {"net": args.net, "device": first.cost.name}, args.overwrite)
        targets = [first, *_compared(args, names)]
        outcome, loaders = _run_search(args, targets), _loaders(args, first.cost)
    outcome = time_found(
        outcome, args.target_hardware, args.batch_size, args.runtime, not args.quiet
    )
    paths = results.write_outcome(outcome, output)
    print_found(outcome)
    print(f"written to {output}: {', '.join(path.name for path in paths)}")
    if loaders:
        show_specialised(outcome, loaders, output)


def _loaders(args: argparse.Namespace, cost: Cost) -> list[CostLoader]:
    """Return how the costs of the budgets and of the limits are loaded for other backbones."""

    def loader(name: str) -> CostLoader:
        device = split_quantity(name)[1]
        return lambda backbone, space: load_cost(device, backbone, space=space, progress=False)

    names = [
        name for name, _ in limits_of(args) if not _is_target(name, args.target_hardware, cost)
    ]
    return [
        lambda backbone, space: _cost(args, backbone, space, 1000),
        *map(loader, names),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run(search, argv, PROG)
