"""Putting the channels of convolutions in another order, in place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def by_importance(weight: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the input channels of ``weight`` by importance, group after group.

    Args:
        weight: Of a convolution, [out, in, k, k]. Importance is the L1 norm over an input channel.
        widths: Where groups end; channels stay within theirs.
    """
    importance = weight.abs().sum((0, 2, 3))
    edges = sorted({0, len(importance), *(w for w in widths if w < len(importance))})
    return torch.cat(
        [
            start + importance[start:end].argsort(descending=True, stable=True)
            for start, end in pairwise(edges)
        ]
    )


def permute(tensor: Tensor, order: Tensor, dim: int = 0) -> None:
    """Take the entries of ``tensor`` along ``dim`` in the given order."""
    tensor.copy_(tensor.index_select(dim, order))


def reorder_outputs(conv: nn.Conv2d, bn: nn.BatchNorm2d, order: Tensor) -> None:
    """Put the output channels of a convolution and of the normalisation behind it in order."""
    for tensor in (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var):
        permute(tensor, order)
