"""MobileNetV3 as Once-for-All's supernet (Cai et al., ICLR 2020; Howard et al., ICCV 2019)."""

from __future__ import annotations

from dataclasses import replace

from compofa.networks.backbone import Backbone, PlainLayer, Stage
from compofa.networks.families import inverted

MOBILENET_V3 = Backbone(
    name="mobilenet_v3",
    stem=(
        PlainLayer("stem", "conv", 16, "hswish", 3, 2),
        PlainLayer("first", "mbconv", 16, "relu", 3, residual=True),
    ),
    stages=(
        Stage(24, 2, "relu", (3,)),
        Stage(40, 2, "relu", (5,), se=True),
        Stage(80, 2, "hswish", (3,)),
        Stage(112, 1, "hswish", (3,), se=True),
        Stage(160, 2, "hswish", (5,), se=True),
    ),
    head=(
        PlainLayer("final_expand", "conv", 960, "hswish"),
        PlainLayer("pool", "pool"),
        PlainLayer("mix", "mix", 1280, "hswish"),
    ),
    choices=inverted.CHOICES,
    simple=inverted.SIMPLE,
    format=inverted.FORMAT,
    weight_names=inverted.WEIGHT_NAMES,
)

_FIRST, *_OTHERS = MOBILENET_V3.stages
MOBILENET_V3_SMALL_IMAGES = replace(
    MOBILENET_V3,
    name="mobilenet_v3_small_images",
    stem=(replace(MOBILENET_V3.stem[0], stride=1), MOBILENET_V3.stem[1]),
    stages=(replace(_FIRST, stride=1), *_OTHERS),
)
"""For images up to about 48 pixels: the first two stride-2 steps are dropped, stride 8 remains."""

MOBILENET_V3_MEDIUM_IMAGES = replace(
    MOBILENET_V3,
    name="mobilenet_v3_medium_images",
    stages=(replace(_FIRST, stride=1), *_OTHERS),
)
"""For images of 48 to 128 pixels: the second stride-2 step is dropped, stride 16 remains."""

BACKBONES = (MOBILENET_V3, MOBILENET_V3_SMALL_IMAGES, MOBILENET_V3_MEDIUM_IMAGES)
