"""Backbones: the stage tables of the supernets, the only place with widths and strides.

Every width is ``divisible8(base * width_mult)``. The MobileNetV3 table is that of Once-for-All
(Cai et al., ICLR 2020), after Howard et al., ICCV 2019; the ProxylessNAS table is Once-for-All's
too, after Cai et al., ICLR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compofa.coupling import COUPLINGS, Coupling
from compofa.errors import SpaceError
from compofa.space import SearchSpace, StageSpace


def divisible8(value: float) -> int:
    """Round to the nearest multiple of 8, at least 8 and never below 0.9 of ``value``."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


@dataclass(frozen=True)
class Stage:
    """One stage of a backbone.

    Attributes:
        width: Output channels at width multiplier 1.
        stride: Stride of its first block.
        act: Activation, ``relu``, ``relu6`` or ``hswish``.
        se: Whether its blocks have squeeze-and-excitation.
        kernel: Kernel size where kernels are fixed.
        depths: Blocks it may keep; the largest is what the supernet stores.
    """

    width: int
    stride: int
    act: str
    se: bool
    kernel: int
    depths: tuple[int, ...] = (2, 3, 4)


@dataclass(frozen=True)
class HeadLayer:
    """One layer between the stages and the classifier.

    Attributes:
        name: Its module's name.
        kind: ``conv`` (1x1 with BN), ``mix`` (1x1 without) or ``pool`` (global average).
        width: Output channels at width multiplier 1; 0 keeps the input's.
        act: Activation.
    """

    name: str
    kind: str
    width: int = 0
    act: str = "none"


@dataclass(frozen=True)
class Backbone:
    """A supernet's fixed parts: stem, first block, stages and head.

    Attributes:
        name: Key in :data:`BACKBONES`.
        stem_width: Channels after the first 3x3 convolution, at width multiplier 1.
        stem_stride: Its stride.
        stem_act: Its activation.
        first_width: Channels after the first block, whose expand ratio is 1.
        first_act: Its activation.
        first_residual: Whether it adds its input to its output.
        stages: The elastic stages.
        head: The layers behind them, with one pool; the classifier follows.
        kernels: Kernel sizes of an elastic-kernel space.
        expands: Expand ratios of a free space.
        width_mult: Multiplies every width.
        bn_eps: Epsilon of every batch normalisation.
        bn_momentum: Momentum of every batch normalisation.
    """

    name: str
    stem_width: int
    stem_stride: int
    stem_act: str
    first_width: int
    first_act: str
    first_residual: bool
    stages: tuple[Stage, ...]
    head: tuple[HeadLayer, ...]
    kernels: tuple[int, ...] = (3, 5, 7)
    expands: tuple[int, ...] = (3, 4, 6)
    width_mult: float = 1.0
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1

    def scaled(self, width_mult: float) -> Backbone:
        """Return this backbone with another width multiplier."""
        return replace(self, width_mult=float(width_mult))

    def width(self, base: int) -> int:
        """Return the channels that a width of ``base`` in the table stands for."""
        return divisible8(base * self.width_mult)

    @property
    def fixed_widths(self) -> dict[str, int]:
        """Output channels of the stem and of the head's convolutions, by module name."""
        head = {layer.name: self.width(layer.width) for layer in self.head if layer.width}
        return {"stem": self.width(self.stem_width), **head}

    @property
    def stride(self) -> int:
        """How many times smaller the last feature map is than the image."""
        total = self.stem_stride
        for stage in self.stages:
            total *= stage.stride
        return total

    def free_space(self, resolutions: Sequence[int] = (224,)) -> SearchSpace:
        """Return the Once-for-All space: every depth, kernel and expand ratio a free choice."""
        stages = tuple(StageSpace(s.depths, self.kernels, self.expands) for s in self.stages)
        slots = max(max(stage.depths) for stage in stages)
        return SearchSpace("ofa", stages, slots, tuple(resolutions))

    def compound_space(
        self,
        coupling: Coupling | None = COUPLINGS["simple"],
        elastic_kernel: bool = False,
        resolutions: Sequence[int] = (224,),
    ) -> SearchSpace:
        """Return a CompOFA space.

        A stage that always is one block has no depth to couple: its expand ratio stays a free
        choice, among those of the coupling.

        Args:
            coupling: Pairs (depth, expand ratio); ``None`` leaves the two free.
            elastic_kernel: Whether kernels vary, or stay at each stage's fixed size.
            resolutions: Input resolutions in pixels.
        """
        stages = []
        for stage in self.stages:
            depths, expands, pairs = stage.depths, self.expands, None
            if coupling is not None:
                expands = tuple(sorted({expand for _, expand in coupling}))
                if depths != (1,):
                    depths, pairs = tuple(depth for depth, _ in coupling), coupling
            kernels = self.kernels if elastic_kernel else (stage.kernel,)
            stages.append(StageSpace(depths, kernels, expands, pairs))
        slots = max(max(stage.depths) for stage in stages)
        name = "compofa" if coupling is not None else "ofa"
        name += "-elastic" if elastic_kernel and coupling is not None else ""
        name += "-fixed" if not elastic_kernel and coupling is None else ""
        return SearchSpace(name, tuple(stages), slots, tuple(resolutions))


MOBILENET_V3 = Backbone(
    name="mobilenet_v3",
    stem_width=16,
    stem_stride=2,
    stem_act="hswish",
    first_width=16,
    first_act="relu",
    first_residual=True,
    stages=(
        Stage(24, 2, "relu", False, 3),
        Stage(40, 2, "relu", True, 5),
        Stage(80, 2, "hswish", False, 3),
        Stage(112, 1, "hswish", True, 3),
        Stage(160, 2, "hswish", True, 5),
    ),
    head=(
        HeadLayer("final_expand", "conv", 960, "hswish"),
        HeadLayer("pool", "pool"),
        HeadLayer("mix", "mix", 1280, "hswish"),
    ),
)

MOBILENET_V3_SMALL_IMAGES = replace(
    MOBILENET_V3,
    name="mobilenet_v3_small_images",
    stem_stride=1,
    stages=(replace(MOBILENET_V3.stages[0], stride=1), *MOBILENET_V3.stages[1:]),
)
"""For images of 8 to 64 pixels: the first two stride-2 steps are dropped."""

PROXYLESS = Backbone(
    name="proxyless",
    stem_width=32,
    stem_stride=2,
    stem_act="relu6",
    first_width=16,
    first_act="relu6",
    first_residual=False,
    stages=(
        Stage(24, 2, "relu6", False, 3),
        Stage(40, 2, "relu6", False, 5),
        Stage(80, 2, "relu6", False, 5),
        Stage(96, 1, "relu6", False, 5),
        Stage(192, 2, "relu6", False, 7),
        Stage(320, 1, "relu6", False, 7, depths=(1,)),
    ),
    head=(HeadLayer("mix", "conv", 1280, "relu6"), HeadLayer("pool", "pool")),
    bn_eps=1e-3,
)
"""Fixed kernel sizes are the commonest of each stage of the published ProxylessNAS mobile nets."""

PROXYLESS_SMALL_IMAGES = replace(
    PROXYLESS,
    name="proxyless_small_images",
    stem_stride=1,
    stages=(replace(PROXYLESS.stages[0], stride=1), *PROXYLESS.stages[1:]),
)

BACKBONES = {
    backbone.name: backbone
    for backbone in (MOBILENET_V3, MOBILENET_V3_SMALL_IMAGES, PROXYLESS, PROXYLESS_SMALL_IMAGES)
}


def backbone(name: str, width_mult: float = 1.0) -> Backbone:
    """Return a backbone of :data:`BACKBONES` at a width multiplier.

    Raises:
        SpaceError: The name is unknown, or the multiplier is not in (0, 8].
    """
    if name not in BACKBONES:
        raise SpaceError(f"unknown backbone {name!r}: expected one of {', '.join(BACKBONES)}")
    if not 0 < width_mult <= 8:
        raise SpaceError(f"expected a width multiplier above 0 and at most 8, got {width_mult}")
    return BACKBONES[name].scaled(width_mult)
