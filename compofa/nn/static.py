"""Static blocks: what an extracted subnet is made of, built from :class:`LayerSpec`.

Parameter names are the same as in the elastic blocks, so that extraction is copying by name.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from compofa.layout import LayerSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "hswish": nn.Hardswish,
}


def activation(name: str) -> nn.Module:
    """Return a new in-place activation module; ``none`` is the identity."""
    return ACTIVATIONS[name](inplace=True) if name != "none" else nn.Identity()


class ConvBN(nn.Sequential):
    """Same-padded convolution, batch normalisation, activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        act: str,
        eps: float,
        momentum: float,
        groups: int = 1,
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        norm = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        super().__init__(OrderedDict(conv=conv, bn=norm, act=activation(act)))


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their means (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` of shape [n, channels, h, w]."""
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * nn.functional.hardsigmoid(gate)


class MBConv(nn.Module):
    """Inverted residual block: 1x1 expand, depthwise k x k, SE, 1x1 project."""

    def __init__(self, spec: LayerSpec, eps: float, momentum: float) -> None:
        super().__init__()
        mid, norm = spec.mid_channels, {"eps": eps, "momentum": momentum}
        self.expand = ConvBN(spec.in_channels, mid, 1, 1, spec.act, **norm) if spec.expand else None
        self.depthwise = ConvBN(mid, mid, spec.kernel, spec.stride, spec.act, groups=mid, **norm)
        self.se = SqueezeExcite(mid, spec.se_channels) if spec.se_channels else None
        self.project = ConvBN(mid, spec.out_channels, 1, 1, "none", **norm)
        self.residual = spec.residual

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.expand(x) if self.expand is not None else x
        y = self.depthwise(y)
        if self.se is not None:
            y = self.se(y)
        y = self.project(y)
        return x + y if self.residual else y


class GlobalPool(nn.Module):
    """Mean over the feature map, kept as [n, channels, 1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, channels, h, w] to [n, channels, 1, 1]."""
        return x.mean((2, 3), keepdim=True)


def build_layer(spec: LayerSpec, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
    """Build the module that ``spec`` describes, with torch's default weights.

    Args:
        spec: Its kind and shapes.
        eps: Epsilon of its batch normalisations.
        momentum: Momentum of its batch normalisations.
    """
    if spec.kind == "conv":
        return ConvBN(
            spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.act, eps, momentum
        )
    if spec.kind == "mbconv":
        return MBConv(spec, eps, momentum)
    if spec.kind == "pool":
        return GlobalPool()
    if spec.kind == "mix":
        conv = nn.Conv2d(spec.in_channels, spec.out_channels, 1, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, act=activation(spec.act)))
    return nn.Linear(spec.in_channels, spec.out_channels)


class StaticNetwork(nn.Module):
    """A plain network made of layers: no elasticity, no link to a supernet.

    Attributes:
        specs: The layers it was built from, in order; each is reachable as
            ``network.get_submodule(spec.name)``.
    """

    def __init__(
        self,
        specs: tuple[LayerSpec, ...],
        dropout: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.specs = specs
        with torch.random.fork_rng(devices=[]):
            built = {spec.name: build_layer(spec, eps, momentum) for spec in specs}
        stages: dict[int, list[nn.Module]] = {}
        for name, layer in built.items():
            if name.startswith("stages."):
                stages.setdefault(int(name.split(".")[1]), []).append(layer)
        self.stem = built["stem"]
        self.first = built["first"]
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages.values())
        self.final_expand = built["final_expand"]
        self.pool = built["pool"]
        self.mix = built["mix"]
        self.dropout = nn.Dropout(dropout)
        self.classifier = built["classifier"]

    def units(self) -> list[nn.Module]:
        """Return the modules up to the pool in the order they run, each taking one tensor."""
        blocks = [block for stage in self.stages for block in stage]
        return [self.stem, self.first, *blocks, self.final_expand]

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [n, 3, r, r], normalised; returns logits [n, classes]."""
        x = images
        for unit in self.units():
            x = unit(x)
        x = self.mix(self.pool(x))
        return self.classifier(self.dropout(x.flatten(1)))
