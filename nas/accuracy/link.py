"""Scales that a Gaussian process on accuracies works on: percent, or the logit of a share."""

from __future__ import annotations

import numpy as np

MOST = 30.0
"""Greatest absolute logit that is turned back into percent, well within float64."""


class Points:
    """Percentage points as they are, for accuracies whose number of images is not known."""

    def __call__(self, top1: np.ndarray) -> np.ndarray:
        """Return ``top1``."""
        return np.asarray(top1, dtype=np.float64)

    def percent(self, values: np.ndarray) -> np.ndarray:
        """Return ``values``."""
        return values

    def slope(self, values: np.ndarray) -> np.ndarray:
        """Return ones."""
        return np.ones_like(values)


class Logit:
    """The logit of a share of images, so that every prediction lies between 0 and 100 %.

    Half a hit and half a miss are added to the counts (the empirical logit; Cox and Snell, Analysis
    of Binary Data, 1989), so that 0 and 100 % of few images are finite. On the way back nothing is
    subtracted: a prediction stays that far from 0 and 100 %, as the images cannot tell more.

    Args:
        images: Number of images of each measurement.
    """

    def __init__(self, images: int) -> None:
        self.images = images

    def __call__(self, top1: np.ndarray) -> np.ndarray:
        """Return the empirical logit of top-1 in percent."""
        hits = np.asarray(top1, dtype=np.float64) / 100 * self.images
        return np.log((hits + 0.5) / (self.images - hits + 0.5))

    def percent(self, values: np.ndarray) -> np.ndarray:
        """Return the logistic function of ``values``, in percent."""
        return 100 / (1 + np.exp(-np.clip(values, -MOST, MOST)))

    def slope(self, values: np.ndarray) -> np.ndarray:
        """Return the derivative of :meth:`percent`."""
        share = self.percent(values) / 100
        return 100 * share * (1 - share)
