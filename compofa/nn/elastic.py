"""Elastic operators: layers whose widths and kernel size are arguments of ``forward``.

A narrower layer uses the first channels of the wide one. A smaller depthwise kernel is the centre
of the larger, multiplied by a learned matrix where the network has kernel transforms (Cai et al.,
ICLR 2020, section 3.3); one pair of matrices a block, shared by its channels.

An :class:`Elastic` layer runs as the static layer that a :class:`~compofa.layout.LayerSpec`
describes. Its ``weights(spec)`` returns the tensors that it computes with, under the names of that
static layer: extraction and ``forward`` use the same slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compofa.layout import LayerSpec, se_channels
from compofa.nn.static import activation, shortcut_pool

Named = Iterator[tuple[str, Tensor]]


def centre(weight: Tensor, kernel: int) -> Tensor:
    """Return the central ``kernel`` x ``kernel`` part of filters [..., K, K]."""
    start = (weight.shape[-1] - kernel) // 2
    return weight[..., start : start + kernel, start : start + kernel]


def transform_kernel(weight: Tensor, matrix: Tensor | None, kernel: int) -> Tensor:
    """Derive a smaller depthwise filter from the next larger one.

    Args:
        weight: Filters, shape [channels, 1, K, K] with K > ``kernel``.
        matrix: Shape [kernel**2, kernel**2], multiplied from the left; ``None`` is the identity.
        kernel: Size wanted.
    """
    part = centre(weight, kernel)
    if matrix is None:
        return part
    return F.linear(part.reshape(len(weight), -1), matrix).view(len(weight), 1, kernel, kernel)


class ElasticBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation of the first channels, as many as the input has."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [n, c, h, w] with c at most the stored channels."""
        c = x.shape[1]
        return F.batch_norm(
            x,
            self.running_mean[:c],
            self.running_var[:c],
            self.weight[:c],
            self.bias[:c],
            self.training,
            self.momentum,
            self.eps,
        )

    def weights(self, prefix: str, channels: int) -> Named:
        """Yield what a static batch normalisation of ``channels`` holds."""
        for name in ("weight", "bias", "running_mean", "running_var"):
            yield f"{prefix}.{name}", getattr(self, name)[:channels]
        yield f"{prefix}.num_batches_tracked", self.num_batches_tracked


class ElasticPointwise(nn.Module):
    """Convolution (1x1 by default), BN and activation with elastic input and output widths."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        act: str,
        eps: float,
        momentum: float,
        kernel: int = 1,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.bn = ElasticBatchNorm2d(out_channels, eps=eps, momentum=momentum)
        self.act = activation(act)

    def forward(self, x: Tensor, out_channels: int) -> Tensor:
        """Map [n, in, h, w] to [n, out_channels, h / stride, w / stride]."""
        weight = self.conv.weight[:out_channels, : x.shape[1]]
        return self.act(self.bn(F.conv2d(x, weight, None, self.conv.stride, self.conv.padding)))

    def weights(self, prefix: str, in_channels: int, out_channels: int) -> Named:
        """Yield what a static layer of these widths holds."""
        yield f"{prefix}.conv.weight", self.conv.weight[:out_channels, :in_channels]
        yield from self.bn.weights(f"{prefix}.bn", out_channels)


class ElasticDepthwise(nn.Module):
    """Depthwise convolution, BN and activation with elastic width and kernel size.

    Args:
        channels: Stored channels.
        kernels: Kernel sizes it can take; the largest is stored.
        stride: Stride.
        act: Activation.
        transform: Whether smaller kernels go through learned matrices.
        eps: Epsilon of its batch normalisation.
        momentum: Momentum of its batch normalisation.
    """

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int],
        stride: int,
        act: str,
        transform: bool,
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.kernels = tuple(sorted(kernels, reverse=True))
        self.stride = stride
        self.conv = nn.Conv2d(
            channels, channels, self.kernels[0], stride, groups=channels, bias=False
        )
        self.bn = ElasticBatchNorm2d(channels, eps=eps, momentum=momentum)
        self.act = activation(act)
        self.matrices = nn.ParameterDict(
            {str(kernel): torch.eye(kernel**2) for kernel in self.kernels[1:]} if transform else {}
        )

    def filters(self, channels: int, kernel: int) -> Tensor:
        """Return the depthwise filters [channels, 1, kernel, kernel]."""
        weight = self.conv.weight[:channels]
        for size in self.kernels[1:]:
            if size < kernel:
                break
            matrix = self.matrices[str(size)] if self.matrices else None
            weight = transform_kernel(weight, matrix, size)
        return weight

    def forward(self, x: Tensor, kernel: int) -> Tensor:
        """Map [n, c, h, w] to [n, c, h / stride, w / stride]."""
        c = x.shape[1]
        x = F.conv2d(x, self.filters(c, kernel), None, self.stride, kernel // 2, groups=c)
        return self.act(self.bn(x))

    def weights(self, prefix: str, channels: int, kernel: int) -> Named:
        """Yield what a static layer of this width and kernel size holds."""
        yield f"{prefix}.conv.weight", self.filters(channels, kernel)
        yield from self.bn.weights(f"{prefix}.bn", channels)


class ElasticSqueezeExcite(nn.Module):
    """Squeeze-and-excitation whose hidden width follows its input's width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, se_channels(channels), 1)
        self.expand = nn.Conv2d(se_channels(channels), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Gate ``x`` of shape [n, c, h, w]."""
        c = x.shape[1]
        hidden = se_channels(c)
        gate = x.mean((2, 3), keepdim=True)
        gate = F.conv2d(gate, self.reduce.weight[:hidden, :c], self.reduce.bias[:hidden]).relu()
        gate = F.conv2d(gate, self.expand.weight[:c, :hidden], self.expand.bias[:c])
        return x * F.hardsigmoid(gate)

    def weights(self, prefix: str, channels: int) -> Named:
        """Yield what a static block on ``channels`` holds."""
        hidden = se_channels(channels)
        yield f"{prefix}.reduce.weight", self.reduce.weight[:hidden, :channels]
        yield f"{prefix}.reduce.bias", self.reduce.bias[:hidden]
        yield f"{prefix}.expand.weight", self.expand.weight[:channels, :hidden]
        yield f"{prefix}.expand.bias", self.expand.bias[:channels]


class Elastic(nn.Module):
    """A layer that runs as any static layer that its weights hold."""

    def forward(self, x: Tensor, spec: LayerSpec) -> Tensor:
        """Map the input of the layer that ``spec`` describes to its output."""
        raise NotImplementedError

    def weights(self, spec: LayerSpec) -> Named:
        """Yield what the static layer that ``spec`` describes holds."""
        raise NotImplementedError


class ElasticConv(Elastic, ElasticPointwise):
    """A convolution layer of its own, with elastic widths."""

    def __init__(self, spec: LayerSpec, eps: float, momentum: float) -> None:
        ElasticPointwise.__init__(
            self, spec.in_channels, spec.out_channels, spec.act, eps, momentum, spec.kernel,
            spec.stride,
        )  # fmt: skip

    def forward(self, x: Tensor, spec: LayerSpec) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = ElasticPointwise.forward(self, x, spec.out_channels)
        return x + y if spec.residual else y

    def weights(self, spec: LayerSpec) -> Named:
        """Yield what the static convolution that ``spec`` describes holds."""
        yield "conv.weight", self.conv.weight[: spec.out_channels, : spec.in_channels]
        yield from self.bn.weights("bn", spec.out_channels)


class ElasticLinear(Elastic, nn.Linear):
    """The classifier, with as many inputs as it is given."""

    def __init__(self, spec: LayerSpec) -> None:
        nn.Linear.__init__(self, spec.in_channels, spec.out_channels)

    def forward(self, x: Tensor, spec: LayerSpec) -> Tensor:
        """Map [n, in] to [n, out]."""
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)

    def weights(self, spec: LayerSpec) -> Named:
        """Yield what the static classifier that ``spec`` describes holds."""
        yield "weight", self.weight[:, : spec.in_channels]
        yield "bias", self.bias


class ElasticBottleneck(Elastic):
    """Residual block of ResNet50D with elastic input, middle and output widths.

    Args:
        spec: The largest form of the block.
        eps: Epsilon of its batch normalisations.
        momentum: Momentum of its batch normalisations.
    """

    def __init__(self, spec: LayerSpec, eps: float, momentum: float) -> None:
        super().__init__()
        ins, mid, outs = spec.in_channels, spec.mid_channels, spec.out_channels
        self.conv1 = ElasticPointwise(ins, mid, spec.act, eps, momentum)
        self.conv2 = ElasticPointwise(mid, mid, spec.act, eps, momentum, spec.kernel, spec.stride)
        self.conv3 = ElasticPointwise(mid, outs, "none", eps, momentum)
        self.pool = shortcut_pool(spec)
        self.downsample = None
        if spec.downsample:
            self.downsample = ElasticPointwise(ins, outs, "none", eps, momentum)
        self.act = activation(spec.act)

    def forward(self, x: Tensor, spec: LayerSpec) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.conv2(self.conv1(x, spec.mid_channels), spec.mid_channels)
        y = self.conv3(y, spec.out_channels)
        if self.downsample is not None:
            x = self.downsample(self.pool(x), spec.out_channels)
        return self.act(x + y)

    def weights(self, spec: LayerSpec) -> Named:
        """Yield what the static block that ``spec`` describes holds."""
        ins, mid, outs = spec.in_channels, spec.mid_channels, spec.out_channels
        yield from self.conv1.weights("conv1", ins, mid)
        yield from self.conv2.weights("conv2", mid, mid)
        yield from self.conv3.weights("conv3", mid, outs)
        if self.downsample is not None:
            yield from self.downsample.weights("downsample", ins, outs)


class ElasticMBConv(Elastic):
    """Inverted residual block with elastic expand ratio and kernel size.

    Args:
        spec: The largest form of the block: its widths, stride, activation and SE.
        kernels: Kernel sizes it can take.
        transform: Whether smaller kernels go through learned matrices.
        eps: Epsilon of its batch normalisations.
        momentum: Momentum of its batch normalisations.
    """

    def __init__(
        self, spec: LayerSpec, kernels: Sequence[int], transform: bool, eps: float, momentum: float
    ) -> None:
        super().__init__()
        mid = spec.mid_channels
        self.in_channels = spec.in_channels
        self.residual = spec.residual
        self.expand = ElasticPointwise(spec.in_channels, mid, spec.act, eps, momentum)
        self.depthwise = ElasticDepthwise(
            mid, kernels, spec.stride, spec.act, transform, eps, momentum
        )
        self.se = ElasticSqueezeExcite(mid) if spec.se_channels else None
        self.project = ElasticPointwise(mid, spec.out_channels, "none", eps, momentum)

    def forward(self, x: Tensor, spec: LayerSpec) -> Tensor:
        """Map [n, in, h, w] to [n, out, h / stride, w / stride]."""
        y = self.expand(x, spec.mid_channels)
        y = self.depthwise(y, spec.kernel)
        if self.se is not None:
            y = self.se(y)
        y = self.project(y, self.project.conv.out_channels)
        return x + y if self.residual else y

    def weights(self, spec: LayerSpec) -> Named:
        """Yield what the static block that ``spec`` describes holds."""
        mid = spec.mid_channels
        yield from self.expand.weights("expand", spec.in_channels, mid)
        yield from self.depthwise.weights("depthwise", mid, spec.kernel)
        if self.se is not None:
            yield from self.se.weights("se", mid)
        yield from self.project.weights("project", mid, spec.out_channels)


def build_elastic(
    spec: LayerSpec, kernels: Sequence[int], transform: bool, eps: float, momentum: float
) -> Elastic:
    """Build the elastic layer whose largest form ``spec`` describes.

    Args:
        spec: Its kind, one of :data:`ELASTIC`, and its largest shapes.
        kernels: Kernel sizes that an inverted residual block can take.
        transform: Whether smaller kernels go through learned matrices.
        eps: Epsilon of its batch normalisations.
        momentum: Momentum of its batch normalisations.
    """
    if spec.kind == "mbconv":
        return ElasticMBConv(spec, kernels, transform, eps, momentum)
    if spec.kind == "linear":
        return ElasticLinear(spec)
    return {"conv": ElasticConv, "bottleneck": ElasticBottleneck}[spec.kind](spec, eps, momentum)


ELASTIC = ("mbconv", "bottleneck", "conv", "linear")
"""Kinds of layers that have an elastic form."""
