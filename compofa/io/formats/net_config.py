"""Once-for-All's ``net.config``: a specialised network as JSON, read and written.

A mapping with ``name``, ``bn``, ``first_conv``, ``blocks``, ``final_expand_layer`` (MobileNetV3
alone), ``feature_mix_layer`` and ``classifier``. A block is a ``mobile_inverted_conv`` (newer
files: ``conv``) and a ``shortcut``; without a convolution, or with a zero layer for one, it does
nothing and is skipped. The mobile networks of ProxylessNAS come in the same form with their
``resolution``; beside a ``net.config`` it stands in ``run.config``. ResNet50D has ``input_stem``, a
list of convolutions, in place of ``first_conv``, and bottlenecks for blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from compofa.errors import SpaceError
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.families.resnet50d import widths_of
from compofa.networks.kinds import LayerSpec, divisible8, mid_channels, se_channels
from compofa.networks.layout import at_resolution
from compofa.networks.network_spec import MAX_LAYERS, FixedNetwork
from compofa.networks.supernet_spec import field
from compofa.space.subnet import as_number

ACTS = {"relu": "relu", "relu6": "relu6", "h_swish": "hswish", None: "none"}
"""Activations by their names there."""
BLOCKS = ("MBInvertedConvLayer", "MBConvLayer")
KINDS = ("conv", "mbconv", "bottleneck", "mix", "pool", "maxpool", "linear")
"""Kinds of layers that it can hold."""
NETWORKS = ("MobileNetV3", "MobileNetV3Large", "ProxylessNASNets", "MobileNetV2", "ResNets")
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
        return parse_json(read_text(path, MAX_BYTES))
    except OSError as error:
        raise SpaceError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise SpaceError(f"{path}: expected JSON, got {error}") from None


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
    blocks = field(data, "blocks", list)
    if len(blocks) > MAX_LAYERS:
        raise SpaceError(f"blocks: expected at most {MAX_LAYERS}, got {len(blocks)}")
    layers = (_resnet if name == "ResNets" else _inverted)(data, blocks)
    classifier = field(data, "classifier", dict)
    wanted = {"name": "LinearLayer", "bias": True, "use_bn": False, "act_func": None, **_ORDER}
    _require(classifier, wanted, "classifier")
    sizes = [_integer(classifier, key, "classifier") for key in ("in_features", "out_features")]
    layers.append(LayerSpec("linear", "classifier", 1, 1, *sizes))
    if resolution is None:
        resolution = _integer(data, "resolution", "network") if "resolution" in data else 224
    dropout = field(classifier, "dropout_rate", float, int)
    resized = at_resolution(tuple(layers), resolution)
    return FixedNetwork(resized, dropout, eps, momentum, widths_of(layers))


def _inverted(data: Mapping[str, Any], blocks: list[Any]) -> list[LayerSpec]:
    """Read a network of inverted blocks, without its classifier."""
    layers = [_conv(field(data, "first_conv", dict), "first_conv", "stem")]
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
    mix = _conv(field(data, "feature_mix_layer", dict), "feature_mix_layer", "mix")
    if "final_expand_layer" not in data:
        return [*layers, mix, _pool(mix.out_channels)]
    expand = _conv(field(data, "final_expand_layer", dict), "final_expand_layer", "final_expand")
    return [*layers, expand, _pool(mix.in_channels), mix]


def _resnet(data: Mapping[str, Any], blocks: list[Any]) -> list[LayerSpec]:
    """Read a ResNet50D, without its classifier."""
    stem = field(data, "input_stem", list)
    if len(stem) not in (2, 3):
        raise SpaceError(f"input_stem: expected 2 or 3 convolutions, got {len(stem)}")
    names = ("stem", "stages.0.0", "stem_out") if len(stem) == 3 else ("stem", "stem_out")
    layers = []
    for number, (conv, name) in enumerate(zip(stem, names, strict=True)):
        where, residual = f"input_stem[{number}]", name == "stages.0.0"
        if residual:
            if not isinstance(conv, Mapping) or not _is_residual(conv, where):
                raise SpaceError(f"{where}: expected a convolution with a shortcut")
            conv = field(conv, "conv", dict)
        if not isinstance(conv, Mapping):
            raise SpaceError(f"{where}: expected a mapping, got {type(conv).__name__}")
        layers.append(replace(_conv(conv, where, name), residual=residual))
    channels = layers[-1].out_channels
    layers.append(LayerSpec("maxpool", "stem_pool", 1, 1, channels, channels, kernel=3, stride=2))
    stage, position = 0, 0
    for number, block in enumerate(blocks):
        layer = _bottleneck(block, f"blocks[{number}]")
        opens = stage == 0 or layer.downsample
        stage, position = (stage + 1, 0) if opens else (stage, position + 1)
        layers.append(replace(layer, name=f"stages.{stage}.{position}"))
    return [*layers, _pool(layers[-1].out_channels)]


def to_net_config(network: FixedNetwork) -> dict[str, Any]:
    """Return a network in the form of a ``net.config``; the reverse of :func:`from_net_config`.

    Raises:
        SpaceError: It is of another family.
    """
    for layer in network.layers:
        if layer.kind not in KINDS or layer.act not in ACTS.values():
            raise SpaceError(
                f"layer {layer.name}: net.config has {', '.join(KINDS)} with the activations "
                f"{', '.join(ACTS.values())}, got {layer.kind} with {layer.act}"
            )
    layers = {layer.name: layer for layer in network.layers}
    resnet, expand = "stem_out" in layers, layers.get("final_expand")
    blocks = [layer for layer in network.layers if layer.kind in ("mbconv", "bottleneck")]
    if not resnet and "mix" not in layers:
        raise SpaceError("expected a MobileNetV3, ProxylessNAS or ResNet50D for a net.config")
    if resnet:
        name, stem = (
            "ResNets",
            [layers[n] for n in ("stem", "stages.0.0", "stem_out") if n in layers],
        )
        before: dict[str, Any] = {"input_stem": list(map(_written_conv, stem))}
        after: dict[str, Any] = {}
    else:
        name = "MobileNetV3" if expand else "ProxylessNASNets"
        before = {"first_conv": _written_conv(layers["stem"])}
        after = {"final_expand_layer": _written_conv(expand)} if expand else {}
        after["feature_mix_layer"] = _written_conv(layers["mix"])
    return {
        "name": name,
        "bn": {"momentum": network.bn_momentum, "eps": network.bn_eps},
        **before,
        "blocks": [(_written_bottleneck if resnet else _written_block)(b) for b in blocks],
        **after,
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


def _conv(conv: Mapping[str, Any], where: str, name: str) -> LayerSpec:
    _require(conv, {"name": "ConvLayer", **_PLAIN, **_ORDER}, where)
    names = ("in_channels", "out_channels", "kernel_size", "stride")
    ins, outs, kernel, stride = (_integer(conv, part, where) for part in names)
    kind = "conv" if field(conv, "use_bn", bool) else "mix"
    return LayerSpec(
        kind, name, 1, 1, ins, outs, kernel=kernel, stride=stride, act=_act(conv, where)
    )


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


def _bottleneck(block: Any, where: str) -> LayerSpec:
    kind = field(block, "name", str)
    if kind != "ResNetBottleneckBlock":
        raise SpaceError(f"{where}: expected ResNetBottleneckBlock, got {kind[:40]!r}")
    _require(block, {"groups": 1, "downsample_mode": "avgpool_conv"}, where)
    names = ("in_channels", "out_channels", "kernel_size", "stride")
    ins, outs, kernel, stride = (_integer(block, part, where) for part in names)
    ratio = field({"expand_ratio": 0.25, **block}, "expand_ratio", int, float)
    if not 0 < ratio <= 64:
        raise SpaceError(f"{where}: expand_ratio: expected above 0 and at most 64, got {ratio}")
    mid = field({"mid_channels": None, **block}, "mid_channels", int, NoneType)
    if mid is not None and not 1 <= mid <= 1_000_000:
        raise SpaceError(f"{where}: mid_channels: expected 1 to 1000000, got {mid}")
    return LayerSpec(
        kind="bottleneck",
        name="",
        in_size=1,
        out_size=1,
        in_channels=ins,
        out_channels=outs,
        mid_channels=mid_channels(outs, ratio) if mid is None else divisible8(mid),
        kernel=kernel,
        stride=stride,
        act=_act(block, where),
        residual=True,
        downsample=stride > 1 or ins != outs,
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
    conv = {
        "name": "ConvLayer",
        "kernel_size": layer.kernel,
        "stride": layer.stride,
        **_PLAIN,
        **_channels(layer),
        "use_bn": layer.kind == "conv",
        "act_func": _their_act(layer.act),
        **_ORDER,
    }
    if not layer.residual:
        return conv
    return {"name": "ResidualBlock", "conv": conv, "shortcut": _written_shortcut(layer)}


def _written_shortcut(layer: LayerSpec) -> dict[str, Any]:
    rest = {"use_bn": False, "act_func": None, "dropout_rate": 0, **_ORDER}
    return {"name": "IdentityLayer", **_channels(layer), **rest}


def _channels(layer: LayerSpec) -> dict[str, int]:
    return {"in_channels": layer.in_channels, "out_channels": layer.out_channels}


def _written_block(layer: LayerSpec) -> dict[str, Any]:
    ratio = as_number(layer.mid_channels / layer.in_channels) if layer.expand else 1
    if layer.expand and ratio == 1:  # which would mean a block without expansion
        raise SpaceError(f"layer {layer.name}: net.config has no expansion to as many channels")
    return {
        "name": "MobileInvertedResidualBlock",
        "mobile_inverted_conv": {
            "name": "MBInvertedConvLayer",
            **_channels(layer),
            "kernel_size": layer.kernel,
            "stride": layer.stride,
            "expand_ratio": ratio,
            "mid_channels": layer.mid_channels if layer.expand else None,
            "act_func": _their_act(layer.act),
            "use_se": layer.se_channels > 0,
        },
        "shortcut": _written_shortcut(layer) if layer.residual else None,
    }


def _written_bottleneck(layer: LayerSpec) -> dict[str, Any]:
    return {
        "name": "ResNetBottleneckBlock",
        **_channels(layer),
        "kernel_size": layer.kernel,
        "stride": layer.stride,
        "expand_ratio": layer.mid_channels / layer.out_channels,
        "mid_channels": layer.mid_channels,
        "act_func": _their_act(layer.act),
        "groups": 1,
        "downsample_mode": "avgpool_conv",
    }
