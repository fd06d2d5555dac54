"""Backbones: the stage tables of the supernets, the only place with widths and strides.

Every width is ``divisible8(base * width_mult)``. The MobileNetV3 table is that of Once-for-All
(Cai et al., ICLR 2020), after Howard et al., ICCV 2019.
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
        act: Activation, ``relu`` or ``hswish``.
        se: Whether its blocks have squeeze-and-excitation.
        kernel: Kernel size where kernels are fixed.
    """

    width: int
    stride: int
    act: str
    se: bool
    kernel: int


@dataclass(frozen=True)
class Backbone:
    """A supernet's fixed parts: stem, first block, stages and head.

    Attributes:
        name: Key in :data:`BACKBONES`.
        stem_width: Channels after the first 3x3 convolution, at width multiplier 1.
        stem_stride: Its stride.
        stages: The elastic stages.
        expand_width: Channels after the final 1x1 convolution.
        mix_width: Channels after the feature-mix 1x1 convolution behind the pool.
        depths: Blocks a stage may keep; the largest is what the supernet stores.
        kernels: Kernel sizes of an elastic-kernel space.
        expands: Expand ratios of a free space.
        width_mult: Multiplies every width.
        bn_eps: Epsilon of every batch normalisation.
        bn_momentum: Momentum of every batch normalisation.
    """

    name: str
    stem_width: int
    stem_stride: int
    stages: tuple[Stage, ...]
    expand_width: int
    mix_width: int
    depths: tuple[int, ...] = (2, 3, 4)
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
    def stride(self) -> int:
        """How many times smaller the last feature map is than the image."""
        total = self.stem_stride
        for stage in self.stages:
            total *= stage.stride
        return total

    def free_space(self, resolutions: Sequence[int] = (224,)) -> SearchSpace:
        """Return the Once-for-All space: every depth, kernel and expand ratio a free choice."""
        stages = tuple(StageSpace(self.depths, self.kernels, self.expands) for _ in self.stages)
        return SearchSpace("ofa", stages, max(self.depths), tuple(resolutions))

    def compound_space(
        self,
        coupling: Coupling | None = COUPLINGS["simple"],
        elastic_kernel: bool = False,
        resolutions: Sequence[int] = (224,),
    ) -> SearchSpace:
        """Return a CompOFA space.

        Args:
            coupling: Pairs (depth, expand ratio); ``None`` leaves the two free.
            elastic_kernel: Whether kernels vary, or stay at each stage's fixed size.
            resolutions: Input resolutions in pixels.
        """
        depths, expands = self.depths, self.expands
        if coupling is not None:
            depths = tuple(depth for depth, _ in coupling)
            expands = tuple(sorted({expand for _, expand in coupling}))
        stages = tuple(
            StageSpace(
                depths, self.kernels if elastic_kernel else (stage.kernel,), expands, coupling
            )
            for stage in self.stages
        )
        name = "compofa" if coupling is not None else "ofa"
        name += "-elastic" if elastic_kernel and coupling is not None else ""
        name += "-fixed" if not elastic_kernel and coupling is None else ""
        return SearchSpace(name, stages, max(depths), tuple(resolutions))


MOBILENET_V3 = Backbone(
    name="mobilenet_v3",
    stem_width=16,
    stem_stride=2,
    stages=(
        Stage(24, 2, "relu", False, 3),
        Stage(40, 2, "relu", True, 5),
        Stage(80, 2, "hswish", False, 3),
        Stage(112, 1, "hswish", True, 3),
        Stage(160, 2, "hswish", True, 5),
    ),
    expand_width=960,
    mix_width=1280,
)

MOBILENET_V3_SMALL_IMAGES = replace(
    MOBILENET_V3,
    name="mobilenet_v3_small_images",
    stem_stride=1,
    stages=(replace(MOBILENET_V3.stages[0], stride=1), *MOBILENET_V3.stages[1:]),
)
"""For images of 8 to 64 pixels: the first two stride-2 steps are dropped."""

BACKBONES = {backbone.name: backbone for backbone in (MOBILENET_V3, MOBILENET_V3_SMALL_IMAGES)}


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
