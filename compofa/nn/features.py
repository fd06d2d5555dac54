"""Feature maps at several scales, for detection and segmentation backbones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from compofa.errors import SpaceError
from compofa.nn.static import StaticNetwork


class FeatureLevel(NamedTuple):
    """The last feature maps at one scale.

    Attributes:
        module: Name of the layer that returns them.
        channels: Their channels.
        reduction: By how much they are smaller than the image.
    """

    module: str
    channels: int
    reduction: int


def feature_levels(network: StaticNetwork) -> tuple[FeatureLevel, ...]:
    """Return the scales of a network before its pool, finest first."""
    levels: dict[int, FeatureLevel] = {}
    reduction = 1
    for spec in network.specs:
        if spec.kind == "pool":
            break
        reduction *= spec.stride
        levels[reduction] = FeatureLevel(spec.name, spec.out_channels, reduction)
    return tuple(levels.values())


class FeatureExtractor(nn.Module):
    """A network without its head that returns feature maps at several scales.

    It returns what a timm model with ``features_only=True`` does, the input of a feature pyramid.
    The layers are those of ``network``, not copies: with a bound subnet, a detector trains the
    supernet. Layers behind the last scale asked for are not run.

    Args:
        network: An extracted or bound subnet, or a specialised network.
        out_indices: Which scales to return, in ascending order; negative ones count from the
            coarsest. By default all of :func:`feature_levels`.

    Attributes:
        levels: The scales returned.

    Raises:
        SpaceError: An index is out of range, or they do not ascend.

    Example::

        net = extract(supernet, subnet)
        backbone = FeatureExtractor(net, out_indices=(-3, -2, -1))
        pyramid = torchvision.ops.FeaturePyramidNetwork(backbone.channels(), 128)
        maps = pyramid(OrderedDict(enumerate(backbone(images))))
    """

    def __init__(self, network: StaticNetwork, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        known = feature_levels(network)
        places = list(range(len(known))) if out_indices is None else list(out_indices)
        found = [place + len(known) * (place < 0) for place in places]
        if not found or found != sorted({*found} & {*range(len(known))}):
            raise SpaceError(
                f"out_indices: expected ascending indices from {-len(known)} to {len(known) - 1}, "
                f"got {places}"
            )
        self.levels = tuple(known[place] for place in found)
        names = [spec.name for spec in network.specs]
        self._names = tuple(names[: names.index(self.levels[-1].module) + 1])
        self.layers = nn.ModuleList(network.get_submodule(name) for name in self._names)

    def channels(self) -> list[int]:
        """Return the channels of each scale."""
        return [level.channels for level in self.levels]

    def reduction(self) -> list[int]:
        """Return by how much each scale is smaller than the image."""
        return [level.reduction for level in self.levels]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps of each scale.

        Args:
            images: Normalised images [n, 3, h, w]; h and w may differ.

        Returns:
            Tensors [n, channels, h / reduction, w / reduction], rounded up.
        """
        wanted = {level.module for level in self.levels}
        maps, x = [], images
        for name, layer in zip(self._names, self.layers, strict=True):
            x = layer(x)
            if name in wanted:
                maps.append(x)
        return maps
