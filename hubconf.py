"""Networks for ``torch.hub.load``: once-for-all supernets and specialised networks by their ids."""

from compofa.model_zoo import ofa_net, ofa_specialized

dependencies = ["numpy", "torch", "tqdm", "yaml"]
__all__ = ["ofa_net", "ofa_specialized"]
