"""The supernet that a command is asked about: a named one, or that of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compofa.cli.common import Parser, int_list
from compofa.errors import ConfigError
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import NETWORKS, entry, network_spec
from nas.search import pipeline

if TYPE_CHECKING:
    from compofa.io.checkpoint import Checkpoint


def add_network(sub: Parser, net: str | None = "compofa", default: str = "") -> None:
    """Add ``--net`` and ``--width-mult``; ``default`` describes a default that is not a name."""
    text = f"a checkpoint, or one of {', '.join(NETWORKS)}"
    sub.add_argument("--net", default=net, metavar="ID|FILE", help=text + default)
    sub.add_argument(
        "--width-mult",
        type=float,
        metavar="X",
        help="width multiplier of a named network (default: its own)",
    )


def add_timed_network(sub: Parser) -> None:
    """Add ``--net``, ``--width-mult`` and ``--resolutions``."""
    add_network(sub)
    sub.add_argument(
        "--resolutions",
        type=int_list,
        nargs="+",
        metavar="R",
        help="input resolutions (default: those that a checkpoint was trained at; of a named "
        "network those with the feature maps of 160 176 192 208 224 at stride 32)",
    )


def timed_network(args: argparse.Namespace) -> NetworkSpec:
    """Return the definition of the network, with its space at the resolutions to time.

    Raises:
        CompofaError: There is no such network, or it does not take one of the resolutions.
    """
    wanted = sorted({r for group in args.resolutions or [] for r in group})
    spec, checkpoint = network_of(args.net, args.width_mult)
    if checkpoint is None:
        return at_resolutions(spec, wanted or pipeline.usual_resolutions(spec.backbone))
    from nas.search.from_checkpoint import search_resolutions

    return at_resolutions(spec, search_resolutions(checkpoint, wanted))


def require_known(net: str) -> None:
    """Check a name at once, where the import of torch to open it would take seconds.

    Raises:
        SpaceError: It is neither that of a network nor looks like that of a file.
    """
    if not Path(net).suffix and not Path(net).exists():
        entry(net)


def network_of(net: str, width_mult: float | None) -> tuple[NetworkSpec, Checkpoint | None]:
    """Return the definition of a supernet, and its checkpoint unless it is only a name.

    Raises:
        CompofaError: There is no such supernet, or a checkpoint has another width.
    """
    if net in NETWORKS and not NETWORKS[net].shipped:
        return network_spec(net, width_mult=width_mult), None
    require_known(net)
    from compofa.io.open import open_network

    if width_mult is not None:
        raise ConfigError("--width-mult: a checkpoint has its own width, expected none")
    opened = open_network(net)
    if not isinstance(opened.spec, NetworkSpec):
        raise ConfigError(f"--net: expected a supernet, got the specialised network {net}")
    return opened.spec, opened.checkpoint


def at_resolutions(spec: NetworkSpec, sizes: Sequence[int]) -> NetworkSpec:
    """Return a definition with its space at other resolutions.

    Raises:
        SpaceError: The network does not take one of them.
    """
    for size in sizes:
        spec.check_resolution(size)
    return replace(spec, space=spec.space.restrict(resolutions=sizes))
