"""What a phase takes over from trained weights: definition, classes, normalisation."""

from __future__ import annotations

import logging
from dataclasses import replace

from compofa.data import DataSplits
from compofa.data.catalog import Normalisation
from compofa.data.imagenet import is_imagenet
from compofa.errors import CheckpointError
from compofa.io.open import OpenedNetwork
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import entry
from compofa.space.coupling import parse_coupling
from compofa.space.search_space import SearchSpace
from compofa.training.config import TrainConfig, default_network

log = logging.getLogger(__name__)


def with_classes_of(
    opened: OpenedNetwork, path: str, splits: DataSplits, seed: int
) -> OpenedNetwork:
    """Return a network with the classifier for the classes of a data set, and log what was done.

    Args:
        opened: The network.
        path: Its path or id, for the log.
        splits: The data set.
        seed: Seed of a new classifier.

    Raises:
        DataError: The network has no class names, and the numbered class folders of the data set
            are not in numerical order.
    """
    fitted = opened.with_classes(splits.classes, seed)
    if fitted.network is opened.network:
        return fitted
    if sorted(opened.classes) == sorted(splits.classes):
        log.info("%s has these classes in another order: outputs reordered", path)
    else:
        log.info("new classifier for %d classes, which are not those of %s",
                 len(splits.classes), path)  # fmt: skip
    return fitted


def normalisation_of(opened: OpenedNetwork, path: str, splits: DataSplits) -> Normalisation:
    """Return how images are normalised for a network, and log it if the data set's own differs.

    It is the network's own, for its first layers were trained on such inputs. Weights without a
    definition do not say: with ImageNet's 1,000 outputs it is ImageNet's, and otherwise the data
    set's.

    Args:
        opened: The network.
        path: Its path or id, for the log.
        splits: The data set.
    """
    found = opened.checkpoint
    known = opened.described or is_imagenet(found.classes, found.network.classes)
    norm = found.normalisation if known else splits.normalisation
    if norm != splits.normalisation:
        log.info("images are normalised with mean %s and deviation %s, as for %s",
                 norm.mean, norm.std, path)  # fmt: skip
    return norm


def student_network(
    opened: OpenedNetwork, path: str, config: TrainConfig, classes: int
) -> NetworkSpec:
    """Return the definition of the supernet that a phase trains, from its initial weights.

    Backbone, width and search space are those of the weights. Where these were trained for less
    than the phase samples (by a teacher, or an earlier phase of progressive shrinking), the search
    space is that of the phase's default network, on the same backbone. ``--heuristic`` and
    ``--fixed-kernel`` take precedence.

    Args:
        opened: The network with the initial weights.
        path: Its path or id, for errors.
        config: Resolved settings without a network.
        classes: Number of classes.

    Raises:
        CheckpointError: It is a specialised network.
        CompofaError: The settings do not fit it.
    """
    require_supernet(opened, path, config)
    found, phase = opened.spec, config.recipe_phase
    assert isinstance(found, NetworkSpec)
    changed = config.heuristic is not None or config.fixed_kernel is not None
    small = bool(phase.values) or (is_one(found.space) and not phase.largest_only)
    spec = found
    if changed or small:
        usual = entry(default_network(config.dataset, phase))
        coupling, elastic = _kind_of(found) or (usual.coupling, usual.elastic_kernel)
        if config.heuristic is not None:
            coupling = config.heuristic
        if config.fixed_kernel is not None:
            elastic = not config.fixed_kernel
        table = found.backbone
        elastic = elastic and table.can_fix
        space = table.compound_space(parse_coupling(coupling), elastic)
        spec = NetworkSpec(table, space, classes, kernel_transform=elastic)
    space = spec.space.restrict(resolutions=(config.eval_size,))
    spec = replace(spec, space=space, classes=classes, dropout=config.dropout)
    for size in (*config.image_size, config.eval_size):
        spec.check_resolution(size)
    phase.within(spec.space)
    return spec.largest_only() if phase.largest_only else spec


def require_supernet(opened: OpenedNetwork, path: str, config: TrainConfig) -> None:
    """Check that initial weights are those of a supernet.

    Raises:
        CheckpointError: They are those of a specialised network.
    """
    if not opened.spec.elastic:
        raise CheckpointError(
            f"--init-path {path}: expected the weights of a supernet for --task {config.task}, "
            "got a specialised network; --task finetune trains one"
        )


def is_one(space: SearchSpace) -> bool:
    """Whether a search space has one subnet, as a teacher's has."""
    return space.restrict(resolutions=(1,)).size == 1


def _kind_of(spec: NetworkSpec) -> tuple[str, bool] | None:
    """Return named coupling and elastic kernels of a search space, ``None`` for another space."""
    for coupling in ("simple", "none"):
        for elastic in (True, False):
            space = spec.backbone.compound_space(parse_coupling(coupling), elastic)
            if (space.stages, space.outer) == (spec.space.stages, spec.space.outer):
                return coupling, elastic
    return None
