"""Backbones: the stage tables of the supernets, the only place with widths and strides.

Every width is ``divisible8(base * width_mult)``. The MobileNetV3 table is that of Once-for-All
(Cai et al., ICLR 2020), after Howard et al., ICCV 2019; the ProxylessNAS and ResNet50D tables are
Once-for-All's too, after Cai et al., ICLR 2019, and He et al., CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from compofa.errors import SpaceError
from compofa.space.config import WIDE, StageForm, plain
from compofa.space.coupling import COUPLINGS, Coupling
from compofa.space.search_space import SearchSpace, StageSpace
from compofa.space.subnet import Number


def divisible8(value: float) -> int:
    """Round to the nearest multiple of 8, at least 8 and never below 0.9 of ``value``."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


@dataclass(frozen=True)
class PlainLayer:
    """One layer outside the stages' blocks.

    Attributes:
        name: Its module's name.
        kind: ``conv`` (convolution with BN), ``mix`` (1x1 without), ``mbconv`` (inverted residual
            block), ``maxpool`` (3x3) or ``pool`` (global average).
        width: Output channels at width multiplier 1; 0 keeps the input's.
        act: Activation.
        kernel: Kernel size.
        stride: Stride.
        residual: Whether it adds its input to its output.
        choice: Which of a subnet's widths sets its output channels; ``None`` where none does.
    """

    name: str
    kind: str
    width: int = 0
    act: str = "none"
    kernel: int = 1
    stride: int = 1
    residual: bool = False
    choice: int | None = None


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
        kind: Its blocks: ``mbconv``, ``bottleneck``, or ``conv``, a residual convolution.
        before: Layers between the stage before and its first block.
        choice: Which of a subnet's widths sets its output channels; ``None`` where none does.
        expands: Expand ratios, where they are not the backbone's.
    """

    width: int
    stride: int
    act: str
    se: bool
    kernel: int
    depths: tuple[int, ...] = (2, 3, 4)
    kind: str = "mbconv"
    before: tuple[PlainLayer, ...] = ()
    choice: int | None = None
    expands: tuple[Number, ...] | None = None


@dataclass(frozen=True)
class Backbone:
    """A supernet's fixed parts: stem, first block, stages and head.

    Attributes:
        name: Key in :data:`BACKBONES`.
        stem_width: Channels after the first 3x3 convolution, at width multiplier 1.
        stem_stride: Its stride.
        stem_act: Its activation.
        first_width: Channels after the first block, whose expand ratio is 1; 0 without one.
        first_act: Its activation.
        first_residual: Whether it adds its input to its output.
        stages: The elastic stages.
        head: The layers behind them, with one pool; the classifier follows.
        kernels: Kernel sizes of an elastic-kernel space.
        expands: Expand ratios of a free space.
        width_mult: Multiplies every width.
        simple: The coupling that ``simple`` stands for: pairs (depth as the field's ``d`` writes
            it, expand ratio).
        widths: Width multipliers that each elastic width has a choice of; empty without any.
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
    head: tuple[PlainLayer, ...]
    kernels: tuple[int, ...] = (3, 5, 7)
    expands: tuple[Number, ...] = (3, 4, 6)
    width_mult: float = 1.0
    simple: Coupling | None = COUPLINGS["simple"]
    widths: tuple[float, ...] = ()
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1

    def scaled(self, width_mult: float) -> Backbone:
        """Return this backbone with another width multiplier."""
        return replace(self, width_mult=float(width_mult))

    def width(self, base: float) -> int:
        """Return the channels that a width of ``base`` in the table stands for."""
        return divisible8(base * self.width_mult)

    @property
    def stem(self) -> tuple[PlainLayer, ...]:
        """The layers before the stages."""
        conv = PlainLayer(
            "stem", "conv", self.stem_width, self.stem_act, 3, self.stem_stride,
            choice=0 if self.widths else None,
        )  # fmt: skip
        if not self.first_width:
            return (conv,)
        first = PlainLayer(
            "first", "mbconv", self.first_width, self.first_act, 3, residual=self.first_residual
        )
        return conv, first

    @property
    def choices(self) -> int:
        """Number of elastic widths: those that ``w`` of a subnet sets."""
        rows = [*self.stem, *self.stages, *(row for s in self.stages for row in s.before)]
        return len({row.choice for row in rows if row.choice is not None})

    def named_coupling(self, name: str) -> Coupling | None:
        """Return the pairs that a key of :data:`compofa.space.coupling.COUPLINGS` means here."""
        return self.simple if name == "simple" else COUPLINGS[name]

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
            for row in (*stage.before, stage):
                total *= row.stride
        return total

    def free_space(self, resolutions: Sequence[int] = (224,)) -> SearchSpace:
        """Return the Once-for-All space: every depth, kernel and expand ratio a free choice."""
        return self.compound_space(None, True, resolutions)

    def compound_space(
        self,
        coupling: Coupling | str | None = "simple",
        elastic_kernel: bool = False,
        resolutions: Sequence[int] = (224,),
    ) -> SearchSpace:
        """Return a CompOFA space.

        A stage that always is one block has no depth to couple: its expand ratio stays a free
        choice, among those of the coupling. Elastic widths stay free choices too: CompOFA couples
        the two dimensions of a stage, and a stage's output width is no more its own than that of
        the stage behind it. The residual convolution of ResNet50D's stem has no expand ratio, and
        so nothing to couple its depth with.

        Args:
            coupling: Pairs (depth, expand ratio), the depth as the field's ``d`` writes it;
                ``None`` leaves the two free, ``simple`` is the backbone's own.
            elastic_kernel: Whether kernels vary, or stay at each stage's fixed size.
            resolutions: Input resolutions in pixels.

        Raises:
            SpaceError: A depth of the coupling is none that a stage can have.
        """
        pairs = self.named_coupling(coupling) if isinstance(coupling, str) else coupling
        widths = (tuple(range(len(self.widths))),) * self.choices
        forms = WIDE if widths else plain(len(self.stages), 16, 0)
        stages = [
            self._stage(stage, form, pairs, elastic_kernel)
            for stage, form in zip(self.stages, forms, strict=True)
        ]
        slots = max(max(stage.depths) for stage in stages)
        name = "compofa" if pairs is not None else "ofa"
        one_kernel = len(self.kernels) == 1
        name += "-elastic" if elastic_kernel and pairs is not None else ""
        name += "-fixed" if not (elastic_kernel or one_kernel) and pairs is None else ""
        return SearchSpace(name, tuple(stages), slots, tuple(resolutions), widths)

    def _stage(
        self, stage: Stage, form: StageForm, pairs: Coupling | None, elastic_kernel: bool
    ) -> StageSpace:
        """Return the choices of one stage."""
        kernels = self.kernels if elastic_kernel else (stage.kernel,)
        expands = self.expands if stage.expands is None else stage.expands
        if pairs is None or stage.expands is not None:
            return StageSpace(stage.depths, kernels, expands)
        expands = tuple(sorted({expand for _, expand in pairs}))
        if stage.depths == (1,):
            return StageSpace(stage.depths, kernels, expands)
        blocks = tuple((form.blocks(depth), expand) for depth, expand in pairs)
        if min(blocks)[0] < 1:
            known = [number for number, _ in form.depths]
            depths = ", ".join(str(depth) for depth, _ in pairs)
            raise SpaceError(
                f"coupling: expected depths from {min(known)} to {max(known)}, got {depths}"
            )
        return StageSpace(tuple(depth for depth, _ in blocks), kernels, expands, blocks)


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
        PlainLayer("final_expand", "conv", 960, "hswish"),
        PlainLayer("pool", "pool"),
        PlainLayer("mix", "mix", 1280, "hswish"),
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
    head=(PlainLayer("mix", "conv", 1280, "relu6"), PlainLayer("pool", "pool")),
    bn_eps=1e-3,
)
"""Fixed kernel sizes are the commonest of each stage of the published ProxylessNAS mobile nets."""

PROXYLESS_SMALL_IMAGES = replace(
    PROXYLESS,
    name="proxyless_small_images",
    stem_stride=1,
    stages=(replace(PROXYLESS.stages[0], stride=1), *PROXYLESS.stages[1:]),
)

_STEM_OUT = PlainLayer("stem_out", "conv", 64, "relu", 3, choice=1)
_STEM_POOL = PlainLayer("stem_pool", "maxpool", kernel=3, stride=2)
_BOTTLENECKS = Stage(256, 1, "relu", False, 3, kind="bottleneck", choice=2)

RESNET50D = Backbone(
    name="resnet50d",
    stem_width=32,
    stem_stride=2,
    stem_act="relu",
    first_width=0,
    first_act="none",
    first_residual=False,
    stages=(
        Stage(32, 1, "relu", False, 3, (0, 1), "conv", choice=0, expands=(1,)),
        replace(_BOTTLENECKS, before=(_STEM_OUT, _STEM_POOL)),
        replace(_BOTTLENECKS, width=512, stride=2, choice=3),
        replace(_BOTTLENECKS, width=1024, stride=2, choice=4, depths=(4, 5, 6)),
        replace(_BOTTLENECKS, width=2048, stride=2, choice=5),
    ),
    head=(PlainLayer("pool", "pool"),),
    kernels=(3,),
    expands=(0.2, 0.25, 0.35),
    simple=((0, 0.2), (1, 0.25), (2, 0.35)),
    widths=(0.65, 0.8, 1.0),
)
"""The first stage is the stem's residual convolution, which a subnet may leave out; it shares its
width with the convolution before it. ``simple`` gives a stage with no, one or two blocks beyond the
least the expand ratio 0.2, 0.25 or 0.35."""

RESNET50D_SMALL_IMAGES = replace(
    RESNET50D,
    name="resnet50d_small_images",
    stem_stride=1,
    stages=(
        RESNET50D.stages[0],
        replace(RESNET50D.stages[1], before=(_STEM_OUT,)),
        *RESNET50D.stages[2:],
    ),
)
"""For images of 8 to 64 pixels: the first two stride-2 steps are dropped, the pool with them."""

BACKBONES = {
    backbone.name: backbone
    for backbone in (
        MOBILENET_V3,
        MOBILENET_V3_SMALL_IMAGES,
        PROXYLESS,
        PROXYLESS_SMALL_IMAGES,
        RESNET50D,
        RESNET50D_SMALL_IMAGES,
    )
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
