"""Latency by lookup: published YAML tables, one file a resolution, read as they are.

A table's keys name a layer with its shapes; a network's latency is the sum over its layers
(Cai et al., ICLR 2020; Sahni et al., ICLR 2021). A layer that a table lacks is an error, never a
wrong number: the Note10 tables, for one, were measured on the network of width 1.2.

This module needs NumPy and PyYAML alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compofa.errors import SpaceError, TableError
from compofa.io.atomic import write_text_atomic
from compofa.io.untrusted import parse_json, parse_yaml, printable, read_text
from compofa.networks.backbone import Backbone
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from nas.cost.base import LayerSumCost
from nas.model_file import card_text

MAX_FILE_BYTES = 8 << 20
WIDTHS = (0.25, 0.35, 0.5, 0.65, 0.75, 0.8, 1.0, 1.1, 1.2, 1.25, 1.3, 1.4, 1.5, 1.75, 2.0)
"""Width multipliers that are tried to say which network a table was measured on."""

CARD = "tables.json"
"""File beside tables that were measured here: name of the device, and error of their sums."""
SAMPLED = "latency.csv"
"""Table of whole networks that ``sample`` starts and the device fills in."""

_FILE = re.compile(r"(\d{1,4})_lookup_table\.ya?ml")
_KEY = re.compile(r"[A-Za-z]\w*-[A-Za-z0-9_:-]+:", re.ASCII)
_FIELD = re.compile(r"  ([a-z0-9_]+): ([+-]?[0-9.]+(?:[eE][+-][0-9]+)?)")
_NAMES = {"stem": "Conv", "final_expand": "Conv_1", "pool": "AvgPool2D", "mix": "Conv_2",
          "classifier": "Logits", "stem_out": "Conv_stem", "stem_pool": "MaxPool2D"}  # fmt: skip
_EXPECTED = "expected a latency table: a mapping of layer keys, each with its mean in ms"


def layer_key(layer: LayerSpec) -> str:
    """Return the key that the published tables give a layer; ResNet50D's are this library's."""
    shape_in = f"{layer.in_size}x{layer.in_size}x{layer.in_channels}"
    shape_out = f"{layer.out_size}x{layer.out_size}x{layer.out_channels}"
    if layer.kind == "mbconv":
        return (
            f"expanded_conv-input:{shape_in}-output:{shape_out}-expand:{layer.mid_channels}"
            f"-kernel:{layer.kernel}-stride:{layer.stride}-idskip:{int(layer.residual)}"
            f"-se:{int(layer.se_channels > 0)}-hs:{int(layer.act == 'hswish')}"
        )
    if layer.kind == "bottleneck":
        return (
            f"bottleneck-input:{shape_in}-output:{shape_out}-mid:{layer.mid_channels}"
            f"-stride:{layer.stride}-downsample:{int(layer.downsample)}"
        )
    if layer.kind == "linear":
        return f"Logits-input:{shape_in}-output:{layer.out_channels}"
    if layer.name in _NAMES:
        return f"{_NAMES[layer.name]}-input:{shape_in}-output:{shape_out}"
    if layer.kind == "conv":
        return f"Conv_residual-input:{shape_in}-output:{shape_out}"
    options = "".join(f"-{name}:{value:g}" for name, value in layer.options)
    return (
        f"{layer.kind}-input:{shape_in}-output:{shape_out}-mid:{layer.mid_channels}"
        f"-kernel:{layer.kernel}-stride:{layer.stride}-act:{layer.act}"
        f"-se:{layer.se_channels}-residual:{int(layer.residual)}{options}"
    )


def read_table(path: str | Path) -> dict[str, float]:
    """Read a lookup table.

    The published files have one plain form, which is read line by line; any other YAML mapping of
    keys to ``{mean: ms, ...}`` goes through PyYAML's safe loader, without tags and aliases.

    Returns:
        Mean latency in ms by layer key.

    Raises:
        TableError: The file is missing, empty, malformed or not such a table.
    """
    path = Path(path)
    try:
        text = read_text(path, MAX_FILE_BYTES)
        table = _plain(text)
        if table is None:
            table = _means(parse_yaml(text), path)
    except OSError as error:
        raise TableError(f"cannot read the latency table {path}: {error.strerror}") from error
    except ValueError as error:
        raise TableError(f"{path}: {_EXPECTED}, got {error}") from None
    if not table:
        raise TableError(f"{path}: {_EXPECTED}, got no entry")
    for key, mean in table.items():
        if not (math.isfinite(mean) and mean >= 0):
            raise TableError(f"{path}: expected a mean of at least 0 ms for {key}, got {mean}")
    return table


def _plain(text: str) -> dict[str, float] | None:
    """Read the published files' form; ``None`` when the text has any other."""
    table: dict[str, float] = {}
    fields: dict[str, float] = {}
    key = None
    for line in [*text.split("\n"), "end:"]:
        field = _FIELD.fullmatch(line)
        if field is not None and key is not None:
            name, value = field.groups()
            if name in fields or (name == "mean" and "." not in value):
                return None  # repeated, or a number that YAML might read in another way
            try:
                fields[name] = float(value)
            except ValueError:
                return None
        elif line == "":
            continue
        elif _KEY.fullmatch(line) is not None:
            if key is not None:
                if "mean" not in fields or key in table:
                    return None
                table[key] = fields["mean"]
            key, fields = line[:-1], {}
        else:
            return None
    return table


def _means(data: Any, path: Path) -> dict[str, float]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise TableError(f"{path}: {_EXPECTED}, got {type(data).__name__}")
    table = {}
    for key, entry in data.items():
        mean = entry.get("mean") if isinstance(entry, Mapping) else None
        if not isinstance(key, str) or isinstance(mean, bool) or not isinstance(mean, int | float):
            raise TableError(f"{path}: {_EXPECTED}, got the entry {str(key)[:80]!r} without one")
        table[key] = float(mean)
    return table


class TableCost(LayerSumCost):
    """Latency by lookup in a folder of tables ``R_lookup_table.yaml``; a cost in ms.

    Only the files of the resolutions that are asked for are read.

    Args:
        folder: The tables' folder.
        backbone: Widths and strides of the network.
        classes: Outputs of the classifier.

    Raises:
        TableError: The folder holds no table.
    """

    def __init__(self, folder: str | Path, backbone: Backbone, classes: int = 1000) -> None:
        self.folder = Path(folder)
        self.files = table_files(self.folder)
        self._tables: dict[int, dict[str, float]] = {}
        super().__init__(
            backbone,
            classes,
            self._unused,
            printable(self.folder.name),
            "ms",
            card_text(_read_card(self.folder), "error", "sums of measured layers"),
        )

    @staticmethod
    def _unused(layer: LayerSpec) -> float:
        raise AssertionError("a layer's latency depends on the table, so on the resolution")

    def table(self, resolution: int) -> dict[str, float]:
        """Return the means in ms by layer key at a resolution.

        Raises:
            TableError: There is no table for it, or it cannot be used.
        """
        if resolution not in self._tables:
            if resolution not in self.files:
                listed = ", ".join(map(str, sorted(self.files)))
                raise TableError(
                    f"{self.folder}: no latency table for resolution {resolution}, expected one "
                    f"of {listed}"
                )
            self._tables[resolution] = read_table(self.files[resolution])
        return self._tables[resolution]

    def cost_of(self, layer: LayerSpec, resolution: int) -> float:
        """Return the latency of a layer, ms.

        Raises:
            TableError: The table lacks it; the message says which width the table fits.
        """
        table, key = self.table(resolution), layer_key(layer)
        if key in table:
            return table[key]
        width = self.backbone.width_mult
        fits = table_width(table, self.backbone, resolution, self.classes)
        if fits is None:
            reason = "and no common width multiplier fits the table"
        elif fits == width:
            reason = f"though the table fits width multiplier {width:g}"
            if layer.kind == "linear":
                reason = f"{reason}: it was measured with another number of classes"
        else:
            reason = f"which fits width multiplier {fits:g}, not {width:g}"
        raise TableError(f"{self.files[resolution]}: no entry for the layer {key}, {reason}")


def write_tables(
    folder: str | Path,
    tables: Mapping[int, Mapping[str, tuple[float, int]]],
    name: str,
    error: str,
) -> list[Path]:
    """Write lookup tables in the published format, and beside them what is known of their error.

    Args:
        folder: Their folder.
        tables: By resolution and layer key: mean in ms, and number of samples.
        name: Name of the device.
        error: Error of the sums.

    Returns:
        The files of the tables.
    """
    paths = []
    for r, table in tables.items():
        lines = [
            line
            for key, (mean, count) in table.items()
            for line in (f"{key}:", f"  count: {count}", f"  mean: {mean:.9f}")
        ]
        paths.append(Path(folder) / f"{r}_lookup_table.yaml")
        write_text_atomic(paths[-1], "\n".join(lines) + "\n")
    write_text_atomic(
        Path(folder) / CARD, json.dumps({"name": name, "error": error}, indent=2) + "\n"
    )
    return paths


def _read_card(folder: Path) -> dict[str, Any]:
    """Return what stands beside tables of their error; empty where nothing does.

    Raises:
        TableError: It is no such file.
    """
    path = folder / CARD
    if not path.is_file():
        return {}
    try:
        card = parse_json(read_text(path))
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: expected the card of lookup tables, got: {error}") from None
    if not isinstance(card, dict):
        raise TableError(f"{path}: expected a JSON object, got {type(card).__name__}")
    return card


def table_files(folder: str | Path) -> dict[int, Path]:
    """Return the tables of a folder by resolution.

    Raises:
        TableError: It is no folder, or holds no ``R_lookup_table.yaml``.
    """
    folder = Path(folder)
    try:
        found = {name: _FILE.fullmatch(name.name) for name in sorted(folder.iterdir())}
    except OSError as error:
        raise TableError(
            f"cannot read the folder of latency tables {folder}: {error.strerror}"
        ) from error
    files = {int(match[1]): path for path, match in found.items() if match is not None}
    if not files:
        measured = folder / SAMPLED
        got = "none"
        if measured in found:
            got = f"whole networks: fit a model to {measured} (python -m nas fit-latency)"
        raise TableError(
            f"{folder}: expected latency tables named R_lookup_table.yaml (R a resolution), "
            f"got {got}"
        )
    return files


def table_width(
    table: Mapping[str, float], backbone: Backbone, resolution: int, classes: int = 1000
) -> float | None:
    """Return the width multiplier of the network that a table was measured on.

    It is the one whose stem, first block and head the table holds, as far as it holds any;
    ``None`` when that leaves less than half of them.
    """
    largest = backbone.free_space((resolution,)).largest
    best, share = None, 0.5
    for width in sorted({*WIDTHS, backbone.width_mult}):
        try:
            layers = layout(backbone.scaled(width), largest, classes)
        except SpaceError:
            continue
        fixed = [layer_key(layer) for layer in layers if not layer.name.startswith("stages.")]
        held = sum(key in table for key in fixed) / len(fixed)
        if held > share:
            best, share = width, held
    return best
