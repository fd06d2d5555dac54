"""Named networks: definitions that need no numbers typed, and where their weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compofa.backbones import backbone
from compofa.coupling import COUPLINGS, Coupling
from compofa.errors import CheckpointError, SpaceError
from compofa.network import NetworkSpec

if TYPE_CHECKING:
    from torch import Tensor

    from compofa.checkpoint import Checkpoint
    from compofa.supernet import Supernet

_PACKAGE = Path(__file__).resolve().parent
CHECKPOINT_FOLDERS = (_PACKAGE / "checkpoints", _PACKAGE.parent / "checkpoints")
"""Where weights that ship are: in an installation, and in a clone."""


@dataclass(frozen=True)
class Entry:
    """A row of the table of named networks.

    Attributes:
        backbone: Name of its backbone.
        width_mult: Width multiplier.
        coupling: Name of its coupling; ``none`` for a free space.
        elastic_kernel: Whether kernels vary.
        description: One line for listings.
        shipped: File of weights in ``checkpoints/``, or empty.
    """

    backbone: str
    width_mult: float
    coupling: str
    elastic_kernel: bool
    description: str
    shipped: str = ""


NETWORKS: dict[str, Entry] = {
    "compofa": Entry(
        "mobilenet_v3", 1.0, "simple", False, "CompOFA, fixed kernels: 243 subnets"
    ),
    "compofa-elastic": Entry(
        "mobilenet_v3", 1.0, "simple", True, "CompOFA, elastic kernels: 117^5 subnets"
    ),
    "ofa_mbv3_d234_e346_k357_w1.0": Entry(
        "mobilenet_v3", 1.0, "none", True, "Once-for-All MobileNetV3, 2.2e19 subnets"
    ),
    "ofa_mbv3_d234_e346_k357_w1.2": Entry(
        "mobilenet_v3", 1.2, "none", True, "Once-for-All MobileNetV3, wider"
    ),
    "ofa_proxyless_d234_e346_k357_w1.3": Entry(
        "proxyless", 1.3, "none", True, "Once-for-All ProxylessNAS, 2.0e20 subnets"
    ),
    "compofa-proxyless": Entry(
        "proxyless", 1.3, "simple", False, "ProxylessNAS with CompOFA's coupling: 729 subnets"
    ),
    "compofa-small": Entry(
        "mobilenet_v3_small_images", 0.25, "simple", False,
        "CompOFA for images of 8 to 64 pixels, a quarter of the width",
    ),
    "compofa-elastic-small": Entry(
        "mobilenet_v3_small_images", 0.25, "simple", True, "the same with elastic kernels"
    ),
    "ofa-small": Entry(
        "mobilenet_v3_small_images", 0.25, "none", True, "the same with every choice free"
    ),
    "ofa-proxyless-small": Entry(
        "proxyless_small_images", 0.25, "none", True,
        "ProxylessNAS for images of 8 to 64 pixels, a quarter of the width",
    ),
    "compofa-digits": Entry(
        "mobilenet_v3_small_images", 0.25, "simple", False,
        "compofa-small trained on scikit-learn's digits; weights ship with the project",
        "compofa-digits.pt",
    ),
}  # fmt: skip
"""The networks by their ids. Ids of Once-for-All are those of its published table."""


def entry(net_id: str) -> Entry:
    """Return the row of ``net_id``.

    Raises:
        SpaceError: There is none; the message lists the known ids.
    """
    if net_id not in NETWORKS:
        raise SpaceError(f"unknown network {net_id!r}: expected one of {', '.join(NETWORKS)}")
    return NETWORKS[net_id]


def network_spec(
    net_id: str,
    classes: int = 1000,
    *,
    coupling: Coupling | str | None = "",
    elastic_kernel: bool | None = None,
    width_mult: float | None = None,
    resolutions: tuple[int, ...] = (224,),
    dropout: float = 0.1,
) -> NetworkSpec:
    """Return the definition of a named network, with changes where asked.

    Args:
        net_id: A key of :data:`NETWORKS`.
        classes: Outputs of the classifier.
        coupling: Pairs (depth, expand ratio), or ``None`` for a free space; the network's own
            when left out.
        elastic_kernel: Whether kernels vary; the network's own choice when left out.
        width_mult: Width multiplier; the network's own when left out.
        resolutions: Resolutions of its space, in pixels.
        dropout: Probability before the classifier.

    Raises:
        SpaceError: Unknown network or choices outside their ranges.
    """
    row = entry(net_id)
    table = backbone(row.backbone, row.width_mult if width_mult is None else width_mult)
    pairs = COUPLINGS[row.coupling] if isinstance(coupling, str) else coupling
    elastic = row.elastic_kernel if elastic_kernel is None else elastic_kernel
    space = table.compound_space(pairs, elastic, resolutions)
    return NetworkSpec(table, space, classes, kernel_transform=elastic, dropout=dropout)


def ofa_net(net_id: str, pretrained: bool = False, classes: int = 1000) -> Supernet:
    """Build a supernet by name, as in Once-for-All.

    Args:
        net_id: A key of :data:`NETWORKS`, such as ``compofa``.
        pretrained: Load the weights that ship with this library.
        classes: Outputs of the classifier of a network without weights.

    Returns:
        The supernet, in evaluation mode when pretrained.

    Raises:
        SpaceError: Unknown network.
        CheckpointError: No weights ship for it.
    """
    from compofa.supernet import Supernet

    row = entry(net_id)
    if not pretrained:
        return Supernet(network_spec(net_id, classes))
    from compofa.checkpoint import load_checkpoint

    return load_checkpoint(shipped_weights(net_id, row)).build()


def shipped_weights(net_id: str, row: Entry) -> Path:
    """Return the path of the weights that ship for a network.

    Raises:
        CheckpointError: None do, or this installation lacks them.
    """
    if not row.shipped:
        raise CheckpointError(
            f"no weights ship for {net_id}: build it without pretrained and load a file with "
            "compofa.checkpoint.load_weights(net, path)"
        )
    for folder in CHECKPOINT_FOLDERS:
        if (folder / row.shipped).is_file():
            return folder / row.shipped
    raise CheckpointError(f"this installation lacks {row.shipped}: expected it in {folder}")


def open_checkpoint(net: str, arch: str | None = None) -> tuple[Path, Checkpoint]:
    """Find and read a trained network.

    Args:
        net: A key of :data:`NETWORKS` whose weights ship, or the path of a checkpoint: this
            library's, or one of Once-for-All, CompOFA or MMRazor.
        arch: The network that another program's weights belong to; by default as
            :func:`network_of` recognises it.

    Returns:
        The file and what it holds.

    Raises:
        SpaceError: ``net`` is neither a known network nor a file, or ``arch`` is unknown.
        CheckpointError: The file cannot be used.
    """
    from compofa.formats import read_any

    if net in NETWORKS:
        path = shipped_weights(net, NETWORKS[net])
    else:
        path = Path(net)
        if not path.exists() and path.suffix == "":
            entry(net)
    return path, read_any(path, arch)[1]


def network_of(path: str | Path, state: Mapping[str, Tensor], arch: str | None) -> NetworkSpec:
    """Return the network that weights belong to.

    Args:
        path: Their file, for the error.
        state: The weights by this library's names.
        arch: A key of :data:`NETWORKS`; by default the first of the same widths, with elastic
            kernels where there are kernel matrices.

    Raises:
        SpaceError: ``arch`` is unknown.
        CheckpointError: No network has such widths.
    """
    elastic = any(".matrices." in name for name in state)
    bias = state.get("classifier.bias")
    classes = 1000 if bias is None else bias.numel()
    if arch is not None:
        return network_spec(arch, classes)
    convs = {name: state.get(f"{name}.conv.weight") for name in ("stem", "final_expand", "mix")}
    widths = {n: len(w) for n, w in convs.items() if w is not None and w.ndim}
    fits = [
        name
        for name, row in NETWORKS.items()
        if backbone(row.backbone, row.width_mult).fixed_widths == widths
    ]
    if not fits:
        first, before, after = (widths.get(name, 0) for name in convs)
        raise CheckpointError(
            f"{path}: expected weights of one of {', '.join(NETWORKS)}, got {first} channels "
            f"after the first convolution, {before} before the pool and {after} after it"
        )
    best = next((name for name in fits if NETWORKS[name].elastic_kernel == elastic), fits[0])
    return network_spec(best, classes)
