"""ProxylessNAS as Once-for-All's supernet (Cai et al., ICLR 2020), after Cai et al., ICLR 2019.

Its last stage always is one block, which the config format writes without a depth.
"""

from __future__ import annotations

from dataclasses import replace

from compofa.networks.backbone import Backbone, PlainLayer, Stage
from compofa.networks.families import inverted

PROXYLESS = Backbone(
    name="proxyless",
    stem=(
        PlainLayer("stem", "conv", 32, "relu6", 3, 2),
        PlainLayer("first", "mbconv", 16, "relu6", 3),
    ),
    stages=(
        Stage(24, 2, "relu6", (3,)),
        Stage(40, 2, "relu6", (5,)),
        Stage(80, 2, "relu6", (5,)),
        Stage(96, 1, "relu6", (5,)),
        Stage(192, 2, "relu6", (7,)),
        Stage(320, 1, "relu6", (7,), depths=(1,)),
    ),
    head=(PlainLayer("mix", "conv", 1280, "relu6"), PlainLayer("pool", "pool")),
    choices=inverted.CHOICES,
    simple=inverted.SIMPLE,
    format=inverted.FORMAT.with_single_last(True),
    bn_eps=1e-3,
    weight_names=inverted.WEIGHT_NAMES,
)
"""Fixed kernel sizes are the commonest of each stage of the published ProxylessNAS mobile nets."""

_FIRST, *_OTHERS = PROXYLESS.stages
PROXYLESS_SMALL_IMAGES = replace(
    PROXYLESS,
    name="proxyless_small_images",
    stem=(replace(PROXYLESS.stem[0], stride=1), PROXYLESS.stem[1]),
    stages=(replace(_FIRST, stride=1), *_OTHERS),
)
"""For images up to about 48 pixels: the first two stride-2 steps are dropped."""

BACKBONES = (PROXYLESS, PROXYLESS_SMALL_IMAGES)
