"""The Note10 latency model of layers, fitted to the published lookup tables.

Non-negative least squares of relative error on counts of work and traffic, then a ridge on the
logarithm of the residual: by place, kernel, expand ratio, trend in size, and size. The tables hold
one width, so the error at another is estimated in two ways: by leaving out whole stages (other
channel widths, other activations), and on published latencies of networks of width 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from compofa.errors import TableError
from compofa.io.untrusted import parse_json, read_text
from compofa.networks.backbone import Backbone
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.kinds import LayerSpec
from compofa.networks.layout import layout
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Subnet
from nas.cost.fitted import LayerModel, layer_factors, layer_features
from nas.cost.lookup import TableCost, layer_key

RESOLUTIONS = (128, 224)
STRENGTH = {"slope": 0.1, "size": 3.0}
"""Strength of the ridge on terms of the correction; 1 on those not named."""


class MeasuredLayers:
    """Every layer of a space with its measured latency, at each resolution of the tables."""

    def __init__(self, tables: str | Path, backbone: Backbone) -> None:
        cost = TableCost(tables, backbone)
        self.layers: list[LayerSpec] = []
        self.resolutions: list[int] = []
        latency_ms: list[float] = []
        for r in sorted(cost.files):
            seen: dict[str, LayerSpec] = {}
            for kernel in backbone.values("kernel"):
                for expand in backbone.values("expand"):
                    blocks = ((kernel, expand),) * 2
                    subnet = Subnet(r, (blocks,) * len(backbone.stages))
                    for layer in layout(backbone, subnet):
                        seen.setdefault(layer_key(layer), layer)
            self.layers += seen.values()
            self.resolutions += [r] * len(seen)
            latency_ms += [cost.cost_of(layer, r) for layer in seen.values()]
        self.latency_ms = np.array(latency_ms)
        self.expands = np.array(backbone.values("expand"), dtype=np.float64)

    def fit(self, rows: np.ndarray) -> LayerModel:
        """Fit the model to the rows of a mask."""
        layers = [self.layers[i] for i in np.flatnonzero(rows)]
        y = self.latency_ms[rows]
        names, x = _matrix([layer_features(layer) for layer in layers])
        weights, _ = nnls(x / y[:, None], np.ones(len(y)), maxiter=10_000)
        rest = np.log(y / np.maximum(x @ weights, 1e-9))
        terms, z = _matrix([layer_factors(layer, self.expands) for layer in layers])
        strength = np.array([_strength(term) for term in terms])
        factors = np.linalg.solve(z.T @ z + np.diag(strength), z.T @ rest)
        arrays = {
            "feature_names": np.array(names), "weights": weights,
            "factor_names": np.array(terms), "factors": factors,
            "expands": self.expands, "resolution_range": np.array(RESOLUTIONS),
        }  # fmt: skip
        return LayerModel(arrays, {"name": "note10", "kind": LayerModel.kind})

    def mape(self, model: LayerModel, rows: np.ndarray) -> float:
        """Return the mean absolute error of layers, percent."""
        predicted = np.array([model.layer_ms(self.layers[i]) for i in np.flatnonzero(rows)])
        return 100 * float(np.abs(predicted / self.latency_ms[rows] - 1).mean())


def _strength(term: str) -> float:
    last = term.rsplit(".", 1)[-1].rstrip("0123456789")
    return STRENGTH.get(last, 1.0)


def _matrix(rows: Sequence[dict[str, float]]) -> tuple[list[str], np.ndarray]:
    names = sorted({name for row in rows for name in row})
    column = {name: place for place, name in enumerate(names)}
    matrix = np.zeros((len(rows), len(names)))
    for index, row in enumerate(rows):
        for name, value in row.items():
            matrix[index, column[name]] = value
    return names, matrix


def fit_note10(
    tables: str | Path, networks: SubnetArrays, specialized: str | Path | None = None
) -> LayerModel:
    """Fit the Note10 model and measure its error.

    Args:
        tables: Folder of the published tables (width 1.2, r = 160 to 224 by 4).
        networks: Networks on which sums of the model are compared with sums of the tables.
        specialized: Folder of published specialised networks, whose names give latencies.
    """
    wide = MOBILENET_V3.scaled(1.2)
    measured = MeasuredLayers(tables, wide)
    r = np.array(measured.resolutions)
    stages = np.array([layer.name.rpartition(".")[0] for layer in measured.layers])
    everything = np.ones(len(r), dtype=bool)
    model = measured.fit(everything)
    exact = TableCost(tables, wide)(networks)
    held_out: dict[str, Any] = {}
    for name, kept in {"resolutions 160-180": r > 180, "resolution 160": r > 160,
                       "resolutions 176 and 208": ~np.isin(r, (176, 208))}.items():  # fmt: skip
        part = measured.fit(kept)
        rows = np.isin(networks.resolutions, np.unique(r[~kept]))
        some = networks[rows]
        error = np.abs(part.cost(wide)(some) / exact[rows] - 1)
        held_out[name] = {
            "layers_mape": round(measured.mape(part, ~kept), 2),
            "networks_mape": round(100 * float(error.mean()), 2),
        }
    for stage in sorted(set(stages) - {""}):
        kept = stages != stage
        held_out[stage] = {"layers_mape": round(measured.mape(measured.fit(kept), ~kept), 2)}
    fitted = 100 * np.abs(model.cost(wide)(networks) / exact - 1)
    lowest = held_out["resolutions 160-180"]["networks_mape"]
    other_width = ""
    if specialized is not None:
        published = check_specialized(model, specialized)
        held_out["published networks"] = published
        errors = [abs(row["error_percent"]) for row in published if row["width_mult"] == 1.0]
        other_width = f"; width 1.0: {np.mean(errors):.1f} % on {len(errors)} published networks"
    model.card.update(
        width_mult=wide.width_mult,
        error=(
            f"width 1.2: MAPE {fitted.mean():.1f} % on measured resolutions, {lowest:.1f} % on "
            f"lower ones left out{other_width}"
        ),
        networks_mape=round(float(fitted.mean()), 3),
        networks_p95=round(float(np.percentile(fitted, 95)), 3),
        layers_mape=round(measured.mape(model, everything), 3),
        held_out=held_out,
    )
    return model


def check_specialized(model: LayerModel, folder: str | Path) -> list[dict[str, Any]]:
    """Compare the model with the latencies that published networks carry in their names.

    Those are whole milliseconds. Networks above the model's resolutions are left out.
    """
    rows = []
    for path in sorted(Path(folder).glob("note10_lat-*ms_*")):
        try:
            config = parse_json(read_text(path / "net.config"))
            size = parse_json(read_text(path / "run.config"))["image_size"]
            width = {16: 1.0, 24: 1.2}[config["first_conv"]["out_channels"]]
            blocks = [block["mobile_inverted_conv"] for block in config["blocks"][1:]]
            stages: list[list[tuple[int, int]]] = []
            for block in filter(None, blocks):
                if block["in_channels"] != block["out_channels"]:
                    stages.append([])
                stages[-1].append((block["kernel_size"], block["expand_ratio"]))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise TableError(f"{path}: expected a specialised network, got: {error!r}") from error
        if not RESOLUTIONS[0] <= size <= RESOLUTIONS[1]:
            continue
        published = float(path.name.split("lat-")[1].split("ms")[0])
        subnet = Subnet(size, tuple(map(tuple, stages)))
        space = MOBILENET_V3.free_space()
        predicted = float(model.cost(MOBILENET_V3.scaled(width))(space.arrays_of([subnet]))[0])
        rows.append(
            {
                "name": path.name.split("_finetune")[0],
                "width_mult": width,
                "published_ms": published,
                "model_ms": round(predicted, 2),
                "error_percent": round(100 * (predicted / published - 1), 1),
            }
        )
    return rows
