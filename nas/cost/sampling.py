"""Subnets to measure on a device: a spread-out sample, its ONNX files, and the table to fill in.

A device folder holds ``network.json`` (what was sampled), ``latency.csv`` (one row per subnet),
the ONNX files that it names, and ``measure.py``, which runs on the device
(:mod:`nas.cost.on_device`). Weights are random: latency depends on shapes alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compofa.errors import CompofaError, ConfigError, TableError
from compofa.io.atomic import write_atomic, write_text_atomic
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import params
from compofa.networks.network_spec import network_from_json
from compofa.networks.supernet_spec import NetworkSpec
from compofa.seeds import rng
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet
from nas.cost import on_device
from nas.cost.fit import MIN_ROWS
from nas.cost.lookup import SAMPLED
from nas.tables import read_csv, write_subnets

TABLE, NETWORK = SAMPLED, "network.json"
SCRIPT, TFLITE_SCRIPT = "measure.py", "to_tflite.sh"
TO_TFLITE = """\
#!/bin/sh
# Converts the ONNX files of this folder to TFLite, runs each with TFLite's benchmark_model on the
# Android device that adb sees, and keeps what it prints in benchmark/. Afterwards, this fills the
# table in:
#
#   python measure.py --from-benchmark benchmark
#
# Needs onnx2tf (pip install onnx2tf tensorflow), adb, and benchmark_model on the device:
# https://www.tensorflow.org/lite/performance/measurement
set -eu
cd "$(dirname "$0")"
threads=${1:-4}
mkdir -p tflite benchmark
for file in subnet_*.onnx; do
    name=${file%.onnx}
    [ -s "benchmark/$name.txt" ] && continue
    [ -d "tflite/$name" ] || onnx2tf -i "$file" -o "tflite/$name"
    adb push "tflite/$name/${name}_float32.tflite" /data/local/tmp/subnet.tflite
    adb shell /data/local/tmp/benchmark_model --graph=/data/local/tmp/subnet.tflite \\
        --num_threads="$threads" > "benchmark/$name.part" 2>&1
    mv "benchmark/$name.part" "benchmark/$name.txt"
done
"""
OPSET = 17
"""ONNX operator set of the files: HardSwish is in it since 14, and converters know all of it."""

MEASURED = (on_device.LATENCY, on_device.SAMPLES, on_device.SETUP)
"""Columns of the table that a measurement fills in."""
_TRIES = 20


def spread_sample(space: SearchSpace, count: int, seed: int = 0) -> list[Subnet]:
    """Draw distinct subnets that a latency model can be fitted to.

    The smallest and the largest subnet of the space come first. The others are a Latin hypercube
    over the genes: each resolution, each depth and each value of a block occurs equally often.

    Args:
        space: The space, with its resolutions.
        count: Number of subnets; a space with fewer gives all of them.
        seed: Random seed.

    Returns:
        The subnets, ordered by resolution.

    Raises:
        ConfigError: They would be too few for a fit.
    """
    if min(count, space.size) < MIN_ROWS:
        raise ConfigError(
            f"expected at least {MIN_ROWS} subnets for a fit, got {min(count, space.size):g} of "
            f"{space.name}, which has {space.size:.4g} at its resolutions"
        )
    draws = rng(seed, "device-sample")
    found = dict.fromkeys([space.smallest, space.largest])
    if space.size <= count:
        found |= dict.fromkeys(space.enumerate())
    for _ in range(_TRIES):
        columns = [
            draws.permutation(np.arange(count) * options // count)
            for options in space.cardinalities.tolist()
        ]
        genes = space.canonical(np.column_stack(columns))
        found |= dict.fromkeys(space.subnets_of(space.arrays(genes)))
        if len(found) >= count:
            break
    chosen = list(found)[:count]
    return sorted(chosen, key=lambda subnet: subnet.resolution)


def static_onnx(
    layers: Sequence[LayerSpec], resolution: int, batch: int = 1, seed: int = 0
) -> bytes:
    """Return a network with random weights as ONNX, with all shapes static.

    torch's legacy exporter is used: it takes a tenth of the time of the other, and its operators
    are those that the converters to TFLite know.

    Args:
        layers: The layers of the network.
        resolution: Side of its images in pixels.
        batch: Images per batch.
        seed: Seed of the weights.
    """
    import io
    import warnings

    import torch

    from compofa.nn.static import StaticNetwork

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = StaticNetwork(layers).eval()
    images = torch.zeros(batch, 3, resolution, resolution)
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation
        torch.onnx.export(
            module, (images,), buffer, dynamo=False, opset_version=OPSET,
            input_names=["images"], output_names=["logits"],
        )  # fmt: skip
    return buffer.getvalue()


@dataclass(frozen=True)
class DeviceFolder:
    """A folder of subnets to measure.

    Attributes:
        path: The folder.
        network: The sampled supernet's definition, its space at the sampled resolutions.
        net: Its name.
        batch: Images per batch.
    """

    path: Path
    network: NetworkSpec
    net: str
    batch: int = 1

    @classmethod
    def of_table(cls, table: str | Path) -> DeviceFolder | None:
        """Return the folder that a table is in; ``None`` where it is in none.

        Raises:
            TableError: Its ``network.json`` cannot be used.
        """
        path = Path(table).with_name(NETWORK)
        if not path.is_file():
            return None
        try:
            data = parse_json(read_text(path))
            network, batch = network_from_json(data["network"]), data["batch"]
            if not isinstance(network, NetworkSpec) or not isinstance(batch, int) or batch < 1:
                raise ValueError("another kind of network or no batch size")
            return cls(path.parent, network, str(data["net"]), batch)
        except (OSError, ValueError, KeyError, TypeError, CompofaError) as error:
            raise TableError(f"{path}: expected what `nas sample` wrote, got: {error}") from None

    @property
    def table(self) -> Path:
        """The table to fill in."""
        return self.path / TABLE

    def describe(self) -> dict[str, Any]:
        """Return the content of ``network.json``."""
        return {"net": self.net, "batch": self.batch, "network": self.network.to_json()}

    def expected_bytes(self, subnets: Sequence[Subnet]) -> int:
        """Return the size of all ONNX files, roughly: that of the weights."""
        return 4 * sum(params(self.network.layers_of(subnet)) for subnet in subnets)

    def start(self, subnets: Sequence[Subnet], tflite: bool = False) -> list[str]:
        """Write the table, the scripts and ``network.json``, unless they are of the same sample.

        Args:
            subnets: The subnets, one per row of the table.
            tflite: Whether to write the script that converts to TFLite as well.

        Returns:
            The names of the ONNX files, one per subnet.

        Raises:
            ConfigError: The folder holds another sample.
        """
        names = [f"subnet_{place:03}_r{s.resolution}.onnx" for place, s in enumerate(subnets)]
        form = self.network.space.config_format
        arrays = self.network.space.arrays_of(subnets)
        columns = {name: [None] * len(names) for name in MEASURED}
        draft = self.path / f".{TABLE}.csv"
        write_subnets(draft, arrays, form, columns, {on_device.FILE: names})
        try:
            if self.table.exists() and _sample(self.table) != _sample(draft):
                raise ConfigError(
                    f"expected a folder that is empty or has the same sample, got {self.path}: "
                    "its latency.csv lists other subnets"
                )
            if self.table.exists():
                kept = DeviceFolder.of_table(self.table)
                if kept is None or kept.describe() != self.describe():
                    raise ConfigError(
                        f"expected a folder that is empty or has the same sample, got {self.path}: "
                        "its network.json is of another network or batch size"
                    )
            else:
                _write_json(self.path / NETWORK, self.describe())
                draft.rename(self.table)
        finally:
            draft.unlink(missing_ok=True)
        script = Path(on_device.__file__).read_text(encoding="utf-8")
        write_text_atomic(self.path / SCRIPT, script)
        if tflite:
            write_text_atomic(self.path / TFLITE_SCRIPT, TO_TFLITE)
        return names

    def export(self, name: str, subnet: Subnet, seed: int = 0) -> bool:
        """Write the ONNX file of a subnet, unless it is there; returns whether it was written."""
        path = self.path / name
        if path.is_file():
            return False
        layers = self.network.layers_of(subnet)
        content = static_onnx(layers, subnet.resolution, self.batch, seed)
        write_atomic(path, lambda file: file.write(content) and None)
        return True


def _sample(path: Path) -> list[list[str]]:
    """Return a table without what the measurement fills in."""
    table = read_csv(path)
    kept = [place for place, name in enumerate(table.header) if name not in MEASURED]
    return [[row[place] for place in kept] for row in (table.header, *table.rows)]


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text_atomic(path, json.dumps(data, indent=1) + "\n")
