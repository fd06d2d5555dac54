"""Definitions of named networks."""

from __future__ import annotations

from dataclasses import dataclass

from compofa.errors import SpaceError, unknown_name
from compofa.networks.families import backbone
from compofa.networks.network_spec import FixedNetwork, Network
from compofa.networks.published import SPECIALISED
from compofa.networks.supernet_spec import NetworkSpec
from compofa.space.coupling import Coupling

SMALL_IMAGES, MEDIUM_IMAGES, LARGE_IMAGES = (8, 48), (48, 128), (128, 256)
"""Sides of the images that a kind of backbone is for, in pixels: strides 8, 16 and 32."""
TOLERANCE = 1.25
"""Factor beyond its sizes up to which a network is used without a warning."""


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
        sizes: Smallest and largest side of the images that it is for, in pixels; ``None`` if
            unknown. Suggested networks, listings and warnings follow from it.
    """

    backbone: str
    width_mult: float
    coupling: str
    elastic_kernel: bool
    description: str
    shipped: str = ""
    sizes: tuple[int, int] | None = None

    def serves(self, resolution: int) -> bool:
        """Return whether images of this side, in pixels, are within or near its sizes."""
        if self.sizes is None:
            return True
        return self.sizes[0] / TOLERANCE <= resolution <= self.sizes[1] * TOLERANCE


NETWORKS: dict[str, Entry] = {
    "compofa": Entry(
        "mobilenet_v3", 1.0, "simple", False, "CompOFA, fixed kernels: 243 subnets",
        sizes=LARGE_IMAGES,
    ),
    "compofa-elastic": Entry(
        "mobilenet_v3", 1.0, "simple", True, "CompOFA, elastic kernels: 117^5 subnets",
        sizes=LARGE_IMAGES,
    ),
    "ofa_mbv3_d234_e346_k357_w1.0": Entry(
        "mobilenet_v3", 1.0, "none", True, "Once-for-All MobileNetV3: 2.2e19 subnets",
        sizes=LARGE_IMAGES,
    ),
    "ofa_mbv3_d234_e346_k357_w1.2": Entry(
        "mobilenet_v3", 1.2, "none", True, "Once-for-All MobileNetV3, 1.2 times the width",
        sizes=LARGE_IMAGES,
    ),
    "ofa_proxyless_d234_e346_k357_w1.3": Entry(
        "proxyless", 1.3, "none", True, "Once-for-All ProxylessNAS: 2.0e20 subnets",
        sizes=LARGE_IMAGES,
    ),
    "compofa-proxyless": Entry(
        "proxyless", 1.3, "simple", False, "ProxylessNAS with CompOFA's coupling: 729 subnets",
        sizes=LARGE_IMAGES,
    ),
    "compofa-medium": Entry(
        "mobilenet_v3_medium_images", 0.5, "simple", False,
        "CompOFA at stride 16, half the width: 243 subnets", sizes=MEDIUM_IMAGES,
    ),
    "compofa-elastic-medium": Entry(
        "mobilenet_v3_medium_images", 0.5, "simple", True,
        "compofa-medium with elastic kernels: 117^5 subnets", sizes=MEDIUM_IMAGES,
    ),
    "ofa-medium": Entry(
        "mobilenet_v3_medium_images", 0.5, "none", True,
        "compofa-medium with every choice free: 2.2e19 subnets", sizes=MEDIUM_IMAGES,
    ),
    "compofa-small": Entry(
        "mobilenet_v3_small_images", 0.25, "simple", False,
        "CompOFA at stride 8, a quarter of the width: 243 subnets", sizes=SMALL_IMAGES,
    ),
    "compofa-elastic-small": Entry(
        "mobilenet_v3_small_images", 0.25, "simple", True,
        "compofa-small with elastic kernels: 117^5 subnets", sizes=SMALL_IMAGES,
    ),
    "ofa-small": Entry(
        "mobilenet_v3_small_images", 0.25, "none", True,
        "compofa-small with every choice free: 2.2e19 subnets", sizes=SMALL_IMAGES,
    ),
    "ofa-proxyless-small": Entry(
        "proxyless_small_images", 0.25, "none", True,
        "ProxylessNAS at stride 8, a quarter of the width", sizes=SMALL_IMAGES,
    ),
    "ofa_resnet50": Entry(
        "resnet50d", 1.0, "none", False, "Once-for-All ResNet50D, elastic widths: 2.5e12 subnets",
        sizes=LARGE_IMAGES,
    ),
    "compofa-resnet50": Entry(
        "resnet50d", 1.0, "simple", False,
        "ResNet50D with depth and expand ratio coupled, widths free: 118,098 subnets",
        sizes=LARGE_IMAGES,
    ),
    "ofa-resnet50-small": Entry(
        "resnet50d_small_images", 0.25, "none", False,
        "ResNet50D at stride 8, a quarter of the width", sizes=SMALL_IMAGES,
    ),
    "compofa-resnet50-small": Entry(
        "resnet50d_small_images", 0.25, "simple", False,
        "ofa-resnet50-small with depth and expand ratio coupled", sizes=SMALL_IMAGES,
    ),
    "compofa-digits": Entry(
        "mobilenet_v3_small_images", 0.25, "simple", False,
        "compofa-small trained on scikit-learn's digits; weights ship with the project",
        "compofa-digits.pt", SMALL_IMAGES,
    ),
}  # fmt: skip
"""Named supernets by id. Ids of Once-for-All's networks are those of its published table."""

PUBLISHED = {
    "compofa": "compofa_nets/model_best_compofa_simple.pth.tar",
    "compofa-elastic": "compofa_nets/model_best_compofa_simple_elastic.pth.tar",
    "ofa_mbv3_d234_e346_k357_w1.0": "ofa_nets/ofa_mbv3_d234_e346_k357_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.2": "ofa_nets/ofa_mbv3_d234_e346_k357_w1.2",
    "ofa_proxyless_d234_e346_k357_w1.3": "ofa_nets/ofa_proxyless_d234_e346_k357_w1.3",
    "ofa_resnet50": "ofa_nets/ofa_resnet50_d=0+1+2_e=0.2+0.25+0.35_w=0.65+0.8+1.0",
}
"""Supernets with published weights: names for :func:`compofa.io.download.published_file`."""


def entry(net_id: str) -> Entry:
    """Return the entry of a named supernet.

    Raises:
        SpaceError: The id is unknown; the message lists the known ones.
    """
    if net_id not in NETWORKS:
        raise SpaceError(unknown_name("network", net_id, NETWORKS))
    return NETWORKS[net_id]


def size_warning(net_id: str, resolution: int, label: str = "") -> str:
    """Return one line if a named network is used far from the image sizes that it is for.

    Args:
        net_id: A key of :data:`NETWORKS`.
        resolution: Side of the images in pixels.
        label: What to call the network; by default its id.

    Returns:
        The warning; empty if there is none.
    """
    row = entry(net_id)
    if row.sizes is None or row.serves(resolution):
        return ""
    low, high = row.sizes
    like = [
        name
        for name, other in NETWORKS.items()
        if (other.coupling, other.elastic_kernel) == (row.coupling, row.elastic_kernel)
        and other.sizes is not None
        and other.sizes[0] <= resolution <= other.sizes[1]
        and not other.shipped
    ]
    better = f"; networks for {resolution} pixels: {', '.join(like)}" if like else ""
    text = f"is for images of {low} to {high} pixels, used at {resolution}{better}"
    return f"{label or net_id} {text}"


def warn_of_size(spec: Network, resolution: int, label: str) -> str:
    """Return :func:`size_warning` for any network: that of the zoo's networks on its backbone.

    Args:
        spec: Its definition.
        resolution: Side of the images in pixels.
        label: What to call it.
    """
    name = spec.backbone if isinstance(spec, FixedNetwork) else spec.backbone.name
    like = (net_id for net_id, row in NETWORKS.items() if row.backbone == name)
    net_id = label if label in NETWORKS else next(like, "")
    return size_warning(net_id, resolution, label) if net_id else ""


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
