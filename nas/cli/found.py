"""Printing of what a search found."""

from __future__ import annotations

from nas.cost.base import Cost
from nas.cost.objectives import column_names
from nas.search import pipeline, results
from nas.search.timed import ABOVE


def print_found(outcome: pipeline.Outcome) -> None:
    """Print the found subnets as a table, and the errors of cost and accuracy."""
    target, columns = outcome.targets[0], results.found_columns(outcome)
    above = outcome.measured.get(ABOVE, [0.0] * len(outcome.found))
    names, own = column_names(outcome.costs), heading(target.cost)
    more = [name for name in (*outcome.measured, *names[1:]) if name not in ("macs", "params")]
    more_titles = "".join(f"  {name.replace('_', ' '):>16}" for name in more)
    titles = f"{'budget':>9}  {own:>12}  {'top-1 %':>8}{more_titles}"
    print(f"{titles}  {'MACs':>12}  {'params':>10}  subnet")
    for row, found in enumerate(outcome.found):
        cells = "".join(f"  {short(columns[name][row], '.2f'):>16}" for name in more)
        print(
            f"{short(found.budget):>9}  {short(found.cost, '.6g'):>{max(12, len(own))}}  "
            f"{found.accuracy:>8.2f}{cells}  {columns['macs'][row]:>12,}  "
            f"{columns['params'][row]:>10,}  {found.subnet}"
        )
        if above[row]:
            print(f"{'':>9}  its measured latency is above the budget")
        if found.slack:
            print(f"{'':>9}  every subnet of {target.name} meets this budget: it is not binding")
    how = "all of them compared" if outcome.found[0].exact else "evolution"
    print(f"{target.space.size:.4g} subnets, {how}, {outcome.found[0].evaluated:,} evaluated")
    for cost in outcome.costs:
        print(f"cost {cost.name}: {cost.error}")
    print(f"top-1 {target.accuracy.name}: {target.accuracy.error}")


def heading(cost: Cost) -> str:
    """Return the heading of a cost's column, such as ``latency ms``."""
    counts = {"flops": "MACs", "params": "parameters"}
    return counts.get(cost.name, f"{cost.quantity.replace('_', ' ')} {cost.unit}")


def short(value: float, form: str = "g") -> str:
    """Write a number in a format, but a whole or large one with all its digits."""
    whole = isinstance(value, int) or abs(value) >= 1e5
    return f"{value:,.0f}" if whole else f"{value:{form}}"
