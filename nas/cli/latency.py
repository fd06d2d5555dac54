"""``python -m nas measure`` and ``fit-latency``: latency models and tables of one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from compofa.cli.common import Parser
from compofa.errors import ConfigError, TableError
from compofa.io.atomic import is_stream, require_other
from nas.cli.networks import add_timed_network, network_of, timed_network
from nas.cost.devices import DEVICES, LocalDevice
from nas.cost.on_device import SETUP
from nas.cost.timing import RUNTIMES
from nas.cost.units import column_quantity
from nas.tables import Table, lines, read_csv, read_subnets

MEASURE = "time the networks of a space on this machine and write lookup tables"
FIT = "fit a latency model to measured networks"


def add_measure_options(sub: Parser) -> None:
    """Add the options of ``measure``."""
    add_timed_network(sub)
    local = [name for name, device in DEVICES.items() if isinstance(device, LocalDevice)]
    sub.add_argument("--device", choices=local, default="cpu", help="device to time")
    sub.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="torch",
        help="torch times each layer in eager mode; onnxruntime times whole networks as exported, "
        "several times faster than torch, and fits a model to them",
    )
    sub.add_argument(
        "--batch-size",
        type=int,
        default=0,
        metavar="N",
        help="images per batch; 0 for 1 (cpu) or 64 (gpu)",
    )
    sub.add_argument("--output", required=True, metavar="DIR", help="folder of R_lookup_table.yaml")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def measure(args: argparse.Namespace) -> None:
    """Time networks on this machine and write lookup tables."""
    spec = timed_network(args)
    backbone, space, classes = spec.backbone, spec.space, spec.classes
    device = DEVICES[args.device]
    assert isinstance(device, LocalDevice)  # a choice of --device
    settings = device.settings(args.batch_size, args.runtime)
    if args.runtime == "torch":
        from nas.cost.measured import measure

        cost = measure(backbone, space, classes, settings, progress=not args.quiet)
        paths = cost.export(args.output, space)
    else:
        from nas.cost.measured_onnx import export_tables, measure_onnx

        cost = measure_onnx(backbone, space, classes, settings, progress=not args.quiet)
        paths = export_tables(cost, args.output, space)
    print(f"{cost.name}: {cost.error}")
    print(f"{len(paths)} lookup tables in {args.output}")


def add_fit_options(sub: Parser) -> None:
    """Add the options of ``fit-latency``, those of the network aside."""
    sub.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="CSV with ks, e, d, r (or what the network's subnets have) and latency_ms, such as "
        "the latency.csv of sample",
    )
    sub.add_argument("--output", required=True, metavar="FILE", help="model (.npz) to write")
    sub.add_argument(
        "--column",
        default="latency_ms",
        help="measured column: a quantity and its unit, as in energy_mj; any other name is that of "
        "a column of latencies in ms",
    )
    sub.add_argument("--name", help="name of the device (default: that of the output file)")
    sub.add_argument("--seed", type=int, default=0, help="random seed")
    sub.add_argument("--quiet", action="store_true", help="no progress bar")


def fit_latency(args: argparse.Namespace) -> None:
    """Fit a latency model to a table."""
    from nas.cost.fit_latency import fit_latency
    from nas.cost.sampling import DeviceFolder

    source = Path(args.input)
    require_model(args.output, source)
    table = read_csv(source)
    card: dict[str, object] = {"source": source.name}
    folder = DeviceFolder.of_table(source) if args.net is None else None
    if folder is not None:
        backbone, classes, width = folder.network.backbone, folder.network.classes, args.width_mult
        card |= {"net": folder.net, "batch": folder.batch}
        if width is not None:
            raise ConfigError(f"--width-mult: {source} is of {folder.net}, expected none")
    else:
        spec, _ = network_of(args.net or "compofa", args.width_mult)
        backbone, classes = spec.backbone, spec.classes
    _require_filled(table, args.column)
    arrays, columns = read_subnets(table, [args.column])
    quantity, unit = column_quantity(args.column)
    card |= {"quantity": quantity, "unit": unit, **_measured_with(table)}
    name = args.name or Path(args.output).stem
    model = fit_latency(
        arrays, columns[args.column], backbone, classes, name, card, progress=not args.quiet
    )
    model.save(args.output)
    what = f"{quantity.replace('_', ' ')} in {unit}"
    print(f"{name}: {what}, {model.error}; written to {args.output}")


def _require_filled(table: Table, column: str) -> None:
    """Check that all rows have a value, so that an interrupted measurement is not taken as whole.

    Raises:
        TableError: Some have none.
    """
    if column in table.header:
        place = table.header.index(column)
        empty = [row for row, fields in enumerate(table.rows) if not fields[place].strip()]
        if empty:
            raise TableError(
                f"{table.path}: expected {column} in all {len(table.rows)} rows, {len(empty)} have "
                f"none ({lines(empty)}): continue measuring, or delete them"
            )


def _measured_with(table: Table) -> dict[str, str]:
    """Return how the rows were measured, as far as the table says.

    Raises:
        TableError: They were measured differently.
    """
    if SETUP not in table.header:
        return {}
    place = table.header.index(SETUP)
    found = sorted({fields[place].strip() for fields in table.rows})
    if len(found) > 1:
        raise TableError(
            f"{table.path}: expected rows that were all measured alike, got "
            f"{found[0]!r} and {found[1]!r} in the column {SETUP}"
        )
    return {SETUP: found[0]} if found and found[0] else {}


def require_model(output: str, source: Path) -> None:
    """Check that a model and its card can be written to a path without replacing their source.

    Raises:
        ConfigError: It is a stream, or one of them is the source.
    """
    if is_stream(output):
        raise ConfigError(f"--output: expected a file, for its card goes beside it, got {output}")
    for file in (output, Path(output).with_suffix(".json")):
        require_other(file, source)
