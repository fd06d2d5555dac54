"""What a supernet is, as data: enough to build it again from a checkpoint, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any, ClassVar

from compofa.errors import SpaceError
from compofa.networks.backbones import Backbone, backbone
from compofa.networks.layout import LayerSpec, layout
from compofa.space.search_space import SearchSpace, StageSpace
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
        known = range(len(self.backbone.widths))
        if len(self.space.widths) != self.backbone.choices or any(
            index not in known for indices in self.space.widths for index in indices
        ):
            raise SpaceError(
                f"backbone {self.backbone.name} has {self.backbone.choices} elastic widths of "
                f"{len(known)} choices, space {self.space.name} has {self.space.widths}"
            )
        if not 1 <= self.classes <= 1_000_000:
            raise SpaceError(f"expected 1 to 1000000 classes, got {self.classes}")
        if not 0 <= self.dropout < 1:
            raise SpaceError(f"expected a dropout from 0 up to 1, got {self.dropout}")

    @property
    def min_resolution(self) -> int:
        """The least side of an image that leaves one pixel a stride of the backbone."""
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

    def largest_only(self) -> NetworkSpec:
        """Return the definition of this network's largest subnet alone: a teacher's."""
        stages = tuple(
            StageSpace((max(s.depths),), (max(s.kernels),), (max(s.expands),))
            for s in self.space.stages
        )
        space = replace(
            self.space,
            name=f"{self.space.name}-largest",
            stages=stages,
            widths=tuple((max(indices),) for indices in self.space.widths),
        )
        return replace(self, space=space, kernel_transform=False)

    def to_json(self) -> dict[str, Any]:
        """Return the definition as JSON data."""
        space = self.space
        widths = {"widths": [list(indices) for indices in space.widths]} if space.widths else {}
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
                        "kernels": list(stage.kernels),
                        "expands": list(stage.expands),
                        "coupling": [list(p) for p in stage.coupling] if stage.coupling else None,
                    }
                    for stage in space.stages
                ],
                **widths,
            },
        }

    @classmethod
    def from_json(cls, data: Any) -> NetworkSpec:
        """Read what :meth:`to_json` wrote; every value is checked.

        Raises:
            SpaceError: Something is missing, of another type or out of range.
        """
        try:
            space = field(data, "space", dict)
            widths = tuple(
                _integers({"widths": indices}, "widths", 15, least=0)
                for indices in (field(space, "widths", list) if "widths" in space else ())
            )
            least = 0 if widths else 1
            stages = tuple(_stage(stage, least) for stage in field(space, "stages", list))
            if not 1 <= len(stages) <= 16:
                raise SpaceError(f"expected 1 to 16 stages, got {len(stages)}")
            slots = field(space, "slots", int)
            if slots != max(max(stage.depths) for stage in stages):
                raise SpaceError(f"expected as many slots as the largest depth, got {slots}")
            resolutions = _integers(space, "resolutions", 4096)
            return cls(
                backbone(field(data, "backbone", str), field(data, "width_mult", float, int)),
                SearchSpace(field(space, "name", str)[:80], stages, slots, resolutions, widths),
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


def _stage(data: Any, least: int) -> StageSpace:
    depths = _integers(data, "depths", 16, least)
    expands = tuple(numbers("expands", field(data, "expands", list)))
    if not expands or any(not 0 < expand <= 16 for expand in expands):
        raise SpaceError(f"expected expand ratios above 0 and at most 16, got {expands}")
    coupling = field(data, "coupling", list, NoneType)
    if coupling is not None:
        coupling = tuple(tuple(numbers("coupling", pair)) for pair in coupling)
        if any(len(pair) != 2 for pair in coupling) or not (
            {d for d, _ in coupling} == set(depths) and {e for _, e in coupling} == set(expands)
        ):
            raise SpaceError("expected a coupling of the stage's own depths and expand ratios")
    kernels = _integers(data, "kernels", 15)
    if any(kernel % 2 == 0 for kernel in kernels):
        raise SpaceError(f"expected odd kernel sizes, got {kernels}")
    return StageSpace(depths, kernels, expands, coupling)


def _integers(data: Mapping[str, Any], key: str, limit: int, least: int = 1) -> tuple[int, ...]:
    values = tuple(numbers(key, field(data, key, list)))
    fit = all(type(value) is int and least <= value <= limit for value in values)
    if not values or len(values) > 256 or not fit:
        raise SpaceError(f"{key}: expected integers from {least} to {limit}, got {values}")
    return values
