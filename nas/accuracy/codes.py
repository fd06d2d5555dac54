"""Choices of blocks as row numbers of tables: what makes predictors fast in NumPy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from compofa.errors import SpaceError
from compofa.space.arrays import SubnetArrays

CHUNK = 4096
"""Subnets worked on at once, few enough for the processor's cache."""

MAX_TABLE_ROWS = 10_000


class ChoiceCodes:
    """Turns the choices of blocks into one row number per group of blocks.

    A network's first layer is linear in one-hot choices, so the sum over a few blocks takes few
    values: one table row for each. Prediction is then a handful of gathers.
    """

    def __init__(self, values: Mapping[str, np.ndarray], slots: int) -> None:
        self.values, self.slots = dict(values), slots
        counts = [len(known) for known in values.values()]
        self.radix = 1 + math.prod(counts)
        width = max(1, int(math.log(MAX_TABLE_ROWS + 0.5, self.radix)))
        self.groups = [slice(at, min(at + width, slots)) for at in range(0, slots, width)]
        self._lookups = {}
        for place, (name, known) in enumerate(values.items()):
            codes = math.prod(counts[place + 1 :]) * np.arange(len(known))
            self._lookups[name] = self._lookup(known, codes + (place == 0))

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
        arrays = arrays.checked(self.values)
        *others, last = self.values
        present = arrays.blocks[last] != 0
        if present.shape[1] != self.slots:
            raise SpaceError(f"expected {self.slots} blocks per subnet, got {present.shape[1]}")
        codes = self._codes(arrays.blocks[last], last)
        for name in others:
            codes += self._codes(arrays.blocks[name], name)
            optional = 0 in self.values[name]
            if not optional and not np.array_equal(arrays.blocks[name] != 0, present):
                raise SpaceError(
                    f"expected {name} and {last} to be 0 at the same blocks (those past the depth)"
                )
            if optional:
                codes *= present
        rows = []
        for group in self.groups:
            row = codes[:, group.start].astype(np.intp)
            for place, slot in enumerate(range(group.start + 1, group.stop), start=1):
                row += codes[:, slot] * self.radix**place
            rows.append(row)
        return rows

    def _codes(self, values: np.ndarray, name: str) -> np.ndarray:
        table = self._lookups[name]
        if values.dtype.kind in "iu":
            lookup, index = table[::20].copy(), values
        else:
            lookup, index = table, np.rint(np.nan_to_num(values, nan=-1.0) * 20).astype(np.intp)
        index = np.where((index < 0) | (index >= len(lookup)), len(lookup) - 1, index)
        codes = lookup[index]
        if codes.size and codes.min() < 0:
            wrong = values[codes < 0][0]
            listed = ", ".join(f"{value:g}" for value in self.values[name])
            raise SpaceError(f"{name}: expected one of {listed} (0 past the depth), got {wrong:g}")
        return codes

    def tables(self, weight: np.ndarray) -> list[np.ndarray]:
        """Fold a first layer into one table per group of blocks.

        Args:
            weight: Shape [slots, values, width]: for each block the weights of the one-hot values,
                choice after choice.

        Returns:
            For each group float32 of shape [radix ** blocks, width].
        """
        pairs, start = np.zeros((self.slots, 1, weight.shape[2]), dtype=weight.dtype), 0
        for known in self.values.values():
            part = weight[:, start : start + len(known)]
            pairs = (pairs[:, :, None] + part[:, None]).reshape(self.slots, -1, weight.shape[2])
            start += len(known)
        pairs = np.concatenate([np.zeros_like(pairs[:, :1]), pairs], axis=1)
        tables = []
        for group in self.groups:
            table = np.zeros((1, weight.shape[2]), dtype=np.float32)
            for slot in range(group.start, group.stop):
                table = (pairs[slot][:, None] + table[None]).reshape(-1, weight.shape[2])
            tables.append(table)
        return tables
