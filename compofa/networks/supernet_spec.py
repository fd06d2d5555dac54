"""What a supernet is, as data: enough to build it again from a checkpoint, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, ClassVar

from compofa.errors import SpaceError
from compofa.networks.backbone import Backbone
from compofa.networks.families import backbone
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.space.choice import Choice
from compofa.space.search_space import SearchSpace
from compofa.space.stage_space import StageSpace
from compofa.space.subnet import Subnet, numbers

MAX_RESOLUTION = 2048
"""The largest side of an image that a network is used with, in pixels."""


@dataclass(frozen=True)
class NetworkSpec:
    """A supernet's definition.

    Attributes:
        backbone: Widths and strides.
        space: The subnets it is trained for; their largest choices are what it stores.
        classes: Outputs of the classifier.
        kernel_transform: Whether smaller kernels go through learned matrices. A property of
            the network: it decides which weights exist.
        dropout: Probability before the classifier, in training.
    """

    backbone: Backbone
    space: SearchSpace
    classes: int = 1000
    kernel_transform: bool = False
    dropout: float = 0.1

    elastic: ClassVar[bool] = True
    """Whether there are subnets to choose from."""

    def __post_init__(self) -> None:
        if len(self.space.stages) != len(self.backbone.stages):
            raise SpaceError(
                f"backbone {self.backbone.name} has {len(self.backbone.stages)} stages, "
                f"space {self.space.name} has {len(self.space.stages)}"
            )
        if self.space.names != self.backbone.names:
            raise SpaceError(
                f"backbone {self.backbone.name} has blocks with the choices "
                f"{', '.join(self.backbone.names)}, space {self.space.name} has "
                f"{', '.join(self.space.names)}"
            )
        known = range(len(self.backbone.widths))
        if len(self.space.outer) != self.backbone.outer_count or any(
            value not in known for choice in self.space.outer for value in choice.values
        ):
            raise SpaceError(
                f"backbone {self.backbone.name} has {self.backbone.outer_count} elastic widths of "
                f"{len(known)} values, space {self.space.name} has "
                f"{[choice.values for choice in self.space.outer]}"
            )
        if not 1 <= self.classes <= 1_000_000:
            raise SpaceError(f"expected 1 to 1000000 classes, got {self.classes}")
        if not 0 <= self.dropout < 1:
            raise SpaceError(f"expected a dropout from 0 up to 1, got {self.dropout}")

    @property
    def min_resolution(self) -> int:
        """The least image side: one pixel remains behind all strides of the backbone."""
        return self.backbone.stride

    def check_resolution(self, resolution: int) -> None:
        """Check that the network can take images of this side.

        Raises:
            SpaceError: It is too small or absurdly large.
        """
        if not self.min_resolution <= resolution <= MAX_RESOLUTION:
            raise SpaceError(
                f"expected an image size from {self.min_resolution} to {MAX_RESOLUTION} for "
                f"backbone {self.backbone.name}, got {resolution}"
            )

    def layers_of(self, subnet: Subnet) -> tuple[LayerSpec, ...]:
        """Return the layers of a subnet, with their shapes."""
        return layout(self.backbone, subnet, self.classes)

    def with_classes(self, classes: int) -> NetworkSpec:
        """Return the definition with another number of classes."""
        return replace(self, classes=classes)

    def largest_only(self) -> NetworkSpec:
        """Return the definition of this network's largest subnet alone: a teacher's."""
        stages = tuple(
            StageSpace((max(s.depths),), tuple(map(_largest, s.choices))) for s in self.space.stages
        )
        outer = tuple(map(_largest, self.space.outer))
        space = replace(self.space, name=f"{self.space.name}-largest", stages=stages, outer=outer)
        return replace(self, space=space, kernel_transform=False)

    def to_json(self) -> dict[str, Any]:
        """Return the definition as JSON data."""
        space = self.space
        return {
            "backbone": self.backbone.name,
            "width_mult": self.backbone.width_mult,
            "classes": self.classes,
            "kernel_transform": self.kernel_transform,
            "dropout": self.dropout,
            "space": {
                "name": space.name,
                "slots": space.slots,
                "resolutions": list(space.resolutions),
                "stages": [
                    {
                        "depths": list(stage.depths),
                        "choices": {c.name: list(c.values) for c in stage.choices},
                        "coupling": [list(p) for p in stage.coupling] if stage.coupling else None,
                    }
                    for stage in space.stages
                ],
                "outer": [list(choice.values) for choice in space.outer],
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> NetworkSpec:
        """Read what :meth:`to_json` wrote; every value is checked.

        Raises:
            SpaceError: Something is missing, of another type or out of range.
        """
        try:
            table = backbone(field(data, "backbone", str), field(data, "width_mult", float, int))
            space = field(data, "space", dict)
            listed = field({"outer": space.get("widths", []), **space}, "outer", list)
            outer = tuple(
                Choice("width", _integers({"outer": values}, "outer", 15, least=0))
                for values in listed
            )
            stages = tuple(_stage(stage, table) for stage in field(space, "stages", list))
            if not 1 <= len(stages) <= 16:
                raise SpaceError(f"expected 1 to 16 stages, got {len(stages)}")
            slots = field(space, "slots", int)
            if slots != max(max(stage.depths) for stage in stages):
                raise SpaceError(f"expected as many slots as the largest depth, got {slots}")
            resolutions = _integers(space, "resolutions", 4096)
            name = field(space, "name", str)[:80]
            if not name.isprintable():
                raise SpaceError(f"name: expected printable characters, got {name!r}")
            form = table.config_format
            return cls(
                table,
                SearchSpace(name, stages, slots, resolutions, outer, form),
                field(data, "classes", int),
                field(data, "kernel_transform", bool),
                field(data, "dropout", float, int),
            )
        except SpaceError as error:
            raise SpaceError(f"not a network definition: {error}") from None


def field(data: Any, key: str, *kinds: type) -> Any:
    """Return ``data[key]``, a value of a mapping that came from a file.

    Raises:
        SpaceError: ``data`` is not a mapping, has no such key or its value is of no type of
            ``kinds`` (exactly: ``True`` is no ``int``).
    """
    if not isinstance(data, Mapping):
        raise SpaceError(f"expected a mapping with {key!r}, got {type(data).__name__}")
    if key not in data:
        raise SpaceError(f"{key}: missing")
    if type(data[key]) not in kinds:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise SpaceError(f"{key}: expected {names}, got {type(data[key]).__name__}")
    return data[key]


_FIRST_NAMES = {"kernel": "kernels", "expand": "expands"}
"""How the first version called these choices."""


def _stage(data: Any, table: Backbone) -> StageSpace:
    depths = _integers(data, "depths", 16, 0 if table.config_format.stages else 1)
    if isinstance(data, Mapping) and "choices" not in data:
        data = {**data, "choices": {n: data.get(_FIRST_NAMES.get(n, n), []) for n in table.names}}
    held = field(data, "choices", dict)
    if tuple(held) != table.names:
        raise SpaceError(f"choices: expected {', '.join(table.names)}, got {[*held]!r:.80}")
    choices = tuple(_choice(held, table, name) for name in table.names)
    coupling = field(data, "coupling", list, NoneType)
    if coupling is not None:
        coupling = tuple(tuple(numbers("coupling", pair)) for pair in coupling)
        if any(len(pair) != 2 for pair in coupling) or not (
            {d for d, _ in coupling} == {*depths}
            and {value for _, value in coupling} == {*choices[-1].values}
        ):
            raise SpaceError("expected a coupling of the stage's own depths and last choice")
    return StageSpace(depths, choices, coupling)


def _choice(held: Mapping[str, Any], table: Backbone, name: str) -> Choice:
    """Read the values of a choice: of the kind and about the size of those of the backbone."""
    values = tuple(numbers(name, field(held, name, list)))
    known = table.values(name)
    whole = all(type(value) is int for value in known) and name != table.names[-1]
    odd = whole and all(value % 2 for value in known)
    least, most = (0 if 0 in known else 1e-3), max(16, *known)
    fit = all(
        least <= value <= most and (type(value) is int or not whole) and (value % 2 or not odd)
        for value in values
    )
    if not values or len(values) > 256 or not fit:
        kind = ("odd " if odd else "") + ("integers" if whole else "numbers")
        raise SpaceError(f"{name}: expected {kind} from {least:g} to {most}, got {[*values]!r:.80}")
    return Choice(name, values)


def _largest(choice: Choice) -> Choice:
    return Choice(choice.name, (max(choice.values),))


def _integers(data: Mapping[str, Any], key: str, limit: int, least: int = 1) -> tuple[int, ...]:
    values = tuple(numbers(key, field(data, key, list)))
    fit = all(type(value) is int and least <= value <= limit for value in values)
    if not values or len(values) > 256 or not fit:
        raise SpaceError(f"{key}: expected integers from {least} to {limit}, got {[*values]!r:.80}")
    return values
