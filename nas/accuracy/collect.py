"""Collecting accuracy records of a trained supernet: what an accuracy predictor is fitted on.

Subnets are drawn from the seed, each is calibrated and evaluated on the validation images, and
its record is appended to a file of JSON lines. A collection that was interrupted goes on where it
stopped, because what stands in the file is not measured again.

Several workers measure a subnet each at a time, and worker 0 appends their records in the order in
which it would have measured them itself: the file is that of one worker. When one dies, what stands
in the file is safe, and the same command measures the rest.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from compofa.distributed.backend import Backend, SingleProcess
from compofa.errors import DataError
from compofa.evaluate import Evaluator
from compofa.io.atomic import is_stream
from compofa.io.checkpoint import Checkpoint
from compofa.io.locks import exclusive_by_main
from compofa.io.records import EvalRecord, append_record, read_records, trim_records
from compofa.seeds import rng
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet

log = logging.getLogger(__name__)


def draw_subnets(space: SearchSpace, count: int, seed: int) -> list[Subnet]:
    """Return distinct subnets: the smallest and largest at each resolution, then random ones.

    Every prefix of a longer draw is the shorter draw, so that a collection can be extended.

    Args:
        space: Where from, its resolutions included.
        count: How many; the whole space where it is smaller.
        seed: Of the random ones.
    """
    if count >= space.size:
        return list(space.enumerate())
    chosen: dict[Subnet, None] = {}
    for resolution in sorted(space.resolutions, reverse=True):
        chosen[space.largest.at(resolution)] = None
        chosen[space.smallest.at(resolution)] = None
    generator = rng(seed, "collect")
    while len(chosen) < count:
        chosen[space.sample(generator)] = None
    return list(chosen)[:count]


def collect(
    checkpoint: Checkpoint,
    net: str,
    subnets: Sequence[Subnet],
    evaluator: Evaluator,
    output: str | Path,
    *,
    bar: bool = True,
    backend: Backend | None = None,
) -> list[EvalRecord]:
    """Measure ``subnets`` and append their records to ``output``, skipping those already there.

    Args:
        checkpoint: The supernet. Records in ``output`` of another one (by its ``digest``), of
            other images or of another number of calibration images are refused.
        net: Name or path for the records.
        subnets: What to measure.
        evaluator: On what.
        output: File of JSON lines, made if need be.
        bar: Whether to draw a progress bar.
        backend: Workers that all call this, each with an evaluator of its own that has all images.

    Returns:
        The records of ``subnets``, in their order.

    Raises:
        BusyError: Another process is collecting to ``output``.
        DataError: ``output`` cannot be read or written, or holds something else.
        ConfigError: Workers have read different checkpoints.
    """
    backend = backend or SingleProcess()
    backend.require_same("checkpoint", checkpoint.digest)
    with exclusive_by_main(backend, output):
        return _collect(checkpoint, net, subnets, evaluator, Path(output), bar, backend)


def _collect(
    checkpoint: Checkpoint,
    net: str,
    subnets: Sequence[Subnet],
    evaluator: Evaluator,
    output: Path,
    bar: bool,
    backend: Backend,
) -> list[EvalRecord]:
    digest = checkpoint.digest

    earlier = backend.from_main(lambda: _known(output, digest, evaluator))
    known = {record.subnet: record for record in earlier}
    todo = [subnet for subnet in subnets if subnet not in known]
    if len(todo) < len(subnets):
        log.info(
            "%d of %d records are in %s already", len(subnets) - len(todo), len(subnets), output
        )
    supernet = checkpoint.build().to(evaluator.device) if todo else None
    ordered = sorted(todo, key=lambda subnet: subnet.resolution)
    bar = bar and backend.is_main
    with tqdm(total=len(todo), desc="records", unit="net", disable=not bar, leave=False) as shown:
        for start in range(0, len(todo), backend.size):
            mine = ordered[start + backend.rank : start + backend.rank + 1]
            measured = [evaluator.measure(supernet, subnet, net, digest) for subnet in mine]
            for record in itertools.chain(*backend.gather(measured)):
                if backend.is_main:
                    append_record(output, record)
                known[record.subnet] = record
                shown.update()
            backend.commit()
    return [known[subnet] for subnet in subnets]


def _known(output: Path, digest: str, evaluator: Evaluator) -> list[EvalRecord]:
    """Read the records of an earlier call, each subnet's first, and leave no others in the file.

    What goes is a line that was not finished, and what two processes have measured at once.
    """
    if not output.exists() or is_stream(output):
        return []
    records = read_records(output)
    wanted = _conditions(
        digest, evaluator.part, evaluator.splits.name, evaluator.calibration_images
    )
    for record in records:
        got = _conditions(record.checkpoint, record.part, record.dataset, record.calibration_images)
        if got != wanted:
            raise DataError(
                f"{output}: expected records of {wanted}, got one of {got}; choose another file"
            )
    trim_records(output, records)
    return records


def _conditions(checkpoint: str, part: str, dataset: str, calibration_images: int) -> str:
    """Say what records must share to stand in one file."""
    return (
        f"checkpoint {checkpoint} on {part} images of {dataset}, calibrated on {calibration_images}"
    )
