"""Settings for images that have no recipe of their own, from a survey of what is there.

Options that are given win. The rows of :data:`compofa.training.recipes.OWN_IMAGES` are those of
data sets of about 2,000 images; :func:`suggest` fits them to others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from compofa.data.sampling import steps_per_epoch
from compofa.data.survey import Survey
from compofa.networks.zoo import NETWORKS
from compofa.training.config import TrainConfig, flag
from compofa.training.optimizers import OPTIMIZERS
from compofa.training.recipes import TRANSFER, Phase

COUPLED = ("compofa-small", "compofa-medium", "compofa")
FREE = ("ofa-small", "ofa-medium", "ofa_mbv3_d234_e346_k357_w1.0")
"""Networks for own images by increasing size: compound spaces, and those of phases that need free
choices."""
ANY_SIZE = "imagefolder"
"""The data set that says nothing about its images; others state their network and resolutions."""
SETTINGS = (
    "net", "image_size", "eval_size", "batch_size", "epochs", "warmup_epochs", "lr",
    "validate_every", "workers", "threads",
)  # fmt: skip
"""What is suggested, in the order of the table."""

MANY_IMAGES = 10_000
"""Training images from which photographs are used at more than 128 pixels from scratch."""
STEPS = 32
"""Steps per epoch up to which a row's number of epochs holds; with more steps there are fewer
epochs, at least a quarter."""
VALIDATION_SHARE = 0.1
"""Cost of validation as a share of training, at most."""


class Suggestion(NamedTuple):
    """A value and the reason for it."""

    value: Any
    why: str


@dataclass(frozen=True)
class Before:
    """Trained network that a run starts from or is taught by.

    Attributes:
        source: What it is, for messages.
        net: Its id; ``None`` if it is none of the zoo.
        eval_size: Resolution to evaluate it at, in pixels.
        image_size: Resolutions that it was trained at; empty if unknown.
        initial: Whether ``--init-path`` names it.
        same_classes: Whether it has the classes of the images.
    """

    source: str
    net: str | None
    eval_size: int
    image_size: tuple[int, ...] = ()
    initial: bool = False
    same_classes: bool = True


def suggest(
    config: TrainConfig, found: Survey, before: Before | None = None
) -> dict[str, Suggestion]:
    """Return values for the settings that were not given.

    Args:
        config: The settings as given.
        found: What the data set holds.
        before: The network that the phase starts from or is taught by, if any.
    """
    phase, chosen = config.recipe_phase, {}
    if config.dataset == ANY_SIZE or (before is not None and before.image_size):
        chosen |= _sizes(config, phase, found, before)
    batch = config.batch_size
    if batch is None:
        chosen["batch_size"] = usual = _batch(found.train)
        batch = usual.value
    steps = steps_per_epoch(found.train, min(batch, found.train), 1)
    transferred = phase.single or (
        before is not None
        and before.initial
        and (phase.starts_from is None or not before.same_classes)
    )
    row = TRANSFER if transferred else phase
    epochs = max(1, round(row.epochs * min(1, max(0.25, STEPS / steps))))
    often = "step" if steps == 1 else f"{steps:,} steps"
    start = "from trained weights, " * transferred
    chosen["epochs"] = Suggestion(
        epochs, f"{start}{epochs * steps:,} steps in all, at {often} per epoch"
    )
    epochs = epochs if config.epochs is None else config.epochs
    warmup = min(epochs - 1, round(epochs * row.warmup_epochs / row.epochs))
    chosen["warmup_epochs"] = Suggestion(warmup, f"of {epochs} epochs")
    lr = OPTIMIZERS[config.optimizer].default_lr(row.base_lr, batch)
    chosen["lr"] = Suggestion(lr, f"{start}peak for {batch} images per step")
    chosen["validate_every"] = _interval(config, phase, found, epochs)
    return {name: each for name, each in chosen.items() if getattr(config, name) is None}


def _sizes(
    config: TrainConfig, phase: Phase, found: Survey, before: Before | None
) -> dict[str, Suggestion]:
    """Suggest resolutions and network."""
    sizes, why = config.image_size or (), "given"
    if not sizes and before is not None and before.image_size:
        sizes, why = before.image_size, f"those of {before.source}"
    elif not sizes:
        largest, why = _largest(found, before)
        sizes = (largest,) if phase.single else resolutions(largest)
        if before is not None:  # none far below those of the weights
            row = NETWORKS.get(before.net)
            sizes = tuple(size for size in sizes if row is None or row.serves(size)) or (largest,)
    chosen = {
        "image_size": Suggestion(tuple(sizes), why),
        "eval_size": Suggestion(max(sizes), "the largest of training"),
    }
    if phase.single or config.follows_weights:
        return chosen
    if before is not None and before.net is not None:
        chosen["net"] = Suggestion(before.net, f"that of {before.source}")
    else:
        net = network_for(max(sizes), FREE if phase.free else COUPLED)
        low, high = NETWORKS[net].sizes
        chosen["net"] = Suggestion(net, f"for images of {low} to {high} pixels")
    return chosen


def _largest(found: Survey, before: Before | None) -> tuple[int, str]:
    """Return the largest resolution of training and the reason for it."""
    side = max(16, found.side - found.side % 8)
    typical = f"images of {found.side} pixels (shorter side)"
    if before is not None:
        row = NETWORKS.get(before.net)
        low = min(before.eval_size, row.sizes[0] if row and row.sizes else before.eval_size)
        largest = min(before.eval_size, max(low, side))
        return largest, f"{typical}, {before.source} at {before.eval_size}"
    if found.train < MANY_IMAGES and side > NETWORKS[COUPLED[1]].sizes[1]:
        return NETWORKS[COUPLED[1]].sizes[1], f"{typical}, fewer than {MANY_IMAGES:,} of them"
    return min(224, side), typical


def resolutions(largest: int) -> tuple[int, ...]:
    """Return resolutions to sample in training: multiples of 4 from 5/8 of the largest up."""
    return tuple(sorted({max(8, largest * eighths // 32 * 4) for eighths in (5, 6, 7, 8)}))


def with_network_for_sizes(config: TrainConfig) -> TrainConfig:
    """Return settings with the network for the image sizes that were given, if it was not."""
    largest = max([*(config.image_size or ()), config.eval_size or 0])
    if config.dataset != ANY_SIZE or not largest or config.net or config.follows_weights:
        return config
    phase = config.recipe_phase
    if phase.single:
        return config
    return replace(config, net=network_for(largest, FREE if phase.free else COUPLED))


def network_for(resolution: int, networks: Iterable[str] = COUPLED) -> str:
    """Return the first of ``networks`` that is for images of this side, else the last."""
    *others, last = networks
    return next((net for net in others if resolution <= NETWORKS[net].sizes[1]), last)


def _batch(images: int) -> Suggestion:
    """Suggest a power of two that leaves 20 steps per epoch, from 16 to 128 (or 256)."""
    most = 256 if images >= 10 * MANY_IMAGES else 128
    batch = min(most, max(16, 1 << max(0, (images // 20).bit_length() - 1)))
    return Suggestion(max(2, min(batch, images)), f"for {images:,} training images")


def _interval(config: TrainConfig, phase: Phase, found: Survey, epochs: int) -> Suggestion:
    """Suggest epochs between validations so that these cost little beside training.

    A training image costs three times as much as one in evaluation, per subnet.
    """
    networks = 1 if phase.largest_only or phase.single else 2
    calibration = 0 if phase.single else min(config.calibration_images, found.train)
    cost = networks * (found.validation + calibration)
    subnets = config.dynamic_batch_size or phase.subnets
    every = -(-cost // max(1, int(VALIDATION_SHARE * 3 * subnets * found.train)))
    every = max(1, min(every, epochs // 5))
    return Suggestion(every, f"{networks * found.validation:,} images and BN calibration each time")


def table(config: TrainConfig, given: TrainConfig, reasons: dict[str, Suggestion]) -> list[str]:
    """Return lines with option, value and reason of each setting that was not given.

    Args:
        config: Resolved settings.
        given: The settings as given.
        reasons: What was suggested.
    """
    rows = []
    for name in SETTINGS:
        value = getattr(config, name)
        if getattr(given, name) is None and value is not None and name in reasons:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
            text = f"{value:.4g}" if isinstance(value, float) else text
            rows.append((flag(name), text, reasons[name].why))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows]


def heading(found: Survey) -> str:
    """Return one line about the images, with what a user should know about them."""
    low, high = found.sides
    spread = f" ({low} to {high} without the smallest and largest tenth)" if low < high else ""
    text = (
        f"{found.train:,} training and {found.validation:,} validation images of "
        f"{len(found.classes)} classes, typical shorter side {found.side} pixels{spread}"
    )
    if found.imbalance >= 2:
        text += f"; {found.fewest:,} to {found.most:,} training images per class"
    return text


EXAMPLES = ((24, 2_000), (64, 2_000), (64, 20_000), (500, 300), (500, 5_000), (500, 50_000))
"""Shorter sides in pixels and numbers of training images of the table in the documentation."""


def examples() -> list[str]:
    """Return the lines of a Markdown table: what is suggested for some kinds of images."""
    lines = [
        "| your images | training images | network | training at, px | batch | teacher's epochs |",
        "|---|---|---|---|---|---|",
    ]
    config = TrainConfig(task="teacher", dataset=ANY_SIZE, data_path="DIR")
    for side, images in EXAMPLES:
        names = tuple(map(str, range(10)))
        share = images // 10
        found = Survey(images, share, names, share, share, side, (side, side), True)
        row = {name: each.value for name, each in suggest(config, found).items()}
        sizes = ", ".join(map(str, row["image_size"]))
        lines.append(
            f"| {side} px | {images:,} | `{row['net']}` | {sizes} | {row['batch_size']} "
            f"| {row['epochs']} |"
        )
    return lines


def filled(config: TrainConfig, suggestions: dict[str, Suggestion]) -> TrainConfig:
    """Return settings with suggestions in place of what was not given."""
    return replace(config, **{name: each.value for name, each in suggestions.items()})
