"""Sorting channels by importance, so that the narrow networks begin with the best ones."""

from __future__ import annotations

import torch
from torch import Tensor

from compofa.nn.elastic import ElasticMBConv, ElasticSqueezeExcite
from compofa.supernet import Supernet


def sort_channels(net: Supernet) -> None:
    """Order every block's middle channels by importance, largest first, in place.

    Importance is the L1 norm of the project convolution's weights (of the gate's, for the
    hidden channels of SE), as in Once-for-All. The largest network computes what it did before;
    narrower ones change, so this belongs before the first phase that trains them.
    """
    with torch.no_grad():
        for block in net.modules():
            if isinstance(block, ElasticMBConv):
                importance = block.project.conv.weight.abs().sum((0, 2, 3))
                _reorder_block(block, importance.argsort(descending=True, stable=True))
            elif isinstance(block, ElasticSqueezeExcite):
                importance = block.expand.weight.abs().sum((0, 2, 3))
                _reorder_hidden(block, importance.argsort(descending=True, stable=True))


def _reorder_block(block: ElasticMBConv, order: Tensor) -> None:
    for part in (block.expand, block.depthwise):
        _permute(part.conv.weight, order)
        for tensor in (
            part.bn.weight,
            part.bn.bias,
            part.bn.running_mean,
            part.bn.running_var,
        ):
            _permute(tensor, order)
    if block.se is not None:
        _permute(block.se.reduce.weight, order, 1)
        _permute(block.se.expand.weight, order)
        _permute(block.se.expand.bias, order)
    _permute(block.project.conv.weight, order, 1)


def _reorder_hidden(gate: ElasticSqueezeExcite, order: Tensor) -> None:
    _permute(gate.reduce.weight, order)
    _permute(gate.reduce.bias, order)
    _permute(gate.expand.weight, order, 1)


def _permute(tensor: Tensor, order: Tensor, dim: int = 0) -> None:
    tensor.copy_(tensor.index_select(dim, order))
