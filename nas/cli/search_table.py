"""What ``run_NAS.py`` prints of a search."""

from __future__ import annotations

from nas.cost.base import Cost
from nas.cost.objectives import column_names
from nas.report import results
from nas.report.data import ERROR, count
from nas.search.pipeline import Outcome
from nas.search.timed import ABOVE


def print_found(outcome: Outcome) -> None:
    """Print the found subnets as a table, and the errors of cost and accuracy."""
    target, columns = outcome.targets[0], results.found_columns(outcome)
    above = outcome.measured.get(ABOVE, [0.0] * len(outcome.found))
    names, own = column_names(outcome.costs), heading_of(target.cost)
    measured = [name for name in outcome.measured if not name.endswith(ERROR)]
    more = [*measured, *(name for name in names[1:] if name not in ("macs", "params"))]
    titles = "".join(f"  {name.replace('_', ' '):>19}" for name in more)
    if measured:
        titles = f"  {'90 % interval':>16}{titles}"
    counts = {"macs": ("MACs", 12), "params": ("params", 10)}
    counts.pop(names[0], None)
    titles += "".join(f"  {title:>{width}}" for title, width in counts.values())
    print(f"{'budget':>9}  {own:>12}  {'top-1 %':>8}{titles}  subnet")
    for row, found in enumerate(outcome.found):
        low, high = (columns[name][row] for name in results.INTERVAL)
        cells = f"  {f'{low:.2f} to {high:.2f}':>16}" if measured else ""
        for name in more:
            value = results.measured_value(columns, name, row)
            text = short(value.value, ".4g") if value.error is None else value.text(2)
            cells += f"  {text:>19}"
        for name, (_, width) in counts.items():
            cells += f"  {columns[name][row]:>{width},}"
        print(
            f"{short(found.budget):>9}  {short(found.cost, '.6g'):>{max(12, len(own))}}  "
            f"{found.accuracy:>8.2f}{cells}  {found.subnet}"
        )
        if above[row]:
            print(f"{'':>9}  its measured latency is above the budget")
        if found.slack:
            print(f"{'':>9}  every subnet of {target.name} meets this budget: it is not binding")
    how = "all of them compared" if outcome.found[0].exact else "evolution"
    print(f"{count(target.space.size)} subnets, {how}, {outcome.found[0].evaluated:,} evaluated")
    for cost in outcome.costs:
        print(f"cost {cost.name}: {cost.error}")
    print(f"top-1 {target.accuracy.name}: {target.accuracy.error}")


def heading_of(cost: Cost) -> str:
    """Return the heading of a cost's column: ``latency ms``, ``MACs``."""
    counts = {"flops": "MACs", "params": "parameters"}
    return counts.get(cost.name, f"{cost.quantity.replace('_', ' ')} {cost.unit}")


def short(value: float, form: str = "g") -> str:
    """Write a number in a format, but a whole or large one with all its digits."""
    whole = isinstance(value, int) or abs(value) >= 1e5
    return f"{value:,.0f}" if whole else f"{value:{form}}"
