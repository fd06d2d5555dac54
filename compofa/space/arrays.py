"""Many subnets as arrays, the form that costs and predictors take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compofa.errors import SpaceError
from compofa.space.subnet import Subnet


@dataclass(frozen=True, eq=False)
class SubnetArrays:
    """Subnets of the same stages and choices, one per row.

    Attributes:
        blocks: For each choice of a block, by name, its values, shape [n, stages * slots]; 0 past a
            stage's depth.
        depths: Number of blocks of each stage, shape [n, stages].
        resolutions: In pixels, shape [n].
        outer: Values of the choices outside the blocks, shape [n, choices], n x 0 without any.
    """

    blocks: Mapping[str, np.ndarray]
    depths: np.ndarray
    resolutions: np.ndarray
    outer: np.ndarray

    def __len__(self) -> int:
        return len(self.resolutions)

    def __getitem__(self, rows: slice | np.ndarray | Sequence[int]) -> SubnetArrays:
        """Return some of the rows."""
        return SubnetArrays(
            {name: values[rows] for name, values in self.blocks.items()},
            self.depths[rows], self.resolutions[rows], self.outer[rows],
        )  # fmt: skip

    def __iter__(self) -> Iterator[SubnetArrays]:
        """Yield each row as arrays of one row."""
        return (self[row : row + 1] for row in range(len(self)))

    @property
    def slots(self) -> int:
        """Blocks that the arrays have for each stage."""
        return next(iter(self.blocks.values())).shape[1] // self.depths.shape[1]

    @property
    def active(self) -> np.ndarray:
        """Whether each block is within the depth of its stage, shape [n, stages * slots]."""
        active = np.arange(self.slots) < self.depths[:, :, None]
        return active.reshape(len(self), self.depths.shape[1] * self.slots)

    def checked(self, names: Sequence[str]) -> SubnetArrays:
        """Return the same with NumPy arrays of matching shapes.

        Args:
            names: Choices of a block that must be there.

        Raises:
            SpaceError: Shapes do not fit together, or choices are missing.
        """
        blocks = {name: np.asarray(values) for name, values in self.blocks.items()}
        depths, r, outer = map(np.asarray, (self.depths, self.resolutions, self.outer))
        held = {**blocks, "depths": depths, "resolutions": r, "outer": outer}
        widths = {values.shape[1:] for values in blocks.values()}
        fits = {*names} <= {*blocks} and len(widths) == 1 and r.ndim == 1
        fits = fits and depths.ndim == outer.ndim == 2 and len(next(iter(widths))) == 1
        fits = fits and {len(values) for values in held.values()} == {len(r)}
        if not fits or not depths.shape[1] or widths.pop()[0] % depths.shape[1]:
            shown = ", ".join(f"{name} {list(values.shape)}" for name, values in held.items())
            raise SpaceError(
                f"expected {', '.join(names)} of shape [n, stages * slots], depths of shape "
                f"[n, stages] and resolutions of shape [n], got {shown}"
            )
        return SubnetArrays(blocks, depths, r, outer)

    def outer_as_stages(self) -> SubnetArrays:
        """Return the same subnets with each choice outside the blocks written as a stage.

        It has one block whose last choice is the value plus 1, its others 1. What learns from
        blocks, such as accuracy predictors, learns from these choices like this.
        """
        n, count = self.outer.shape
        if not count:
            return self
        blocks, last = {}, [*self.blocks][-1]
        for name, values in self.blocks.items():
            more = np.zeros((n, count * self.slots), dtype=values.dtype)
            more[:, :: self.slots] = self.outer + 1 if name == last else 1
            blocks[name] = np.concatenate([values, more], axis=1)
        depths = np.concatenate([self.depths, np.ones_like(self.outer)], axis=1)
        return SubnetArrays(blocks, depths, self.resolutions, np.zeros((n, 0), np.int64))


def concatenate(parts: Sequence[SubnetArrays]) -> SubnetArrays:
    """Return the rows of all ``parts``, which have the same stages and choices."""
    names = parts[0].blocks
    return SubnetArrays(
        {name: np.concatenate([part.blocks[name] for part in parts]) for name in names},
        np.concatenate([part.depths for part in parts]),
        np.concatenate([part.resolutions for part in parts]),
        np.concatenate([part.outer for part in parts]),
    )


def arrays_of(subnets: Sequence[Subnet], names: Sequence[str], slots: int) -> SubnetArrays:
    """Write subnets of the same stages as arrays.

    Args:
        subnets: At least one.
        names: Names of the choices of a block.
        slots: Blocks per stage, at least the largest depth.
    """
    past = (0,) * len(names)
    rows = [
        [block for stage in subnet.stages for block in (*stage, *(past,) * (slots - len(stage)))]
        for subnet in subnets
    ]
    return SubnetArrays(
        {
            name: np.array([[block[place] for block in row] for row in rows])
            for place, name in enumerate(names)
        },
        np.array([subnet.depths for subnet in subnets]),
        np.array([subnet.resolution for subnet in subnets]),
        np.array([subnet.outer for subnet in subnets], dtype=np.int64).reshape(len(rows), -1),
    )
