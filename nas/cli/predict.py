"""``python -m nas estimate``: accuracy and costs of a table of subnets."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from compofa.cli.common import Parser
from compofa.errors import ConfigError, SpaceError, TableError, did_you_mean
from compofa.io.atomic import require_other
from compofa.networks.zoo import NETWORKS
from compofa.space.arrays import SubnetArrays
from compofa.space.search_space import SearchSpace
from nas.cli.networks import add_network, at_resolutions, network_of
from nas.cost.base import macs_cost, params_cost
from nas.cost.devices import ALIASES, DEVICES, find_device, load_cost
from nas.cost.objectives import require_quantity, split_quantity
from nas.search import pipeline
from nas.search.evolution import require_finite
from nas.tables import Table, lines, read_csv, read_subnets, require_members, write_columns

log = logging.getLogger(__name__)
_T = TypeVar("_T")

COUNTS = {"macs": macs_cost, "params": params_cost}
OWN_NET = "net"
"""Column of a search's tables with the network of each row."""


def add_predict_options(sub: Parser) -> None:
    """Add the options of ``predict``."""
    add_network(sub, None, " (default: that of the column net of each row, else compofa)")
    sub.add_argument(
        "--columns",
        required=True,
        metavar="LIST",
        help="comma-separated: top1, top1_std, macs, params, the name of an objective such as "
        "memory, or QUANTITY:DEVICE, as in latency:note10 and energy:phone.npz",
    )
    sub.add_argument(
        "--input",
        required=True,
        metavar="CSV",
        help="table with the columns ks, e, d and r, such as the results.csv or pareto.csv of a "
        "search; other columns are kept. May be gzipped. Where --net is one of several networks "
        "in the column net, every row is predicted as its own network",
    )
    sub.add_argument(
        "--output",
        required=True,
        metavar="CSV",
        help="table to write: --input with --columns added; columns of the same name are replaced. "
        "It may be the file of --input",
    )
    sub.add_argument(
        "--latency-table",
        metavar="DIR",
        help="folder of lookup tables, used for every latency:DEVICE",
    )
    sub.add_argument(
        "--accuracy-predictor",
        metavar="FILE",
        help="accuracy predictor to use instead of the shipped one",
    )


def predict(args: argparse.Namespace) -> None:
    """Read a table, predict each column, and write the table with them.

    Raises:
        CompofaError: An option or a row is not usable.
    """
    wanted = args.columns.split(",")
    models = [device for quantity, device in map(split_quantity, wanted) if quantity]
    for model in filter(None, [args.accuracy_predictor, *models]):
        require_other(args.output, model, f"{os.path.splitext(model)[0]}.json")
    for name in wanted:
        _require_column(name)
    table = read_csv(args.input)
    arrays, _ = read_subnets(table)
    columns: dict[str, list[float]] = {name: [0.0] * len(arrays.resolutions) for name in wanted}
    for net, rows in _rows_by_network(table, args.net, args.input).items():
        for name, values in _predicted(args, net, arrays, rows, wanted).items():
            for row, value in zip(rows.tolist(), values.tolist(), strict=True):
                columns[name][row] = value
    replaced = write_columns(args.output, table, columns)
    if replaced:
        log.info("%s: replaced what %s holds", ", ".join(replaced), args.input)
    print(f"{len(arrays.resolutions)} subnets with {args.columns}: {args.output}")


def _require_column(name: str) -> None:
    """Check that ``name`` may be a column to predict.

    Raises:
        ConfigError: It is none.
    """
    if name in ("top1", "top1_std", *COUNTS) or find_device(name) or ":" in name:
        return
    known = ["top1", "top1_std", *COUNTS, "latency:DEVICE", *DEVICES, *ALIASES]
    raise ConfigError(
        f"--columns: {did_you_mean(name, known)}expected top1, top1_std, macs, params, "
        f"latency:DEVICE or the name of an objective, got {name!r}"
    )


def _rows_by_network(table: Table, net: str | None, path: str) -> dict[str, np.ndarray]:
    """Return the rows of each network, counted from 0."""
    place = table.header.index(OWN_NET) if OWN_NET in table.header else None
    names = [] if place is None else [row[place] for row in table.rows]
    if not names or (net is not None and net not in names):
        return {net or "compofa": np.arange(len(table.rows))}
    unknown = [place for place, name in enumerate(names) if name not in NETWORKS]
    if unknown:
        name = names[unknown[0]]
        raise TableError(
            f"{path}, {lines(unknown)}: {OWN_NET}: {did_you_mean(name, NETWORKS)}expected a "
            f"named network, got {name!r}: give it, or its checkpoint, with --net for all rows"
        )
    return {name: np.flatnonzero(np.array(names) == name) for name in dict.fromkeys(names)}


def _predicted(
    args: argparse.Namespace, net: str, arrays: SubnetArrays, rows: np.ndarray, wanted: list[str]
) -> dict[str, np.ndarray]:
    """Return the columns of some rows, which are subnets of one network."""
    spec, checkpoint = network_of(net, args.width_mult)
    backbone, classes = spec.backbone, spec.classes
    if checkpoint is not None and not args.accuracy_predictor and {"top1", "top1_std"} & {*wanted}:
        raise ConfigError(
            f"--accuracy-predictor: expected one for the top-1 of {net}, such as the predictor.npz "
            "of its search"
        )

    def ask(question: Callable[[SubnetArrays], _T], of: SubnetArrays) -> _T:
        return _ask(question, of, args.input, rows)

    arrays = require_members(arrays[rows], spec.space, args.input, rows)

    def known(some: SubnetArrays) -> SearchSpace:
        return at_resolutions(spec, np.unique(some.resolutions).tolist()).space

    space = ask(known, arrays)
    columns: dict[str, np.ndarray] = {}
    for name in wanted:
        if name in ("top1", "top1_std"):
            model = pipeline.accuracy_model(args.accuracy_predictor or net, backbone.width_mult)
            columns[name] = ask(model.predict if name == "top1" else model.std, arrays)
            log.info("%s: %s, %s", name, model.name, model.error)
        elif name in COUNTS:
            columns[name] = COUNTS[name](backbone, classes)(arrays).astype(np.int64)
        else:
            cost = load_cost(split_quantity(name)[1], backbone, classes,
                             table=args.latency_table, space=space)  # fmt: skip
            require_quantity(name, cost)
            values = ask(cost, arrays)
            whole = cost.error == "exact" and (values == np.rint(values)).all()
            columns[name] = values.astype(np.int64) if whole else values
            log.info("%s: %s", name, cost.error)
        require_finite(name, columns[name], 0)
    return columns


def _ask(
    question: Callable[[SubnetArrays], _T], arrays: SubnetArrays, path: str, rows: np.ndarray
) -> _T:
    """Call a model; if it refuses some resolutions, name their lines in the table.

    Args:
        question: The model.
        arrays: Its subnets.
        path: The table.
        rows: Rows of the table that the subnets are, counted from 0.

    Raises:
        TableError: A resolution is refused.
    """
    try:
        return question(arrays)
    except SpaceError:
        for resolution in np.unique(arrays.resolutions):
            refused = np.flatnonzero(arrays.resolutions == resolution)
            try:
                question(arrays[refused])
            except SpaceError as error:
                raise TableError(f"{path}, {lines(rows[refused])}: {error}") from None
        raise
