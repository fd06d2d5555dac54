"""Prediction: the most probable classes of image files, transformed as in evaluation."""

from __future__ import annotations

import csv
import glob
import io
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compofa.data import (
    DatasetInfo,
    FilesSource,
    Normalisation,
    calibration_loader,
    dataset_info,
    eval_loader,
    import_torchvision,
)
from compofa.data.folders import IMAGE_SUFFIXES, image_paths
from compofa.data.imagenet import is_imagenet
from compofa.distributed.threads import cpu_threads, default_threads
from compofa.errors import CheckpointError, DataError, SpaceError
from compofa.io.atomic import write_text_atomic
from compofa.io.checkpoint import Checkpoint
from compofa.io.export import card_path, load_onnx
from compofa.io.untrusted import printable
from compofa.networks.network_spec import network_from_json
from compofa.networks.supernet_spec import field
from compofa.nn.static import StaticNetwork
from compofa.space.subnet import numbers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        image: Path of the image.
        classes: Names of the classes, the most probable first.
        probabilities: Their probabilities, in [0, 1].
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ImageInput:
    """How a network takes images: the transform of evaluation on its data set.

    Attributes:
        info: The data set, which decides how images are resized and cropped
            (:func:`compofa.data.transforms.eval_images`).
        normalisation: Mean and standard deviation of the network's inputs.
        resolution: Resolution in pixels.
    """

    info: DatasetInfo
    normalisation: Normalisation
    resolution: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, resolution: int) -> ImageInput:
        """Return that of a network at a resolution in pixels.

        Raises:
            DataError: The data set of the checkpoint is not registered.
        """
        return cls(dataset_info(checkpoint.dataset), checkpoint.normalisation, resolution)

    def source(self, images: Sequence[str]) -> FilesSource:
        """Return image files as a source; their targets are 0."""
        paths = np.array([os.fsencode(path) for path in images])
        targets = np.zeros(len(images), dtype=np.int64)
        return FilesSource("", paths, targets, self.info.native_size)


class Classifier:
    """A network that classifies image files.

    Args:
        run: From normalised images [n, 3, r, r] to logits [n, classes].
        classes: Names of the classes, in the order of the logits.
        image_input: How the network takes images.
        device: Device that ``run`` computes on.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Tensor],
        classes: tuple[str, ...],
        image_input: ImageInput,
        device: str | torch.device = "cpu",
    ) -> None:
        self.run, self.classes, self.input = run, classes, image_input
        self.device = torch.device(device)

    @classmethod
    def of(cls, network: StaticNetwork, checkpoint: Checkpoint, resolution: int) -> Classifier:
        """Return the classifier of a network, on the network's device.

        Args:
            network: A specialised network, or a calibrated subnet.
            checkpoint: Where it comes from: classes, normalisation and data set.
            resolution: Resolution in pixels.

        Raises:
            DataError: The data set of the checkpoint is not registered.
        """
        names = class_names(checkpoint.classes, checkpoint.network.classes)
        device = next(network.parameters()).device
        return cls(network.eval(), names, ImageInput.of(checkpoint, resolution), device)

    @classmethod
    def of_onnx(cls, path: str | Path) -> Classifier:
        """Return the classifier of an ONNX file with its card, which runs in ONNX Runtime.

        Raises:
            ConfigError: onnxruntime is not installed.
            CheckpointError: The file or its card is missing or damaged, or they do not fit.
            DataError: The data set of the card is not registered.
        """
        run, card = load_onnx(path)
        try:
            network = network_from_json(field(card, "network", dict))
            names = field(card, "classes", list)
            if any(type(name) is not str for name in names) or len(names) not in (
                0,
                network.classes,
            ):
                raise SpaceError(f"classes: expected {network.classes} names, got {names!r:.80}")
            values = field(card, "normalisation", dict)
            mean, std = (
                tuple(map(float, numbers(key, field(values, key, list)))) for key in ("mean", "std")
            )
            norm, resolution = Normalisation(mean, std), field(card, "resolution", int)
            network.check_resolution(resolution)
            dataset = field(card, "dataset", str)
        except (DataError, SpaceError) as error:
            raise CheckpointError(
                f"{card_path(path)}: expected the card that export writes: {error}"
            ) from error
        logits = run(torch.zeros(1, 3, resolution, resolution))
        if logits.shape != (1, network.classes):
            raise CheckpointError(
                f"{path}: expected logits of the {network.classes} classes of its card, got an "
                f"output of shape {tuple(logits.shape)}"
            )
        image_input = ImageInput(dataset_info(dataset), norm, resolution)
        return cls(run, class_names(tuple(names), network.classes), image_input)

    def predict(
        self,
        images: Sequence[str],
        top: int = 3,
        *,
        batch_size: int = 64,
        workers: int = 0,
        progress: Callable[[int], object] = lambda images: None,
    ) -> list[Prediction]:
        """Return the most probable classes of each image; unreadable images are logged and skipped.

        Args:
            images: Paths of image files, in their order of the result.
            top: Classes per image; all of them if the network has fewer.
            batch_size: Images per batch.
            workers: Loader workers.
            progress: Called after each batch with its number of images.

        Raises:
            DataError: No image can be read, or logits are not finite.
        """
        loader = eval_loader(
            self.input.source(images),
            self.input.info,
            resolution=self.input.resolution,
            batch_size=batch_size,
            workers=workers,
            normalisation=self.input.normalisation,
        )
        found: list[Prediction] = []
        with cpu_threads(default_threads(self.input.resolution)):
            for start, batch in zip(range(0, len(images), batch_size), loader, strict=True):
                chunk = images[start : start + batch_size]
                broken = dict(batch.broken)
                for path, reason in broken.items():
                    log.warning("skipping unreadable image: %s: %s", printable(path), reason)
                kept = [path for path in chunk if path not in broken]
                found += self._most_probable(kept, batch.images, top)
                progress(len(chunk))
        if not found:
            raise DataError(f"none of {len(images)} images can be read: see the warnings above")
        return found

    def _most_probable(self, paths: Sequence[str], images: Tensor, top: int) -> list[Prediction]:
        if not paths:
            return []
        with torch.inference_mode():
            images = images.to(self.device, memory_format=torch.channels_last)
            logits = self.run(images).float().cpu()
            best = logits.topk(min(top, logits.shape[1]), dim=1).indices
            probabilities = logits.softmax(dim=1).gather(1, best)
        broken = int((~logits.isfinite()).any(dim=1).sum())
        if broken:
            raise DataError(
                f"expected finite logits, got NaN or infinite ones for {broken} of {len(paths)} "
                "images: check the weights"
            )
        return [
            Prediction(path, tuple(self.classes[index] for index in row), tuple(values))
            for path, row, values in zip(paths, best.tolist(), probabilities.tolist(), strict=True)
        ]


def class_names(names: tuple[str, ...], outputs: int) -> tuple[str, ...]:
    """Return the names of a network's classes, in the order of its logits.

    Networks for ImageNet whose files lack names get torchvision's English ones, all other networks
    without names ``class 0``, ``class 1``, …

    Args:
        names: Names in the network's file; may be empty.
        outputs: Number of classes.
    """
    if names:
        return names
    if not is_imagenet(names, outputs):
        return tuple(f"class {index}" for index in range(outputs))
    weights = import_torchvision().models.MobileNet_V3_Large_Weights.IMAGENET1K_V1
    return tuple(weights.meta["categories"])


def calibration_images(
    image_input: ImageInput, images: Sequence[str], n_images: int, seed: int = 0
) -> list[Tensor]:
    """Return batches of given images to calibrate BN on, where there are no training images.

    Args:
        image_input: How the network takes images.
        images: Paths of image files; unreadable ones are left out.
        n_images: Number of images; all of them if there are fewer.
        seed: Seed of the sample of images.
    """
    loader = calibration_loader(
        image_input.source(images),
        image_input.info,
        resolution=image_input.resolution,
        batch_size=256,
        seed=seed,
        n_images=n_images,
        normalisation=image_input.normalisation,
    )
    return [batch.images.contiguous(memory_format=torch.channels_last) for batch in loader]


def find_images(words: Iterable[str]) -> list[str]:
    """Return the image files of paths: files, folders (searched recursively) and glob patterns.

    Args:
        words: Paths and patterns (``*``, ``?``, ``[…]``, ``**``). A file is taken whatever its
            name is; of the files in a folder, those with the suffix of an image are.

    Returns:
        The paths, each once, in the order of ``words`` and sorted within a folder or a pattern.

    Raises:
        DataError: There is nothing at a path, or it has no images.
    """
    found: dict[str, None] = {}
    for word in words:
        if os.path.lexists(word):
            inside = _inside(word) if os.path.isdir(word) else [word]
            what = "a folder without images"
        else:
            inside = [image for place in sorted(glob.glob(word, recursive=True))
                      for image in (_inside(place) if os.path.isdir(place) else [place])
                      if Path(image).suffix.lower() in IMAGE_SUFFIXES]  # fmt: skip
            what = "no image that matches" if glob.has_magic(word) else "nothing there"
        if not inside:
            raise DataError(
                f"{word}: expected an image, a folder of images or a pattern, got {what}"
            )
        found |= dict.fromkeys(inside)
    return list(found)


def _inside(folder: str) -> list[str]:
    paths = image_paths(Path(folder), Path(folder))
    return [os.path.join(folder, os.path.normpath(os.fsdecode(path))) for path in paths]


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as CSV, replacing ``path``.

    One row per image: ``image``, then ``class_1``, ``probability_1``, ``class_2``, … by falling
    probability.

    Raises:
        CompofaError: The file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ranks = range(1, len(predictions[0].classes) + 1)
    names = [f"{name}_{rank}" for rank in ranks for name in ("class", "probability")]
    writer.writerow(["image", *names])
    for found in predictions:
        pairs = zip(found.classes, found.probabilities, strict=True)
        values = [value for name, p in pairs for value in (name, f"{p:.6f}")]
        writer.writerow([found.image, *values])
    write_text_atomic(path, text.getvalue())
