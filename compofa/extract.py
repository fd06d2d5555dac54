"""Extraction: a plain, independent torch network for one subnet of a supernet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compofa.layout import LayerSpec, layout
from compofa.network import NetworkSpec
from compofa.nn.elastic import Elastic
from compofa.nn.static import StaticNetwork
from compofa.subnet import Subnet

if TYPE_CHECKING:
    from compofa.supernet import Supernet


def build_static(spec: NetworkSpec, subnet: Subnet) -> StaticNetwork:
    """Build the network of ``subnet`` with torch's default weights."""
    table = spec.backbone
    layers = layout(table, subnet, spec.classes)
    return StaticNetwork(layers, spec.dropout, table.bn_eps, table.bn_momentum)


def extract(supernet: Supernet, subnet: Subnet) -> StaticNetwork:
    """Copy ``subnet`` out of ``supernet``.

    The result computes what the supernet computes with this subnet, shares no memory with it and
    stands in the same mode, on the same device, with numbers of the same type. Its BN statistics
    are those that the supernet happens to hold: :func:`compofa.calibrate.calibrate` measures its
    own.

    Raises:
        SpaceError: The supernet has no such subnet.
    """
    supernet.spec.space.free().require(subnet, resolution=False)
    weight = next(supernet.parameters())
    network = build_static(supernet.spec, subnet).to(weight.device, weight.dtype)
    with torch.no_grad():
        network.load_state_dict(dict(active_weights(supernet, network.specs)))
    return network.train(supernet.training)


def active_weights(
    supernet: Supernet, specs: tuple[LayerSpec, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that ``supernet`` uses for the layers ``specs``, by static name."""
    for spec in specs:
        module = supernet.get_submodule(spec.name)
        elastic = isinstance(module, Elastic)
        named = module.weights(spec) if elastic else module.state_dict().items()
        for name, tensor in named:
            yield f"{spec.name}.{name}", tensor.detach()
