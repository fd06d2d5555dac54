"""Extraction: a plain, independent torch network for one subnet of a supernet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from compofa.networks.layout import layout
from compofa.networks.supernet_spec import NetworkSpec
from compofa.nn.elastic import ElasticKernel
from compofa.nn.static import StaticNetwork
from compofa.space.subnet import Subnet

if TYPE_CHECKING:
    from compofa.nn.supernet import Supernet


def build_static(spec: NetworkSpec, subnet: Subnet) -> StaticNetwork:
    """Build the network of ``subnet`` with torch's default weights."""
    table = spec.backbone
    layers = layout(table, subnet, spec.classes)
    return StaticNetwork(layers, spec.dropout, table.bn_eps, table.bn_momentum)


def extract(supernet: Supernet, subnet: Subnet) -> StaticNetwork:
    """Copy ``subnet`` out of ``supernet``.

    The result computes what the supernet computes with this subnet, shares no memory with it and
    stands in the same mode, on the same device, with numbers of the same type. Its BN statistics
    are those that the supernet happens to hold: :func:`compofa.nn.calibrate.calibrate` measures its
    own.

    Raises:
        SpaceError: The supernet has no such subnet.
    """
    weight = next(supernet.parameters())
    with torch.no_grad():
        bound = supernet.bind(subnet)
        weights = bound.state_dict()
        for path, module in bound.named_modules():
            if isinstance(module, ElasticKernel):
                weights[f"{path}.conv.weight"] = module.filters()
                for kernel in module.matrices:
                    del weights[f"{path}.matrices.{kernel}"]
        network = build_static(supernet.spec, subnet).to(weight.device, weight.dtype)
        network.load_state_dict(weights)
    return network.train(supernet.training)
