"""Distillation of the Gaussian process into a small network, on synthetic subnets."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from compofa.seeds import derive_seed, rng
from compofa.space.arrays import SubnetArrays, concatenate
from nas.accuracy.predictor import FORMAT
from tools.fit.gaussian_process import AccuracyGP, single_thread

WIDTHS = (96, 32)
SPREAD_SAMPLES = 1500


def distil(
    teacher: AccuracyGP,
    arrays: SubnetArrays,
    anchors: np.ndarray,
    *,
    samples: int,
    seed: int,
    epochs: int = 60,
) -> tuple[dict[str, np.ndarray], float]:
    """Train a two-layer network with a linear path to reproduce ``teacher``.

    Args:
        teacher: Fitted; the network with label 0 is the one distilled.
        arrays: Measured subnets, whose choices the synthetic ones recombine.
        anchors: Resolutions of the outputs.
        samples: Synthetic subnets to train on; a tenth as many more test the network.
        seed: Seed of sampling and training.
        epochs: Passes over the samples.

    Returns:
        The arrays of :class:`nas.accuracy.predictor.FittedPredictor` without ``noise``, and the
        root mean square difference (points) from the teacher on fresh subnets.
    """
    kernels, expands = teacher.features_.kernels, teacher.features_.expands
    tests = max(1000, samples // 10)
    drawn = recombine(arrays, samples + tests, rng(seed, "synthetic subnets"))
    drawn = _with_measured(drawn, arrays)
    x = one_hot(drawn, kernels, expands)
    y = teacher.predict(drawn, anchors)
    few = recombine(arrays, SPREAD_SAMPLES, rng(seed, "synthetic subnets for spread"))
    log_std = np.log(teacher.std(few, anchors))
    spread, spread_bias = _ridge(one_hot(few, kernels, expands), log_std)
    slots = arrays.blocks["kernel"].shape[1]
    with single_thread():
        net = _train(x[:-tests], y[:-tests], epochs, derive_seed(seed, "distillation"))
    gap = float(np.sqrt(np.mean((_forward(net, x[-tests:]) - y[-tests:]) ** 2)))
    by_slot = (slots, len(kernels) + len(expands), -1)
    result = {key: value.astype(np.float32) for key, value in net.items()}
    result |= {
        "format": np.array(FORMAT),
        "kernels": kernels.astype(np.int64),
        "expands": expands.astype(np.float64),
        "resolutions": anchors.astype(np.int64),
        "input_weight": result["input_weight"].reshape(by_slot),
        "skip_weight": result["skip_weight"].reshape(by_slot),
        "spread_weight": spread.reshape(by_slot).astype(np.float32),
        "spread_bias": spread_bias.astype(np.float32),
        "spread_bound": np.stack([log_std.min(axis=0), log_std.max(axis=0)]).astype(np.float32),
    }
    return result, gap


def one_hot(arrays: SubnetArrays, kernels: np.ndarray, expands: np.ndarray) -> np.ndarray:
    """Return float32 [n, slots * (kernels + expands)], a block's choices side by side."""
    hot = [
        arrays.blocks["kernel"][:, :, None] == kernels,
        arrays.blocks["expand"][:, :, None] == expands,
    ]
    return np.concatenate(hot, axis=2).reshape(len(arrays.blocks["kernel"]), -1).astype(np.float32)


def recombine(arrays: SubnetArrays, count: int, generator: np.random.Generator) -> SubnetArrays:
    """Make subnets from the stages of measured ones, with kernels drawn anew.

    Depth and expand of a stage stay together, so a compound coupling is kept. Half of the subnets
    are drawn with a common tilt towards large or small stages and kernels: searches end there,
    and independent draws hardly ever come near.
    """
    slots, stages = arrays.blocks["kernel"].shape[1], arrays.depths.shape[1]
    per_stage = -(-slots // stages)
    ks, e = (
        np.zeros((count, slots), arrays.blocks["kernel"].dtype),
        np.zeros((count, slots), arrays.blocks["expand"].dtype),
    )
    tilted = generator.random((count, 1)) < 0.5
    tilt = generator.random((count, 1))
    for start in range(0, slots, per_stage):
        columns = slice(start, min(start + per_stage, slots))
        order = np.argsort(arrays.blocks["expand"][:, columns].sum(axis=1), kind="stable")
        quantile = np.where(
            tilted, tilt + generator.normal(0, 0.15, (count, 1)), generator.random((count, 1))
        ).clip(0, 1)[:, 0]
        rows = order[np.rint(quantile * (len(order) - 1)).astype(int)]
        e[:, columns] = arrays.blocks["expand"][rows, columns]
        for slot in range(columns.start, columns.stop):
            seen = np.unique(arrays.blocks["kernel"][arrays.blocks["kernel"][:, slot] > 0, slot])
            if not len(seen):
                continue
            aim = np.where(
                tilted, tilt + generator.normal(0, 0.3, (count, 1)), generator.random((count, 1))
            ).clip(0, 1 - 1e-9)[:, 0]
            ks[:, slot] = np.where(e[:, slot] > 0, seen[(aim * len(seen)).astype(int)], 0)
    d = np.stack(
        [(ks[:, s : s + per_stage] > 0).sum(axis=1) for s in range(0, slots, per_stage)], axis=1
    )
    none = np.zeros((count, 0), dtype=np.int64)
    return SubnetArrays({"kernel": ks, "expand": e}, d, np.zeros(count, dtype=np.int64), none)


def _with_measured(drawn: SubnetArrays, measured: SubnetArrays) -> SubnetArrays:
    """Put the measured subnets before those drawn, so that the network fits them as well."""
    return concatenate([measured, drawn])


def _ridge(x: np.ndarray, y: np.ndarray, strength: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    x = x.astype(np.float64)
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - x_mean, y - y_mean
    weight = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    return weight, y_mean - x_mean @ weight


def _forward(net: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(x @ net["input_weight"] + net["input_bias"], 0) ** 2
    hidden = np.maximum(hidden @ net["hidden_weight"] + net["hidden_bias"], 0)
    return hidden @ net["output_weight"] + net["output_bias"] + x @ net["skip_weight"]


def _train(x: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> dict[str, np.ndarray]:
    """Fit the linear path exactly, then the network to what it leaves.

    The first layer's rectified sums are squared: accuracy is smooth, nearly quadratic in the
    choices, and the network comes about twice as close as with plain rectified sums.
    """
    skip, bias = _ridge(x, y)
    left = y - x @ skip - bias
    scale = max(float(left.std()), 1e-6)
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.from_numpy(x)
    target = torch.from_numpy((left / scale).astype(np.float32))
    sizes = [x.shape[1], *WIDTHS, y.shape[1]]
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        weight = torch.randn(fan_in, fan_out, generator=generator) * (2 / fan_in) ** 0.5
        layers += [weight.requires_grad_(), torch.zeros(fan_out, requires_grad=True)]
    optimiser = torch.optim.Adam(layers, lr=1e-2)
    batch = 512
    steps = epochs * max(1, len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    order = torch.arange(0)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=generator)
        rows, order = order[:batch], order[batch:]
        hidden = inputs[rows]
        hidden = torch.relu(hidden @ layers[0] + layers[1]) ** 2
        hidden = torch.relu(hidden @ layers[2] + layers[3])
        loss = ((hidden @ layers[4] + layers[5] - target[rows]) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    values = [layer.detach().numpy().astype(np.float64) for layer in layers]
    keys = ("input_weight", "input_bias", "hidden_weight", "hidden_bias", "output_weight")
    return {
        **dict(zip(keys, values[:5], strict=True)),
        "output_weight": values[4] * scale,
        "output_bias": values[5] * scale + bias,
        "skip_weight": skip,
    }
