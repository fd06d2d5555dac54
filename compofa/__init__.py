"""Once-for-all networks with compound search spaces: train once, pick a network for each device.

The names below are imported on first use, so that importing the package takes no time::

    import compofa

    opened = compofa.open_network("compofa-digits")
    subnet = opened.spec.space.sample(0)
    logits = opened.network(images, subnet)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compofa.evaluate import Evaluator
    from compofa.io.checkpoint import Checkpoint, load_checkpoint, load_weights
    from compofa.io.open import OpenedNetwork, open_network
    from compofa.model_zoo import ofa_net, ofa_specialized
    from compofa.networks.supernet_spec import NetworkSpec
    from compofa.networks.zoo import list_networks, network_spec
    from compofa.nn.calibrate import calibrate
    from compofa.nn.extract import extract
    from compofa.nn.supernet import Supernet
    from compofa.space.search_space import SearchSpace
    from compofa.space.subnet import Subnet

if os.name != "posix":
    raise ImportError(
        "compofa needs Linux or macOS, for POSIX file locks and signals, got the system "
        f"{os.name!r}; on Windows, use WSL"
    )

__version__ = "0.1.0"
_PLACES = {
    "Checkpoint": "compofa.io.checkpoint",
    "Evaluator": "compofa.evaluate",
    "NetworkSpec": "compofa.networks.supernet_spec",
    "OpenedNetwork": "compofa.io.open",
    "SearchSpace": "compofa.space.search_space",
    "Subnet": "compofa.space.subnet",
    "Supernet": "compofa.nn.supernet",
    "calibrate": "compofa.nn.calibrate",
    "extract": "compofa.nn.extract",
    "list_networks": "compofa.networks.zoo",
    "load_checkpoint": "compofa.io.checkpoint",
    "load_weights": "compofa.io.checkpoint",
    "network_spec": "compofa.networks.zoo",
    "ofa_net": "compofa.model_zoo",
    "ofa_specialized": "compofa.model_zoo",
    "open_network": "compofa.io.open",
}
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(
            f"module 'compofa' has no attribute {name!r}: expected one of "
            f"{', '.join(_PLACES)}, or a module"
        )
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value  # found directly from now on
    return value


def __dir__() -> list[str]:
    return sorted([*_PLACES, "__version__"])
