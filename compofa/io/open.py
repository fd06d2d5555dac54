"""One door to trained networks: any format, by name or by path, read once and built once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from compofa.data.catalog import Normalisation
from compofa.errors import CheckpointError
from compofa.io.checkpoint import Checkpoint, from_data, weights_in
from compofa.io.classifier import with_classes
from compofa.io.download import replaceable
from compofa.io.formats.names import recognise, to_ours
from compofa.io.formats.specialised import EXTRA, find_specialised, read_specialised
from compofa.io.tensors import read_hashed
from compofa.io.zoo import published_id, specialised_definition, specialised_files, supernet_path
from compofa.networks.layout import weight_shapes
from compofa.networks.network_spec import Network
from compofa.networks.published import Specialised, specialised
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import NETWORKS, PUBLISHED, entry, network_spec
from compofa.nn.static import StaticNetwork
from compofa.nn.supernet import Supernet


@dataclass(frozen=True, eq=False)
class OpenedNetwork:
    """A trained network with everything that its files say of it.

    Attributes:
        network: The network with its weights, on the CPU, in evaluation mode.
        checkpoint: Definition, weights as stored, classes, data set, measured figures.
        format: Format of the file, one of :data:`compofa.io.formats.names.FORMATS`.
        files: The files that were read; that of the weights comes first.
        described: Whether id or files define the network. Otherwise the definition was recognised
            from the weights or given, and classes and normalisation are unknown.
    """

    network: Supernet | StaticNetwork
    checkpoint: Checkpoint
    format: str
    files: tuple[Path, ...]
    described: bool = True

    @property
    def path(self) -> Path:
        """The file of the weights."""
        return self.files[0]

    @property
    def spec(self) -> Network:
        """The definition: of a supernet with its search space, or of a specialised network."""
        return self.checkpoint.network

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits; empty where the file has none."""
        return self.checkpoint.classes

    @property
    def normalisation(self) -> Normalisation:
        """Mean and standard deviation that images are normalised with."""
        return self.checkpoint.normalisation

    @property
    def image_size(self) -> int:
        """Resolution to evaluate at, in pixels."""
        return self.checkpoint.image_size

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the file of the weights."""
        return self.checkpoint.digest

    def with_classes(self, classes: Sequence[str] | int, seed: int = 0) -> OpenedNetwork:
        """Return the network with the classifier for other classes.

        Outputs are reordered for the same classes in another order; for other classes the
        classifier is replaced by a new one. See :func:`compofa.io.classifier.with_classes`.

        Args:
            classes: Names of the classes in the order of the logits, or their number.
            seed: Seed of a new classifier; no global generator is used.

        Returns:
            This object if the network has these classes in this order.

        Raises:
            DataError: The network has no class names, and ``classes`` are the numbers 0 to 999 in
                another order.
            SpaceError: The number of classes is out of range.
        """
        found = with_classes(self.checkpoint, classes, seed)
        if found.weights is self.checkpoint.weights:
            return self if found is self.checkpoint else replace(self, checkpoint=found)
        return replace(self, network=found.build(str(self.path)), checkpoint=found)


def open_network(source: str | Path, *, arch: str | NetworkSpec | None = None) -> OpenedNetwork:
    """Open a trained network: read its files once, build it once, check that the weights fit.

    Args:
        source: A path or an id. A path leads to a checkpoint of this library, of Once-for-All,
            CompOFA or MMRazor, or to a specialised network: a folder with ``net.config``, or a
            ``.json`` beside a ``.pth``. An id is that of a supernet with pretrained weights
            (:data:`compofa.networks.zoo.NETWORKS`) or of a specialised network of Once-for-All;
            published weights are downloaded once. Ids take precedence over files: to open a file
            that is named like one, give its absolute path.
        arch: Definition of weights that come without one, or its id; recognised from the
            weights when left out. The classes are always those of the weights.

    Raises:
        SpaceError: ``source`` is neither a known id nor a file, or ``arch`` is unknown.
        CheckpointError: The files cannot be read or downloaded, are damaged or of an unknown
            format, or the weights do not fit.
    """
    source = str(source)
    if source in NETWORKS:
        path = supernet_path(source)
        with replaceable(path) if source in PUBLISHED else nullcontext():
            return replace(_open_file(path, source), described=True)
    path = Path(source)
    if not os.path.lexists(path):
        if "/" not in source and ("@" in source or "_top1" in source):
            return _open_published(specialised(source))
        if not path.suffix:
            entry(source)  # raises, with the known ids
    if (net_id := published_id(path)) is not None:
        return open_network(net_id)
    files = find_specialised(path)
    if files is None:
        return _open_file(path, arch)
    return _opened(read_specialised(files, files.network()), "ofa", *files.paths)


def _open_published(row: Specialised) -> OpenedNetwork:
    files = specialised_files(row)
    network = specialised_definition(row, files)
    with replaceable(files.weights):
        checkpoint = read_specialised(files, network)
        checkpoint = replace(checkpoint, figures={"published": {"top1": row.top1}})
        return _opened(checkpoint, "ofa", *files.paths)


def _open_file(path: Path, arch: str | NetworkSpec | None) -> OpenedNetwork:
    data, digest = read_hashed(path)
    if "format" in data:
        return _opened(from_data(path, data, digest), "compofa", path)
    state = weights_in(path, data)
    kind = recognise(state)
    if kind is None:
        example = f"names such as {next(iter(state))}" if state else "an empty one"
        raise CheckpointError(
            f"{path}: expected weights of Once-for-All, CompOFA, MMRazor or this "
            f"library, got {example[:80]}"
        )
    extra = data.get(EXTRA)
    if isinstance(extra, Mapping):
        checkpoint = from_data(path, {**extra, "weights": state, "training": None})
        if not checkpoint.network.elastic:
            raise CheckpointError(f"{path}: expected net.config beside a specialised network")
        weights = to_ours(state, checkpoint.network.space.slots)
        checkpoint = replace(checkpoint, weights=weights, digest=digest)
    else:
        weights = to_ours(state)
        spec = _definition(weights, arch, str(path))
        checkpoint = Checkpoint(spec, weights, dataset="imagenet", digest=digest)
    opened = _opened(checkpoint, kind, path)
    return replace(opened, described=isinstance(extra, Mapping))


def _opened(checkpoint: Checkpoint, format: str, *files: Path) -> OpenedNetwork:
    return OpenedNetwork(checkpoint.build(str(files[0])), checkpoint, format, files)


def _definition(
    state: Mapping[str, Tensor], arch: str | NetworkSpec | None, source: str
) -> NetworkSpec:
    """Return the definition of weights that come without one, with as many classes as they have."""
    if arch is None:
        return recognise_network(state, source)
    if isinstance(arch, str):
        return network_spec(arch, _classes(state))
    return replace(arch, classes=_classes(state, arch.classes))


def recognise_network(state: Mapping[str, Tensor], source: str = "state dict") -> NetworkSpec:
    """Return the named network that weights without a definition belong to.

    It is the one of :data:`compofa.networks.zoo.NETWORKS` whose layers have most of their channels
    from the weights, and at least half; of equals preferably one whose kernels are elastic if and
    only if there are kernel matrices.

    Args:
        state: The weights by this library's names.
        source: Name of the weights in error messages.

    Raises:
        CheckpointError: No network is of these weights.
    """
    shapes, classes = {name: tuple(w.shape) for name, w in state.items()}, _classes(state)
    shares = {name: _share(network_spec(name, classes), shapes) for name in NETWORKS}
    best = max(shares.values())
    if best < 0.5:
        convs = [f"{name} {list(shape)}" for name, shape in shapes.items() if len(shape) == 4]
        raise CheckpointError(
            f"{source}: expected weights of one of {', '.join(NETWORKS)}, got "
            f"{', '.join(convs[:3]) or 'no convolutions'}"
        )
    elastic = any(".matrices." in name for name in state)
    fits = [name for name, share in shares.items() if share == best]
    found = next((name for name in fits if NETWORKS[name].elastic_kernel == elastic), fits[0])
    return network_spec(found, classes)


def _share(spec: NetworkSpec, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Return the share of a network's convolutions that have these channels."""
    wanted = weight_shapes(spec.layers_of(spec.space.largest))
    held = sum(shapes.get(name, ())[:2] == shape[:2] for name, shape in wanted.items())
    return held / len(wanted)


def _classes(state: Mapping[str, Tensor], otherwise: int = 1000) -> int:
    bias = state.get("classifier.bias")
    return otherwise if bias is None else bias.numel()
