"""Search of a trained supernet: collect records, fit a predictor, measure the found subnets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
from tqdm import tqdm

from compofa.errors import ConfigError
from compofa.evaluate import Evaluator
from compofa.io.checkpoint import Checkpoint
from compofa.io.open import OpenedNetwork
from compofa.io.records import EvalRecord
from compofa.networks.backbone import Backbone
from compofa.space.arrays import SubnetArrays
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.accuracy.base import AccuracyModel, interval_90
from nas.accuracy.collect import collect, draw_subnets
from nas.cost.base import Cost
from nas.search.folder import PREDICTOR, RECORDS
from nas.search.pipeline import RESOLUTIONS, Outcome, Target, accuracy_model
from nas.search.verify import small_validation, standard_error, verify, weak_ranking

log = logging.getLogger(__name__)

MOST_RESOLUTIONS = len(RESOLUTIONS)
"""Resolutions of a search by default, at most: all subnets are measured or timed at each."""

CostLoader = Callable[[Backbone, SearchSpace, int], Cost]


class Clipped:
    """Clips the predictions of an accuracy model to 100 %."""

    unit = "top-1 %"

    def __init__(self, model: AccuracyModel) -> None:
        self.name, self.error, self._model = model.name, model.error, model
        self.spearman: float | None = getattr(model, "spearman", None)

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return predicted top-1 in percent, at most 100, shape [n]."""
        return np.minimum(self._model.predict(arrays), 100.0)

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the standard deviation in percentage points, shape [n]."""
        return self._model.std(arrays)

    def interval(self, arrays: SubnetArrays) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the 90 % prediction intervals, in percent, shape [n] each."""
        return interval_90(self._model, arrays)


@dataclass(frozen=True)
class Trained:
    """A trained supernet to search.

    Attributes:
        name: Name in tables.
        opened: The supernet.
        resolutions: Resolutions of its search space, in pixels.
    """

    name: str
    opened: OpenedNetwork
    resolutions: tuple[int, ...]

    @property
    def space(self) -> SearchSpace:
        """The space it was trained for."""
        space = self.opened.spec.space
        return space.restrict(resolutions=self.resolutions, name=self.name)

    @property
    def free_space(self) -> SearchSpace | None:
        """The space without its coupling; ``None`` if it has none."""
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
    compare: bool = False,
    seed: int = 0,
    bar: bool = True,
) -> list[Target]:
    """Return the targets of a search: the trained space and, for comparison, its free space.

    Args:
        trained: The supernet.
        load_cost: Returns the cost of subnets of a space.
        evaluator: Measures accuracy on the validation images.
        folder: Folder for ``records.jsonl`` and the fitted ``predictor.npz``. Records that are
            there already are not measured again.
        samples: Number of subnets to measure, half of them from the free space if it is included.
        predictor: File of an accuracy predictor to use instead of measuring subnets.
        compare: Whether to include the free space. Its front is not shown: the supernet was not
            trained on it.
        seed: Seed for drawing the subnets.
        bar: Whether to show progress bars.

    Raises:
        ConfigError: There are too few subnets to fit a predictor.
    """
    spaces = [trained.space]
    if compare and trained.free_space is not None:
        spaces.append(trained.free_space)
    network = trained.opened.spec
    if predictor is not None:
        accuracy = accuracy_model(predictor, network.backbone.width_mult)
    else:
        subnets = _drawn(spaces, samples, seed)
    costs = [load_cost(network.backbone, space, network.classes) for space in spaces]
    notes: list[str] = []
    if predictor is None:
        records = collect(
            trained.opened, trained.name, subnets,
            evaluator, folder / RECORDS, bar=bar,
        )  # fmt: skip
        accuracy = fit_records(records, spaces[-1], trained.name, network.backbone.width_mult)
        accuracy.save(folder / PREDICTOR)
        few = small_validation(records[0].images, float(np.median([r.top1 for r in records])))
        notes += filter(None, [few])
    weak = weak_ranking(accuracy)
    notes += filter(None, [weak])
    for note in notes:
        log.warning("%s", note)
    reasons = [weak or "", "no front is shown: the supernet was not trained on this space"]
    parts = zip(spaces, costs, reasons, strict=False)
    return [
        Target(
            space.name, network.backbone, network.classes, space, Clipped(accuracy), cost,
            no_front, tuple(notes),
        )
        for space, cost, no_front in parts
    ]  # fmt: skip


def verify_found(
    outcome: Outcome,
    trained: Trained,
    evaluator: Evaluator,
    folder: Path,
    count: int,
    bar: bool = True,
) -> Outcome:
    """Measure the best predicted subnets of each budget, of which the best measured one wins.

    Args:
        outcome: Outcome of the search.
        trained: The supernet.
        evaluator: Measures accuracy on the validation images.
        folder: Folder of ``records.jsonl``: subnets that have a record are not measured again.
        count: Candidates per budget; see :func:`nas.search.verify.verify`.
        bar: Whether to show a progress bar.
    """

    def measure(subnets: Sequence[Subnet]) -> list[EvalRecord]:
        return collect(
            trained.opened, trained.name, subnets, evaluator, folder / RECORDS,
            bar=bar, title="candidates",
        )  # fmt: skip

    return verify(outcome, measure, count)


def _drawn(spaces: Sequence[SearchSpace], samples: int, seed: int) -> list[Subnet]:
    """Draw distinct subnets from each space in turn, and check that they suffice for a fit."""
    from nas.accuracy.fit import MIN_ROWS

    lists = [draw_subnets(space, max(samples, 0), seed) for space in spaces]
    turns = chain.from_iterable(zip_longest(*lists))
    drawn = list(dict.fromkeys(subnet for subnet in turns if subnet is not None))[: max(samples, 0)]
    if len(drawn) < MIN_ROWS:
        raise ConfigError(
            f"expected at least {MIN_ROWS} distinct subnets to fit a predictor on, got "
            f"{len(drawn)}: use more samples or resolutions, or give a predictor"
        )
    return drawn


def fit_records(
    records: Sequence[EvalRecord], space: SearchSpace, name: str, width_mult: float | None = None
) -> AccuracyModel:
    """Fit a predictor on measured records of subnets of ``space``.

    Args:
        records: Measured subnets.
        space: Space of the subnets.
        name: Name of the model.
        width_mult: Width multiplier of the network, for the model's card.

    Raises:
        DataError: There are too few records.
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
    return fit_accuracy(arrays, top1, name=name, card=card, images=records[0].images)


def measure_found(outcome: Outcome, trained: Trained, evaluator: Evaluator, bar: bool) -> Outcome:
    """Measure the accuracy of the found subnets.

    Args:
        outcome: Outcome of the search.
        trained: The supernet.
        evaluator: Measures accuracy on the test images.
        bar: Whether to show a progress bar.
    """
    supernet = trained.opened.network.to(evaluator.device)
    subnets = [found.subnet for found in outcome.found]
    with tqdm(subnets, desc="winners", unit="net", disable=not bar, leave=False) as shown:
        records = [evaluator.measure(supernet, subnet, trained.name) for subnet in shown]
    measured = {
        "measured_top1": [record.top1 for record in records],
        "measured_top1_se": [standard_error(record.top1, record.images) for record in records],
    }
    measured = outcome.measured | measured
    return replace(outcome, measured=measured, checkpoint=trained.opened.digest)


def search_resolutions(checkpoint: Checkpoint, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Return the resolutions to search: ``wanted``, or by default those of training.

    Of more than :data:`MOST_RESOLUTIONS`, those of the published searches are taken if all of them
    were trained, otherwise as many, spread evenly. Files of earlier versions and of other programs
    do not say how they were trained: their data set's resolutions are taken if they are evaluated
    at the size that is usual there, otherwise that size alone.

    Raises:
        ConfigError: The checkpoint names no known data set.
        SpaceError: The network does not take images of one of them.
    """
    sizes = tuple(wanted or _few(checkpoint.resolutions or _usual(checkpoint)))
    for size in sizes:
        checkpoint.network.check_resolution(size)
    return sizes


def _usual(checkpoint: Checkpoint) -> tuple[int, ...]:
    from compofa.data import DATASETS

    if checkpoint.dataset not in DATASETS:
        raise ConfigError("the checkpoint names no known data set: give --resolutions")
    info = DATASETS[checkpoint.dataset]
    if checkpoint.image_size == info.eval_resolution:
        return info.train_resolutions
    log.info(
        "the checkpoint does not say which resolutions it was trained at: searching %d pixels, at "
        "which it is evaluated (--resolutions gives others)",
        checkpoint.image_size,
    )
    return (checkpoint.image_size,)


def _few(sizes: Sequence[int]) -> tuple[int, ...]:
    if len(sizes) <= MOST_RESOLUTIONS:
        return tuple(sizes)
    if set(RESOLUTIONS) <= set(sizes):
        return RESOLUTIONS
    places = np.linspace(0, len(sizes) - 1, MOST_RESOLUTIONS).round().astype(int)
    return tuple(sorted(sizes)[place] for place in places)
