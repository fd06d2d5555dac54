"""Export: a subnet as a file that other programs run, checked after writing, with its card.

``onnx`` runs in ONNX Runtime, ``torchscript`` and ``pt2`` (``torch.export``) in torch without this
library, and ``safetensors`` holds the weights with what :func:`load_exported` needs to build the
network around them. The batch size is free in all of them.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compofa.errors import CheckpointError, CompofaError, ConfigError, SpaceError
from compofa.io.atomic import is_stream, write_atomic, write_text_atomic
from compofa.io.untrusted import parse_json, read_text
from compofa.io.weights import copy_checked
from compofa.networks.families import subnet_from_config
from compofa.networks.layout import macs, params
from compofa.networks.network_spec import FixedNetwork, Network, network_from_json
from compofa.nn.blocks import ConvBN
from compofa.nn.static import StaticNetwork
from compofa.space.subnet import Subnet

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts", "pt2": ".pt2", "safetensors": ".safetensors"}
"""Formats, and the endings of their files."""
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
"""Packages, beyond those that this library installs, that a format needs."""
TOLERANCE = 1e-4
"""Largest difference to torch's logits that an exported network may show."""

Run = Callable[[Tensor], Tensor]


def fold_bn(network: StaticNetwork) -> StaticNetwork:
    """Return a copy in evaluation mode whose BN is part of its convolutions' weights and biases."""
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if isinstance(module, ConvBN):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return folded


def subnet_card(spec: Network, subnet: Subnet) -> dict[str, Any]:
    """Return what is known of a subnet without its weights, as JSON data."""
    layers = spec.layers_of(subnet)
    return {
        "subnet": subnet.to_config(),
        "resolution": subnet.resolution,
        "params": params(layers),
        "macs": macs(layers),
        "network": spec.to_json(),
    }


def require_packages(format: str) -> None:
    """Check that ``format`` is known and that what it needs is installed.

    Raises:
        ConfigError: It is not.
    """
    if format not in SUFFIXES:
        raise ConfigError(f"unknown format {format!r}: expected one of {', '.join(SUFFIXES)}")
    missing = [name for name in NEEDS.get(format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"exporting to {format} needs {', '.join(missing)}: pip install 'compofa[export]'"
        )


def export(
    network: StaticNetwork,
    path: str | Path,
    format: str,
    card: Mapping[str, Any],
    *,
    fold: bool = False,
    tolerance: float = TOLERANCE,
) -> float:
    """Write ``network`` and its card, which goes to :func:`card_path` and names its SHA-256.

    What is to be written is loaded again and run on batches of one and three random images; what
    it says must agree with ``network`` in torch. Otherwise, and when anything cannot be written,
    both files stay as they were before. A stream (:func:`compofa.io.atomic.is_stream`) gets no
    card.

    Args:
        network: An extracted network on the CPU; it stays as it is.
        path: File to write.
        format: A key of :data:`SUFFIXES`.
        card: JSON data, at least that of :func:`subnet_card`.
        fold: Fold BN into the convolutions.
        tolerance: Largest difference of a logit allowed.

    Returns:
        The largest difference of a logit.

    Raises:
        ConfigError: The format is unknown or needs a package that is not installed.
        CompofaError: A file cannot be written, or the file disagrees with torch.
    """
    require_packages(format)
    path = Path(path)
    reference = copy.deepcopy(network).eval()
    exported = fold_bn(reference) if fold else reference
    card = {"file": path.name, "format": format, "bn_folded": fold, **card}
    content = _serialise(exported, format, card)
    difference = _difference(reference, _load(content, format), card["resolution"])
    if not difference <= tolerance:
        raise CompofaError(
            f"{path}: expected logits within {tolerance:g} of torch's, "
            f"got a difference of {difference:.3g}; nothing was written"
        )
    card |= {"max_difference": difference, "sha256": hashlib.sha256(content).hexdigest()}

    def writer(file: BinaryIO) -> None:
        file.write(content)
        file.flush()  # the card comes last that can fail: either both files are new or neither
        if not is_stream(path):
            write_text_atomic(card_path(path), json.dumps(card, indent=2) + "\n")

    write_atomic(path, writer)
    return difference


def card_path(path: str | Path) -> Path:
    """Return where the card of an exported file is: beside it, at ``path`` + ``.json``."""
    return Path(f"{path}.json")


def load_exported(path: str | Path) -> StaticNetwork:
    """Build the network of a ``safetensors`` file that :func:`export` wrote.

    Where its card is beside it, the file must be the one that the card was written for.

    Raises:
        CheckpointError: The file is missing, damaged, from elsewhere or not its card's.
    """
    from safetensors import SafetensorError

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    _check_card(Path(path), hashlib.sha256(content).hexdigest())
    try:
        return _network_of(content, str(path))
    except (SafetensorError, SpaceError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = str(error).split("\n")[0][:120]
        raise CheckpointError(f"{path}: expected a subnet that export wrote: {reason}") from error


def _check_card(path: Path, found: str) -> None:
    """Hold a file's SHA-256 to that of its card; earlier versions wrote cards without one."""
    try:
        card = parse_json(read_text(card_path(path)))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {card_path(path)}: {error}") from error
    wanted = card.get("sha256", found) if isinstance(card, Mapping) else None
    if wanted != found:
        raise CheckpointError(
            f"{path}: expected SHA-256 {str(wanted)[:64]} as in {card_path(path).name}, got {found}"
        )


def _network_of(content: bytes, source: str) -> StaticNetwork:
    from safetensors.torch import load

    weights = load(content)
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    card = parse_json(header["__metadata__"]["compofa"])
    subnet = subnet_from_config(card["subnet"])
    network = FixedNetwork.of(network_from_json(card["network"]), subnet).build().eval()
    network = fold_bn(network) if card["bn_folded"] else network
    copy_checked(network, weights, source)
    return network


def _images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def _difference(reference: StaticNetwork, run: Run, side: int) -> float:
    batches = [_images(count, side) for count in (1, 3)]
    with torch.no_grad():
        found = [(run(images) - reference(images)).abs().max() for images in batches]
    return float(torch.stack(found).max())  # NaN where either is


def _serialise(network: StaticNetwork, format: str, card: Mapping[str, Any]) -> bytes:
    if format == "safetensors":
        from safetensors.torch import save

        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        known = {key: card[key] for key in ("subnet", "network", "bn_folded")}
        return save(weights, {"compofa": json.dumps(known)})
    images = _images(2, card["resolution"])
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # torch calls its TorchScript deprecated, and its exporters call parts of it that are.
        warnings.simplefilter("ignore")
        if format == "torchscript":
            torch.jit.save(torch.jit.trace(network, images, check_trace=False), buffer)
            return buffer.getvalue()
        shapes = ({0: torch.export.Dim("batch")},)
        if format == "pt2":
            program = torch.export.export(network, (images,), dynamic_shapes=shapes)
            torch.export.save(program, buffer)
            return buffer.getvalue()
        names = {"input_names": ["images"], "output_names": ["logits"]}
        onnx = torch.onnx.export(
            network, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
        )
        return onnx.model_proto.SerializeToString()


def _load(content: bytes, format: str) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        if format == "torchscript":
            return torch.jit.load(io.BytesIO(content), map_location="cpu")
        if format == "pt2":
            return torch.export.load(io.BytesIO(content)).module()
    if format == "safetensors":
        return _network_of(content, "what was exported")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
