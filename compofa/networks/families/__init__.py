"""Network families: one module each, with everything that is particular to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compofa.errors import SpaceError, UnregisteredError, unknown_name
from compofa.networks.backbone import Backbone
from compofa.networks.families import mobilenet_v3, proxyless, resnet50d
from compofa.space.config import ConfigFormat
from compofa.space.subnet import Subnet

BACKBONES: dict[str, Backbone] = {
    backbone.name: backbone
    for family in (mobilenet_v3, proxyless, resnet50d)
    for backbone in family.BACKBONES
}
"""The backbones by name; :func:`register_backbone` adds more."""


def register_backbone(backbone: Backbone) -> Backbone:
    """Add a backbone, so that checkpoints of its networks are read by name.

    Raises:
        SpaceError: There is another backbone of that name.
    """
    if BACKBONES.setdefault(backbone.name, backbone) != backbone:
        raise SpaceError(f"expected a new backbone, got {backbone.name}, which is known")
    return backbone


def backbone(name: str, width_mult: float = 1.0) -> Backbone:
    """Return a backbone of :data:`BACKBONES` at a width multiplier.

    Raises:
        UnregisteredError: The name is unknown.
        SpaceError: The multiplier is not in (0, 8].
    """
    if name not in BACKBONES:
        raise UnregisteredError(
            f"{unknown_name('backbone', name, BACKBONES)}, or one of your own, registered with "
            "register_backbone before its files are opened"
        )
    if not 0 < width_mult <= 8:
        raise SpaceError(f"expected a width multiplier above 0 and at most 8, got {width_mult}")
    return BACKBONES[name].scaled(width_mult)


def config_formats() -> list[ConfigFormat]:
    """Return the config formats of all families, those with more keys first."""
    found = dict.fromkeys(table.config_format for table in BACKBONES.values())
    return sorted(found, key=lambda form: -len(form.keys))


def subnet_from_config(config: Mapping[str, Any], resolution: int = 224) -> Subnet:
    """Read a subnet of any family: the one whose keys ``config`` has.

    Args:
        config: Lists of numbers by key, and ``r``, an integer or a list of one. Other keys are
            ignored.
        resolution: Used where ``config`` has no ``r``.

    Raises:
        SpaceError: No family has such keys, a value is not a number of its kind or the lengths do
            not fit together.
    """
    return format_of(config if isinstance(config, Mapping) else {}).read(config, resolution)


def layer_kinds() -> dict[str, set[str]]:
    """Return which kinds of layers the families have under which names.

    ``stages`` stands for the blocks of all stages.
    """
    found: dict[str, set[str]] = {"stages": set(), "classifier": {"linear"}}
    for table in BACKBONES.values():
        for row in (*table.stem, *table.head, *(r for s in table.stages for r in s.before)):
            found.setdefault(row.name, set()).add(row.kind)
        found["stages"] |= {stage.kind for stage in table.stages}
    return found


def format_of(keys: Any) -> ConfigFormat:
    """Return the config format whose keys are all among ``keys``; else the one nearest to them."""
    forms = config_formats()
    matching = [form for form in forms if form.matches(keys)]
    return (
        matching[0]
        if matching
        else max(forms, key=lambda form: sum(key in keys for key, _ in form.keys))
    )
