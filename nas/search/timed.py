"""Latency of found subnets, timed end to end where the device of a search is this machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nas.cost.devices import LocalDevice, Networks, find_device
from nas.search.pipeline import Outcome

MEASURED, ABOVE = "measured_latency_ms", "above_budget_ms"
"""Columns of results.csv: measured latency, and by how much it exceeds the budget, 0 if it does
not."""


def time_found(
    outcome: Outcome, device: str, batch: int = 0, runtime: str = "torch", bar: bool = True
) -> Outcome:
    """Time the found subnets; networks of random weights, since latency depends on shapes alone.

    Args:
        outcome: Outcome of the search.
        device: Device of the search; any other than one of this machine leaves it unchanged.
        batch: Images per batch; 0 for the device's default.
        runtime: What runs the networks, one of :data:`nas.cost.timing.RUNTIMES`.
        bar: Whether to show a progress bar.
    """
    entry, target = find_device(device), outcome.targets[0]
    if not isinstance(entry, LocalDevice) or target.cost.name != entry.name:
        return outcome
    networks = Networks(target.backbone, target.classes, batch=batch, progress=bar, runtime=runtime)
    times = entry.time([found.subnet for found in outcome.found], networks)
    budgets = np.array([found.budget for found in outcome.found])
    columns = {
        MEASURED: times.tolist(),
        ABOVE: np.round(np.maximum(times - budgets, 0), 4).tolist(),
    }
    return replace(outcome, measured={**outcome.measured, **columns})
