"""Speed and quality of searches: ``python -m benchmarks.search``.

With ``--reference DATA`` (a folder with the published predictor and the Note10 tables) also how
near the default search comes to the best known subnets, over several seeds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from nas.accuracy.base import AccuracyModel
from nas.accuracy.predictor import load_accuracy_model
from nas.cost.base import Cost
from nas.cost.devices import load_cost
from nas.cost.lookup import TableCost
from nas.search.evolution import Evolution
from nas.search.search import pareto_search, search, search_front

RESOLUTIONS = (160, 176, 192, 208, 224)
BUDGETS = (15.0, 20.0, 25.0, 30.0, 35.0)
FULL = Evolution(children=400)
"""About 50,000 candidates a budget."""
BEST_KNOWN = {15.0: 0.78800, 20.0: 0.80789, 25.0: 0.82222, 30.0: 0.83187, 35.0: 0.83791}
"""Published predictor, Note10 tables of width 1.2, all of OFA: from runs with up to a million
predictions each and from hundreds of short ones."""


def median_seconds(step: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Run ``step`` once unmeasured and ``rounds`` times measured."""
    result, times = step(), []
    for _ in range(rounds):
        started = time.perf_counter()
        result = step()
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


def speed(rounds: int) -> None:
    cost = load_cost("note10", MOBILENET_V3)
    free, compound = load_accuracy_model("ofa_mbv3_w1.0"), load_accuracy_model("compofa")
    space = MOBILENET_V3.compound_space(resolutions=RESOLUTIONS)
    seconds, found = median_seconds(lambda: search(space, compound, cost, BUDGETS), rounds)
    print(f"CompOFA, {len(BUDGETS)} budgets: all {found[0].evaluated:,} subnets in "
          f"{1e3 * seconds:.1f} ms")  # fmt: skip
    space = MOBILENET_V3.free_space(RESOLUTIONS)
    for name, settings in (("default effort", Evolution()), ("full effort", FULL)):
        for budgets in ((20.0,), BUDGETS):
            step = partial(search, space, free, cost, budgets, evolution=settings)
            seconds, found = median_seconds(step, rounds)
            count = found[0].evaluated
            print(f"OFA, {len(budgets)} budgets, {name}: {count / len(budgets):,.0f} candidates "
                  f"and {seconds / len(budgets):.3f} s a budget, {count / seconds:,.0f} "
                  "candidates/s")  # fmt: skip
    seconds, front = median_seconds(lambda: search_front(space, free, cost), 1)
    print(f"OFA, whole front: {len(front.genes)} subnets in {seconds:.2f} s")
    costs = [cost, load_cost("flops", MOBILENET_V3), load_cost("params", MOBILENET_V3)]
    seconds, front = median_seconds(lambda: pareto_search(space, free, costs), 1)
    print(f"OFA, four objectives: {len(front.genes)} subnets in {seconds:.2f} s")


def quality(accuracy: AccuracyModel, cost: Cost, seeds: int) -> None:
    space = MOBILENET_V3.free_space(RESOLUTIONS)
    rows, started = [], time.perf_counter()
    for seed in range(seeds):
        found = search(space, accuracy, cost, list(BEST_KNOWN), seed=seed)
        rows.append([result.accuracy for result in found])
    seconds = (time.perf_counter() - started) / seeds
    print(f"\nOFA, published predictor, {seeds} seeds, {found[0].evaluated:,} predictions and "
          f"{seconds:.2f} s a seed")  # fmt: skip
    print(f"{'budget':>8} {'best known':>11} {'best':>8} {'mean':>8} {'worst':>8}")
    for (budget, best), values in zip(BEST_KNOWN.items(), np.transpose(rows), strict=True):
        print(f"{budget:>5g} ms {best:>11.5f} {values.max():>8.5f} {values.mean():>8.5f} "
              f"{values.min():>8.5f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.search", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timings, of which the median counts")
    parser.add_argument("--reference", type=Path, help="folder with the published files")
    parser.add_argument("--seeds", type=int, default=10, help="searches to judge quality by")
    args = parser.parse_args()
    speed(args.rounds)
    if args.reference:
        quality(
            load_accuracy_model(args.reference / "predictors" / "acc_predictor.pth"),
            TableCost(args.reference / "latency" / "note10_lut", MOBILENET_V3.scaled(1.2)),
            args.seeds,
        )


if __name__ == "__main__":
    main()
