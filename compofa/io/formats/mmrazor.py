"""MMRazor's subnet files: YAML with one ``chosen`` value for every choice of its supernet.

``backbone.layers.1`` is the first block, which does not vary; ``layers.2`` to ``layers.6`` are the
five stages of MobileNetV3.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compofa.errors import ConfigError
from compofa.io.untrusted import parse_yaml, read_text
from compofa.networks.backbone import Backbone
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.space.subnet import Subnet, numbers

_LISTED = 8


def to_choices(subnet: Subnet, backbone: Backbone = MOBILENET_V3) -> dict[str, Any]:
    """Return ``subnet`` as the content of an MMRazor file.

    Blocks past a stage's depth get the smallest choices, as in the files that MMRazor publishes.

    Raises:
        ConfigError: MMRazor has no such network.
    """
    _require_family(backbone)
    widths = _widths(backbone)
    first = {
        "0.expand_ratio": 1, "0.kernel_size": 3, "depth": 1,
        "out_channels": widths["backbone.first_channels"],
    }  # fmt: skip
    chosen: dict[str, Any] = {
        **{f"backbone.layers.1.{key}": value for key, value in first.items()},
        **widths,
    }
    smallest = tuple(min(choice.values) for choice in backbone.choices)
    for index, (stage, blocks) in enumerate(zip(backbone.stages, subnet.stages, strict=True)):
        layer = f"backbone.layers.{index + 2}"
        for position in range(max(stage.depths)):
            kernel, expand = blocks[position] if position < len(blocks) else smallest
            chosen[f"{layer}.{position}.expand_ratio"] = expand
            if stage.se:
                chosen[f"{layer}.{position}.expand_ratio_se"] = expand
            chosen[f"{layer}.{position}.kernel_size"] = kernel
        chosen[f"{layer}.depth"] = len(blocks)
    chosen["input_shape"] = [subnet.resolution, subnet.resolution]
    return {key: {"chosen": value} for key, value in chosen.items()}


def from_choices(
    data: Any, backbone: Backbone = MOBILENET_V3, source: str | Path = "subnet"
) -> Subnet:
    """Read the content of an MMRazor file.

    ``expand_ratio_se`` is not looked at: the squeeze of a block follows its width, as in the
    Once-for-All network that MMRazor's was converted from.

    Args:
        data: What the YAML holds.
        backbone: The network that it must be a subnet of.
        source: What to call it in errors.

    Raises:
        ConfigError: Keys are missing (all are listed), or widths are those of another network.
        SpaceError: A value is not a number, or outside the network's choices.
    """
    _require_family(backbone)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: expected keys with chosen values, got {type(data).__name__}")
    stages = range(2, len(backbone.stages) + 2)
    _require(data, [f"backbone.layers.{n}.depth" for n in stages] + ["input_shape"], source)
    depths = [_number(data, f"backbone.layers.{n}.depth") for n in stages]
    blocks = [
        [f"backbone.layers.{n}.{j}." for j in range(depth)]
        for n, depth, stage in zip(stages, depths, backbone.stages, strict=True)
        if depth in stage.depths
    ]
    if len(blocks) < len(depths):
        known = [stage.depths for stage in backbone.stages]
        raise ConfigError(f"{source}: expected depths from {known}, got {depths}")
    parts = ("kernel_size", "expand_ratio")
    widths = _widths(backbone)
    _require(data, [b + part for stage in blocks for b in stage for part in parts], source)
    for key, width in widths.items():
        if key in data and _number(data, key) != width:
            raise ConfigError(f"{source}: {key}: expected {width}, got {_number(data, key)}")
    sides = numbers("input_shape", data["input_shape"]["chosen"])
    if not sides or set(sides) != {max(1, int(sides[0]))}:
        raise ConfigError(f"{source}: input_shape: expected one whole side, got {sides}")
    choices = tuple(
        tuple(tuple(_number(data, block + part) for part in parts) for block in stage)
        for stage in blocks
    )
    subnet = Subnet(sides[0], choices, format=backbone.config_format)
    backbone.free_space().require(subnet, resolution=False)
    return subnet


def read_subnet(path: str | Path, backbone: Backbone = MOBILENET_V3) -> Subnet:
    """Read an MMRazor subnet file.

    Raises:
        ConfigError: It cannot be read or is not one; see :func:`from_choices`.
    """
    try:
        data = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a YAML file of a subnet, got {error}") from None
    return from_choices(data, backbone, path)


def dump(subnet: Subnet, backbone: Backbone = MOBILENET_V3) -> str:
    """Return the text of an MMRazor subnet file."""
    return yaml.safe_dump(to_choices(subnet, backbone))


def _widths(backbone: Backbone) -> dict[str, int]:
    rows = {row.name: backbone.width(row.width) for row in (*backbone.stem, *backbone.head)}
    widths = {
        f"backbone.layers.{index + 2}.out_channels": backbone.width(stage.width)
        for index, stage in enumerate(backbone.stages)
    }
    return {
        "backbone.first_channels": rows["stem"], "backbone.last_channels": rows["mix"], **widths
    }  # fmt: skip


def _require_family(backbone: Backbone) -> None:
    if "mmrazor" not in [names.program for names in backbone.weight_names]:
        raise ConfigError(f"MMRazor has no {backbone.name}: expected a network that it has")


def _require(data: Mapping[str, Any], keys: list[str], source: str | Path) -> None:
    missing = [k for k in keys if not isinstance(data.get(k), Mapping) or "chosen" not in data[k]]
    if missing:
        more = ", …" * (len(missing) > _LISTED)
        raise ConfigError(
            f"{source}: expected a chosen value for every choice, {len(missing)} missing: "
            f"{', '.join(missing[:_LISTED])}{more}"
        )


def _number(data: Mapping[str, Any], key: str) -> Any:
    chosen = data[key].get("chosen") if isinstance(data[key], Mapping) else data[key]
    values = numbers(key, chosen)
    if len(values) != 1:
        raise ConfigError(f"{key}: expected one number, got {len(values)}")
    return values[0]
