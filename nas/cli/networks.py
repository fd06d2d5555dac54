"""The network that ``sample`` and ``measure`` time: a named one, or that of a checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import replace

from compofa.cli.common import Parser, int_list
from compofa.errors import ConfigError
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import NETWORKS, network_spec
from nas.search import pipeline


def add_timed_network(sub: Parser) -> None:
    """Add ``--net``, ``--width-mult`` and ``--resolutions``."""
    sub.add_argument(
        "--net",
        default="compofa",
        metavar="ID|FILE",
        help=f"a checkpoint, or one of {', '.join(NETWORKS)}",
    )
    sub.add_argument(
        "--width-mult",
        type=float,
        metavar="X",
        help="width multiplier of a named network (default: its own)",
    )
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
    if args.net in NETWORKS and not NETWORKS[args.net].shipped:
        spec = network_spec(args.net, width_mult=args.width_mult)
        sizes = wanted or pipeline.usual_resolutions(spec.backbone)
    else:
        from compofa.io.open import open_network
        from nas.search.from_checkpoint import search_resolutions

        if args.width_mult is not None:
            raise ConfigError("--width-mult: a checkpoint has its own width, expected none")
        opened = open_network(args.net)
        spec = opened.spec
        if not isinstance(spec, NetworkSpec):
            raise ConfigError(f"--net: expected a supernet, got the specialised network {args.net}")
        sizes = search_resolutions(opened.checkpoint, wanted)
    for size in sizes:
        spec.check_resolution(size)
    return replace(spec, space=spec.space.restrict(resolutions=sizes))
