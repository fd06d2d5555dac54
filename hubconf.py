"""Networks for ``torch.hub.load``.

:func:`ofa_net` and :func:`ofa_specialized` build any network by its id. The other entry points are
those of Once-for-All, under the same names: a supernet, or a specialised network and its resolution
in pixels, with the published weights unless ``pretrained=False``.
"""

from functools import partial as _partial

from compofa.model_zoo import ofa_net, ofa_specialized

dependencies = ["numpy", "torch", "tqdm", "yaml"]

ofa_supernet_resnet50 = _partial(ofa_net, "ofa_resnet50", pretrained=True)
ofa_supernet_mbv3_w10 = _partial(ofa_net, "ofa_mbv3_d234_e346_k357_w1.0", pretrained=True)
ofa_supernet_mbv3_w12 = _partial(ofa_net, "ofa_mbv3_d234_e346_k357_w1.2", pretrained=True)
ofa_supernet_proxyless = _partial(ofa_net, "ofa_proxyless_d234_e346_k357_w1.3", pretrained=True)


def _network(net_id):
    return _partial(ofa_specialized, net_id, pretrained=True)


resnet50D_MAC_4_1B = _network("resnet50D_MAC@4.1B_top1@79.8")
resnet50D_MAC_3_7B = _network("resnet50D_MAC@3.7B_top1@79.7")
resnet50D_MAC_3_0B = _network("resnet50D_MAC@3.0B_top1@79.3")
resnet50D_MAC_2_4B = _network("resnet50D_MAC@2.4B_top1@79.0")
resnet50D_MAC_1_8B = _network("resnet50D_MAC@1.8B_top1@78.3")
resnet50D_MAC_1_2B = _network("resnet50D_MAC@1.2B_top1@77.1_finetune@25")
resnet50D_MAC_0_9B = _network("resnet50D_MAC@0.9B_top1@76.3_finetune@25")
resnet50D_MAC_0_6B = _network("resnet50D_MAC@0.6B_top1@75.0_finetune@25")


def ofa_specialized_get():
    """Return the function that builds a specialised network of an id."""
    return ofa_specialized
