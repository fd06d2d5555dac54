"""Options of ``run_NAS.py``."""

from __future__ import annotations

import argparse

from compofa.cli.common import Parser, int_list
from compofa.errors import ConfigError
from compofa.networks.zoo import NETWORKS
from nas.cost.devices import DEVICES
from nas.cost.timing import RUNTIMES
from nas.cost.units import Amount
from nas.search.verify import CANDIDATES

PROG = "run_NAS.py"
DESCRIPTION = """\
Find the most accurate subnet for each latency budget of a device, and plot its Pareto front
together with that of the original Once-for-All space. Accuracy and latency come from models fitted
to published measurements; the held-out error of each is printed.

  run_NAS.py --target-hardware note10
  run_NAS.py --net compofa-elastic --target-hardware v100
  run_NAS.py --target-hardware phone.npz --constraints 15 20
  run_NAS.py --net runs/NAME/PHASE/best.pt --target-hardware cpu

For a trained checkpoint, the accuracy of random subnets is measured first and a predictor is fitted
to it, unless --accuracy-predictor gives one. The best predicted subnets of each budget are measured
on the validation images, the most accurate one wins, and the winners are measured on the test
images.
"""


def parser() -> Parser:
    """Build the command's parser."""
    p = Parser(prog=PROG, description=DESCRIPTION)
    p.add_argument(
        "--net",
        default="compofa",
        metavar="ID|FILE",
        help=f"{', '.join(NETWORKS)}, or a trained checkpoint",
    )
    p.add_argument(
        "--target-hardware",
        default="note10",
        metavar="DEVICE",
        help=f"{', '.join(DEVICES)}, a model's file or a folder of lookup tables",
    )
    p.add_argument(
        "--constraints",
        type=_amount,
        nargs="+",
        metavar="X",
        help="budgets in the device's unit, or with one, as in 20ms or 2MB (default: those of the "
        "published search, or four quantiles of the space). A budget that no subnet meets is "
        "skipped with a warning that names the least cost; it is an error if none can be met",
    )
    p.add_argument(
        "--limit",
        nargs="+",
        action="append",
        default=[],
        metavar="COST=X",
        help="bound on a cost of the found subnets, as in macs=300M, params=5M, memory=2MB, "
        "v100=9ms or DEVICE X; repeatable. k, M and G are powers of 1,000. A bound on the cost of "
        "--target-hardware itself, as in latency=20, is its budget",
    )
    p.add_argument(
        "--objectives",
        nargs="+",
        default=[],
        metavar="COST",
        help="costs to minimise together with that of --target-hardware, such as macs params "
        "memory; writes the Pareto set to objectives.csv",
    )
    p.add_argument(
        "--resolutions",
        type=int_list,
        nargs="+",
        metavar="R",
        help="input resolutions (default: 160 176 192 208 224, half of that at stride 16 and a "
        "quarter at stride 8; those that a checkpoint was trained at, five of them at most; in "
        "each case those that device and accuracy predictor serve)",
    )
    p.add_argument(
        "--compare",
        nargs="+",
        metavar="NET",
        help="networks to compare it with, or none (default: the free space of compofa and "
        "compofa-elastic, compofa for that; none for a checkpoint, which takes free: its front is "
        "not shown, as nothing was trained on it)",
    )
    p.add_argument(
        "--width-mult",
        type=float,
        metavar="X",
        help="width multiplier (default: the network's own). Fitted accuracy models serve widths "
        "within a factor of 1.25 of the measured one (1.0), with 1.5 points more uncertainty",
    )
    p.add_argument(
        "--latency-table", metavar="DIR", help="folder of lookup tables R_lookup_table.yaml"
    )
    p.add_argument(
        "--accuracy-predictor",
        metavar="FILE",
        help="accuracy predictor: .npz of fit-accuracy, or a published .pth (as for ofa_resnet50)",
    )
    p.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the results; those of the same network and device in it are replaced "
        "(default: runs/search-NET-DEVICE)",
    )
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="empty --output of the results of another search",
    )
    p.add_argument("--seed", type=int, default=0, help="random seed")
    p.add_argument(
        "--batch-size",
        type=int,
        default=0,
        metavar="N",
        help="images per batch when this machine is timed; 0 for 1 (cpu) or 64 (gpu)",
    )
    p.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="torch",
        help="what runs networks when this machine is timed: torch, in eager mode, or onnxruntime, "
        "as they are exported",
    )
    own = p.add_argument_group("with a trained checkpoint")
    own.add_argument("--data-path", "--imagenet-path", metavar="DIR", help="folder of its data set")
    own.add_argument(
        "--samples",
        type=int,
        default=80,
        metavar="N",
        help="number of subnets to measure for the predictor",
    )
    own.add_argument(
        "--verify",
        type=int,
        default=CANDIDATES,
        metavar="K",
        help="measure the K best predicted subnets of each budget on the validation images, and "
        "let the most accurate win; 0 trusts the predictor",
    )
    own.add_argument("--workers", type=int, default=0, metavar="N", help="loader workers")
    own.add_argument(
        "--device",
        help="device to measure accuracy on: cpu, cuda or mps (default: cuda if available)",
    )
    p.add_argument("--quiet", action="store_true", help="no progress bars")
    return p


def _amount(text: str) -> Amount:
    try:
        return Amount.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def limits_of(args: argparse.Namespace) -> list[tuple[str, Amount]]:
    """Return the names and bounds of ``--limit``, given as ``COST=X`` or as ``COST X``.

    Raises:
        ConfigError: One is neither.
    """
    found = []
    for words in args.limit:
        rest = iter(words)
        for word in rest:
            name, equals, text = word.rpartition("=")
            if not equals:
                name, text = word, next(rest, "")
            try:
                found.append((name, Amount.parse(text)))
            except ConfigError as error:
                raise ConfigError(f"--limit {name}: {error}") from None
    return found
