"""The part of ``run_NAS.py`` that shows networks with published weights beside a search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compofa.cli.common import say
from compofa.networks.published import SPECIALISED
from compofa.networks.zoo import PUBLISHED
from nas.cli.search_table import heading_of, short
from nas.cost.devices import LocalDevice, find_device
from nas.search.folder import SPECIALISED as TABLE
from nas.search.folder import subnet_file
from nas.search.pipeline import Outcome
from nas.search.specialised import CostLoader, best_within, within_limits, write_specialised

EVALUATE = "python eval_sampled_config.py --net {} --imagenet-path DIR"
FINETUNE = "python train_ofa_net.py --task finetune --init-path {} --dataset imagefolder"


def show_specialised(outcome: Outcome, loaders: Sequence[CostLoader], output: Path) -> None:
    """Write and print the specialised networks within the budgets, and how to use their weights.

    None are shown beside a network that is not one of ImageNet, or where this machine would have
    to be timed.

    Args:
        outcome: A search of a network by name.
        loaders: For each of ``outcome.costs``, how it is loaded for other backbones.
        output: Folder of the results.
    """
    target, table = outcome.targets[0], output / TABLE
    heading = heading_of(target.cost)
    table.unlink(missing_ok=True)
    backbones = {row.backbone.name for row in SPECIALISED.values() if row.backbone}
    local = [isinstance(find_device(cost.name), LocalDevice) for cost in outcome.costs]
    if target.backbone.name not in {*backbones, "resnet50d"}:
        return
    if any(local):
        say(
            f"the {len(SPECIALISED)} specialised networks of the zoo were not timed here: "
            "python -m compofa zoo lists them"
        )
        return
    priced = within_limits(outcome, loaders)
    if not priced:
        print(f"none of the {len(SPECIALISED)} specialised networks of the zoo is within that")
    else:
        write_specialised(table, outcome, priced)
        print("\nspecialised networks of the zoo, with published weights and top-1:")
        print(f"{'within':>9}  {heading:>12}  {'top-1 %':>8}  {'cost':9}  {'weights':10}  id")
        for found in outcome.found:
            best = best_within(priced, found.budget)
            if best is None:
                print(f"{short(found.budget):>9}  none")
                continue
            cost = short(best.costs[0], ".6g")
            print(
                f"{short(found.budget):>9}  {cost:>{max(12, len(heading))}}  "
                f"{best.row.top1:>8.2f}  {best.source:9}  {best.weights:10}  {best.row.net_id}"
            )
        print(f"{len(priced)} of {len(SPECIALISED)} are in {table.name}")
        say(f"evaluate one:  {EVALUATE.format('ID')}")
        say(f"fine-tune one: {FINETUNE.format('ID')} --data-path DIR")
    if target.name in PUBLISHED:
        subnet = output / subnet_file(outcome.found[-1].budget)
        say(
            f"weights of {target.name} are published, so of what was found as well: "
            f"{EVALUATE.format(target.name)} --subnet {subnet}"
        )
    else:
        print(f"weights of {target.name} itself: none are published, train it (docs/training.md)")
