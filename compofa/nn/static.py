"""The blocks that networks are made of, built from :class:`LayerSpec`, and plain networks of them.

A block takes its convolutions from :attr:`LayerSpec.convs`, under the same names. Supernets,
their subnets and extracted networks have the same blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compofa.networks.layout import ConvSpec, LayerSpec

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

    def __init__(self, spec: ConvSpec, eps: float, momentum: float, residual: bool = False) -> None:
        norm = nn.BatchNorm2d(spec.out_channels, eps=eps, momentum=momentum)
        super().__init__(OrderedDict(conv=conv2d(spec), bn=norm, act=activation(spec.act)))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.act(self.bn(self.conv(x)))
        return x + y if self.residual else y


def conv2d(spec: ConvSpec) -> nn.Conv2d:
    """Build the same-padded convolution that ``spec`` describes."""
    return nn.Conv2d(
        spec.in_channels, spec.out_channels, spec.kernel, spec.stride, spec.kernel // 2,
        groups=spec.groups, bias=spec.bias,
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their means (Hu et al., CVPR 2018)."""

    def __init__(self, reduce: ConvSpec, expand: ConvSpec) -> None:
        super().__init__()
        self.reduce = conv2d(reduce)
        self.expand = conv2d(expand)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` of shape [n, channels, h, w]."""
        gate = self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu())
        return x * nn.functional.hardsigmoid(gate)


class MBConv(nn.Module):
    """Inverted residual block: 1x1 expand, depthwise k x k, SE, 1x1 project."""

    def __init__(self, spec: LayerSpec, eps: float, momentum: float) -> None:
        super().__init__()
        convs = {conv.name: conv for conv in spec.convs}
        self.expand = ConvBN(convs["expand"], eps, momentum) if spec.expand else None
        self.depthwise = ConvBN(convs["depthwise"], eps, momentum)
        gate = convs.get("se.reduce"), convs.get("se.expand")
        self.se = SqueezeExcite(*gate) if spec.se_channels else None
        self.project = ConvBN(convs["project"], eps, momentum)
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
        parts = {conv.name: ConvBN(conv, eps, momentum) for conv in spec.convs}
        self.conv1, self.conv2, self.conv3 = parts["conv1"], parts["conv2"], parts["conv3"]
        stride = spec.stride
        self.pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.downsample = parts.get("downsample")
        self.act = activation(spec.act)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.conv3(self.conv2(self.conv1(x)))
        if self.downsample is not None:
            x = self.downsample(self.pool(x))
        return self.act(x + y)


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
        return ConvBN(*spec.convs, eps, momentum, spec.residual)
    if spec.kind == "mbconv":
        return MBConv(spec, eps, momentum)
    if spec.kind == "bottleneck":
        return Bottleneck(spec, eps, momentum)
    if spec.kind == "maxpool":
        return nn.MaxPool2d(spec.kernel, spec.stride, spec.kernel // 2)
    if spec.kind == "pool":
        return GlobalPool()
    if spec.kind == "mix":
        return nn.Sequential(OrderedDict(conv=conv2d(*spec.convs), act=activation(spec.act)))
    return nn.Linear(spec.in_channels, spec.out_channels)


def build_layers(specs: tuple[LayerSpec, ...], eps: float, momentum: float) -> dict[str, nn.Module]:
    """Build the layers that ``specs`` describe, by name; torch's generators are as before."""
    with torch.random.fork_rng(devices=[]):
        return {spec.name: build_layer(spec, eps, momentum) for spec in specs}


class LayeredNetwork(nn.Module):
    """Named layers in the order of a layout: stem, stages, head, pool and classifier.

    Args:
        specs: What the layers are, in the order they run; those of stage i have the names
            ``stages.i.0``, ``stages.i.1``, … and a stage may have none.
        layers: Their modules, by name.
        dropout: Probability before the classifier, in training.
    """

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...  # noqa: D102

    def __init__(
        self, specs: tuple[LayerSpec, ...], layers: Mapping[str, nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.specs = specs
        stages: list[list[nn.Module]] = []
        for spec in specs:
            name, *position = spec.name.split(".")
            if not position:
                if name == "classifier":
                    self.dropout = nn.Dropout(dropout)
                self.add_module(name, layers[name])
                continue
            self.add_module("stages", None)  # its place among the layers; filled below
            stages += [[] for _ in range(len(stages), int(position[0]) + 1)]
            stages[int(position[0])].append(layers[spec.name])
        self.stages = nn.ModuleList(nn.Sequential(*blocks) for blocks in stages)

    def _run(self, images: Tensor, layers: Iterable[nn.Module]) -> Tensor:
        """Run ``layers`` in place of the network's own; the last is the classifier."""
        *before, classifier = layers
        x = images
        for layer in before:
            x = layer(x)
        return classifier(self.dropout(x.flatten(1)))


class StaticNetwork(LayeredNetwork):
    """A plain network made of layers: no elasticity.

    Args:
        specs: Its layers, in the order they run.
        dropout: Probability before the classifier, in training.
        eps: Epsilon of its batch normalisations.
        momentum: Momentum of its batch normalisations.
        layers: Their modules by name; built with torch's default weights when left out.

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
        layers: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(specs, layers or build_layers(specs, eps, momentum), dropout)
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
        return self._run(images, [self.get_submodule(spec.name) for spec in self.specs])
