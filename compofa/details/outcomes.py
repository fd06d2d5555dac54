"""What a network said of each image of an evaluation, and what follows per class."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compofa.distributed.backend import Backend


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Predictions for n images with known classes.

    Attributes:
        images: Indices of the images in their source, ascending, int64 [n].
        targets: True classes, int64 [n].
        predicted: Most probable classes, int64 [n].
        probabilities: Probabilities of the predicted classes, float32 [n].
        true_probabilities: Probabilities of the true classes, float32 [n].
    """

    images: NDArray[np.int64]
    targets: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    true_probabilities: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def right(self) -> NDArray[np.bool_]:
        """Whether the predicted class is the true one, bool [n]."""
        return self.predicted == self.targets

    @property
    def top1(self) -> float:
        """Top-1 accuracy in percent."""
        return 100 * int(self.right.sum()) / len(self)

    def confusion(self, classes: int) -> NDArray[np.int64]:
        """Return images by true (row) and predicted (column) class, int64 [classes, classes]."""
        from sklearn.metrics import confusion_matrix

        return confusion_matrix(self.targets, self.predicted, labels=np.arange(classes))

    def confused_pairs(self, classes: int) -> list[tuple[int, int, int]]:
        """Return (true class, predicted class, images) of all confusions, the most frequent first.

        Args:
            classes: Number of classes.
        """
        matrix = self.confusion(classes)
        np.fill_diagonal(matrix, 0)
        rows, columns = np.nonzero(matrix)
        order = np.argsort(-matrix[rows, columns], kind="stable")
        return [
            (int(r), int(c), int(matrix[r, c]))
            for r, c in zip(rows[order], columns[order], strict=True)
        ]


_COLUMNS = tuple(field.name for field in fields(Outcomes))


class Observer:
    """Collects the logits of an evaluation as the few numbers per image that are kept of them."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.generic], ...]] = []

    def __call__(self, logits: Tensor, targets: Tensor, predicted: Tensor) -> None:
        """Add a batch.

        Args:
            logits: float32 [n, classes].
            targets: Class indices [n].
            predicted: Indices of the largest logits [n].
        """
        probabilities = logits.softmax(dim=1)
        wanted = [probabilities.gather(1, index[:, None])[:, 0] for index in (predicted, targets)]
        self._parts.append(tuple(x.cpu().numpy() for x in (targets, predicted, *wanted)))

    def outcomes(self, images: NDArray[np.int64], backend: Backend) -> Outcomes:
        """Return the outcomes of all ranks, ordered by image; all ranks call this together.

        Args:
            images: Indices of this rank's images in their order of evaluation, int64 [n].
            backend: The ranks.
        """
        columns = [np.concatenate(each) for each in zip(*self._parts, strict=True)]
        mine = dict(zip(_COLUMNS, (images, *columns), strict=True)) if columns else None
        found = [each for each in backend.gather(mine) if each is not None]
        together = {name: np.concatenate([each[name] for each in found]) for name in _COLUMNS}
        order = np.argsort(together["images"])
        return Outcomes(**{name: values[order] for name, values in together.items()})
