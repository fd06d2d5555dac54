"""A specialised network as data: one network with nothing left to choose, without torch.

What :class:`compofa.networks.supernet_spec.NetworkSpec` is to a supernet: enough to build it again
from a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from dataclasses import field as attribute
from typing import Any, ClassVar

from compofa.errors import SpaceError
from compofa.networks.families import BACKBONES, inverted, layer_kinds, resnet50d
from compofa.networks.kinds import KINDS, ConvSpec, LayerSpec
from compofa.networks.layout import at_resolution, params
from compofa.networks.supernet_spec import MAX_RESOLUTION, NetworkSpec, field
from compofa.space.config import ConfigFormat
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Block, Subnet, numbers

ACTS = ["relu", "relu6", "hswish", "none"]
"""Activations that are known; :func:`compofa.nn.blocks.register_activation` adds more."""
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
        outer: Values of its choices outside the blocks, as in
            :class:`compofa.space.subnet.Subnet`; the layers say what these mean, and networks are
            compared by them.
        backbone: Name of the backbone that it is a subnet of, where that is known.
    """

    layers: tuple[LayerSpec, ...]
    dropout: float = 0.1
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1
    outer: tuple[int, ...] = attribute(default=(), compare=False)
    backbone: str = attribute(default="", compare=False)

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
        named = layer_kinds()
        for layer in self.layers:
            _check_layer(layer, named)
        _check_order(self.layers)
        if params(self.layers) > MAX_PARAMS:
            raise SpaceError(
                f"expected at most {MAX_PARAMS:,} parameters, got {params(self.layers):,}"
            )
        known = all(type(value) is int and 0 <= value < 16 for value in self.outer)
        form, pairs, count = self.config_format, [], 0
        if self.backbone in BACKBONES:
            count = BACKBONES[self.backbone].outer_count
        elif self.outer:
            count = form.count
        known = known and len(self.outer) == count
        if self.outer and form.stages:
            known = known and len(self.depths) == len(form.stages)
            pairs = [*zip(self.depths, form.stages, strict=False)]
        if not known or any(depth not in [n for _, n in how.depths] for depth, how in pairs):
            raise SpaceError(
                f"outer: expected the {count} choices of a network of depths {self.depths}, "
                f"got {self.outer!r:.80}"
            )
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
        outer = tuple(map(int, subnet.outer))
        return cls(layers, spec.dropout, table.bn_eps, table.bn_momentum, outer, table.name)

    def at(self, resolution: int) -> FixedNetwork:
        """Return the same network for images of another side.

        Raises:
            SpaceError: It cannot take such images.
        """
        return replace(self, layers=at_resolution(self.layers, resolution))

    def with_classes(self, classes: int) -> FixedNetwork:
        """Return the definition with another number of classes."""
        *body, last = self.layers
        return replace(self, layers=(*body, replace(last, out_channels=classes)))

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
        """The least image side: one pixel remains behind all strides of the network."""
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
    def config_format(self) -> ConfigFormat:
        """Format in which it is written as a subnet."""
        if self.backbone in BACKBONES:
            return BACKBONES[self.backbone].config_format
        return resnet50d.FORMAT if self.outer else inverted.FORMAT

    @property
    def subnet(self) -> Subnet:
        """The choices of its blocks, for records and for reading."""
        stages, form = _stages(self.layers), self.config_format
        kept = stages if form.stages else filter(None, stages)
        return Subnet(self.resolution, tuple(map(tuple, kept)), self.outer, form)

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage, which may be 0."""
        return tuple(map(len, _stages(self.layers)))

    def layers_of(self, subnet: Subnet) -> tuple[LayerSpec, ...]:
        """Return the layers at the resolution of ``subnet``, which must be this network's.

        Raises:
            SpaceError: It has other depths or kernels, or, where those tell networks apart, other
                expand ratios.
        """
        mine = self.subnet
        same = subnet.stages == mine.stages
        if self.outer:  # in narrow networks several ratios give the same bottleneck
            same = subnet.depths == mine.depths and subnet.outer == mine.outer
        if not same:
            raise SpaceError(f"expected the network {mine}, got {subnet}")
        return self.at(subnet.resolution).layers

    def to_json(self) -> dict[str, Any]:
        """Return the definition as JSON data."""
        named = [f.name for f in fields(LayerSpec) if f.name not in (*_SIZES, "options")]
        return {
            "resolution": self.resolution,
            "dropout": self.dropout,
            "bn_eps": self.bn_eps,
            "bn_momentum": self.bn_momentum,
            "outer": list(self.outer),
            "backbone": self.backbone,
            "layers": [
                {name: getattr(layer, name) for name in named}
                | ({"options": dict(layer.options)} if layer.options else {})
                for layer in self.layers
            ],
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
                tuple(field({"outer": data.get("widths", []), **data}, "outer", list)),
                field({"backbone": "", **data}, "backbone", str),
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


def _stages(layers: Sequence[LayerSpec]) -> list[list[Block]]:
    blocks = [layer for layer in layers if layer.name.startswith("stages.")]
    numbers = [int(layer.name.split(".")[1]) for layer in blocks]
    stages: list[list[Block]] = [[] for _ in range(max(numbers, default=-1) + 1)]
    for number, layer in zip(numbers, blocks, strict=True):
        block = KINDS[layer.kind].block
        assert block is not None, layer.kind  # checked
        stages[number].append(block(layer))
    return stages


def _read_layer(data: Any) -> LayerSpec:
    """Read a layer; what a newer version added may be missing."""
    values = {
        f.name: field(data, f.name, _TYPES[f.type])
        for f in fields(LayerSpec)
        if f.name not in (*_SIZES, "options") and (f.default is MISSING or f.name in data)
    }
    options = field({"options": {}, **data}, "options", dict)
    pairs = [(str(name)[:40], *numbers(str(name)[:40], value)) for name, value in options.items()]
    if any(len(pair) != 2 for pair in pairs):
        raise SpaceError("options: expected one number each")
    return LayerSpec(**values, in_size=1, out_size=1, options=tuple(pairs))


def _check_layer(layer: LayerSpec, known: Mapping[str, set[str]]) -> None:
    """Check a layer by itself.

    Args:
        layer: The layer.
        known: Which kinds of layers there are under which names.

    Raises:
        SpaceError: It could not be built, or has what its kind has no use for.
    """
    where = f"layer {layer.name[:40]!r}"
    kinds = known.get("stages" if _STAGE_BLOCK.fullmatch(layer.name) else layer.name, ())
    if layer.kind not in kinds:
        wanted = " or ".join(sorted(kinds)) if kinds else f"a name of {', '.join(known)}"
        raise SpaceError(f"{where}: expected {wanted}, got {layer.kind[:40]!r}")
    channels = (layer.in_channels, layer.out_channels)
    block = KINDS[layer.kind].fields is not None and layer.kind != "conv"
    whole = block or layer.kind in ("conv", "maxpool")
    inner = (layer.mid_channels, layer.se_channels)
    same = layer.stride == 1 and channels[0] == channels[1]
    options = KINDS[layer.kind].options
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
        "expansion and SE in inverted blocks alone": layer.kind not in ("conv", "bottleneck")
        or not (layer.expand or layer.se_channels),
        "a residual in every bottleneck": layer.residual or layer.kind != "bottleneck",
        "a residual of the same shape": not layer.residual
        or layer.downsample
        or (same and (block or layer.kind == "conv")),
        "downsampling in bottlenecks alone": layer.kind not in ("conv", "mbconv")
        or not layer.downsample,
        "as many channels out as in": "pool" not in layer.kind or channels[0] == channels[1],
        f"no option but {', '.join(options) or 'none'}": all(
            name in options for name, _ in layer.options
        ),
    }
    fault = next((wanted for wanted, right in faults.items() if not right), None)
    if not fault and not all(map(_buildable, layer.convs)):
        fault = "convolutions with odd kernels, and channels that the groups divide"
    if fault:
        raise SpaceError(f"{where}: expected {fault}, got {layer}")


def _buildable(conv: ConvSpec) -> bool:
    """Whether a convolution that follows from an option can be built."""
    channels = (conv.in_channels, conv.out_channels)
    return (
        conv.kernel in range(1, 16, 2)
        and conv.stride in range(1, 5)
        and conv.groups in range(1, MAX_CHANNELS + 1)
        and all(c in range(1, MAX_CHANNELS + 1) and c % conv.groups == 0 for c in channels)
    )


def _check_order(layers: tuple[LayerSpec, ...]) -> None:
    """Check the order of the layers, by their names, and that their channels fit.

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
