"""Choices of blocks as row numbers of tables: what makes predictors fast in NumPy."""

from __future__ import annotations

import math

import numpy as np

from compofa.errors import SpaceError
from compofa.space.arrays import SubnetArrays

CHUNK = 4096
"""Subnets worked on at once, few enough for the processor's cache."""

MAX_TABLE_ROWS = 10_000


class ChoiceCodes:
    """Turns kernel and expand arrays into one row number a group of blocks.

    A network's first layer is linear in one-hot choices, so the sum over a few blocks takes few
    values: one table row for each. Prediction is then a handful of gathers.
    """

    def __init__(self, kernels: np.ndarray, expands: np.ndarray, slots: int) -> None:
        self.kernels, self.expands, self.slots = kernels, expands, slots
        self.radix = 1 + len(kernels) * len(expands)
        width = max(1, int(math.log(MAX_TABLE_ROWS + 0.5, self.radix)))
        self.groups = [slice(at, min(at + width, slots)) for at in range(0, slots, width)]
        self._kernel_codes = self._lookup(kernels, 1 + len(expands) * np.arange(len(kernels)))
        self._expand_codes = self._lookup(expands, np.arange(len(expands)))

    @staticmethod
    def _lookup(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
        table = np.full(1000, -(10**6), dtype=np.int32)
        table[0] = 0
        table[np.rint(values * 20).astype(int)] = codes
        return table

    def rows(self, arrays: SubnetArrays) -> list[np.ndarray]:
        """Return for each group the table row of every subnet.

        Raises:
            SpaceError: A shape or value that the model was not fitted on.
        """
        ks, e = np.asarray(arrays.ks), np.asarray(arrays.e)
        if ks.ndim != 2 or ks.shape != e.shape or ks.shape[1] != self.slots:
            raise SpaceError(
                f"expected ks and e of shape [n, {self.slots}], got {ks.shape} and {e.shape}"
            )
        codes = self._codes(ks, self._kernel_codes, "kernel sizes", self.kernels)
        codes += self._codes(e, self._expand_codes, "expand ratios", self.expands)
        if np.count_nonzero(ks) != np.count_nonzero(e) or ((ks == 0) & (e != 0)).any():
            raise SpaceError("expected ks and e to be 0 at the same blocks (those past the depth)")
        rows = []
        for group in self.groups:
            row = codes[:, group.start].astype(np.intp)
            for place, slot in enumerate(range(group.start + 1, group.stop), start=1):
                row += codes[:, slot] * self.radix**place
            rows.append(row)
        return rows

    @staticmethod
    def _codes(values: np.ndarray, table: np.ndarray, what: str, known: np.ndarray) -> np.ndarray:
        if values.dtype.kind in "iu":
            lookup, index = table[::20].copy(), values
        else:
            lookup, index = table, np.rint(np.nan_to_num(values, nan=-1.0) * 20).astype(np.intp)
        index = np.where((index < 0) | (index >= len(lookup)), len(lookup) - 1, index)
        codes = lookup[index]
        if codes.size and codes.min() < 0:
            wrong = values[codes < 0][0]
            listed = ", ".join(f"{value:g}" for value in known)
            raise SpaceError(f"expected {what} among {listed} (0 past the depth), got {wrong:g}")
        return codes

    def tables(self, weight: np.ndarray) -> list[np.ndarray]:
        """Fold a first layer into one table a group of blocks.

        Args:
            weight: Shape [slots, kernels + expands, width]: the weights of the one-hot kernels,
                then of the one-hot expands, of each block.

        Returns:
            For each group float32 of shape [radix ** blocks, width].
        """
        count = len(self.kernels)
        pairs = weight[:, :count, None] + weight[:, None, count:]
        pairs = pairs.reshape(self.slots, self.radix - 1, -1)
        pairs = np.concatenate([np.zeros_like(pairs[:, :1]), pairs], axis=1)
        tables = []
        for group in self.groups:
            table = np.zeros((1, weight.shape[2]), dtype=np.float32)
            for slot in range(group.start, group.stop):
                table = (pairs[slot][:, None] + table[None]).reshape(-1, weight.shape[2])
            tables.append(table)
        return tables
