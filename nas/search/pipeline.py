"""A search by names: from a network and a device to an outcome, which results.py writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import ConfigError, SearchError, unknown_name
from compofa.io.untrusted import printable
from compofa.networks.backbone import Backbone
from compofa.networks.zoo import NETWORKS, network_spec
from compofa.space.arrays import SubnetArrays
from compofa.space.search_space import SearchSpace
from nas.accuracy.base import AccuracyModel
from nas.accuracy.predictor import load_accuracy_model
from nas.cost.base import Cost
from nas.cost.objectives import LimitedCost
from nas.search.evolution import Evolution, extreme
from nas.search.pareto import pareto_front
from nas.search.search import (
    Found,
    Points,
    cheapest,
    pareto_search,
    sample_points,
    search,
    search_front,
    within_reach,
)

RESOLUTIONS = (160, 176, 192, 208, 224)
"""Input resolutions of the published searches, whose networks have stride 32, pixels."""
CLOUD = 2000
SHARES = (0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Target:
    """A network to search: its space, accuracy predictor and cost.

    Attributes:
        name: Name in tables and legends.
        backbone: Widths and strides.
        classes: Outputs of the classifier.
        space: The space to search, with its resolutions.
        accuracy: Predictor of top-1.
        cost: Cost that the budgets limit.
        no_front: Why its front is not shown; empty if it is.
        notes: What a reader of the results must know about the measurements.
    """

    name: str
    backbone: Backbone
    classes: int
    space: SearchSpace
    accuracy: AccuracyModel
    cost: Cost
    no_front: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of a search, ready to be written.

    Attributes:
        targets: The searched network, then those it is compared with.
        found: The best subnet for each budget that can be met.
        fronts: The front of each target.
        clouds: Random subnets of each target.
        limits: Further costs of the found subnets, each with its upper bound.
        objectives: Costs minimised together, the target's cost first; empty without such a search.
        pareto_set: Pareto set of accuracy and all objectives; ``None`` without such a search.
        measured: Columns measured afterwards, one value per found subnet.
        checkpoint: Hash of the searched checkpoint; empty for a network by name.
    """

    targets: tuple[Target, ...]
    found: tuple[Found, ...]
    fronts: tuple[Points, ...]
    clouds: tuple[Points, ...]
    limits: tuple[tuple[Cost, float], ...] = ()
    objectives: tuple[Cost, ...] = ()
    pareto_set: Points | None = None
    measured: dict[str, list[float]] = field(default_factory=dict)
    checkpoint: str = ""

    @property
    def costs(self) -> tuple[Cost, ...]:
        """The cost that the budgets limit, then those of the limits."""
        return (self.targets[0].cost, *(cost for cost, _ in self.limits))


class Percent:
    """Converts a predictor of fractions, such as the published one, to percent.

    Attributes:
        resolutions: The measured resolutions, rising; those between them are served as well.
    """

    unit = "top-1 %"

    def __init__(self, model: Any) -> None:
        self.name, self.error, self._model = model.name, model.error, model
        self.resolutions = model.resolutions

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return top-1 in percent, shape [n]."""
        return self._model.predict_percent(arrays)

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return its standard deviation in points, shape [n]."""
        return 100.0 * self._model.std(arrays)


def accuracy_model(name_or_path: str | Path, width_mult: float | None = None) -> AccuracyModel:
    """Open a predictor, converted to percent; see :func:`load_accuracy_model`."""
    model = load_accuracy_model(name_or_path, width_mult)
    return Percent(model) if hasattr(model, "predict_percent") else model


def usual_resolutions(backbone: Backbone) -> tuple[int, ...]:
    """Return the resolutions with the feature maps of :data:`RESOLUTIONS` at stride 32."""
    return tuple(size * backbone.stride // 32 for size in RESOLUTIONS)


def named_space(
    net: str, width_mult: float | None, resolutions: Sequence[int] | None = None
) -> tuple[Backbone, SearchSpace, int]:
    """Return backbone, space and classes of a named network.

    Args:
        net: Its name.
        width_mult: Width multiplier; ``None`` for the network's own.
        resolutions: Resolutions of the space; by default those of :func:`usual_resolutions`.

    Raises:
        ConfigError: The name is unknown.
    """
    if net not in NETWORKS:
        expected = f"expected a checkpoint's path or one of {', '.join(NETWORKS)}"
        raise ConfigError(unknown_name("network", net, NETWORKS, expected))
    spec = network_spec(net, width_mult=width_mult)
    sizes = resolutions or usual_resolutions(spec.backbone)
    for resolution in sizes:
        spec.check_resolution(resolution)
    spec = replace(spec, space=spec.space.restrict(resolutions=sizes))
    return spec.backbone, replace(spec.space, name=net), spec.classes


def network_name(net: str) -> str:
    """Return the name of a checkpoint: that of its run, or its file's stem.

    A run keeps ``best.pt`` and ``last.pt`` in one folder per phase, as in
    ``runs/digits-compofa-small/compound-1/best.pt``.
    """
    from compofa.training.recipes import task_names

    path = Path(net)
    if path.stem not in ("best", "last", "previous") or not path.parent.name:
        return printable(path.stem)
    task = path.parent.name.rpartition("-")[0] or path.parent.name
    of_phase = task in task_names() and path.parent.parent.name
    return printable(path.parent.parent.name if of_phase else path.parent.name)


def usual_budgets(target: Target) -> list[float]:
    """Return four quantiles of the cost of random subnets, rounded to two digits.

    A quantile that rounding would move below all sampled costs is not rounded.
    """
    genes = target.space.sample_genes(np.random.default_rng(0), CLOUD)
    costs = target.cost(target.space.arrays(genes))
    spread = [(float(f"{cost:.1e}"), float(cost)) for cost in np.quantile(costs, SHARES)]
    return sorted({short if short >= costs.min() else cost for short, cost in spread})


def run_search(
    targets: Sequence[Target],
    budgets: Sequence[float],
    *,
    limits: Sequence[tuple[Cost, float]] = (),
    objectives: Sequence[Cost] = (),
    seed: int = 0,
    evolution: Evolution | None = None,
) -> Outcome:
    """Search the first target for each budget, and evaluate the fronts of all.

    Args:
        targets: The network to search, then those to compare it with.
        budgets: In the unit of the cost.
        limits: Further costs of the found subnets, each with its upper bound. They do not apply to
            the fronts.
        objectives: Costs to minimise together with the target's, for a Pareto set of all.
        seed: Random seed.
        evolution: Effort of the evolution where a space is not enumerated.

    Raises:
        SearchError: No budget or limit can be met; the message names the least possible. One
            budget among several is left out with a warning.
    """
    first = targets[0]
    cost = _limited(first.space, first.cost, budgets, limits)
    found = search(first.space, first.accuracy, cost, budgets, seed=seed, evolution=evolution)
    fronts = [search_front(t.space, t.accuracy, t.cost, seed=seed) for t in targets]
    fronts[0] = with_found(first, fronts[0], found)
    clouds = [sample_points(t.space, t.accuracy, [t.cost], CLOUD, seed=seed) for t in targets]
    minimised = (first.cost, *objectives) if objectives else ()
    together = (
        pareto_search(first.space, first.accuracy, minimised, seed=seed) if minimised else None
    )
    return Outcome(
        tuple(targets),
        tuple(found),
        tuple(fronts),
        tuple(clouds),
        tuple(limits),
        minimised,
        together,
    )


def require_met(
    space: SearchSpace,
    cost: Cost,
    budgets: Sequence[float],
    limits: Sequence[tuple[Cost, float]] = (),
) -> None:
    """Check that a subnet is within all limits and the largest budget, if there are budgets.

    Raises:
        SearchError: None is; the message names the least possible.
    """
    limited = _limited(space, cost, budgets, limits)
    if budgets:
        within_reach(space, limited, np.array([max(budgets)]), *cheapest(space, limited))


def _limited(
    space: SearchSpace,
    cost: Cost,
    budgets: Sequence[float],
    limits: Sequence[tuple[Cost, float]],
) -> Cost:
    """Return ``cost`` for subnets within the limits.

    Raises:
        SearchError: No subnet is within one of them, or within all.
    """
    if not limits:
        return cost
    for other, most in limits:
        least = extreme(space, other)[1]
        if not least <= most < np.inf:
            raise SearchError(
                f"expected a limit of at least {least:,.6g} {other.unit} on {other.name}, the "
                f"least of {space.name}, got {most:,.6g}"
            )
    ceiling = max(extreme(space, cost, greatest=True)[1], *budgets)
    limited = LimitedCost(cost, limits, ceiling)
    if extreme(space, limited)[1] > ceiling:
        listed = " and ".join(f"{most:,.6g} {other.unit} on {other.name}" for other, most in limits)
        raise SearchError(f"no subnet of {space.name} within {listed} was found")
    return limited


def with_found(target: Target, front: Points, found: Sequence[Found]) -> Points:
    """Return the Pareto front of ``front`` and the found subnets together."""
    joined = Points(
        np.concatenate([front.genes, [target.space.encode(f.subnet) for f in found]]),
        np.append(front.accuracy, [f.accuracy for f in found]),
        np.concatenate([front.costs, [[f.cost] for f in found]]),
    )
    return joined.take(pareto_front(joined.costs[:, 0], joined.accuracy))


def require_distinct(names: Sequence[str]) -> None:
    """Check that no network is compared with itself.

    Raises:
        SearchError: A name occurs twice.
    """
    if len(set(names)) < len(names):
        raise SearchError(f"expected different networks to compare, got {', '.join(names)}")
