"""The classifier of a trained network for other classes: kept, reordered or replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from compofa.data.imagenet import WNIDS, require_order
from compofa.io.checkpoint import Checkpoint
from compofa.nn.supernet import initialise


def outputs_of(found: Checkpoint, classes: Sequence[str] | int) -> list[int] | None:
    """Return the outputs of a trained network that stand for classes, in their order.

    Class names are compared. A network whose file does not name its classes is taken to have the
    given ones if it has as many outputs; if these are the 1,000 of ImageNet, names other than
    ImageNet's or the numbers 0 to 999 are other classes.

    Args:
        found: The network.
        classes: Names of the classes, or their number.

    Returns:
        One output per class; ``None`` if the network was not trained on exactly these classes.

    Raises:
        DataError: The network has no class names, and ``classes`` are the numbers 0 to 999 in
            another order.
    """
    outputs = found.network.classes
    if isinstance(classes, int):
        return list(range(outputs)) if classes == outputs else None
    if len(classes) != outputs:
        return None
    names = found.classes
    if not names:
        require_order(tuple(classes))
        numbers = all(name.isascii() and name.isdecimal() for name in classes)
        if outputs != len(WNIDS) or numbers:
            return list(range(outputs))
        names = WNIDS
    places = {name: output for output, name in enumerate(names)}
    return [places[name] for name in classes] if places.keys() == {*classes} else None


def with_classes(found: Checkpoint, classes: Sequence[str] | int, seed: int = 0) -> Checkpoint:
    """Return a trained network with the classifier for other classes.

    A network of the same classes in another order gets its outputs in the given order. For other
    classes the classifier is a new one, initialised as that of a new network.

    Args:
        found: The network, with weights by this library's names.
        classes: Names of the classes in the order of the logits, or their number.
        seed: Seed of a new classifier.

    Returns:
        ``found`` itself if its outputs are these classes in this order.

    Raises:
        DataError: As :func:`outputs_of`.
        SpaceError: The number of classes is out of range.
    """
    outputs = outputs_of(found, classes)
    names = () if isinstance(classes, int) else tuple(classes)
    if outputs == list(range(found.network.classes)):
        return found if not names or names == found.classes else replace(found, classes=names)
    keys = [name for name in found.weights if name.startswith("classifier.")]
    weights = dict(found.weights)
    if outputs is not None:
        weights |= {key: weights[key][outputs] for key in keys}
        return replace(found, weights=weights, classes=names, training=None, digest="")
    network = found.network.with_classes(len(names) if names else int(classes))
    inputs = weights["classifier.weight"].shape[1]
    classifier = nn.utils.skip_init(nn.Linear, inputs, network.classes)
    with torch.no_grad():
        initialise(classifier, seed)
    weights |= {f"classifier.{name}": value for name, value in classifier.state_dict().items()}
    return replace(
        found, network=network, weights=weights, classes=names, figures={}, training=None, digest=""
    )
