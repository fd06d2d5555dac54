"""Static blocks: what an extracted subnet is made of, built from :class:`LayerSpec`.

Parameter names are the same as in the elastic blocks, so that extraction is copying by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from compofa.layout import LayerSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
}


def activation(name: str) -> nn.Module:
    """Return a new in-place activation module; ``none`` is the identity."""
    return ACTIVATIONS[name](inplace=True) if name != "none" else nn.Identity()


class ConvBN(nn.Sequential):
    """Same-padded convolution, batch normalisation, activation; added to its input if residual."""

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
        residual: bool = False,
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        norm = nn.BatchNorm2d(out_channels, eps=eps, momentum=momentum)
        super().__init__(OrderedDict(conv=conv, bn=norm, act=activation(act)))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.act(self.bn(self.conv(x)))
        return x + y if self.residual else y


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


class Bottleneck(nn.Module):
    """Residual block of ResNet50D: 1x1 reduce, k x k with the stride, 1x1 expand, ReLU after it.

    Where the shape changes, the shortcut is an average pool, a 1x1 convolution and BN (He et al.,
    CVPR 2019).
    """

    def __init__(self, spec: LayerSpec, eps: float, momentum: float) -> None:
        super().__init__()
        ins, mid, outs = spec.in_channels, spec.mid_channels, spec.out_channels
        norm = {"eps": eps, "momentum": momentum}
        self.conv1 = ConvBN(ins, mid, 1, 1, spec.act, **norm)
        self.conv2 = ConvBN(mid, mid, spec.kernel, spec.stride, spec.act, **norm)
        self.conv3 = ConvBN(mid, outs, 1, 1, "none", **norm)
        self.pool = shortcut_pool(spec)
        self.downsample = ConvBN(ins, outs, 1, 1, "none", **norm) if spec.downsample else None
        self.act = activation(spec.act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.conv3(self.conv2(self.conv1(x)))
        if self.downsample is not None:
            x = self.downsample(self.pool(x))
        return self.act(x + y)


def shortcut_pool(spec: LayerSpec) -> nn.Module:
    """Return the average pool of a bottleneck's shortcut; without a stride there is none."""
    return nn.AvgPool2d(spec.stride, ceil_mode=True) if spec.stride > 1 else nn.Identity()


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
            spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.act, eps, momentum,
            residual=spec.residual,
        )  # fmt: skip
    if spec.kind == "mbconv":
        return MBConv(spec, eps, momentum)
    if spec.kind == "bottleneck":
        return Bottleneck(spec, eps, momentum)
    if spec.kind == "maxpool":
        return nn.MaxPool2d(spec.kernel, spec.stride, spec.kernel // 2)
    if spec.kind == "pool":
        return GlobalPool()
    if spec.kind == "mix":
        conv = nn.Conv2d(spec.in_channels, spec.out_channels, 1, bias=False)
        return nn.Sequential(OrderedDict(conv=conv, act=activation(spec.act)))
    return nn.Linear(spec.in_channels, spec.out_channels)


class LayeredNetwork(nn.Module):
    """Named layers in the order of a layout: stem, stages, head, pool and classifier.

    Args:
        layers: The layers by their paths; those of stage i are ``stages.i.0``, ``stages.i.1``, …
        stages: Number of stages; one may have no layer.
        stage: Makes the module that holds the blocks of a stage.
        dropout: Probability before the classifier, in training.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        stages: int,
        stage: Callable[[list[nn.Module]], nn.Module],
        dropout: float,
    ) -> None:
        super().__init__()
        blocks: list[list[nn.Module]] = [[] for _ in range(stages)]
        for path, layer in layers.items():
            if path.startswith("stages."):
                blocks[int(path.split(".")[1])].append(layer)
        names = dict.fromkeys(path.split(".")[0] for path in layers if path != "classifier")
        for name in names:
            whole = name == "stages"
            self.add_module(name, nn.ModuleList(map(stage, blocks)) if whole else layers[name])
        self.dropout = nn.Dropout(dropout)
        self.classifier = layers["classifier"]


class StaticNetwork(LayeredNetwork):
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
        with torch.random.fork_rng(devices=[]):
            built = {spec.name: build_layer(spec, eps, momentum) for spec in specs}
        numbers = [int(name.split(".")[1]) for name in built if name.startswith("stages.")]
        super().__init__(built, max(numbers) + 1, lambda blocks: nn.Sequential(*blocks), dropout)
        self.specs = specs
        self._pool = [spec.name for spec in specs].index("pool")

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return tuple(len(blocks) for blocks in self.stages)

    def units(self) -> list[nn.Module]:
        """Return the modules up to the pool in the order they run, each taking one tensor."""
        return [self.get_submodule(spec.name) for spec in self.specs[: self._pool]]

    def __prepare_scriptable__(self) -> nn.Sequential:
        """Return the same modules in a row, which ``torch.jit.script`` compiles in place of this.

        It cannot compile a look-up of modules by name.
        """
        *names, last = [spec.name for spec in self.specs]
        row = OrderedDict({name.replace(".", "_"): self.get_submodule(name) for name in names})
        row.update(flatten=nn.Flatten(), dropout=self.dropout)
        row[last] = self.classifier
        scriptable = nn.Sequential(row)
        scriptable.training = self.training  # that of its layers stays theirs
        return scriptable

    def forward(self, images: Tensor) -> Tensor:
        """Classify images [n, 3, r, r], normalised; returns logits [n, classes]."""
        x = images
        for unit in self.units():
            x = unit(x)
        for spec in self.specs[self._pool : -1]:
            x = self.get_submodule(spec.name)(x)
        return self.classifier(self.dropout(x.flatten(1)))
