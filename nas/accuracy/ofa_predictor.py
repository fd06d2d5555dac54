"""Once-for-All's published accuracy predictors."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np

from compofa.errors import CheckpointError, SpaceError, TableError
from compofa.io.untrusted import printable
from compofa.networks.families.resnet50d import RESNET50D
from compofa.space.arrays import SubnetArrays
from nas.search.choices import CHUNK, ChoiceCodes


class PublishedPredictor:
    """The published Once-for-All accuracy predictor (``acc_predictor.pth``).

    Linear 128-400-400-400-1 with ReLU on one-hot kernels (3, 5, 7) and expands (3, 4, 6) of 20
    blocks and 8 resolutions (112 to 224 by 16). It returns top-1 as a *fraction* on its own
    scale, about 0.06 above measured accuracy: use it to rank, not as an accuracy. On the OFA w1.0
    subnets measured at r = 224 its Spearman correlation is 0.982. Below r = 160 it does not rank
    subnets of different resolutions.
    """

    unit = "top-1 fraction, published scale (about 0.06 above measured)"
    error = "a ranking: values are about 0.06 above measured top-1"
    resolutions = np.arange(112, 225, 16)
    OFFSET = 0.06
    WIDTHS = (1.0, 1.2)
    """Width multipliers that it is published for."""
    INPUTS = 128
    VALUES: ClassVar = {"kernel": np.array([3, 5, 7]), "expand": np.array([3, 4, 6])}
    """What the blocks of its subnets choose."""

    def __init__(self, layers: list[tuple[np.ndarray, np.ndarray]], name: str) -> None:
        self.layers = layers
        self.name = name

    def serve(self, width_mult: float) -> None:
        """Check that it may be asked about networks of this width multiplier.

        Raises:
            TableError: It is published for others.
        """
        if width_mult not in self.WIDTHS:
            raise TableError(
                f"the accuracy model {self.name} is published for width multiplier "
                f"{' or '.join(f'{width:g}' for width in self.WIDTHS)}, not {width_mult:g}"
            )

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return top-1 as a fraction on the published scale, float64 of shape [n].

        Raises:
            SpaceError: A choice, shape or resolution outside the predictor's.
        """
        self._check(arrays)
        r, known = np.asarray(arrays.resolutions), self.resolutions
        if r.size and (r.min() < known[0] or r.max() > known[-1]):
            wrong = r[(r < known[0]) | (r > known[-1])][0]
            raise SpaceError(f"expected resolutions from {known[0]} to {known[-1]}, got {wrong:g}")
        above = np.searchsorted(known, r)
        share = (known[above] - r) / np.diff(known, prepend=known[0] - 1)[above]
        out = self._forward(arrays, above)
        between = np.flatnonzero(share > 0)
        if len(between):
            some = arrays[between]
            out[between] += share[between] * (
                self._forward(some, above[between] - 1) - out[between]
            )
        return out

    def predict_percent(self, arrays: SubnetArrays) -> np.ndarray:
        """Return 100 times :meth:`predict`: percent, still on the published scale."""
        return 100.0 * self.predict(arrays)

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the offset from measured accuracy, a lower bound of the error, for each subnet."""
        return np.full(len(arrays), self.OFFSET)

    def _forward(self, arrays: SubnetArrays, place: np.ndarray) -> np.ndarray:
        count = len(place)
        out = np.empty(count)
        for start in range(0, count, CHUNK):
            at = slice(start, start + CHUNK)
            some = arrays[at]
            size = place[at, None] == np.arange(len(self.resolutions))
            x = np.concatenate(self._features(some, size), axis=1).astype(np.float32)
            for index, (weight, bias) in enumerate(self.layers):
                x = x @ weight.T + bias
                if index < len(self.layers) - 1:
                    np.maximum(x, 0, out=x)
            out[at] = x[:, 0]
        return out

    def _check(self, arrays: SubnetArrays) -> None:
        ChoiceCodes(self.VALUES, 20).rows(arrays)

    def _features(self, arrays: SubnetArrays, size: np.ndarray) -> list[np.ndarray]:
        n = len(size)
        hot = [
            (arrays.blocks[name][:, :, None] == known).reshape(n, -1)
            for name, known in self.VALUES.items()
        ]
        return [*hot, size]

    @classmethod
    def of(cls, values: list[np.ndarray], name: str) -> PublishedPredictor:
        """Build it from the arrays of the file, in their order."""
        return cls(list(zip(values[::2], values[1::2], strict=True)), name)

    @classmethod
    def shapes(cls) -> list[tuple[int, ...]]:
        """Return the shapes of the arrays of the file, in their order."""
        weights = [(400, cls.INPUTS), (400, 400), (400, 400), (1, 400)]
        return [shape for weight in weights for shape in (weight, weight[:1])]


class PublishedResNetPredictor(PublishedPredictor):
    """The published predictor of ResNet50D (``ofa_resnet50_acc_predictor.pth``).

    Linear 82-400-400-400-1 on one-hot features: 8 resolutions, whether the stem's residual
    convolution is left out or kept, 6 widths of 3 choices, 18 expand ratios of 3 (zeros past the
    depth). The file does not name them. Of the 24 orders of these four groups, this is the one in
    which predicted accuracy rises with every width, every depth and, up to 224 pixels, the
    resolution. The resolutions are not named either: those of Once-for-All's ResNet50D examples
    are assumed, and the gain per step has its only bump where they skip 208. There are no
    measurements to verify it: use it to rank, not as an accuracy.
    """

    unit = "top-1 fraction, published scale (offset from measured top-1 unknown)"
    error = "a ranking: absolute values and assumed resolutions are not verified"
    resolutions = np.array([128, 144, 160, 176, 192, 224, 240, 256])
    INPUTS = 82
    WIDTHS = (1.0,)

    def _check(self, arrays: SubnetArrays) -> None:
        wanted = (len(RESNET50D.stages), RESNET50D.outer_count)
        if (got := (arrays.depths.shape[1], arrays.outer.shape[1])) != wanted:
            raise SpaceError(
                f"expected the subnets of ofa_resnet50, of {wanted[0]} stages and {wanted[1]} "
                f"elastic widths, got {got[0]} and {got[1]}"
            )
        known = RESNET50D.values("expand")
        values = arrays.blocks["expand"][:, arrays.slots :]
        wrong = values[~np.isin(values, [0, *known])]
        if wrong.size:
            raise SpaceError(
                f"expand: expected one of {', '.join(map(str, known))}, got {wrong[0]:g}"
            )

    def _features(self, arrays: SubnetArrays, size: np.ndarray) -> list[np.ndarray]:
        written, n = RESNET50D.config_format.table(arrays), len(size)
        widths = written["w"][:, :, None] == np.arange(len(RESNET50D.widths))
        expands = written["e"][:, :, None] == np.array(RESNET50D.values("expand"))
        stem = arrays.depths[:, :1] == np.arange(2)
        return [size, stem, widths.reshape(n, -1), expands.reshape(n, -1)]

    @classmethod
    def of(cls, values: list[np.ndarray], name: str) -> PublishedPredictor:
        """Build it from the arrays of the file, whose first is the bias of the last layer."""
        return super().of([*values[1:], values[0]], name)

    @classmethod
    def shapes(cls) -> list[tuple[int, ...]]:
        """Return the shapes of the arrays of the file, in their order."""
        *rest, bias = super().shapes()
        return [bias, *rest]


def read_published(path: Path) -> PublishedPredictor:
    """Read ``acc_predictor.pth`` or ResNet50D's: a state dict, bare or nested in a checkpoint.

    Raises:
        TableError: The file is something else.
    """
    expected = (
        f"{path}: expected a published accuracy predictor (linear 128-400-400-400-1, or "
        "82-400-400-400-1 for ResNet50D)"
    )
    # Only this foreign format needs torch; searches on other models must not wait for it.
    from compofa.io.checkpoint import read_safely, weights_in

    try:
        state = weights_in(path, read_safely(path))
    except CheckpointError as error:
        raise TableError(f"{expected}, got a file that cannot be read as one") from error
    shapes = [tuple(value.shape) for value in state.values()]
    kinds = (PublishedPredictor, PublishedResNetPredictor)
    kind = next((kind for kind in kinds if kind.shapes() == shapes), None)
    if kind is None:
        got = ", ".join("x".join(map(str, shape)) for shape in shapes[:8]) or "no weights"
        raise TableError(f"{expected}, got weights of shapes {got}")
    values = [value.detach().float().numpy() for value in state.values()]
    if not all(np.isfinite(value).all() for value in values):
        raise TableError(f"{expected}, got weights that are not finite")
    return kind.of(values, printable(path.stem))
