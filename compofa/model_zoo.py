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


def ofa_net(net_id: str, pretrained: bool = False, classes: int = 1000) -> Supernet:
    """Build a supernet by name.

    Args:
        net_id: A key of :data:`NETWORKS`, such as ``compofa``.
        pretrained: Load its weights: those that ship with this library, or those that
            Once-for-All published, which are downloaded once.
        classes: Outputs of the classifier of a network without weights.

    Returns:
        The supernet, in evaluation mode if pretrained.

    Raises:
        SpaceError: The id is unknown.
        CheckpointError: There are no weights, or they cannot be downloaded.
    """
    spec = network_spec(net_id, classes)
    net = open_network(net_id).network if pretrained else Supernet(spec)
    assert isinstance(net, Supernet)
    return net


def ofa_specialized(net_id: str, pretrained: bool = False) -> tuple[StaticNetwork, int]:
    """Build a specialised network of Once-for-All.

    Args:
        net_id: Its id, such as ``note10_lat@8ms_top1@71.4_finetune@25``; ``-`` may stand for
            ``@``. ``python -m compofa zoo`` lists them.
        pretrained: Load the published weights, which are downloaded once. Images are normalised
            with ImageNet's usual mean and standard deviation.

    Returns:
        The network, in evaluation mode if pretrained, and its resolution in pixels.

    Raises:
        SpaceError: The id is unknown; the message has the nearest ids.
        CheckpointError: A file cannot be downloaded; the message says where to put it.
    """
    row = specialised(net_id)
    if pretrained:
        opened = open_network(row.net_id)
        net, size = opened.network, opened.image_size
    else:
        spec = specialised_definition(row, specialised_files(row, weights=False))
        net, size = build(spec), spec.resolution
    assert isinstance(net, StaticNetwork)
    return net, size
