"""Collection of accuracy records of a trained supernet, to fit an accuracy predictor to.

Random subnets are calibrated and evaluated on the validation images, and each record is appended to
a file of JSON lines. Subnets that have a record in the file are skipped, so an interrupted
collection is resumed by the same command.

Several ranks measure one subnet each at a time, and rank 0 appends their records in the order of a
single process, so that the file is the same. If a rank dies, the records written so far are kept.
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
from compofa.io.locks import exclusive_by_main
from compofa.io.open import OpenedNetwork
from compofa.io.records import EvalRecord, append_record, read_records, trim_records
from compofa.seeds import rng
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet

log = logging.getLogger(__name__)


def draw_subnets(space: SearchSpace, count: int, seed: int) -> list[Subnet]:
    """Return distinct subnets: the smallest and largest at each resolution, then random ones.

    A longer list begins with the shorter ones, so that a collection can be extended.

    Args:
        space: The space, with its resolutions.
        count: Number of subnets; all of the space if it has fewer.
        seed: Random seed.
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
    opened: OpenedNetwork,
    net: str,
    subnets: Sequence[Subnet],
    evaluator: Evaluator,
    output: str | Path,
    *,
    bar: bool = True,
    backend: Backend | None = None,
    title: str = "records",
) -> list[EvalRecord]:
    """Measure ``subnets`` and append their records to ``output``, skipping those already there.

    Args:
        opened: The supernet. It is an error if ``output`` has records of another one (by its
            ``digest``), of other images or of another number of calibration images.
        net: Name or path of the network in the records.
        subnets: Subnets to measure.
        evaluator: Measures accuracy.
        output: File of JSON lines, created if missing.
        bar: Whether to show a progress bar.
        backend: Ranks that all call this function, each with its own evaluator of all images.
        title: Title of the progress bar.

    Returns:
        The records of ``subnets``, in their order.

    Raises:
        BusyError: Another process is collecting to ``output``.
        DataError: ``output`` cannot be read or written, or is not a file of such records.
        ConfigError: Ranks have read different checkpoints.
    """
    backend = backend or SingleProcess()
    backend.require_same("checkpoint", opened.digest)
    with exclusive_by_main(backend, output):
        return _collect(opened, net, subnets, evaluator, Path(output), bar, backend, title)


def _collect(
    opened: OpenedNetwork,
    net: str,
    subnets: Sequence[Subnet],
    evaluator: Evaluator,
    output: Path,
    bar: bool,
    backend: Backend,
    title: str,
) -> list[EvalRecord]:
    digest = opened.digest

    earlier = backend.from_main(lambda: _known(output, digest, evaluator))
    known = {record.subnet: record for record in earlier}
    todo = [subnet for subnet in subnets if subnet not in known]
    if len(todo) < len(subnets):
        log.info(
            "%d of %d records are in %s already", len(subnets) - len(todo), len(subnets), output
        )
    supernet = opened.network.to(evaluator.device)
    ordered = sorted(todo, key=lambda subnet: subnet.resolution)
    bar = bar and backend.is_main
    with tqdm(total=len(todo), desc=title, unit="net", disable=not bar, leave=False) as shown:
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
    """Read the records of an earlier call, and keep only the first of each subnet in the file.

    This removes an unfinished last line and subnets that two processes measured at the same time.
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
    """Return the conditions that all records of a file share, as text."""
    return (
        f"checkpoint {checkpoint} on {part} images of {dataset}, calibrated on {calibration_images}"
    )
