"""Export of subnets for other programs, verified against torch, with a card of metadata.

``onnx`` runs in ONNX Runtime, ``torchscript`` and ``pt2`` (``torch.export``) run in torch without
this library, and ``safetensors`` holds the weights with the metadata from which
:func:`load_exported` builds the network. The batch size is dynamic in all formats.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from compofa.errors import CheckpointError, CompofaError, ConfigError, SpaceError, unknown_name
from compofa.io.atomic import is_stream, write_atomic, write_text_atomic
from compofa.io.untrusted import parse_json, read_text
from compofa.io.weights import copy_checked
from compofa.networks.families import subnet_from_config
from compofa.networks.layout import macs, params
from compofa.networks.network_spec import FixedNetwork, Network, network_from_json
from compofa.nn.blocks import ConvBN
from compofa.nn.build import build
from compofa.nn.static import StaticNetwork
from compofa.space.subnet import Subnet

SUFFIXES = {"onnx": ".onnx", "torchscript": ".ts", "pt2": ".pt2", "safetensors": ".safetensors"}
"""Export formats and their file suffixes."""
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "safetensors": ("safetensors",)}
"""Packages that a format needs beyond the dependencies of this library."""
TOLERANCE = 1e-4
"""Largest absolute difference from torch's logits that an exported network may have."""

Run = Callable[[Tensor], Tensor]


def fold_bn(network: StaticNetwork) -> StaticNetwork:
    """Return a copy in evaluation mode with BN folded into the convolutions."""
    copied = copy.deepcopy(network).eval()
    for module in copied.modules():
        if isinstance(module, ConvBN):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)
            module.bn = nn.Identity()
    return copied


def subnet_card(spec: Network, subnet: Subnet) -> dict[str, Any]:
    """Return the metadata of a subnet as JSON data: choices, resolution, counts, definition."""
    layers = spec.layers_of(subnet)
    return {
        "subnet": subnet.to_config(),
        "resolution": subnet.resolution,
        "params": params(layers),
        "macs": macs(layers),
        "network": spec.to_json(),
    }


def require_packages(format: str) -> None:
    """Check that ``format`` is known and that the packages it needs are installed.

    Raises:
        ConfigError: One of them is not.
    """
    if format not in SUFFIXES:
        raise ConfigError(unknown_name("format", format, SUFFIXES))
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
    """Export ``network`` to ``path``, and its card with the SHA-256 to :func:`card_path`.

    Before anything is written, the exported network is loaded and run on batches of one and three
    random images, and its logits are compared with those of ``network`` in torch. On any error both
    files stay as they were. A stream (:func:`compofa.io.atomic.is_stream`) gets no card.

    Args:
        network: A plain network on the CPU; left unchanged.
        path: File to write.
        format: A key of :data:`SUFFIXES`.
        card: JSON data, at least that of :func:`subnet_card`.
        fold: Whether to fold BN into the convolutions.
        tolerance: Largest difference of logits allowed, relative to the largest logit, or absolute
            where that is below 1.

    Returns:
        The largest absolute difference of logits.

    Raises:
        ConfigError: The format is unknown or needs a package that is not installed.
        CompofaError: A file cannot be written, or the logits differ by more than ``tolerance``.
    """
    require_packages(format)
    path = Path(path)
    reference = copy.deepcopy(network).eval()
    exported = fold_bn(reference) if fold else reference
    card = {"file": path.name, "format": format, "bn_folded": fold, **card}
    content = _serialise(exported, format, card)
    difference, largest = _difference(reference, _load(content, format), card["resolution"])
    if not difference <= tolerance * max(1.0, largest):
        raise CompofaError(
            f"{path}: expected logits of up to {largest:.3g} within {tolerance:g} of torch's, "
            f"relative, got a difference of {difference:.3g}; nothing was written"
        )
    card |= {"max_difference": difference, "sha256": hashlib.sha256(content).hexdigest()}

    def writer(file: BinaryIO) -> None:
        file.write(content)
        file.flush()  # the card is the last step that can fail: both files are replaced or neither
        if not is_stream(path):
            write_text_atomic(card_path(path), json.dumps(card, indent=2) + "\n")

    write_atomic(path, writer)
    return difference


def card_path(path: str | Path) -> Path:
    """Return the path of the card of an exported file: ``path`` + ``.json``."""
    return Path(f"{path}.json")


def load_exported(path: str | Path) -> StaticNetwork:
    """Load the network of a ``safetensors`` file that :func:`export` wrote.

    If there is a card beside the file, its SHA-256 is verified.

    Raises:
        CheckpointError: The file is missing, damaged, not from :func:`export`, or does not match
            its card.
    """
    from safetensors import SafetensorError

    content = _read(path)
    _check_card(Path(path), hashlib.sha256(content).hexdigest())
    try:
        return _network_of(content, str(path))
    except (SafetensorError, SpaceError, RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = str(error).split("\n")[0][:120]
        raise CheckpointError(f"{path}: expected a subnet that export wrote: {reason}") from error


def load_onnx(path: str | Path) -> tuple[Run, dict[str, Any]]:
    """Load an ONNX file that :func:`export` wrote into ONNX Runtime, on the CPU.

    Returns:
        A function from images [n, 3, r, r] to logits [n, classes], both float32, and the card. The
        function raises a CheckpointError for images of another size than the network's.

    Raises:
        ConfigError: onnxruntime is not installed.
        CheckpointError: The file or its card is missing, the file does not match its card, or ONNX
            Runtime cannot load it.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise ConfigError(f"{path}: running it needs onnxruntime: pip install 'compofa[export]'")
    path, content = Path(path), _read(path)
    card = _check_card(path, hashlib.sha256(content).hexdigest())
    if card is None:
        raise CheckpointError(
            f"{path}: expected its card {card_path(path).name} beside it, as export writes"
        )
    if card.get("format") != "onnx" or "sha256" not in card:
        raise CheckpointError(
            f"{card_path(path)}: expected the card that export writes of an ONNX file, with its "
            "SHA-256"
        )
    import onnxruntime

    # They have no base class but Exception.
    kinds = vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    errors = tuple(k for k in kinds if isinstance(k, type) and issubclass(k, Exception))

    def checked(function: Callable[[], Any]) -> Any:
        try:
            return function()
        except (*errors, ValueError) as error:  # ValueError: other inputs or outputs
            reason = " ".join(str(error).split())[:160]
            raise CheckpointError(f"{path}: cannot be run by ONNX Runtime: {reason}") from error

    run = checked(lambda: _load(content, "onnx"))
    return (lambda images: checked(lambda: run(images))), card


def onnx_latency_ms(path: str | Path, runs: int = 30) -> float:
    """Return the median latency of a batch of one image in ONNX Runtime on the CPU, in ms.

    Raises:
        CompofaError: See :func:`load_onnx`.
    """
    run, card = load_onnx(path)
    image, times = _images(1, card["resolution"]), []
    for _ in range(runs):
        started = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[runs // 3 :])  # the first warm up


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def _check_card(path: Path, found: str) -> dict[str, Any] | None:
    """Return a file's card, None if it has none, after comparing the file's SHA-256 with it.

    Cards that earlier versions wrote have no SHA-256.
    """
    try:
        card = parse_json(read_text(card_path(path)))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {card_path(path)}: {error}") from error
    if not isinstance(card, dict):
        raise CheckpointError(f"{card_path(path)}: expected the card that export writes, got none")
    wanted = card.get("sha256", found)
    if wanted != found:
        raise CheckpointError(
            f"{path}: expected SHA-256 {str(wanted)[:64]} as in {card_path(path).name}, got {found}"
        )
    return card


def _network_of(content: bytes, source: str) -> StaticNetwork:
    from safetensors.torch import load

    weights = load(content)
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    card = parse_json(header["__metadata__"]["compofa"])
    subnet = subnet_from_config(card["subnet"])
    network = build(FixedNetwork.of(network_from_json(card["network"]), subnet)).eval()
    network = fold_bn(network) if card["bn_folded"] else network
    copy_checked(network, weights, source)
    return network


def _images(count: int, side: int) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def _difference(reference: StaticNetwork, run: Run, side: int) -> tuple[float, float]:
    """Return the largest absolute difference of logits, NaN if any is, and the largest logit."""
    batches = [_images(count, side) for count in (1, 3)]
    with torch.no_grad():
        expected = [reference(images) for images in batches]
        found = [
            (run(images) - logits).abs().max()
            for images, logits in zip(batches, expected, strict=True)
        ]
    largest = torch.stack([logits.abs().max() for logits in expected]).max()
    return float(torch.stack(found).max()), float(largest)


def _serialise(network: StaticNetwork, format: str, card: Mapping[str, Any]) -> bytes:
    if format == "safetensors":
        from safetensors.torch import save

        weights = {name: value.contiguous() for name, value in network.state_dict().items()}
        known = {key: card[key] for key in ("subnet", "network", "bn_folded")}
        return save(weights, {"compofa": json.dumps(known)})
    images = _images(2, card["resolution"])
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        # TorchScript is deprecated, and torch's exporters call deprecated functions.
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
        model = onnx.model_proto
        for key in ("classes", "input", "subnet"):  # read with session.get_modelmeta()
            if key in card:
                model.metadata_props.add(key=key, value=json.dumps(card[key]))
        return model.SerializeToString()


def _load(content: bytes, format: str) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        if format == "torchscript":
            return torch.jit.load(io.BytesIO(content), map_location="cpu")
        if format == "pt2":
            return torch.export.load(io.BytesIO(content)).module()
    if format == "safetensors":
        return _network_of(content, "exported network")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        arrays = {"images": images.contiguous().numpy()}
        return torch.from_numpy(session.run(["logits"], arrays)[0])

    return run
