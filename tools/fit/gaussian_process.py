"""The Gaussian process on subnets that the shipped predictors are distilled from.

Accuracy is a sum of smooth functions of the blocks' choices: a linear one, one per stage, one per
pair of stages, and one of all blocks. Each has a part shared by all resolutions, a part that grows
with resolution and, where several networks were measured, a part per network. A measurement adds
noise and, where rows were measured in blocks on parts of a validation set, a random offset per
block and resolution. All of it is fitted jointly by marginal likelihood, so that the uncertainty of
the offsets is propagated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from compofa.seeds import rng
from compofa.space.arrays import SubnetArrays

WHOLE = -1
"""Block label of a row measured on the whole validation set (no offset)."""

Rows = tuple[np.ndarray | list[int], torch.Tensor, torch.Tensor | int]
"""Resolutions, their coordinates and networks of some rows; scalars stand for one row."""


@dataclass(frozen=True)
class Measurements:
    """Measured subnets.

    Attributes:
        arrays: The subnets, n rows.
        top1: Percent, float64 [n].
        block: Label of the block of rows that shares an offset, int [n]; :data:`WHOLE` for none.
        net: Label of the network that each row was measured on, int [n]; 0 is the one that a
            predictor is made for, others inform it.
    """

    arrays: SubnetArrays
    top1: np.ndarray
    block: np.ndarray
    net: np.ndarray

    def take(self, index: np.ndarray) -> Measurements:
        """Return the rows ``index``."""
        arrays = self.arrays[index]
        return Measurements(arrays, self.top1[index], self.block[index], self.net[index])


class BlockFeatures:
    """Numbers of a subnet's blocks: kernel and expand as linear and bent contrasts, and presence.

    Columns that are constant over the measured subnets are left out.
    """

    def __init__(self, arrays: SubnetArrays) -> None:
        self.kernels = np.unique(arrays.blocks["kernel"][arrays.blocks["kernel"] > 0])
        self.expands = np.unique(arrays.blocks["expand"][arrays.blocks["expand"] > 0])
        slots, stages = arrays.blocks["kernel"].shape[1], arrays.depths.shape[1]
        every = self._columns(arrays)
        self._kept = np.flatnonzero(np.ptp(every, axis=0) > 0)
        self.kind, self.slot = np.divmod(self._kept, slots)
        self.stage = self.slot // max(1, -(-slots // stages))

    def __call__(self, arrays: SubnetArrays) -> torch.Tensor:
        """Return float64 [n, columns]."""
        return torch.from_numpy(self._columns(arrays)[:, self._kept])

    def _columns(self, arrays: SubnetArrays) -> np.ndarray:
        present = arrays.blocks["kernel"] > 0
        columns = []
        for values, known in (
            (arrays.blocks["kernel"], self.kernels),
            (arrays.blocks["expand"], self.expands),
        ):
            place = np.searchsorted(known, values).clip(max=len(known) - 1) / max(1, len(known) - 1)
            line = 2.0 * place - 1.0
            columns += [np.where(present, line, 0.0), np.where(present, line**2 - 2 / 3, 0.0)]
        return np.concatenate([*columns, 2.0 * present - 1.0], axis=1)


class AccuracyGP:
    """Exact Gaussian process over subnets, resolutions and networks.

    Args:
        steps: Optimiser steps on the marginal likelihood.
        subset: Rows, drawn at random, that the likelihood uses; prediction uses all.
        seed: Of the draw.

    Attributes:
        noise_: Standard deviation (points) of a measurement on the whole set and in a block.
        offset_std_: Standard deviation (points) of the blocks' offsets.
    """

    def __init__(self, steps: int = 50, subset: int = 1000, seed: int = 0) -> None:
        self.steps, self.subset, self.seed = steps, subset, seed

    def fit(self, data: Measurements) -> AccuracyGP:
        """Find the hyperparameters, then condition on all of ``data``."""
        self.features_ = BlockFeatures(data.arrays)
        self.anchors_ = np.unique(data.arrays.resolutions)
        self.nets_ = int(data.net.max()) + 1
        self.level_ = float(data.top1.mean())
        self.scale_ = _within_std(data)
        self._start()
        with single_thread():
            self._optimise(data.take(self._draw(data.net)))
            self._condition(data)
        return self

    def predict(self, arrays: SubnetArrays, anchors: np.ndarray, net: int = 0) -> np.ndarray:
        """Return expected top-1 (percent) of each architecture at each anchor, [n, A]."""
        with torch.no_grad(), single_thread():
            x = self._scaled(arrays)
            mixes = [
                self._mix((r, coordinate, net))
                for r, coordinate in zip(anchors, self._coordinate(anchors), strict=True)
            ]
            level = torch.stack([constant[0] @ self._alpha for _, constant in mixes])
            weights = [
                torch.stack([weight[part][0] * self._alpha for weight, _ in mixes], 1)
                for part in range(4)
            ]
            out = []
            for start in range(0, len(x), 128):  # Small pieces stay in the processor's cache.
                parts = self._parts(x[start : start + 128], self._x)
                out.append(sum(part @ w for part, w in zip(parts, weights, strict=True)) + level)
            return torch.cat(out).numpy() * self.scale_ + self.level_

    def std(self, arrays: SubnetArrays, anchors: np.ndarray, net: int = 0) -> np.ndarray:
        """Return the posterior standard deviation (points) without noise, [n, A]."""
        with torch.no_grad(), single_thread():
            x, columns = self._scaled(arrays), []
            cross, own = self._parts(x, self._x), self._parts(x, None)
            for r, coordinate in zip(anchors, self._coordinate(anchors), strict=True):
                query = (r, coordinate, net)
                k = self._joined(cross, query)
                prior = self._joined(own, query, ([r], coordinate[None], torch.tensor([net])))
                root = torch.linalg.solve_triangular(self._chol, k.T, upper=False)
                columns.append((prior[:, 0] - (root**2).sum(0)).clamp_min(1e-10).sqrt())
            return torch.stack(columns, 1).numpy() * self.scale_

    def offsets(self, block: np.ndarray, r: np.ndarray) -> np.ndarray:
        """Return the estimated offset (points) of rows of ``block`` measured at ``r``, [n]."""
        with torch.no_grad():
            return (self._block_kernel(block, r, self._block, self._r) @ self._alpha).numpy() * (
                self.scale_
            )

    # Hyperparameters are logarithms of standard deviations or length scales, in units of the
    # spread of accuracies at one resolution, with normal priors of the width given.

    def _start(self) -> None:
        slots = int(self.features_.slot.max()) + 1 if len(self.features_.slot) else 1
        amplitudes = [[-1.0, -2.0, -2.5, -1.2], [-3.0, -3.0, -3.5, -3.0], [-3.0, -3.0, -3.5, -3.0]]
        start = {
            "kernel": (torch.full((slots,), 1.8), 1.0),
            "expand": (torch.full((slots,), 1.6), 1.0),
            "present": (torch.full((slots,), 1.0), 1.0),
            "bent": (torch.tensor([1.0, 1.0]), 1.0),
            "amplitude": (torch.tensor(amplitudes), 1.5),
            "noise": (torch.full((self.nets_, 2), -2.5), 1.5),
            "offset": (torch.tensor([-1.5, -1.5]), 1.0),
            "slope": (torch.tensor(-2.0), 1.0),
        }
        self._prior = {key: (value.double(), width) for key, (value, width) in start.items()}
        self._value = {key: value.clone() for key, (value, _) in self._prior.items()}

    def _draw(self, net: np.ndarray) -> np.ndarray:
        """Draw rows for the likelihood, two thirds of them of network 0 if there are others."""
        order = rng(self.seed, "likelihood rows").permutation(len(net))
        first, other = order[net[order] == 0], order[net[order] != 0]
        first = first[: max(self.subset * 2 // 3, self.subset - len(other))]
        return np.sort(np.concatenate([first, other[: self.subset - len(first)]]))

    def _optimise(self, data: Measurements) -> None:
        value = {key: item.clone().requires_grad_() for key, item in self._value.items()}
        self._value = value
        optimiser = torch.optim.Adam(value.values(), lr=0.1)
        features = self.features_(data.arrays)
        y = torch.from_numpy((data.top1 - self.level_) / self.scale_)
        for step in range(self.steps):
            optimiser.param_groups[0]["lr"] = 0.1 * (1 - step / self.steps) + 0.005
            optimiser.zero_grad()
            chol, _ = self._factor(features, data)
            root = torch.linalg.solve_triangular(chol, y[:, None], upper=False)
            loss = 0.5 * (root**2).sum() + chol.diagonal().log().sum()
            for key, (mean, width) in self._prior.items():
                loss = loss + 0.5 * (((value[key] - mean) / width) ** 2).sum()
            loss.backward()
            optimiser.step()
        self._value = {key: item.detach() for key, item in value.items()}

    def _condition(self, data: Measurements) -> None:
        with torch.no_grad():
            self._chol, self._x = self._factor(self.features_(data.arrays), data)
            y = torch.from_numpy((data.top1 - self.level_) / self.scale_)
            self._alpha = torch.cholesky_solve(y[:, None], self._chol)[:, 0]
            self.noise_ = self._value["noise"].exp().numpy() * self.scale_
            self.offset_std_ = float((2 * self._value["offset"]).exp().sum().sqrt()) * self.scale_

    def _factor(
        self, features: torch.Tensor, data: Measurements
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = features / self._lengths()
        r, block = data.arrays.resolutions, data.block
        self._r, self._z, self._block = r, self._coordinate(r), block
        self._net = torch.from_numpy(data.net)
        kernel = self._joined(self._parts(x, x), (r, self._z, self._net))
        kernel = kernel + self._block_kernel(block, r, block, r)
        noise = (2 * self._value["noise"]).exp()[self._net, torch.from_numpy((block >= 0) * 1)]
        return torch.linalg.cholesky(kernel + torch.diag(noise + 1e-8)), x

    def _lengths(self) -> torch.Tensor:
        kind, slot = torch.from_numpy(self.features_.kind), torch.from_numpy(self.features_.slot)
        value = self._value
        base = torch.stack(
            [
                value["kernel"],
                value["kernel"] + value["bent"][0],
                value["expand"],
                value["expand"] + value["bent"][1],
                value["present"],
            ]
        )
        return base[kind, slot].exp()

    def _scaled(self, arrays: SubnetArrays) -> torch.Tensor:
        return self.features_(arrays) / self._lengths()

    def _coordinate(self, r: np.ndarray) -> torch.Tensor:
        """Return what accuracy is about linear in: the cube of the inverse resolution.

        The mean steps 128-160-192-224 of OFA w1.0 are 3.9, 1.9 and 0.8 points.
        """
        every = -((self.anchors_.max() / self.anchors_) ** 3.0)
        spread = max(float(every.std()), 1e-9)
        line = (-((self.anchors_.max() / np.asarray(r)) ** 3.0) - every.mean()) / spread
        return torch.from_numpy(np.asarray(line))

    def _parts(self, a: torch.Tensor, b: torch.Tensor | None) -> list[torch.Tensor]:
        """Kernels linear, a stage, a pair of stages, all; ``b`` None: each row with itself."""
        linear = one = two = distance = torch.zeros(1, 1, dtype=torch.float64)
        for stage in np.unique(self.features_.stage):
            columns = torch.from_numpy(np.flatnonzero(self.features_.stage == stage))
            u = a[:, columns]
            v = u if b is None else b[:, columns]
            dot = (u * v).sum(1, keepdim=True) if b is None else u @ v.T
            own = (u**2).sum(1, keepdim=True)
            other = own if b is None else (v**2).sum(1)[None]
            gap = (own + other - 2 * dot).clamp_min(0)
            near = torch.exp(-0.5 * gap)
            linear, distance, two, one = linear + dot, distance + gap, two + one * near, one + near
        return [linear, one, two, torch.exp(-distance / 8)]

    def _joined(
        self, parts: list[torch.Tensor], left: Rows, right: Rows | None = None
    ) -> torch.Tensor:
        """Combine kernels of architectures with those of resolution and network."""
        weights, constant = self._mix(left, right)
        return sum(part * w for part, w in zip(parts, weights, strict=True)) + constant

    def _mix(
        self, left: Rows, right: Rows | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Return the weight of each kernel of :meth:`_parts` and what is added to their sum."""
        r_b, z_b, net_b = right or (self._r, self._z, self._net)
        r_a, z_a, net_a = left
        shape = (-1, 1)
        grown = torch.as_tensor(z_a).reshape(shape) * z_b[None]
        same = (torch.as_tensor(net_a).reshape(shape) == net_b[None]).double()
        level = (np.reshape(r_a, shape) == np.reshape(r_b, (1, -1))).astype(np.float64)
        power = (2 * self._value["amplitude"]).exp()
        weights = []
        for part in range(4):
            weight = power[0, part] + 0 * grown
            if len(self.anchors_) > 1:
                weight = weight + power[1, part] * grown
            if self.nets_ > 1:
                weight = weight + power[2, part] * same
            weights.append(weight)
        own = same * (25.0 + (2 * self._value["slope"]).exp() * grown)
        unsmooth = torch.from_numpy(level) * (0.15 + 0.01 * same)
        return weights, 25.0 * (1 + grown) + own + unsmooth

    def _block_kernel(
        self, block_a: np.ndarray, r_a: np.ndarray, block_b: np.ndarray, r_b: np.ndarray
    ) -> torch.Tensor:
        """Offsets: one of the block, one of the block at the resolution."""
        same = (block_a[:, None] == block_b[None]) & (block_a[:, None] >= 0)
        both = same & (np.asarray(r_a)[:, None] == np.asarray(r_b)[None])
        power = (2 * self._value["offset"]).exp()
        return power[0] * torch.from_numpy(same * 1.0) + power[1] * torch.from_numpy(both * 1.0)


def _within_std(data: Measurements) -> float:
    """Spread of accuracies about the mean of their network and resolution, at least 0.01."""
    left = data.top1.copy()
    for net in np.unique(data.net):
        for r in np.unique(data.arrays.resolutions):
            rows = (data.net == net) & (data.arrays.resolutions == r)
            left[rows] -= left[rows].mean() if rows.any() else 0.0
    return max(float(left.std()), 0.01)


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch on one thread, so that sums come out the same every time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
