"""Networks by name, under the import that published programs and this README use."""

from compofa.networks.zoo import NETWORKS, ofa_net, ofa_specialized

__all__ = ["NETWORKS", "ofa_net", "ofa_specialized"]
