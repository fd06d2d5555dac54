"""The published Once-for-All accuracy predictor's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from compofa.errors import CheckpointError, SpaceError, TableError
from compofa.subnet import SubnetArrays
from nas.choices import CHUNK, ChoiceCodes


class PublishedPredictor:
    """The published Once-for-All accuracy predictor (``acc_predictor.pth``).

    Linear 128-400-400-400-1 with ReLU on one-hot kernels (3, 5, 7) and expands (3, 4, 6) of 20
    blocks and 8 resolutions (112 to 224 by 16). It returns top-1 as a *fraction* on its own
    scale, about 0.06 above measured accuracy: rank with it, don't quote it. On the OFA w1.0
    subnets measured at r = 224 its Spearman correlation is 0.982. Its figures below r = 160 do
    not rank by resolution.
    """

    unit = "top-1 fraction, published scale (about 0.06 above measured)"
    error = "a ranking: values lie about 0.06 above measured top-1"
    resolutions = np.arange(112, 225, 16)
    OFFSET = 0.06
    SHAPES = ((400, 128), (400, 400), (400, 400), (1, 400))

    def __init__(self, layers: list[tuple[np.ndarray, np.ndarray]], name: str) -> None:
        self.layers = layers
        self.name = name

    def predict(self, arrays: SubnetArrays) -> np.ndarray:
        """Return top-1 as a fraction on the published scale, float64 of shape [n].

        Raises:
            SpaceError: A choice, shape or resolution outside the predictor's.
        """
        ChoiceCodes(np.array([3, 5, 7]), np.array([3, 4, 6]), 20).rows(arrays)
        r = np.asarray(arrays.r)
        if r.size and (r.min() < 112 or r.max() > 224):
            wrong = r[(r < 112) | (r > 224)][0]
            raise SpaceError(f"expected resolutions from 112 to 224, got {wrong:g}")
        above = np.ceil((r - 112) / 16).astype(np.intp)
        share = above - (r - 112) / 16
        out = self._forward(arrays, above)
        between = np.flatnonzero(share > 0)
        if len(between):
            some = SubnetArrays(*(np.asarray(array)[between] for array in arrays))
            out[between] += share[between] * (
                self._forward(some, above[between] - 1) - out[between]
            )
        return out

    def predict_percent(self, arrays: SubnetArrays) -> np.ndarray:
        """Return 100 times :meth:`predict`: percent, still on the published scale."""
        return 100.0 * self.predict(arrays)

    def std(self, arrays: SubnetArrays) -> np.ndarray:
        """Return the published offset, the least that a figure is wrong by, for each subnet."""
        return np.full(len(arrays.r), self.OFFSET)

    def _forward(self, arrays: SubnetArrays, place: np.ndarray) -> np.ndarray:
        count = len(place)
        out = np.empty(count)
        for start in range(0, count, CHUNK):
            at = slice(start, start + CHUNK)
            ks, e = np.asarray(arrays.ks)[at, :, None], np.asarray(arrays.e)[at, :, None]
            x = np.concatenate(
                [
                    (ks == np.array([3, 5, 7])).reshape(len(ks), 60),
                    (e == np.array([3, 4, 6])).reshape(len(ks), 60),
                    place[at, None] == np.arange(8),
                ],
                axis=1,
            ).astype(np.float32)
            for index, (weight, bias) in enumerate(self.layers):
                x = x @ weight.T + bias
                if index < len(self.layers) - 1:
                    np.maximum(x, 0, out=x)
            out[at] = x[:, 0]
        return out


def read_published(path: Path) -> PublishedPredictor:
    """Read ``acc_predictor.pth``: a state dict, loaded with ``weights_only``.

    Raises:
        TableError: The file is something else.
    """
    expected = f"{path}: expected the published accuracy predictor (linear 128-400-400-400-1)"
    import torch  # Only this foreign format needs it; searches on other models must not wait.

    from compofa.tensorfile import read_safely

    try:
        state = read_safely(path)
    except CheckpointError as error:
        raise TableError(f"{expected}, got a file that cannot be read as one") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    plain = isinstance(state, dict) and all(
        torch.is_tensor(value) and value.layout is torch.strided and not value.is_quantized
        for value in state.values()
    )
    if not plain:
        raise TableError(f"{expected}, got {type(state).__name__} of something else")
    shapes = [tuple(value.shape) for value in state.values()]
    wanted = [shape for weight in PublishedPredictor.SHAPES for shape in (weight, weight[:1])]
    if shapes != wanted:
        got = ", ".join("x".join(map(str, shape)) for shape in shapes[:8]) or "no weights"
        raise TableError(f"{expected}, got weights of shapes {got}")
    values = [value.detach().float().numpy() for value in state.values()]
    if not all(np.isfinite(value).all() for value in values):
        raise TableError(f"{expected}, got weights that are not finite")
    return PublishedPredictor(list(zip(values[::2], values[1::2], strict=True)), path.stem)
