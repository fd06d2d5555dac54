from dataclasses import replace
from typing import Any

import pytest

from compofa.errors import SpaceError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3_SMALL_IMAGES
from compofa.networks.supernet_spec import NetworkSpec
from compofa.networks.zoo import network_spec
from compofa.space.coupling import parse_coupling


@pytest.mark.parametrize(
    "spec",
    [
        network_spec("compofa"),
        network_spec("ofa_mbv3_d234_e346_k357_w1.2", 10, resolutions=(128, 132)),
        network_spec("compofa-elastic-small", 2, coupling=parse_coupling("1:2.5,3:4")),
        network_spec("ofa-small", 7, elastic_kernel=False, dropout=0.0).largest_only(),
    ],
)
def test_definitions_come_back_equal(spec: NetworkSpec) -> None:
    assert NetworkSpec.from_json(spec.to_json()) == spec


def changed(data: Any, at: tuple, value: Any) -> Any:
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[at[0]] = value if len(at) == 1 else changed(copy[at[0]], at[1:], value)
    return copy


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (("backbone",), "vgg", "'vgg'"),
        (("width_mult",), 99.0, "width multiplier"),
        (("classes",), 0, "classes.* 0"),
        (("dropout",), 1.0, "dropout"),
        (("space", "slots"), 9, "slots.* 9"),
        (("space", "name"), "\x1b[31m\n", "name: .*printable"),
        (("space", "resolutions"), [16, 16], "resolution"),
        (("space", "resolutions"), [96.5], "resolutions"),
        (("space", "stages"), [], "16 stages.* 0"),
        (("space", "stages", 0, "choices", "kernel"), [4], "kernel.* odd"),
        (("space", "stages", 0, "choices", "kernel"), [17], "kernel.* 16"),
        (("space", "stages", 0, "choices", "kernel"), [3.5], r"kernel.*\[3\.5\]"),
        (("space", "stages", 0, "choices", "kernel"), [], "kernel"),
        (("space", "stages", 0, "choices", "kernel"), 3, "kernel.* int"),
        (("space", "stages", 0, "choices", "expand"), [0], "expand.* 16"),
        (("space", "stages", 0, "choices", "expand"), [1e9], "expand"),
        (("space", "stages", 0, "choices"), {"kernel": [3]}, "kernel, expand"),
        (("space", "stages", 0, "choices"), {"expand": [3], "kernel": [3]}, "kernel, expand"),
        (("space", "stages", 0, "depths"), [0], "depths.* 16"),
        (("space", "outer"), [[0]], "0 elastic widths"),
        (("space", "outer"), [[-1]], "outer.* 15"),
        (("space", "stages", 0, "coupling"), [[2, 3, 4]], "coupling"),
        (("space", "stages", 0, "coupling"), [[2, 3]], "coupling"),
    ],
)
def test_definitions_out_of_range_are_refused(at: tuple, value: Any, message: str) -> None:
    data = network_spec("compofa-small", 3).to_json()
    with pytest.raises(SpaceError, match=message):
        NetworkSpec.from_json(changed(data, at, value))


def test_definitions_of_the_first_version_are_read() -> None:
    spec = network_spec("ofa-resnet50-small", 3)
    data = spec.to_json()
    space = data["space"]
    space["widths"] = space.pop("outer")
    for stage in space["stages"]:
        choices = stage.pop("choices")
        stage.update(kernels=choices["kernel"], expands=choices["expand"])
    assert NetworkSpec.from_json(data) == spec


def test_definitions_that_do_not_fit_together_are_refused() -> None:
    space = MOBILENET_V3_SMALL_IMAGES.free_space()
    with pytest.raises(SpaceError, match=r"5 stages.* 2"):
        NetworkSpec(MOBILENET_V3_SMALL_IMAGES, replace(space, stages=space.stages[:2]))
    spec = NetworkSpec(MOBILENET_V3_SMALL_IMAGES, space)
    assert spec.min_resolution == 8
    spec.check_resolution(8)
    for size in (7, 0, -8, 2049):
        with pytest.raises(SpaceError, match=f"8 to 2048 .* {size}"):
            spec.check_resolution(size)


def test_a_teacher_is_the_largest_subnet_alone() -> None:
    spec = network_spec("compofa-elastic-small", 3).largest_only()
    assert spec.space.size == 1
    assert spec.space.largest.stages == (((7, 6),) * 4,) * 5
    assert not spec.kernel_transform
