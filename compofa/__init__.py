"""Once-for-all networks with compound search spaces: train once, pick a network for each device.

The names below are loaded when they are first used, so that importing the package takes no time::

    import compofa

    net = compofa.ofa_net("compofa-digits", pretrained=True)
    subnet = net.spec.space.sample(0)
    logits = net(images, subnet)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compofa.evaluate import Evaluator
    from compofa.io.checkpoint import Checkpoint, load_checkpoint, load_weights
    from compofa.networks.supernet_spec import NetworkSpec
    from compofa.networks.zoo import list_networks, network_spec, ofa_net, ofa_specialized
    from compofa.nn.calibrate import calibrate
    from compofa.nn.extract import extract
    from compofa.nn.supernet import Supernet
    from compofa.space.search_space import SearchSpace
    from compofa.space.subnet import Subnet

__version__ = "0.1.0"
_PLACES = {
    "Checkpoint": "compofa.io.checkpoint",
    "Evaluator": "compofa.evaluate",
    "NetworkSpec": "compofa.networks.supernet_spec",
    "SearchSpace": "compofa.space.search_space",
    "Subnet": "compofa.space.subnet",
    "Supernet": "compofa.nn.supernet",
    "calibrate": "compofa.nn.calibrate",
    "extract": "compofa.nn.extract",
    "list_networks": "compofa.networks.zoo",
    "load_checkpoint": "compofa.io.checkpoint",
    "load_weights": "compofa.io.checkpoint",
    "network_spec": "compofa.networks.zoo",
    "ofa_net": "compofa.networks.zoo",
    "ofa_specialized": "compofa.networks.zoo",
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
