"""Searching a network that one trained: records, a predictor, and the winners measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compofa.errors import ConfigError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint
from compofa.io.records import EvalRecord
from compofa.networks.backbones import Backbone
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet, SubnetArrays
from nas.accuracy.base import AccuracyModel
from nas.accuracy.collect import collect, draw_subnets
from nas.cost.base import Cost
from nas.cost.devices import DEVICES, LocalDevice, Networks
from nas.search.pipeline import Outcome, Target, accuracy_model

log = logging.getLogger(__name__)

CostLoader = Callable[[Backbone, SearchSpace, int], Cost]


class Clipped:
    """Keeps a predictor's figures below 100 %, which a small data set comes near to."""

    unit = "top-1 %"

    def __init__(self, model: AccuracyModel) -> None:
        self.name, self.error, self._model = model.name, model.error, model

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return expected top-1 in percent, at most 100, shape [n]."""
        return np.minimum(self._model.predict(arrays), 100.0)

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation in points, shape [n]."""
        return self._model.std(arrays)


@dataclass(frozen=True)
class Trained:
    """A checkpoint to search.

    Attributes:
        name: For tables.
        checkpoint: What the file holds.
        resolutions: Where to search, pixels.
    """

    name: str
    checkpoint: Checkpoint
    resolutions: tuple[int, ...]

    @property
    def space(self) -> SearchSpace:
        """The space it was trained for."""
        space = self.checkpoint.network.space
        return space.restrict(resolutions=self.resolutions, name=self.name)

    @property
    def free_space(self) -> SearchSpace | None:
        """The same choices without their coupling; ``None`` if there is none to undo."""
        free = self.space.free(f"{self.name}-free")
        return free if free.stages != self.space.stages else None


def trained_targets(
    trained: Trained,
    load_cost: CostLoader,
    evaluator: Evaluator,
    folder: Path,
    *,
    samples: int = 80,
    predictor: str | None = None,
    compare: bool = True,
    seed: int = 0,
    bar: bool = True,
) -> list[Target]:
    """Return the trained space and, to compare with, the free space of the same supernet.

    Args:
        trained: The network.
        load_cost: Gives the cost of subnets of a space.
        evaluator: Measures accuracy on the validation images.
        folder: Gets ``records.jsonl`` and the fitted ``predictor.npz``; both are used again.
        samples: Subnets to measure, half of them from the free space when it is compared.
        predictor: File of a predictor to use in place of measuring.
        compare: Whether to include the free space.
        seed: Of the subnets.
        bar: Whether to draw progress bars.

    Raises:
        ConfigError: Too few subnets to fit a predictor on.
    """
    spaces = [trained.space]
    if compare and trained.free_space is not None:
        spaces.append(trained.free_space)
    network = trained.checkpoint.network
    if predictor is not None:
        accuracy = accuracy_model(predictor, network.backbone.width_mult)
    else:
        subnets = _drawn(spaces, samples, seed)
    costs = [load_cost(network.backbone, space, network.classes) for space in spaces]
    if predictor is None:
        records = collect(
            trained.checkpoint, trained.name, subnets,
            evaluator, folder / "records.jsonl", bar=bar,
        )  # fmt: skip
        accuracy = fit_records(records, spaces[-1], trained.name, network.backbone.width_mult)
        accuracy.save(folder / "predictor.npz")
    return [
        Target(space.name, network.backbone, network.classes, space, Clipped(accuracy), cost)
        for space, cost in zip(spaces, costs, strict=True)
    ]


def _drawn(spaces: Sequence[SearchSpace], samples: int, seed: int) -> list[Subnet]:
    """Draw the same number of subnets from each space, and check that a fit can do with them."""
    from nas.accuracy.fit import MIN_ROWS

    share = -(-samples // len(spaces))
    drawn = dict.fromkeys(s for space in spaces for s in draw_subnets(space, max(share, 0), seed))
    if len(drawn) < MIN_ROWS:
        raise ConfigError(
            f"expected at least {MIN_ROWS} distinct subnets to fit a predictor on, got "
            f"{len(drawn)}: ask for more samples or resolutions, or give a predictor"
        )
    return list(drawn)


def fit_records(
    records: Sequence[EvalRecord], space: SearchSpace, name: str, width_mult: float | None = None
) -> AccuracyModel:
    """Fit a predictor on measured records of subnets of ``space``.

    Args:
        records: What was measured.
        space: What they are subnets of.
        name: Of the model.
        width_mult: Width multiplier of the network, for the model's card.

    Raises:
        DataError: Too few records.
    """
    from nas.accuracy.fit import fit_accuracy

    arrays = space.arrays_of([record.subnet for record in records])
    card = {
        "source": f"{len(records)} records of {name} on {records[0].part} images of "
        f"{records[0].dataset}",
        "checkpoint": records[0].checkpoint,
        "width_mult": width_mult,
    }
    top1 = np.array([record.top1 for record in records])
    return fit_accuracy(arrays, top1, name=name, card=card)


def measure_found(
    outcome: Outcome, trained: Trained, evaluator: Evaluator, device: str, batch: int, bar: bool
) -> Outcome:
    """Measure the found subnets: accuracy, and latency where this machine is the device.

    Args:
        outcome: Of the search.
        trained: The network.
        evaluator: Measures accuracy on the test images.
        device: Device of the search; one of this machine is timed end to end.
        batch: Images at once when timing; 0 for the device's usual.
        bar: Whether to draw progress bars.
    """
    supernet = trained.checkpoint.build().to(evaluator.device)
    subnets = [found.subnet for found in outcome.found]
    measured = {
        "measured_top1": [
            evaluator.measure(supernet, subnet, trained.name).top1 for subnet in subnets
        ]
    }
    entry = DEVICES.get(device)
    if isinstance(entry, LocalDevice):
        network = trained.checkpoint.network
        networks = Networks(network.backbone, network.classes, batch=batch, progress=bar)
        times = entry.time(subnets, networks)
        measured["measured_latency_ms"] = [float(value) for value in times]
    return replace(outcome, measured=measured)


def search_resolutions(checkpoint: Checkpoint, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Return the resolutions to search: those asked for, or the data set's own.

    Raises:
        ConfigError: The checkpoint names no data set to take them from.
    """
    from compofa.data import DATASETS

    if wanted:
        sizes = tuple(wanted)
    elif checkpoint.dataset in ("imagenet", "imagefolder"):
        from nas.search.pipeline import RESOLUTIONS

        sizes = RESOLUTIONS
    elif checkpoint.dataset in DATASETS:
        sizes = DATASETS[checkpoint.dataset].train_resolutions
    else:
        raise ConfigError("the checkpoint names no known data set: give --resolutions")
    for size in sizes:
        checkpoint.network.check_resolution(size)
    return sizes
