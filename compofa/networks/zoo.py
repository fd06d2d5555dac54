"""Definitions of named networks."""

from __future__ import annotations

from dataclasses import dataclass

from compofa.errors import SpaceError, unknown_name
from compofa.networks.families import backbone
from compofa.networks.published import SPECIALISED
from compofa.networks.supernet_spec import NetworkSpec
from compofa.space.coupling import Coupling


@dataclass(frozen=True)
class Entry:
    """A named supernet.

    Attributes:
        backbone: Name of its backbone.
        width_mult: Width multiplier.
        coupling: Name of its coupling; ``none`` for a free space.
        elastic_kernel: Whether kernel sizes are elastic.
        description: One line for listings.
        shipped: Its file of weights in ``checkpoints/``; empty if none ships.
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
    "ofa_resnet50": Entry(
        "resnet50d", 1.0, "none", False, "Once-for-All ResNet50D, elastic widths, 2.5e12 subnets"
    ),
    "compofa-resnet50": Entry(
        "resnet50d", 1.0, "simple", False,
        "ResNet50D with depth and expand ratio coupled, widths free: 118,098 subnets",
    ),
    "ofa-resnet50-small": Entry(
        "resnet50d_small_images", 0.25, "none", False,
        "ResNet50D for images of 8 to 64 pixels, a quarter of the width",
    ),
    "compofa-resnet50-small": Entry(
        "resnet50d_small_images", 0.25, "simple", False, "the same with its coupling"
    ),
    "compofa-digits": Entry(
        "mobilenet_v3_small_images", 0.25, "simple", False,
        "compofa-small trained on scikit-learn's digits; weights ship with the project",
        "compofa-digits.pt",
    ),
}  # fmt: skip
"""Named supernets by id. Ids of Once-for-All's networks are those of its published table."""

PUBLISHED = {
    "ofa_mbv3_d234_e346_k357_w1.0": "ofa_mbv3_d234_e346_k357_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.2": "ofa_mbv3_d234_e346_k357_w1.2",
    "ofa_proxyless_d234_e346_k357_w1.3": "ofa_proxyless_d234_e346_k357_w1.3",
    "ofa_resnet50": "ofa_resnet50_d=0+1+2_e=0.2+0.25+0.35_w=0.65+0.8+1.0",
}
"""Supernets whose weights Once-for-All published: their file names in its folder ``ofa_nets``."""


def entry(net_id: str) -> Entry:
    """Return the entry of a named supernet.

    Raises:
        SpaceError: The id is unknown; the message lists the known ones.
    """
    if net_id not in NETWORKS:
        raise SpaceError(unknown_name("network", net_id, NETWORKS))
    return NETWORKS[net_id]


def register_network(net_id: str, row: Entry) -> None:
    """Add a named supernet, for ``--net`` and :func:`network_spec`.

    Raises:
        SpaceError: There is another network of that id, or its backbone is unknown.
    """
    backbone(row.backbone, row.width_mult)
    if NETWORKS.setdefault(net_id, row) != row:
        raise SpaceError(f"expected a new network id, got {net_id}, which is known")


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
    """Return the definition of a named supernet, with the given changes.

    Args:
        net_id: A key of :data:`NETWORKS`.
        classes: Number of classes.
        coupling: Pairs (depth, expand ratio) or the name of a coupling; ``None`` for a free
            space; by default the network's own.
        elastic_kernel: Whether kernel sizes are elastic; by default as the network's.
        width_mult: Width multiplier; by default the network's own.
        resolutions: Resolutions of its space, in pixels.
        dropout: Dropout probability before the classifier.

    Raises:
        SpaceError: The id is unknown, or a value is out of range.
    """
    row = entry(net_id)
    table = backbone(row.backbone, row.width_mult if width_mult is None else width_mult)
    elastic = row.elastic_kernel if elastic_kernel is None else elastic_kernel
    if elastic and not table.can_fix:
        raise SpaceError(
            f"{net_id}: expected a network with several kernel sizes for elastic kernels, got one"
        )
    pairs = coupling or row.coupling if isinstance(coupling, str) else coupling
    space = table.compound_space(pairs, elastic, resolutions)
    return NetworkSpec(table, space, classes, kernel_transform=elastic, dropout=dropout)


def list_networks(contains: str = "") -> list[str]:
    """Return the ids of supernets and of specialised networks that contain ``contains``."""
    known = [*NETWORKS, *(row.net_id for row in SPECIALISED.values())]
    return [name for name in known if contains in name]
