"""Once-for-All's ``net.config``: a specialised network as JSON, read and written.

A mapping with ``name``, ``bn``, ``first_conv``, ``blocks``, ``final_expand_layer`` (MobileNetV3
alone), ``feature_mix_layer`` and ``classifier``. A block is a ``mobile_inverted_conv`` (newer
files: ``conv``) and a ``shortcut``; without a convolution, or with a zero layer for one, it does
nothing and is skipped. The mobile networks of ProxylessNAS come in the same form with their
``resolution``; beside a ``net.config`` it stands in ``run.config``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from compofa.errors import SpaceError
from compofa.fixed import MAX_LAYERS, FixedNetwork
from compofa.layout import LayerSpec, at_resolution, se_channels
from compofa.network import field
from compofa.subnet import as_number

ACTS = {"relu": "relu", "relu6": "relu6", "h_swish": "hswish", None: "none"}
"""Activations by their names there."""
BLOCKS = ("MBInvertedConvLayer", "MBConvLayer")
NETWORKS = ("MobileNetV3", "MobileNetV3Large", "ProxylessNASNets", "MobileNetV2")
MAX_BYTES = 4_000_000

_PLAIN = {"dilation": 1, "groups": 1, "bias": False, "has_shuffle": False, "dropout_rate": 0}
_ORDER = {"ops_order": "weight_bn_act"}


def is_net_config(data: Any) -> bool:
    """Whether JSON data is meant to be such a network."""
    return isinstance(data, Mapping) and "blocks" in data and "classifier" in data


def read_json(path: str | Path) -> Any:
    """Read a JSON file of a few kilobytes.

    Raises:
        SpaceError: It cannot be read, is too large or not JSON.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) <= MAX_BYTES:
            return json.loads(content)
    except OSError as error:
        raise SpaceError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise SpaceError(f"{path}: expected JSON: {' '.join(str(error).split())[:120]}") from None
    raise SpaceError(f"{path}: expected a network's JSON, got more than {MAX_BYTES} bytes")


def from_net_config(data: Any, resolution: int | None = None) -> FixedNetwork:
    """Read the content of a ``net.config``; every value is checked.

    Args:
        data: What the JSON holds.
        resolution: Side of its images in pixels; by default what ``data`` says, or 224.

    Raises:
        SpaceError: Something is missing, of another type, out of range or not supported.
    """
    name = field(data, "name", str)
    if name not in NETWORKS:
        raise SpaceError(f"name: expected one of {', '.join(NETWORKS)}, got {name[:40]!r}")
    bn = field(data, "bn", dict)
    eps, momentum = field(bn, "eps", float, int), field(bn, "momentum", float, int)
    _require(bn, {"ws_eps": None}, "bn")
    layers = [_conv(data, "first_conv", "stem")]
    blocks = field(data, "blocks", list)
    if len(blocks) > MAX_LAYERS:
        raise SpaceError(f"blocks: expected at most {MAX_LAYERS}, got {len(blocks)}")
    stage, position = -1, 0
    for number, block in enumerate(blocks):
        where = f"blocks[{number}]"
        conv = _live_conv(block, where)
        if conv is None:
            continue
        if len(layers) == 1:
            layers.append(_block(conv, block, "first", where))
            continue
        layer = _block(conv, block, "stages", where)
        opens = stage < 0 or not layer.residual
        stage, position = (stage + 1, 0) if opens else (stage, position + 1)
        layers.append(replace(layer, name=f"stages.{stage}.{position}"))
    mix = _conv(data, "feature_mix_layer", "mix")
    if "final_expand_layer" in data:
        layers += [_conv(data, "final_expand_layer", "final_expand"), _pool(mix.in_channels), mix]
    else:
        layers += [mix, _pool(mix.out_channels)]
    classifier = field(data, "classifier", dict)
    wanted = {"name": "LinearLayer", "bias": True, "use_bn": False, "act_func": None, **_ORDER}
    _require(classifier, wanted, "classifier")
    sizes = [_integer(classifier, key, "classifier") for key in ("in_features", "out_features")]
    layers.append(LayerSpec("linear", "classifier", 1, 1, *sizes))
    if resolution is None:
        resolution = _integer(data, "resolution", "network") if "resolution" in data else 224
    dropout = field(classifier, "dropout_rate", float, int)
    return FixedNetwork(at_resolution(tuple(layers), resolution), dropout, eps, momentum)


def to_net_config(network: FixedNetwork) -> dict[str, Any]:
    """Return a network in the form of a ``net.config``; the reverse of :func:`from_net_config`.

    Raises:
        SpaceError: It is of another family.
    """
    layers = {layer.name: layer for layer in network.layers}
    if "mix" not in layers:
        raise SpaceError("expected a MobileNetV3 or ProxylessNAS to write as net.config")
    blocks = [_written_block(layer) for layer in network.layers if layer.kind == "mbconv"]
    expand = layers.get("final_expand")
    return {
        "name": "MobileNetV3" if expand else "ProxylessNASNets",
        "bn": {"momentum": network.bn_momentum, "eps": network.bn_eps},
        "first_conv": _written_conv(layers["stem"]),
        "blocks": blocks,
        **({"final_expand_layer": _written_conv(expand)} if expand else {}),
        "feature_mix_layer": _written_conv(layers["mix"]),
        "classifier": {
            "name": "LinearLayer",
            "in_features": layers["classifier"].in_channels,
            "out_features": network.classes,
            "bias": True,
            "use_bn": False,
            "act_func": None,
            "dropout_rate": network.dropout,
            **_ORDER,
        },
    }


def _require(data: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Check values that this library has no other form of, where ``data`` has them."""
    for key, value in wanted.items():
        got = data.get(key, value)
        if got != value or type(got) not in (type(value), float):
            raise SpaceError(f"{where}: {key}: expected {value!r}, got {str(got)[:40]!r}")


def _integer(data: Mapping[str, Any], key: str, where: str) -> int:
    value = field(data, key, int)
    if not 1 <= value <= 1_000_000:
        raise SpaceError(f"{where}: {key}: expected 1 to 1000000, got {value}")
    return value


def _act(data: Mapping[str, Any], where: str) -> str:
    act = field(data, "act_func", str, NoneType)
    if act not in ACTS:
        known = ", ".join(str(name) for name in ACTS)
        raise SpaceError(f"{where}: act_func: expected one of {known}, got {act[:40]!r}")
    return ACTS[act]


def _conv(data: Any, key: str, name: str) -> LayerSpec:
    conv = field(data, key, dict)
    _require(conv, {"name": "ConvLayer", **_PLAIN, **_ORDER}, key)
    names = ("in_channels", "out_channels", "kernel_size", "stride")
    ins, outs, kernel, stride = (_integer(conv, part, key) for part in names)
    kind = "conv" if field(conv, "use_bn", bool) else "mix"
    return LayerSpec(kind, name, 1, 1, ins, outs, kernel=kernel, stride=stride, act=_act(conv, key))


def _pool(channels: int) -> LayerSpec:
    return LayerSpec("pool", "pool", 1, 1, channels, channels)


def _live_conv(block: Any, where: str) -> Mapping[str, Any] | None:
    """Return the convolution of a block, or ``None`` of one that does nothing."""
    if not isinstance(block, Mapping):
        raise SpaceError(f"{where}: expected a mapping, got {type(block).__name__}")
    key = "conv" if "conv" in block else "mobile_inverted_conv"
    conv = field(block, key, dict, NoneType)
    return None if conv is None or conv.get("name") == "ZeroLayer" else conv


def _block(conv: Mapping[str, Any], block: Mapping[str, Any], name: str, where: str) -> LayerSpec:
    kind = field(conv, "name", str)
    if kind not in BLOCKS:
        raise SpaceError(f"{where}: expected one of {', '.join(BLOCKS)}, got {kind[:40]!r}")
    _require(conv, {"groups": None}, where)
    names = ("in_channels", "out_channels", "kernel_size", "stride")
    ins, outs, kernel, stride = (_integer(conv, part, where) for part in names)
    ratio = field(conv, "expand_ratio", int, float)
    if not 0 < ratio <= 64:
        raise SpaceError(f"{where}: expand_ratio: expected above 0 and at most 64, got {ratio}")
    mid = field(conv, "mid_channels", int, NoneType) if "mid_channels" in conv else None
    mid = max(1, round(ins * ratio)) if mid is None else mid
    return LayerSpec(
        kind="mbconv",
        name=name,
        in_size=1,
        out_size=1,
        in_channels=ins,
        out_channels=outs,
        mid_channels=mid,
        kernel=kernel,
        stride=stride,
        act=_act({"act_func": "relu6", **conv}, where),  # what older files leave out
        se_channels=se_channels(mid) if field({"use_se": False, **conv}, "use_se", bool) else 0,
        expand=ratio != 1,
        residual=_is_residual(block, where),
    )


def _is_residual(block: Mapping[str, Any], where: str) -> bool:
    shortcut = field(block, "shortcut", dict, NoneType)
    if shortcut is None or shortcut.get("name") == "ZeroLayer":
        return False
    if shortcut.get("name") != "IdentityLayer":
        got = str(shortcut.get("name"))[:40]
        raise SpaceError(f"{where}: shortcut: expected IdentityLayer, got {got!r}")
    _require(shortcut, {"use_bn": False, "act_func": None, "dropout_rate": 0, **_ORDER}, where)
    return True


def _their_act(act: str) -> str | None:
    return next(theirs for theirs, ours in ACTS.items() if ours == act)


def _written_conv(layer: LayerSpec) -> dict[str, Any]:
    return {
        "name": "ConvLayer",
        "kernel_size": layer.kernel,
        "stride": layer.stride,
        **{key: value for key, value in _PLAIN.items() if key != "dropout_rate"},
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "use_bn": layer.kind == "conv",
        "act_func": _their_act(layer.act),
        "dropout_rate": 0,
        **_ORDER,
    }


def _written_block(layer: LayerSpec) -> dict[str, Any]:
    same = {"in_channels": layer.in_channels, "out_channels": layer.out_channels}
    ratio = as_number(layer.mid_channels / layer.in_channels) if layer.expand else 1
    if layer.expand and ratio == 1:  # which would mean a block without expansion
        raise SpaceError(f"layer {layer.name}: net.config has no expansion to as many channels")
    return {
        "name": "MobileInvertedResidualBlock",
        "mobile_inverted_conv": {
            "name": "MBInvertedConvLayer",
            **same,
            "kernel_size": layer.kernel,
            "stride": layer.stride,
            "expand_ratio": ratio,
            "mid_channels": layer.mid_channels if layer.expand else None,
            "act_func": _their_act(layer.act),
            "use_se": layer.se_channels > 0,
        },
        "shortcut": {
            "name": "IdentityLayer",
            **same,
            "use_bn": False,
            "act_func": None,
            "dropout_rate": 0,
            **_ORDER,
        }
        if layer.residual
        else None,
    }
