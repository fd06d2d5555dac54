"""Image transforms for training, with explicit seeds, and for evaluation.

Small images of one size are transformed per batch (``affine``, ``crop``), photographs one by one
with torchvision (``inception``). Global random states are left unchanged.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from compofa.data.augmentation import AUTO_AUGMENTS, AugmentationSettings
from compofa.data.catalog import DatasetInfo, ImageTransform, Normalisation
from compofa.data.sampling import random_bits
from compofa.data.sources import RawImage
from compofa.data.torchvision_shim import import_torchvision
from compofa.errors import DataError

_PUBLISHED = AugmentationSettings()
_AUTO_AUGMENT, _ERASING = 1 << 32, 1 << 33  # positions in the streams of the augmentation seeds
_MAX_ASPECT = 8  # longer images are centre-cropped before they are resized for evaluation


def uniforms(seeds: NDArray[np.uint64], n: int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), float64 [len(seeds), n], each row from its own seed."""
    bits = random_bits(seeds[:, None], np.arange(n, dtype=np.uint64)[None])
    return (bits >> np.uint64(11)) * 2.0**-53


def train_images(
    images: Sequence[RawImage] | torch.Tensor,
    seeds: NDArray[np.uint64],
    resolution: int,
    info: DatasetInfo,
    settings: AugmentationSettings = _PUBLISHED,
) -> torch.Tensor:
    """Augment training images, all but random erasing.

    Args:
        images: uint8 [n, 3, h, w]; for ``inception`` also a list of n images.
        seeds: Augmentation seeds, uint64 [n].
        resolution: Side of the result, in pixels.
        info: The data set, with its augmentation.
        settings: What is done besides.

    Returns:
        [n, 3, resolution, resolution], uint8 in [0, 255] or float32 in [0, 1].

    Raises:
        DataError: A transform of the data set returns something else.
    """
    if info.train_transform is not None:
        return _own(info.train_transform, images, resolution, info, seeds.tolist())
    if info.augmentation == "inception":
        crops = [
            random_resized_crop(image, int(seed), resolution, settings)
            for image, seed in zip(images, seeds, strict=True)
        ]
        return torch.stack(crops) if crops else _empty(resolution)
    if info.augmentation == "affine":
        images = auto_augment(images, seeds, settings.auto_augment)
        return random_affine(images, seeds, resolution)
    crops = random_crop(images, seeds, info.pad, info.flip)
    return resize(auto_augment(crops, seeds, settings.auto_augment), resolution)


def eval_images(
    images: Sequence[RawImage] | torch.Tensor, resolution: int, info: DatasetInfo
) -> torch.Tensor:
    """Resize images for evaluation; with ``inception``, crop the centre.

    Args:
        images: uint8 [n, 3, h, w]; for ``inception`` also a list of n images.
        resolution: Side of the result, in pixels.
        info: The data set, with its augmentation.

    Returns:
        uint8 [n, 3, resolution, resolution], or what the data set's own transform returns.

    Raises:
        DataError: A transform of the data set returns something else.
    """
    if info.eval_transform is not None:
        return _own(info.eval_transform, images, resolution, info, [0] * len(images))
    if info.augmentation == "inception":
        crops = [centre_crop(image, resolution) for image in images]
        return torch.stack(crops) if crops else _empty(resolution)
    return resize(images, resolution)


def input_rule(info: DatasetInfo, normalisation: Normalisation, resolution: int) -> dict[str, Any]:
    """Return what :func:`eval_images` and :func:`normalise` do, as JSON data for other programs.

    Args:
        info: The data set.
        normalisation: Means and standard deviations of the network's inputs.
        resolution: Side of the images, in pixels.

    Returns:
        ``steps``, in order, each with its ``operation``; sizes are [height, width] in pixels, and
        ``resize_shorter_side`` keeps the aspect ratio. Then images in RGB are divided by 255 and
        normalised with ``mean`` and ``std`` per channel; ``layout`` is that of a batch.
    """
    resize = {"interpolation": "bilinear", "antialias": True}
    if info.eval_transform is not None:
        steps = [{"operation": "eval_transform", "dataset": info.name}]
    elif info.augmentation == "inception":
        steps = [
            {"operation": "centre_crop_to_aspect_ratio", "at_most": _MAX_ASPECT},
            {"operation": "resize_shorter_side", "size": _shorter_side(resolution), **resize},
            {"operation": "centre_crop", "size": [resolution, resolution]},
        ]
    else:
        sides = dict.fromkeys((info.native_size, resolution))
        steps = [{"operation": "resize", "size": [side, side], **resize} for side in sides]
    return {
        "steps": steps, "colours": "RGB", "scale": 1 / 255, "mean": list(normalisation.mean),
        "std": list(normalisation.std), "layout": "NCHW", "dtype": "float32",
    }  # fmt: skip


def _shorter_side(resolution: int) -> int:
    """Return the shorter side that photographs are resized to before the centre crop."""
    return math.ceil(resolution / 0.875)


def _own(
    transform: ImageTransform,
    images: Sequence[RawImage] | torch.Tensor,
    resolution: int,
    info: DatasetInfo,
    seeds: Sequence[int],
) -> torch.Tensor:
    """Apply a data set's own transform to each image, with torch's generator seeded."""
    done: list[torch.Tensor] = []
    for image, seed in zip(images, seeds, strict=True):
        with seeded_cpu(int(seed)):
            done.append(transform(image, resolution))
        shape = tuple(getattr(done[-1], "shape", ()))
        kind = getattr(done[-1], "dtype", type(done[-1]).__name__)
        if shape != (3, resolution, resolution) or kind not in (torch.uint8, torch.float32):
            raise DataError(
                f"{info.name}: expected its transform to return uint8 or float32 "
                f"[3, {resolution}, {resolution}], got {kind} {list(shape)}"
            )
    return torch.stack(done) if done else _empty(resolution)


def normalise(images: torch.Tensor, normalisation: Normalisation) -> torch.Tensor:
    """Normalise images per channel.

    Args:
        images: [n, 3, h, w], uint8 in [0, 255] or float32 in [0, 1].
        normalisation: Means and standard deviations of images in [0, 1].

    Returns:
        float32 [n, 3, h, w].
    """
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    mean = torch.tensor(normalisation.mean).view(1, 3, 1, 1) * scale
    std = torch.tensor(normalisation.std).view(1, 3, 1, 1) * scale
    return images.sub(mean).div_(std)  # uint8 minus float32 is float32


def resize(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """Resize uint8 [n, 3, h, w] bilinearly (antialiased) to uint8 [n, 3, resolution, resolution].

    In uint8 this is several times faster than in float32, and exact for any number of threads.
    """
    if not len(images):
        return _empty(resolution)
    if images.shape[-2:] == (resolution, resolution):
        return images
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)


def random_crop(
    images: torch.Tensor, seeds: NDArray[np.uint64], pad: int, flip: bool
) -> torch.Tensor:
    """Crop each image at random after padding it with black, and flip half of them.

    Args:
        images: uint8 [n, 3, h, w].
        seeds: uint64 [n].
        pad: Padding on each side, in pixels.
        flip: Whether to flip horizontally with probability 0.5.

    Returns:
        uint8 [n, 3, h, w].
    """
    n, _, height, width = images.shape
    draws = uniforms(seeds, 3)
    down, right = (draws[:, :2] * (2 * pad + 1)).astype(np.int64).T
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    crops = windows[np.arange(n), :, down, right]
    if flip:
        flipped = draws[:, 2] < 0.5
        crops[flipped] = crops[flipped][..., ::-1]
    return torch.from_numpy(crops)


def random_affine(
    images: torch.Tensor,
    seeds: NDArray[np.uint64],
    resolution: int,
    degrees: float = 12.0,
    shift: float = 1 / 8,
    scale: tuple[float, float] = (0.9, 1.1),
) -> torch.Tensor:
    """Rotate, translate and scale each image at random on black, and resize it, in one step.

    Args:
        images: uint8 [n, 3, h, w].
        seeds: uint64 [n].
        resolution: Side of the result, in pixels.
        degrees: Maximal rotation in either direction.
        shift: Maximal translation in either direction, as a fraction of the side.
        scale: Minimal and maximal scale factor.

    Returns:
        float32 [n, 3, resolution, resolution] in [0, 1].
    """
    if not len(images):
        return torch.zeros(0, 3, resolution, resolution)
    draws = uniforms(seeds, 4)
    angle = np.deg2rad(degrees) * (2 * draws[:, 0] - 1)
    move = 2 * shift * (2 * draws[:, 1:3] - 1)  # the image spans [-1, 1]
    zoom = 1 / (scale[0] + (scale[1] - scale[0]) * draws[:, 3])
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    # As affine_grid, but written as sums: bit-identical for any batch size.
    line = (2 * np.arange(resolution) + 1) / resolution - 1
    x, y = line[None, None, :], line[None, :, None]
    cos, sin, move = cos[:, None, None], sin[:, None, None], move[:, None, None, :]
    grid = np.stack([cos * x - sin * y + move[..., 0], sin * x + cos * y + move[..., 1]], axis=-1)
    return F.grid_sample(
        images.to(torch.float32) / 255,
        torch.from_numpy(grid.astype(np.float32)),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )


def auto_augment(images: torch.Tensor, seeds: NDArray[np.uint64], name: str) -> torch.Tensor:
    """Apply an automatic augmentation to each image of a batch.

    Args:
        images: uint8 [n, 3, h, w].
        seeds: Augmentation seeds, uint64 [n].
        name: A key of :data:`compofa.data.augmentation.AUTO_AUGMENTS`; ``none`` changes nothing.

    Returns:
        uint8 [n, 3, h, w].
    """
    if name == "none" or not len(images):
        return images
    pipeline = _auto_pipeline(name)
    return _each(pipeline, images, seeds, _AUTO_AUGMENT)


def random_erasing(
    images: torch.Tensor, seeds: NDArray[np.uint64], probability: float
) -> torch.Tensor:
    """Set a rectangle of some images to 0, which is the mean colour of normalised images.

    Args:
        images: Normalised images, float32 [n, 3, h, w].
        seeds: Augmentation seeds, uint64 [n].
        probability: Probability for each image.

    Returns:
        float32 [n, 3, h, w].
    """
    if not probability or not len(images):
        return images
    erase = import_torchvision().transforms.v2.RandomErasing(probability)
    return _each(erase, images, seeds, _ERASING)


def random_resized_crop(
    image: RawImage, seed: int, resolution: int, settings: AugmentationSettings = _PUBLISHED
) -> torch.Tensor:
    """Apply RandomResizedCrop, RandomHorizontalFlip and ColorJitter to one image.

    Scale 0.08 to 1, brightness 32/255 and saturation 0.5 are those of the published OFA training.
    An automatic augmentation comes last.

    Args:
        image: A photograph of any size.
        seed: Augmentation seed.
        resolution: Side of the result, in pixels.
        settings: Scale and colours of other trainings.

    Returns:
        uint8 [3, resolution, resolution].
    """
    with seeded_cpu(seed):
        return _train_pipeline(resolution, settings)(image)


def centre_crop(image: RawImage, resolution: int) -> torch.Tensor:
    """Resize the shorter side to ceil(resolution / 0.875) and crop the centre.

    Args:
        image: A photograph of any size.
        resolution: Side of the result, in pixels.

    Returns:
        uint8 [3, resolution, resolution].
    """
    width, height = image.size if isinstance(image, Image.Image) else image.shape[:0:-1]
    if max(width, height) > _MAX_ASPECT * min(width, height):
        v2 = import_torchvision().transforms.v2
        longest = _MAX_ASPECT * min(width, height)
        image = v2.functional.center_crop(image, [min(height, longest), min(width, longest)])
    return _eval_pipeline(resolution)(image)


@functools.lru_cache(maxsize=64)
def _train_pipeline(
    resolution: int, settings: AugmentationSettings
) -> Callable[[RawImage], torch.Tensor]:
    v2 = import_torchvision().transforms.v2
    crop = v2.RandomResizedCrop(resolution, scale=(settings.crop_scale, 1.0), antialias=True)
    steps = [crop, v2.RandomHorizontalFlip()]
    strength = settings.color_jitter
    if strength is None:
        steps.append(v2.ColorJitter(brightness=32 / 255, saturation=0.5))
    elif strength:
        # The mean of a tensor, which contrast depends on, would vary with the number of threads.
        steps += [v2.ToPILImage(), v2.ColorJitter(strength, strength, strength)]
    if settings.auto_augment != "none":
        steps.append(_auto_pipeline(settings.auto_augment))
    return v2.Compose([*steps, v2.PILToTensor()])


@functools.lru_cache(maxsize=64)
def _auto_pipeline(name: str) -> Callable[[RawImage], torch.Tensor]:
    v2 = import_torchvision().transforms.v2
    return v2.Compose([v2.ToPILImage(), getattr(v2, AUTO_AUGMENTS[name])(), v2.PILToTensor()])


def _each(
    transform: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    seeds: NDArray[np.uint64],
    position: int,
) -> torch.Tensor:
    """Transform each image with torch's generator seeded from its own seed's stream."""
    own = (random_bits(seeds, position) >> np.uint64(1)).tolist()
    changed = []
    for image, seed in zip(images, own, strict=True):
        with seeded_cpu(seed):
            changed.append(transform(image))
    return torch.stack(changed)


@functools.lru_cache(maxsize=64)
def _eval_pipeline(resolution: int) -> Callable[[RawImage], torch.Tensor]:
    v2 = import_torchvision().transforms.v2
    return v2.Compose(
        [
            v2.Resize(_shorter_side(resolution), antialias=True),
            v2.CenterCrop(resolution),
            v2.PILToTensor(),
        ]
    )


@contextmanager
def seeded_cpu(seed: int) -> Iterator[None]:
    """Seed the global CPU generator, which torchvision uses, and restore it afterwards.

    ``torch.manual_seed`` would also seed the generators of GPUs.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def _empty(resolution: int) -> torch.Tensor:
    return torch.zeros(0, 3, resolution, resolution, dtype=torch.uint8)
