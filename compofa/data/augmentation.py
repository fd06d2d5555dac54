"""Settings of the augmentation of training images. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass

AUTO_AUGMENTS = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugmentWide"}
"""Values of ``--auto-augment``, and the classes of ``torchvision.transforms.v2`` that they name.

RandAugment: Cubuk et al., NeurIPS 2020. TrivialAugment: Müller and Hutter, ICCV 2021. torchvision's
defaults are used: two operations of magnitude 9 of 31, and one operation of a random magnitude.
"""

TRIVIAL_SHIFT = 32
"""TrivialAugment shifts by up to this many pixels, whatever the size of the image."""


@dataclass(frozen=True)
class AugmentationSettings:
    """What is done to training images besides the data set's own augmentation.

    The defaults are those of the published training.

    Attributes:
        auto_augment: A key of :data:`AUTO_AUGMENTS`, or ``none``.
        random_erasing: Probability that a rectangle is erased (Zhong et al., AAAI 2020), in [0, 1].
        crop_scale: Smallest area of a random crop of a photograph, as a share of its area.
        color_jitter: Strength of the jitter of brightness, contrast and saturation of photographs,
            in [0, 1]; ``None`` for that of the published training.
    """

    auto_augment: str = "none"
    random_erasing: float = 0.0
    crop_scale: float = 0.08
    color_jitter: float | None = None
