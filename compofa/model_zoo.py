"""Networks by name, with the functions and the import of Once-for-All's ``model_zoo``."""

from __future__ import annotations

from compofa.io.open import open_network
from compofa.io.zoo import specialised_definition, specialised_files
from compofa.networks.published import specialised
from compofa.networks.zoo import NETWORKS, network_spec
from compofa.nn.build import build
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet

__all__ = ["NETWORKS", "ofa_net", "ofa_specialized"]


def ofa_net(net_id: str, pretrained: bool = False, classes: int | None = None) -> Supernet:
    """Build a supernet by name.

    Args:
        net_id: A key of :data:`NETWORKS`, such as ``compofa``.
        pretrained: Load its weights: those that ship with this library, or those that
            Once-for-All or CompOFA published, which are downloaded once.
        classes: Number of classes: by default that of the weights, or 1,000 without weights. For
            another number than that of the weights, the classifier is a new one, the same at every
            call (seed 0); :meth:`compofa.io.open.OpenedNetwork.with_classes` takes a seed.

    Returns:
        The supernet, in evaluation mode if pretrained.

    Raises:
        SpaceError: The id is unknown.
        CheckpointError: There are no weights, or they cannot be downloaded.
    """
    spec = network_spec(net_id, 1000 if classes is None else classes)
    if not pretrained:
        return Supernet(spec)
    opened = open_network(net_id)
    net = (opened if classes is None else opened.with_classes(classes)).network
    assert isinstance(net, Supernet)
    return net


def ofa_specialized(
    net_id: str, pretrained: bool = False, classes: int | None = None
) -> tuple[StaticNetwork, int]:
    """Build a specialised network of Once-for-All.

    Args:
        net_id: Its id, such as ``note10_lat@8ms_top1@71.4_finetune@25``; ``-`` may stand for
            ``@``. ``python -m compofa zoo`` lists them.
        pretrained: Load the published weights, which are downloaded once. Images are normalised
            with ImageNet's usual mean and standard deviation.
        classes: Number of classes, by default ImageNet's 1,000; for another number the classifier
            is a new one, as in :func:`ofa_net`.

    Returns:
        The network, in evaluation mode if pretrained, and its resolution in pixels.

    Raises:
        SpaceError: The id is unknown; the message has the nearest ids.
        CheckpointError: A file cannot be downloaded; the message says where to put it.
    """
    row = specialised(net_id)
    if pretrained:
        opened = open_network(row.net_id)
        opened = opened if classes is None else opened.with_classes(classes)
        net, size = opened.network, opened.image_size
    else:
        spec = specialised_definition(row, specialised_files(row, weights=False))
        spec = spec if classes is None else spec.with_classes(classes)
        net, size = build(spec), spec.resolution
    assert isinstance(net, StaticNetwork)
    return net, size
