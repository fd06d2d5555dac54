"""Sorting channels by importance, so that the narrow networks begin with the best ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from compofa.networks.layout import mid_channels, se_channels
from compofa.nn.static import Bottleneck, ConvBN, MBConv, SqueezeExcite
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Number


def sort_channels(net: Supernet, groups: Sequence[Number] = ()) -> None:
    """Order every block's middle channels by importance, largest first, in place.

    Importance is the L1 norm of the project convolution's weights (of the gate's, for the
    hidden channels of SE), as in Once-for-All. Networks of the full width compute what they did
    before; narrower ones change, unless their width is trained already: name it in ``groups``.
    Both inner widths of a bottleneck are sorted, each by the convolution behind it. Output widths
    are not, as in Once-for-All: the sums of a stage and the stage behind it share them.

    Args:
        net: The supernet.
        groups: Expand ratios that were trained. Channels stay within the groups between their
            widths, so the networks of these ratios compute what they did before.
    """
    with torch.no_grad():
        for stage, blocks in enumerate(net.stages):
            for block in blocks:
                if isinstance(block, Bottleneck):
                    outs = _outputs(net, stage)
                    widths = [mid_channels(out, expand) for out in outs for expand in groups]
                    _reorder_bottleneck(block, widths)
                elif isinstance(block, MBConv):
                    ins = block.expand.conv.in_channels
                    widths = [mid_channels(ins, expand) for expand in groups]
                    _reorder_block(block, _order(block.project.conv.weight, widths))
                    if block.se is not None:
                        hidden = [se_channels(width) for width in widths]
                        _reorder_hidden(block.se, _order(block.se.expand.weight, hidden))


def _order(weight: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the input channels of ``weight`` by importance, group after group of ``widths``."""
    importance = weight.abs().sum((0, 2, 3))
    edges = sorted({0, len(importance), *(w for w in widths if w < len(importance))})
    return torch.cat(
        [
            start + importance[start:end].argsort(descending=True, stable=True)
            for start, end in pairwise(edges)
        ]
    )


def _outputs(net: Supernet, stage: int) -> list[int]:
    """Return the output widths that a stage's blocks can have."""
    table, row = net.spec.backbone, net.spec.backbone.stages[stage]
    indices = net.spec.space.widths[row.choice]
    return [table.width(row.width * table.widths[index]) for index in indices]


def _reorder_bottleneck(block: Bottleneck, widths: Sequence[int]) -> None:
    for part, behind in ((block.conv2, block.conv3), (block.conv1, block.conv2)):
        order = _order(behind.conv.weight, widths)
        _reorder_outputs(part, order)
        _permute(behind.conv.weight, order, 1)


def _reorder_outputs(part: ConvBN, order: Tensor) -> None:
    _permute(part.conv.weight, order)
    for tensor in (part.bn.weight, part.bn.bias, part.bn.running_mean, part.bn.running_var):
        _permute(tensor, order)


def _reorder_block(block: MBConv, order: Tensor) -> None:
    for part in (block.expand, block.depthwise):
        _reorder_outputs(part, order)
    if block.se is not None:
        _permute(block.se.reduce.weight, order, 1)
        _permute(block.se.expand.weight, order)
        _permute(block.se.expand.bias, order)
    _permute(block.project.conv.weight, order, 1)


def _reorder_hidden(gate: SqueezeExcite, order: Tensor) -> None:
    _permute(gate.reduce.weight, order)
    _permute(gate.reduce.bias, order)
    _permute(gate.expand.weight, order, 1)


def _permute(tensor: Tensor, order: Tensor, dim: int = 0) -> None:
    tensor.copy_(tensor.index_select(dim, order))
