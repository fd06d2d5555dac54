"""Backbones: a family's stage table, as data.

Every width is ``divisible8(base * width_mult)``. The tables of the published families are in
:mod:`compofa.networks.families`; one of one's own is an instance of :class:`Backbone`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compofa.errors import SpaceError
from compofa.networks.kinds import divisible8
from compofa.space.choice import Choice
from compofa.space.config import ConfigFormat, StageFormat
from compofa.space.coupling import Coupling
from compofa.space.search_space import SearchSpace
from compofa.space.stage_space import StageSpace
from compofa.space.subnet import Number

if TYPE_CHECKING:
    from compofa.networks.weight_names import WeightNames


@dataclass(frozen=True)
class PlainLayer:
    """One layer outside the stages' blocks.

    Attributes:
        name: Its module's name.
        kind: Key of :data:`compofa.networks.kinds.KINDS`.
        width: Output channels at width multiplier 1; 0 keeps the input's.
        act: Activation.
        kernel: Kernel size.
        stride: Stride.
        residual: Whether it adds its input to its output.
        choice: Which of a subnet's outer choices sets its output channels; ``None`` where none
            does.
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
        act: Activation.
        fixed: Values of the block's choices where these are not elastic, in the order of
            :attr:`Backbone.choices`; the last, which is coupled with the depth, always is elastic
            and needs none.
        se: Whether its blocks have squeeze-and-excitation.
        depths: Numbers of blocks it may have; the largest is what the supernet stores.
        kind: Its blocks: key of :data:`compofa.networks.kinds.KINDS`.
        before: Layers between the stage before and its first block.
        choice: Which of a subnet's outer choices sets its output channels; ``None`` where none
            does.
        only: Values of the last choice, where they are not the backbone's. Such a stage is not
            coupled.
    """

    width: int
    stride: int
    act: str
    fixed: tuple[Number, ...]
    se: bool = False
    depths: tuple[int, ...] = (2, 3, 4)
    kind: str = "mbconv"
    before: tuple[PlainLayer, ...] = ()
    choice: int | None = None
    only: tuple[Number, ...] = ()


@dataclass(frozen=True)
class Backbone:
    """A supernet's table: stem, stages and head, and what its blocks can choose.

    Attributes:
        name: Key in :data:`compofa.networks.families.BACKBONES`.
        stem: The layers before the stages.
        stages: The elastic stages.
        head: The layers behind them, with one pool; the classifier follows.
        choices: What a block chooses in a free space, in the order of a block's numbers. A compound
            space couples the last one with the depth.
        simple: The coupling that ``simple`` stands for: pairs (depth as the config format writes
            it, value of the last choice).
        format: Its config format; by default every choice under its own name.
        width_mult: Multiplies every width.
        widths: Width multipliers that the outer choices index; empty where no width is elastic.
        bn_eps: Epsilon of every batch normalisation.
        bn_momentum: Momentum of every batch normalisation.
        weight_names: How other programs name its weights.
    """

    name: str
    stem: tuple[PlainLayer, ...]
    stages: tuple[Stage, ...]
    head: tuple[PlainLayer, ...]
    choices: tuple[Choice, ...]
    simple: Coupling | None = None
    format: ConfigFormat | None = None
    width_mult: float = 1.0
    widths: tuple[float, ...] = ()
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    weight_names: tuple[WeightNames, ...] = ()

    @property
    def config_format(self) -> ConfigFormat:
        """How its subnets are written."""
        outer = "width" if self.outer_count else ""
        deepest = max(max(stage.depths) for stage in self.stages)
        return self.format or ConfigFormat(self.names, outer, slots=deepest)

    def scaled(self, width_mult: float) -> Backbone:
        """Return this backbone with another width multiplier."""
        return replace(self, width_mult=float(width_mult))

    def width(self, base: float) -> int:
        """Return the channels that a width of ``base`` in the table stands for."""
        return divisible8(base * self.width_mult)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the choices of a block, in the order of a block's numbers."""
        return tuple(choice.name for choice in self.choices)

    def values(self, name: str) -> tuple[Number, ...]:
        """Return what a choice of a block may be in a free space."""
        return next(choice.values for choice in self.choices if choice.name == name)

    @property
    def outer_count(self) -> int:
        """Number of choices outside the blocks: elastic widths."""
        rows = [*self.stem, *self.stages, *(row for s in self.stages for row in s.before)]
        return len({row.choice for row in rows if row.choice is not None})

    def named_coupling(self, name: str) -> Coupling | None:
        """Return the pairs that a name of :data:`compofa.space.coupling.COUPLINGS` means here."""
        return self.simple if name == "simple" else None

    @property
    def stride(self) -> int:
        """How many times smaller the last feature map is than the image."""
        total = 1
        for row in (*self.stem, *(r for stage in self.stages for r in (*stage.before, stage))):
            total *= row.stride
        return total

    @property
    def can_fix(self) -> bool:
        """Whether some choice of a block can be elastic or fixed."""
        return any(len(choice.values) > 1 for choice in self.choices[:-1])

    def free_space(self, resolutions: Sequence[int] = (224,)) -> SearchSpace:
        """Return the Once-for-All space: every choice of every block and stage is free."""
        return self.compound_space(None, True, resolutions)

    def compound_space(
        self,
        coupling: Coupling | str | None = "simple",
        elastic: bool = False,
        resolutions: Sequence[int] = (224,),
    ) -> SearchSpace:
        """Return a CompOFA space.

        A stage that always is one block has no depth to couple: its choice stays free, among the
        values of the coupling. Outer choices stay free too: CompOFA couples the two dimensions of a
        stage, and a stage's output width is no more its own than that of the stage behind it.

        Args:
            coupling: Pairs (depth, value of the last choice), the depth as the config format writes
                it; ``None`` leaves the two free. ``simple`` is the backbone's own, in each stage
                the pairs of the depths that it may have.
            elastic: Whether the other choices of a block (kernel sizes) vary, or stay at each
                stage's fixed value.
            resolutions: Input resolutions in pixels.

        Raises:
            SpaceError: A depth of the coupling is none that a stage can have, or a stage has no
                depth of a named coupling.
        """
        pairs = self.named_coupling(coupling) if isinstance(coupling, str) else coupling
        outer = (Choice("width", tuple(range(len(self.widths)))),) * self.outer_count
        form = self.config_format
        stages = [
            self._stage(stage, how, pairs, elastic, isinstance(coupling, str))
            for stage, how in zip(
                self.stages, form.stage_formats(len(self.stages), 16), strict=True
            )
        ]
        slots = max(max(stage.depths) for stage in stages)
        name = "compofa" if pairs is not None else "ofa"
        name += "-elastic" if elastic and pairs is not None else ""
        name += "-fixed" if not elastic and self.can_fix and pairs is None else ""
        return SearchSpace(name, tuple(stages), slots, tuple(resolutions), outer, form)

    def _stage(
        self, stage: Stage, how: StageFormat, pairs: Coupling | None, elastic: bool, named: bool
    ) -> StageSpace:
        """Return the choices of one stage; pairs of a ``named`` coupling add no depths to it."""
        *others, last = self.choices
        if not elastic:
            others = [
                Choice(choice.name, (value,))
                for choice, value in zip(others, stage.fixed, strict=True)
            ]
        last = Choice(last.name, stage.only or last.values)
        if pairs is None or stage.only:
            return StageSpace(stage.depths, (*others, last))
        last = Choice(last.name, tuple(sorted({value for _, value in pairs})))
        if stage.depths == (1,):
            return StageSpace(stage.depths, (*others, last))
        blocks = tuple((how.blocks(depth), value) for depth, value in pairs)
        if min(blocks)[0] < 1:
            known = [number for number, _ in how.depths]
            depths = ", ".join(str(depth) for depth, _ in pairs)
            raise SpaceError(
                f"coupling: expected depths from {min(known)} to {max(known)}, got {depths}"
            )
        if named:
            blocks = tuple(pair for pair in blocks if pair[0] in stage.depths)
            if not blocks:
                listed = ", ".join(map(str, stage.depths))
                raise SpaceError(f"coupling: expected a pair of the depths {listed}, got none")
            last = Choice(last.name, tuple(sorted({value for _, value in blocks})))
        return StageSpace(tuple(depth for depth, _ in blocks), (*others, last), blocks)
