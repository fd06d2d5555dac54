"""Networks built from their definitions."""

from __future__ import annotations

from compofa.networks.network_spec import Network
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet


def build(spec: Network, seed: int = 0) -> Supernet | StaticNetwork:
    """Build the network that ``spec`` defines, with new weights, in training mode.

    Args:
        spec: The definition of a supernet or of a specialised network.
        seed: Seed of a supernet's weights; a specialised network has torch's default weights.
    """
    if isinstance(spec, NetworkSpec):
        return Supernet(spec, seed)
    return StaticNetwork(spec.layers, spec.dropout, spec.bn_eps, spec.bn_momentum)
