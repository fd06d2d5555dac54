"""A specialised network as data: one network with nothing left to choose, without torch.

What :class:`compofa.networks.supernet_spec.NetworkSpec` is to a supernet: enough to build it again
from a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from dataclasses import field as attribute
from typing import Any, ClassVar

from compofa.errors import SpaceError
from compofa.networks.backbones import RESNET50D
from compofa.networks.layout import LayerSpec, at_resolution, mid_channels, params
from compofa.networks.supernet_spec import MAX_RESOLUTION, NetworkSpec, field
from compofa.space.config import WIDE, WIDTHS
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Block, Number, Subnet, as_number

ACTS = ("relu", "relu6", "hswish", "none")
KINDS = {
    "stem": ("conv",),
    "first": ("mbconv",),
    "stem_out": ("conv",),
    "stem_pool": ("maxpool",),
    "stages": ("mbconv", "bottleneck", "conv"),
    "final_expand": ("conv",),
    "mix": ("conv", "mix"),
    "pool": ("pool",),
    "classifier": ("linear",),
}
"""What a layer may be, by its name; ``stages`` stands for the blocks of all stages."""
MAX_LAYERS, MAX_CHANNELS, MAX_PARAMS = 512, 1_000_000, 100_000_000

_SIZES = ("in_size", "out_size")
_STAGE_BLOCK = re.compile(r"stages\.\d{1,3}\.\d{1,3}")
_TYPES: dict[Any, type] = {"int": int, "str": str, "bool": bool}


@dataclass(frozen=True)
class FixedNetwork:
    """The definition of one network.

    Attributes:
        layers: Its layers in the order they run, with the sizes of feature maps at its
            resolution. The blocks of stage i are named ``stages.i.0``, ``stages.i.1``, …; one
            layer named ``pool`` follows, the last is the ``classifier``.
        dropout: Probability before the classifier, in training.
        bn_eps: Epsilon of every batch normalisation.
        bn_momentum: Momentum of every batch normalisation.
        widths: Which of its supernet's width multipliers it has, as in
            :class:`compofa.space.subnet.Subnet`; the layers say what widths these are, and networks
            are compared by them.
    """

    layers: tuple[LayerSpec, ...]
    dropout: float = 0.1
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    widths: tuple[int, ...] = attribute(default=(), compare=False)

    elastic: ClassVar[bool] = False
    """Whether there are subnets to choose from."""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise SpaceError(f"expected a dropout from 0 up to 1, got {self.dropout}")
        if not 0 < self.bn_eps <= 1 or not 0 <= self.bn_momentum <= 1:
            raise SpaceError(
                "expected BN eps above 0 and at most 1 and momentum from 0 to 1, "
                f"got {self.bn_eps} and {self.bn_momentum}"
            )
        if not 4 <= len(self.layers) <= MAX_LAYERS:
            raise SpaceError(f"expected 4 to {MAX_LAYERS} layers, got {len(self.layers)}")
        for layer in self.layers:
            _check_layer(layer)
        _check_order(self.layers)
        if params(self.layers) > MAX_PARAMS:
            raise SpaceError(
                f"expected at most {MAX_PARAMS:,} parameters, got {params(self.layers):,}"
            )
        known = all(type(index) is int and 0 <= index < 16 for index in self.widths)
        if len(self.widths) not in (0, WIDTHS) or not known:
            raise SpaceError(f"widths: expected {WIDTHS} indices or none, got {self.widths!r:.80}")
        if self.widths and not has_wide_depths(self.layers):
            raise SpaceError(f"widths: expected none with depths {self.depths}, got {self.widths}")
        self.check_resolution(self.resolution)
        if self.layers != at_resolution(self.layers, self.resolution):
            raise SpaceError("expected layers whose sizes follow from the resolution")

    @classmethod
    def of(cls, spec: Network, subnet: Subnet) -> FixedNetwork:
        """Return the definition of ``subnet`` of a supernet, or of the one network there is.

        Raises:
            SpaceError: There is no such subnet.
        """
        if isinstance(spec, FixedNetwork):
            return replace(spec, layers=spec.layers_of(subnet))
        spec.space.free().require(subnet, resolution=False)
        table = spec.backbone
        layers = spec.layers_of(subnet)
        return cls(layers, spec.dropout, table.bn_eps, table.bn_momentum, subnet.widths)

    def at(self, resolution: int) -> FixedNetwork:
        """Return the same network for images of another side.

        Raises:
            SpaceError: It cannot take such images.
        """
        return replace(self, layers=at_resolution(self.layers, resolution))

    @property
    def resolution(self) -> int:
        """Side of its images in pixels."""
        return self.layers[0].in_size

    @property
    def classes(self) -> int:
        """Outputs of the classifier."""
        return self.layers[-1].out_channels

    @property
    def min_resolution(self) -> int:
        """The least side of an image that leaves one pixel a stride of the network."""
        total = 1
        for layer in self.layers:
            total *= layer.stride
        return total

    def check_resolution(self, resolution: int) -> None:
        """Check that the network can take images of this side.

        Raises:
            SpaceError: It is too small or absurdly large.
        """
        if not self.min_resolution <= resolution <= MAX_RESOLUTION:
            raise SpaceError(
                f"expected an image size from {self.min_resolution} to {MAX_RESOLUTION}, "
                f"got {resolution}"
            )

    @property
    def space(self) -> SearchSpace:
        """There is none.

        Raises:
            SpaceError: Always.
        """
        raise SpaceError(f"expected a supernet, got one specialised network: {self.subnet}")

    @property
    def subnet(self) -> Subnet:
        """Kernel sizes and expand ratios of its blocks, for records and for reading.

        A bottleneck's ratio is the least of Once-for-All's that gives its middle channels.
        """
        stages = _stages(self.layers)
        kept = stages if self.widths else filter(None, stages)
        return Subnet(self.resolution, tuple(map(tuple, kept)), self.widths)

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage; that of ResNet50D's stem may be 0."""
        return tuple(map(len, _stages(self.layers)))

    def layers_of(self, subnet: Subnet) -> tuple[LayerSpec, ...]:
        """Return the layers at the resolution of ``subnet``, which must be this network's.

        Raises:
            SpaceError: It has other depths or kernels, or, where those tell networks apart, other
                expand ratios.
        """
        mine = self.subnet
        same = subnet.stages == mine.stages
        if self.widths:  # in narrow networks several ratios give the same bottleneck
            same = subnet.depths == mine.depths and subnet.widths == mine.widths
        if not same:
            raise SpaceError(f"expected the network {mine}, got {subnet}")
        return self.at(subnet.resolution).layers

    def to_json(self) -> dict[str, Any]:
        """Return the definition as JSON data."""
        named = [f.name for f in fields(LayerSpec) if f.name not in _SIZES]
        return {
            "resolution": self.resolution,
            "dropout": self.dropout,
            "bn_eps": self.bn_eps,
            "bn_momentum": self.bn_momentum,
            "widths": list(self.widths),
            "layers": [{name: getattr(layer, name) for name in named} for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Any) -> FixedNetwork:
        """Read what :meth:`to_json` wrote; every value is checked.

        Raises:
            SpaceError: Something is missing, of another type or out of range.
        """
        try:
            listed = field(data, "layers", list)
            if len(listed) > MAX_LAYERS:
                raise SpaceError(f"expected at most {MAX_LAYERS} layers, got {len(listed)}")
            layers = tuple(_read_layer(layer) for layer in listed)
            resolution = field(data, "resolution", int)
            if not all(0 < layer.stride <= 4 for layer in layers):
                raise SpaceError("expected strides from 1 to 4")
            return cls(
                at_resolution(layers, resolution),
                *(field(data, key, float, int) for key in ("dropout", "bn_eps", "bn_momentum")),
                tuple(field(data, "widths", list)) if "widths" in data else (),
            )
        except SpaceError as error:
            raise SpaceError(f"not a network definition: {error}") from None


Network = NetworkSpec | FixedNetwork


def network_from_json(data: Any) -> Network:
    """Read a definition of either kind.

    Raises:
        SpaceError: Something is missing, of another type or out of range.
    """
    kind = FixedNetwork if isinstance(data, dict) and "layers" in data else NetworkSpec
    return kind.from_json(data)


def has_wide_depths(layers: Sequence[LayerSpec]) -> bool:
    """Whether the stages have as many blocks as those of a ResNet50D with elastic widths."""
    depths = [len(stage) for stage in _stages(layers)]
    return len(depths) == len(WIDE) and all(
        any(depth == count for _, count in form.depths)
        for depth, form in zip(depths, WIDE, strict=True)
    )


def _stages(layers: Sequence[LayerSpec]) -> list[list[Block]]:
    blocks = [layer for layer in layers if layer.name.startswith("stages.")]
    numbers = [int(layer.name.split(".")[1]) for layer in blocks]
    stages: list[list[Block]] = [[] for _ in range(max(numbers, default=-1) + 1)]
    for number, layer in zip(numbers, blocks, strict=True):
        stages[number].append((layer.kernel, _ratio(layer)))
    return stages


def _ratio(layer: LayerSpec) -> Number:
    """Return the expand ratio of a block; 1 for a convolution."""
    if layer.kind == "bottleneck":
        out, mid = layer.out_channels, layer.mid_channels
        known = (ratio for ratio in RESNET50D.expands if mid_channels(out, ratio) == mid)
        return next(known, as_number(round(mid / out, 4)))
    return as_number(round(layer.mid_channels / layer.in_channels, 4)) or 1


def _read_layer(data: Any) -> LayerSpec:
    """Read a layer; what a newer version added may be missing."""
    values = {
        f.name: field(data, f.name, _TYPES[f.type])
        for f in fields(LayerSpec)
        if f.name not in _SIZES and (f.default is MISSING or f.name in data)
    }
    return LayerSpec(**values, in_size=1, out_size=1)


def _check_layer(layer: LayerSpec) -> None:
    """Check a layer by itself.

    Raises:
        SpaceError: It could not be built, or has what its kind has no use for.
    """
    where = f"layer {layer.name[:40]!r}"
    kinds = KINDS.get("stages" if _STAGE_BLOCK.fullmatch(layer.name) else layer.name, ())
    if layer.kind not in kinds:
        known = " or ".join(kinds) if kinds else f"a name of {', '.join(KINDS)}"
        raise SpaceError(f"{where}: expected {known}, got {layer.kind[:40]!r}")
    channels = (layer.in_channels, layer.out_channels)
    block = layer.kind in ("mbconv", "bottleneck")
    whole = block or layer.kind in ("conv", "maxpool")
    inner = (layer.mid_channels, layer.se_channels)
    same = layer.stride == 1 and channels[0] == channels[1]
    faults = {
        f"1 to {MAX_CHANNELS} channels": all(1 <= c <= MAX_CHANNELS for c in channels),
        "an odd kernel up to 15": layer.kernel in (range(1, 16, 2) if whole else (1,)),
        "a stride from 1 to 4": layer.stride in (range(1, 5) if whole else (1,)),
        f"an activation of {', '.join(ACTS)}": layer.act in ACTS,
        "middle channels in blocks alone": block == (0 < inner[0] <= MAX_CHANNELS)
        and (block or inner == (0, 0)),
        "fewer channels in SE": 0 <= inner[1] <= max(inner[0], 8),
        "middle channels as what comes in, without expansion": layer.kind != "mbconv"
        or layer.expand
        or layer.mid_channels == layer.in_channels,
        "expansion and SE in inverted blocks alone": layer.kind == "mbconv"
        or not (layer.expand or layer.se_channels),
        "a residual in every bottleneck": layer.residual or layer.kind != "bottleneck",
        "a residual of the same shape": not layer.residual
        or layer.downsample
        or (same and (block or layer.kind == "conv")),
        "downsampling in bottlenecks alone": layer.kind == "bottleneck" or not layer.downsample,
        "as many channels out as in": "pool" not in layer.kind or channels[0] == channels[1],
    }
    fault = next((wanted for wanted, right in faults.items() if not right), None)
    if fault:
        raise SpaceError(f"{where}: expected {fault}, got {layer}")


def _check_order(layers: tuple[LayerSpec, ...]) -> None:
    """Check that the layers follow one another: names as a network has them, channels that fit.

    Raises:
        SpaceError: They do not.
    """
    names = [layer.name for layer in layers]
    tops = [name.split(".")[0] for name in names]
    spine = [top for top in dict.fromkeys(tops) if top in ("stages", "pool", "classifier")]
    whole = spine == ["stages", "pool", "classifier"] and tops[-1] == "classifier"
    ended = -1
    for before, name in zip(["", *names], names, strict=False):
        if not name.startswith("stages."):
            continue
        stage, position = map(int, name.split(".")[1:])
        follows = position > 0 and before == f"stages.{stage}.{position - 1}"
        whole = whole and (follows or (position == 0 and stage > ended))
        ended = stage
    if not whole or len(set(names)) < len(names):
        raise SpaceError(
            "expected blocks stages.0.0, stages.0.1, …, then one pool, the classifier last, "
            f"got {', '.join(names)[:200]}"
        )
    channels = 3
    for layer in layers:
        if layer.in_channels != channels:
            raise SpaceError(
                f"layer {layer.name}: expected {channels} input channels, those of the layer "
                f"before it, got {layer.in_channels}"
            )
        channels = layer.out_channels
