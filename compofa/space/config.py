"""How a family writes its subnets as JSON and in tables: one list of numbers per key.

A :class:`ConfigFormat` is data that a family owns. Once-for-All's config format, with ``ks``, ``e``
and ``d``, and that of its ResNet50D, with ``d``, ``e`` and ``w``, are instances of it; a family
that names no format is written with the names of its choices as keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from compofa.errors import SpaceError
from compofa.space.arrays import SubnetArrays
from compofa.space.subnet import Block, Number, Subnet, numbers

DEPTH, RESOLUTION = "depth", "resolution"
"""Names of the two choices that every space has."""


@dataclass(frozen=True)
class StageFormat:
    """How one stage is written.

    Attributes:
        depths: Pairs (number written for the depth, blocks); none where no depth is written.
        slots: Numbers written per choice of a block.
    """

    depths: tuple[tuple[int, int], ...]
    slots: int

    def blocks(self, number: Number) -> int:
        """Return the number of blocks of a written depth; -1 if it is invalid."""
        return dict(self.depths).get(number, -1)

    def number(self, blocks: int) -> int:
        """Return the written depth of a number of blocks."""
        return {count: number for number, count in self.depths}[blocks]


@dataclass(frozen=True)
class ConfigFormat:
    """A config format: which keys hold which choices, and how many numbers.

    Attributes:
        names: Names of the choices of a block, in the order of a block's numbers.
        outer: Name of the choices outside the blocks; empty without any.
        keys: Pairs (key, name of a choice), in the order they are written; by default every choice
            under its own name. The resolution is written last, as ``r``.
        slots: Fewest numbers per stage and choice. A list has as many for each stage.
        stages: How each stage is written, where stages differ from each other.
        count: Choices outside the blocks, where the format fixes their number.
        unwritten: For each of ``names`` its value in blocks that no number is written for.
        whole: Those of ``names`` whose values are whole numbers.
        single_last: Whether the last stage always is one block, written as one number per choice
            and without a depth.
    """

    names: tuple[str, ...]
    outer: str = ""
    keys: tuple[tuple[str, str], ...] = ()
    slots: int = 1
    stages: tuple[StageFormat, ...] = ()
    count: int = 0
    unwritten: tuple[Number, ...] = ()
    whole: tuple[str, ...] = ()
    single_last: bool = False
    _key_of: dict[str, str] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.keys:
            names = (*self.names, DEPTH, *filter(None, [self.outer]))
            object.__setattr__(self, "keys", tuple((name, name) for name in names))
        self._key_of.update({name: key for key, name in self.keys})

    @property
    def columns(self) -> tuple[str, ...]:
        """The keys in the order they are written, the resolution's last."""
        return (*(key for key, _ in self.keys), "r")

    def name_of(self, key: str) -> str:
        """Return the name of the choice that ``key`` holds; others are returned as they are."""
        return dict(self.keys).get(key, RESOLUTION if key == "r" else key)

    def stage_formats(self, count: int, slots: int) -> tuple[StageFormat, ...]:
        """Return how each of ``count`` stages with up to ``slots`` blocks is written."""
        if self.stages:
            return self.stages
        each = StageFormat(tuple((depth, depth) for depth in range(1, slots + 1)), slots)
        if not self.single_last:
            return (each,) * count
        return (each,) * (count - 1) + (StageFormat((), 1),)

    def write(self, subnet: Subnet, slots: int = 0) -> dict[str, Any]:
        """Return a subnet as JSON data, with 0 for blocks past the depth.

        Args:
            subnet: The subnet.
            slots: Blocks written per stage, where the format leaves that open; by default
                :attr:`slots`, and never fewer than the subnet has.
        """
        varying = subnet.depths[: -1 if self.single_last else None]
        formats = self.stage_formats(len(subnet.stages), max(slots or self.slots, *varying, 0))
        data: dict[str, Any] = {}
        for key, name in self.keys:
            if name == DEPTH:
                pairs = zip(formats, subnet.depths, strict=True)
                data[key] = [form.number(depth) for form, depth in pairs if form.depths]
            elif name == self.outer:
                data[key] = list(subnet.outer)
            else:
                place = self.names.index(name)
                data[key] = [
                    block[place] if block else 0
                    for form, stage in zip(formats, subnet.stages, strict=True)
                    for block in (*stage, *[()] * (form.slots - len(stage)))
                    if form.slots
                ]
        return {**data, "r": subnet.resolution}

    def describe(self, subnet: Subnet) -> str:
        """Return one short line: depths, then each choice stage by stage, then the resolution."""
        formats = self.stage_formats(len(subnet.stages), max(subnet.depths))
        parts = {name: key.removesuffix("s") for key, name in self.keys}
        rows = [form.number(len(stage)) if form.depths else len(stage)
                for form, stage in zip(formats, subnet.stages, strict=True)]  # fmt: skip
        shown = [f"{parts[DEPTH]} {'-'.join(map(str, rows))}"]
        written = [s for form, s in zip(formats, subnet.stages, strict=True) if form.slots]
        for place, name in reversed([*enumerate(self.names)]):
            if name in parts:
                values = [_runs([block[place] for block in stage]) for stage in written]
                shown.append(f"{parts[name]} {'-'.join(values)}")
        if self.outer:
            shown.append(f"{parts[self.outer]} {'-'.join(map(str, subnet.outer))}")
        return "  ".join([*shown, f"r {subnet.resolution}"])

    def matches(self, keys: Any) -> bool:
        """Whether a mapping or header with these keys may hold a subnet of this format."""
        return all(key in keys for key, _ in self.keys)

    def read(self, config: Mapping[str, Any], resolution: int = 224) -> Subnet:
        """Read a subnet; the inverse of :meth:`write`.

        Args:
            config: The lists, of which values past a stage's depth are ignored, and ``r``, an
                integer or a list of one. Further keys are ignored.
            resolution: Used where ``config`` has no ``r``.

        Raises:
            SpaceError: A key is missing, a value is not a number of its kind or the lengths do
                not fit together.
        """
        if not isinstance(config, Mapping):
            example = ", ".join(f"'{key}': [...]" for key, _ in self.keys)
            raise SpaceError(
                f"expected a subnet such as {{{example}, 'r': 224}}, got {type(config).__name__}"
            )
        missing = [key for key, _ in self.keys if key not in config]
        if missing:
            raise SpaceError(
                f"expected a subnet with keys {', '.join(self.columns[:-1])} (and r), "
                f"missing {', '.join(missing)}"
            )
        size = numbers("r", config.get("r", resolution))
        if len(size) != 1:
            raise SpaceError(f"r: expected one resolution, got {len(size)}")
        values = {name: numbers(key, config[key]) for key, name in self.keys}
        for name, items in [*values.items(), (RESOLUTION, size)]:
            broken = [item for item in items if item != int(item)]
            if broken and name in (DEPTH, RESOLUTION, self.outer, *self.whole):
                key = self._key_of.get(name, "r")
                raise SpaceError(f"{key}: expected whole numbers, got {broken[0]}")
        formats, format_ = self._fitting({name: len(items) for name, items in values.items()})
        depths, first, stages = iter(values[DEPTH]), 0, []
        for index, form in enumerate(formats):
            number = next(depths) if form.depths else 1
            blocks = form.blocks(number) if form.depths else 1
            if blocks < 0:
                key = self._key_of[DEPTH]
                known = " or ".join(str(known) for known, _ in form.depths)
                raise SpaceError(f"stage {index + 1}: {key}: expected {known}, got {number}")
            stages.append(
                tuple(self._block(values, first + slot, form.slots) for slot in range(blocks))
            )
            first += form.slots
        return Subnet(size[0], tuple(stages), tuple(values.get(self.outer, ())), format_)

    def _block(self, values: Mapping[str, Sequence[Number]], place: int, slots: int) -> Block:
        return tuple(
            values[name][place] if name in values and slots else self.unwritten[at]
            for at, name in enumerate(self.names)
        )

    def _fitting(self, lengths: Mapping[str, int]) -> tuple[tuple[StageFormat, ...], ConfigFormat]:
        """Return how lists of these lengths are written, and the format that writes them so."""
        depths = lengths[DEPTH]
        written = {name: lengths[name] for name in self.names if name in lengths}
        if self.stages:
            wanted = {name: sum(form.slots for form in self.stages) for name in written}
            wanted |= {DEPTH: len(self.stages), self.outer: self.count}
            for name, count in lengths.items():
                if count != wanted[name]:
                    raise SpaceError(
                        f"{self._key_of[name]}: expected {wanted[name]} numbers, got {count}"
                    )
            return self.stages, self
        slots, rest = divmod(next(iter(written.values())), depths) if depths else (0, 0)
        if not slots or len({*written.values()}) > 1 or rest > 1:
            keys = " and ".join(self._key_of[name] for name in written)
            raise SpaceError(
                f"expected {keys} with the same number of blocks for each of the {depths} stages "
                f"in {self._key_of[DEPTH]}, got {' and '.join(map(str, written.values()))}"
            )
        found = self if bool(rest) == self.single_last else self.with_single_last(bool(rest))
        return found.stage_formats(depths + rest, slots), found

    def with_single_last(self, single_last: bool) -> ConfigFormat:
        """Return this format with another :attr:`single_last`."""
        return replace(self, single_last=single_last)

    def table(self, arrays: SubnetArrays) -> dict[str, np.ndarray]:
        """Return the arrays that a table holds, by key: those of :meth:`write` for each row."""
        slots = arrays.slots
        formats = self.stage_formats(arrays.depths.shape[1], slots)
        columns: dict[str, np.ndarray] = {}
        for key, name in self.keys:
            if name == DEPTH:
                pairs = zip(formats, arrays.depths.T, strict=True)
                rows = [
                    np.array([form.number(blocks) for blocks in column.tolist()], dtype=np.int64)
                    for form, column in pairs
                    if form.depths
                ]
                columns[key] = np.stack(rows, axis=1)
            elif name == self.outer:
                columns[key] = arrays.outer
            else:
                columns[key] = arrays.blocks[name][:, self.places(formats, slots)]
        return {**columns, "r": arrays.resolutions}

    def read_table(self, columns: Mapping[str, np.ndarray]) -> SubnetArrays:
        """Return the subnets of the rows of a table; the inverse of :meth:`table`.

        Args:
            columns: For each key a number array [n, numbers], for ``r`` [n].

        Raises:
            SpaceError: The numbers of columns do not fit together.
        """
        lengths = {name: columns[key].shape[1] for key, name in self.keys}
        formats, _ = self._fitting(lengths)
        slots, stages = max(form.slots for form in formats), len(formats)
        n = len(columns["r"])
        depths = np.ones((n, stages), dtype=np.int64)
        written = iter(columns[self._key_of[DEPTH]].T)
        for index, form in enumerate(formats):
            if form.depths:
                column = next(written)
                depths[:, index] = [form.blocks(number) for number in column.tolist()]
        if depths.size and depths.min() < 0:
            row, stage = np.argwhere(depths < 0)[0].tolist()
            known = " or ".join(str(number) for number, _ in formats[stage].depths)
            raise RowError(row, f"{self._key_of[DEPTH]}: expected {known} in stage {stage + 1}")
        active = (np.arange(slots) < depths[:, :, None]).reshape(n, -1)
        places, blocks = self.places(formats, slots), {}
        for at, name in enumerate(self.names):
            if name in lengths:
                values = columns[self._key_of[name]]
                whole = np.zeros((n, stages * slots), dtype=values.dtype)
                whole[:, places] = values
                if self.unwritten:
                    rest = np.setdiff1d(np.arange(stages * slots), places)
                    whole[:, rest] = self.unwritten[at]
            else:
                whole = np.full((n, stages * slots), self.unwritten[at])
            blocks[name] = whole * active
        outer = columns[self._key_of[self.outer]] if self.outer else np.zeros((n, 0), np.int64)
        return SubnetArrays(blocks, depths, columns["r"], outer)

    @staticmethod
    def places(formats: Sequence[StageFormat], slots: int) -> np.ndarray:
        """Return which of ``slots`` blocks per stage, stage by stage, numbers are written for."""
        return np.concatenate(
            [np.arange(form.slots) + index * slots for index, form in enumerate(formats)]
        )


class RowError(SpaceError):
    """A row of a table is not a subnet.

    Attributes:
        row: Its index.
    """

    def __init__(self, row: int, fault: str) -> None:
        super().__init__(fault)
        self.row = row


def _runs(values: Sequence[Number]) -> str:
    """Write one value for all where they agree, otherwise all of them."""
    return ",".join(map(str, values if len(set(values)) > 1 else values[:1]))
