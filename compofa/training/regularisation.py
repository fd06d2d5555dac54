"""Regularisation that is off by default: settings of augmentation, mixup, cutmix, and averaging.

Importable without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compofa.data.augmentation import TRIVIAL_SHIFT, AugmentationSettings
from compofa.data.catalog import dataset_info
from compofa.data.torchvision_shim import import_torchvision
from compofa.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim.swa_utils import AveragedModel

    from compofa.training.config import TrainConfig

MIXES = {"mixup": "MixUp", "cutmix": "CutMix"}
"""Settings whose value, if above 0, is the alpha of a class of ``torchvision.transforms.v2``.

mixup: Zhang et al., ICLR 2018. CutMix: Yun et al., ICCV 2019.
"""


def faults(config: TrainConfig) -> list[str]:
    """Return what is wrong with the settings of optimiser and augmentation, taken together.

    Args:
        config: Settings with all defaults filled in.
    """
    found = []
    kind = OPTIMIZERS.get(config.optimizer)
    if kind is not None and kind.momentum is None and config.momentum is not None:
        found.append(
            f"--momentum: expected none with --optimizer {config.optimizer}, got {config.momentum}"
        )
    info = dataset_info(config.dataset)
    photographs = info.augmentation == "inception" and info.train_transform is None
    usual, own = AugmentationSettings(), info.train_transform is not None
    because = "a transform of its own" if own else "no photographs"
    found += [
        f"--{name.replace('_', '-')}: expected none with --dataset {config.dataset}, which has "
        f"{because}"
        for name in ("crop_scale", "color_jitter", *["auto_augment"] * own)
        if not photographs and getattr(config, name) != getattr(usual, name)
    ]
    if own:
        return found
    side = min(config.image_size, default=0) if photographs else info.native_size
    if config.auto_augment == "trivialaugment" and side < TRIVIAL_SHIFT:
        found.append(
            f"--auto-augment: expected randaugment for images of {side} pixels, got "
            f"trivialaugment, which shifts by up to {TRIVIAL_SHIFT} pixels"
        )
    return found


def augmentation_settings(config: TrainConfig) -> AugmentationSettings:
    """Return what is done to each training image."""
    return AugmentationSettings(
        config.auto_augment, config.random_erasing, config.crop_scale, config.color_jitter
    )


def mix(
    images: Tensor, targets: Tensor, classes: int, config: TrainConfig, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix each image of a batch with its neighbour, by mixup or cutmix.

    One of the two is chosen at random for the batch if both are set. The same seed gives the same
    mixture.

    Args:
        images: Images, float32 [n, 3, r, r].
        targets: Class indices, int64 [n].
        classes: Number of classes.
        config: Settings.
        seed: Seed of the batch.

    Returns:
        Images, and probabilities of the classes, float32 [n, classes]; both arguments as they are
        if neither is set.
    """
    alphas = {name: getattr(config, name) for name in MIXES if getattr(config, name) > 0}
    if not alphas:
        return images, targets
    from compofa.data.transforms import seeded_cpu

    v2 = import_torchvision().transforms.v2
    mixes = [getattr(v2, MIXES[n])(alpha=a, num_classes=classes) for n, a in alphas.items()]
    with seeded_cpu(seed):
        return v2.RandomChoice(mixes)(images, targets)


def averaged(net: nn.Module, decay: float) -> AveragedModel:
    """Return an exponential moving average (EMA) of weights and BN statistics, and begin it.

    After n updates the next one has the decay min(``decay``, (1 + n) / (10 + n)), so that the
    average follows the weights closely at first (TensorFlow's ``ExponentialMovingAverage`` with
    ``num_updates``). The first update copies them.

    Args:
        net: The network, on its device.
        decay: Decay per step, in [0, 1).
    """
    import torch
    from torch.optim.swa_utils import AveragedModel

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], updates: Tensor | int) -> None:
        if averages[0].is_floating_point():
            n = int(updates)
            torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + n) / (10 + n)))
        else:  # the number of batches that BN has seen
            torch._foreach_copy_(averages, values)

    return AveragedModel(net, multi_avg_fn=update, use_buffers=True).requires_grad_(False)
