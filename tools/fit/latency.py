"""The latency models that ship, fitted on published measurements."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from threadpoolctl import threadpool_limits

from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from nas.cost.fit import fit_network
from nas.cost.fitted import FittedModel
from nas.tables import read_subnets
from tools.fit.layers import fit_note10

COMMAND = "python -m tools.fit latency DIR --output nas/models"
NAS_PE = "NAS_PerformanceEstimation, Apache-2.0"
NOTE10 = "CompOFA, Apache-2.0: Samsung Note10 lookup tables of the OFA w1.2 network"
HELP = "HELP (Lee et al., NeurIPS 2021), MIT"
_STATES = (
    "The machine was in two states while it was measured (27 % of the rows are about 3 % faster); "
    "the model gives the more frequent one."
)
_BUSY = "Small networks wait for the host here; single measurements scatter by tens of percent."

SHIPPED: dict[str, tuple[str, str, str, str]] = {
    "rtx2080ti": ("latency/rtx2080ti_gpu_ofa.csv.gz", "latency_ms", NAS_PE, _STATES),
    "p40": ("latency/p40_gpu_ofa.csv.gz", "latency_ms", NAS_PE, ""),
    **{
        f"{name}-b{batch}": (
            "latency/help_gpus_ofa.csv.gz", f"{column}_{batch}_ms", HELP,
            _BUSY if batch < 64 or column == "2080ti" else "",
        )
        for name, column in (("v100", "v100"), ("titan_rtx", "titan_rtx"),
                             ("titan_xp", "titan_xp"), ("rtx2080ti", "2080ti"))
        for batch in (1, 32, 64)
    },
}  # fmt: skip
"""Name of a shipped model of networks -> table, column, source and caveat."""


NAMES = ("note10", *SHIPPED)


def reproduce(published: Path, output: Path, names: Sequence[str] = NAMES) -> Iterator[FittedModel]:
    """Fit the shipped models again from the published tables, and save them.

    Args:
        published: Folder that holds ``latency`` and ``specialized``.
        output: Folder for ``latency_<name>.npz`` and its card.
        names: Which models of :data:`NAMES`.

    Raises:
        TableError: A table is missing or malformed.
    """
    for name in names:
        with threadpool_limits(1):  # sums in one order: the same bits every time
            model = _note10(published) if name == "note10" else _network(published, name)
        model.save(Path(output) / f"latency_{name}.npz")
        yield model


def _note10(published: Path) -> FittedModel:
    table = "latency/note10_lut"
    networks, _ = read_subnets(published / "latency/note10_lut_sum_ofa.csv.gz", ["latency_ms"])
    model = fit_note10(published / table, networks, published / "specialized")
    return _described(model, NOTE10, table)


def _network(published: Path, name: str) -> FittedModel:
    table, column, source, caveat = SHIPPED[name]
    arrays, columns = read_subnets(published / table, [column])
    model = _described(fit_network(arrays, columns[column], MOBILENET_V3, name), source, table)
    if caveat:
        model.card["caveat"] = caveat
    return model


def _described(model: FittedModel, source: str, table: str) -> FittedModel:
    model.card.update(
        license="Apache-2.0", unit="ms", sources=[source], table=table, command=COMMAND
    )
    return model
