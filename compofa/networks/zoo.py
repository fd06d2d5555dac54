"""Named networks: definitions that need no numbers typed, and where their weights are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compofa.errors import CheckpointError, SpaceError
from compofa.networks.families import backbone
from compofa.networks.layout import weight_shapes
from compofa.networks.published import SPECIALISED, specialised
from compofa.networks.supernet_spec import NetworkSpec
from compofa.space.coupling import Coupling

if TYPE_CHECKING:
    from torch import Tensor

    from compofa.io.checkpoint import Checkpoint
    from compofa.io.formats.specialised import SpecialisedFiles
    from compofa.nn.static import StaticNetwork
    from compofa.nn.supernet import Supernet

_PACKAGE = Path(__file__).resolve().parent.parent
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
"""The networks by their ids. Ids of Once-for-All are those of its published table."""

PUBLISHED = {
    "ofa_mbv3_d234_e346_k357_w1.0": "ofa_mbv3_d234_e346_k357_w1.0",
    "ofa_mbv3_d234_e346_k357_w1.2": "ofa_mbv3_d234_e346_k357_w1.2",
    "ofa_proxyless_d234_e346_k357_w1.3": "ofa_proxyless_d234_e346_k357_w1.3",
    "ofa_resnet50": "ofa_resnet50_d=0+1+2_e=0.2+0.25+0.35_w=0.65+0.8+1.0",
}
"""Networks whose weights Once-for-All published, to be downloaded: their files in ``ofa_nets``."""


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
        coupling: Pairs (depth, expand ratio) or the name of a coupling, or ``None`` for a free
            space; the network's own when left out.
        elastic_kernel: Whether kernels vary; the network's own choice when left out.
        width_mult: Width multiplier; the network's own when left out.
        resolutions: Resolutions of its space, in pixels.
        dropout: Probability before the classifier.

    Raises:
        SpaceError: Unknown network or choices outside their ranges.
    """
    row = entry(net_id)
    table = backbone(row.backbone, row.width_mult if width_mult is None else width_mult)
    elastic = row.elastic_kernel if elastic_kernel is None else elastic_kernel
    if elastic and not table.can_fix:
        raise SpaceError(f"{net_id} has kernels of one size alone: none is elastic")
    pairs = coupling or row.coupling if isinstance(coupling, str) else coupling
    space = table.compound_space(pairs, elastic, resolutions)
    return NetworkSpec(table, space, classes, kernel_transform=elastic, dropout=dropout)


def list_networks(contains: str = "") -> list[str]:
    """Return the ids of supernets and of specialised networks, those with ``contains`` in them."""
    known = [*NETWORKS, *(row.net_id for row in SPECIALISED.values())]
    return [name for name in known if contains in name]


def ofa_net(net_id: str, pretrained: bool = False, classes: int = 1000) -> Supernet:
    """Build a supernet by name, as in Once-for-All.

    Args:
        net_id: A key of :data:`NETWORKS`, such as ``compofa``.
        pretrained: Load its weights: those that ship with this library, or those that
            Once-for-All published, which are downloaded once.
        classes: Outputs of the classifier of a network without weights.

    Returns:
        The supernet, in evaluation mode when pretrained.

    Raises:
        SpaceError: Unknown network.
        CheckpointError: It has no weights, or they cannot be downloaded.
    """
    from compofa.nn.supernet import Supernet

    entry(net_id)
    if not pretrained:
        return Supernet(network_spec(net_id, classes))
    net = open_checkpoint(net_id)[1].build()
    assert isinstance(net, Supernet)
    return net


def ofa_specialized(net_id: str, pretrained: bool = False) -> tuple[StaticNetwork, int]:
    """Build one of Once-for-All's specialised networks, as there.

    Args:
        net_id: An id of its table, such as ``note10_lat@8ms_top1@71.4_finetune@25``; ``-`` may
            stand for ``@``. ``python -m compofa zoo`` lists them.
        pretrained: Load the published weights, which are downloaded once. Images are normalised
            with ImageNet's usual mean and deviation.

    Returns:
        The network, in evaluation mode when pretrained, and the side of its images in pixels.

    Raises:
        SpaceError: Unknown network; the message has the nearest ids.
        CheckpointError: A file cannot be downloaded; the message says where to put it.
    """
    if pretrained:
        checkpoint = open_specialised(net_id)[1]
        return checkpoint.build(), checkpoint.image_size
    row = specialised(net_id)
    network = row.network or specialised_files(net_id, weights=False).network()
    return network.build(), network.resolution


def specialised_files(net_id: str, weights: bool = True) -> SpecialisedFiles:
    """Return the files of a specialised network of Once-for-All, downloading those that are needed.

    Args:
        net_id: Its id.
        weights: Whether the weights are needed.

    Raises:
        SpaceError: Unknown network.
        CheckpointError: A file cannot be downloaded.
    """
    from compofa.io.download import published_file, published_path
    from compofa.io.formats.specialised import CONFIG, INIT, RUN, SpecialisedFiles

    row = specialised(net_id)
    needed = {CONFIG: row.network is None, RUN: row.network is None, INIT: weights}
    names = {name: f"ofa_specialized/{row.folder}/{name}" for name in needed}
    config, run, init = (
        published_file(names[name]) if need else published_path(names[name])
        for name, need in needed.items()
    )
    return SpecialisedFiles(config, init, run)


def open_specialised(net_id: str) -> tuple[Path, Checkpoint]:
    """Read a specialised network of Once-for-All, downloading its files where need be.

    Returns:
        The file of its weights, and the network.

    Raises:
        SpaceError: Unknown network.
        CheckpointError: A file cannot be downloaded or is not the network's.
    """
    from compofa.io.download import replaceable
    from compofa.io.formats.specialised import read_specialised

    row = specialised(net_id)
    files = specialised_files(net_id)
    with replaceable(files.config):
        network = row.network or files.network()
    with replaceable(files.weights):
        checkpoint = read_specialised(files, network)
    return files.weights, replace(checkpoint, figures={"published": {"top1": row.top1}})


def weights_path(net_id: str) -> Path:
    """Return the file of a named supernet's weights: shipped, or published and downloaded.

    Raises:
        SpaceError: Unknown network.
        CheckpointError: It has none, they cannot be downloaded, or this installation lacks them.
    """
    row = entry(net_id)
    if net_id in PUBLISHED:
        from compofa.io.download import published_file

        return published_file(f"ofa_nets/{PUBLISHED[net_id]}")
    if not row.shipped:
        raise CheckpointError(
            f"no weights ship for {net_id}: build it without pretrained and load a file with "
            "compofa.io.checkpoint.load_weights(net, path)"
        )
    for folder in CHECKPOINT_FOLDERS:
        if (folder / row.shipped).is_file():
            return folder / row.shipped
    raise CheckpointError(f"this installation lacks {row.shipped}: expected it in {folder}")


def open_checkpoint(net: str, arch: str | None = None) -> tuple[Path, Checkpoint]:
    """Find and read a trained network: the file of its weights, and what it holds.

    See :func:`open_any` for arguments and errors.
    """
    path, _, checkpoint = open_any(net, arch)
    return path, checkpoint


def open_any(net: str, arch: str | None = None) -> tuple[Path, str, Checkpoint]:
    """Find and read a trained network.

    Args:
        net: A key of :data:`NETWORKS` whose weights ship or were published, the id of a
            specialised network, or a path: a checkpoint of this library, of Once-for-All, CompOFA
            or MMRazor, or the folder of a specialised network.
        arch: The network that another program's weights belong to; by default as
            :func:`network_of` recognises it.

    Returns:
        The file of the weights, its format (of :data:`compofa.io.formats.names.FORMATS`) and what
        it holds.

    Raises:
        SpaceError: ``net`` is neither a known network nor a file, or ``arch`` is unknown.
        CheckpointError: The file cannot be used.
    """
    from compofa.io.formats.specialised import find_specialised
    from compofa.io.open import read_any

    if net in PUBLISHED:
        from compofa.io.download import replaceable

        path = weights_path(net)
        with replaceable(path):
            return path, *read_any(path, net)
    if net in NETWORKS:
        path = weights_path(net)
        return path, *read_any(path, arch)
    path = Path(net)
    if not path.exists():
        if "/" not in net and ("@" in net or "_top1" in net):
            path, checkpoint = open_specialised(net)
            return path, "ofa", checkpoint
        if not path.suffix:
            entry(net)
    files = find_specialised(path)
    return files.weights if files else path, *read_any(path, arch)


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
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    shares = {name: _share(network_spec(name, classes), shapes) for name in NETWORKS}
    fits = [name for name, share in shares.items() if share == max(shares.values()) >= 0.5]
    if not fits:
        raise CheckpointError(
            f"{path}: expected weights of one of {', '.join(NETWORKS)}, got {_seen(shapes)}"
        )
    best = next((name for name in fits if NETWORKS[name].elastic_kernel == elastic), fits[0])
    return network_spec(best, classes)


def _share(spec: NetworkSpec, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the share of a network's weights that are among these, whatever their kernels."""
    wanted = weight_shapes(spec.layers_of(spec.space.largest))
    held = sum(shapes.get(name, ())[:2] == shape[:2] for name, shape in wanted.items())
    return held / len(wanted)


def _seen(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Describe weights by the channels of the first convolutions, for an error."""
    convs = [f"{name} {list(shape)}" for name, shape in shapes.items() if len(shape) == 4]
    return ", ".join(convs[:3]) or "no convolutions"
