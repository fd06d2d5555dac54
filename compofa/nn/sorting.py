"""Sorting channels by importance, so that the narrow networks begin with the best ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compofa.networks.kinds import KINDS
from compofa.nn.supernet import Supernet
from compofa.space.subnet import Number


def sort_channels(net: Supernet, groups: Sequence[Number] = ()) -> None:
    """Order every block's middle channels by importance, largest first, in place.

    Importance is the L1 norm of the project convolution's weights (of the gate's, for the
    hidden channels of SE), as in Once-for-All. Networks of the full width compute what they did
    before; narrower ones change, unless their width is trained already: name it in ``groups``.
    Output widths are not sorted, as in Once-for-All: the sums of a stage and the stage behind it
    share them. Blocks without a method ``sort_channels`` stay as they are.

    Args:
        net: The supernet.
        groups: Values of the choice coupled with the depth (expand ratios) that were trained.
            Channels stay within the groups between their widths, so the networks of these values
            compute what they did before.
    """
    table, space = net.spec.backbone, net.spec.space
    specs = {spec.name: spec for spec in net.specs}
    with torch.no_grad():
        for index, (row, blocks) in enumerate(zip(table.stages, net.stages, strict=True)):
            scales = [1.0]
            if row.choice is not None:
                scales = [table.widths[int(value)] for value in space.outer[row.choice].values]
            outs = [table.width(row.width * scale) for scale in scales]
            for position, block in enumerate(blocks):
                if not hasattr(block, "sort_channels"):
                    continue
                spec, fields = specs[f"stages.{index}.{position}"], KINDS[row.kind].fields
                assert fields is not None
                values = dict(zip(table.names, net.largest.stages[index][position], strict=True))
                widths = [
                    fields(row, {**values, table.names[-1]: value}, spec.in_channels, out,
                           position == 0)["mid_channels"]
                    for out in outs
                    for value in groups
                ]  # fmt: skip
                block.sort_channels(widths)
