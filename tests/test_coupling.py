import pytest

from compofa.errors import SpaceError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.space.coupling import COUPLINGS, parse_coupling


def test_couplings_are_read_from_names_and_pairs() -> None:
    assert [parse_coupling(name) for name in COUPLINGS] == ["simple", "none"]
    assert MOBILENET_V3.named_coupling("simple") == ((2, 3), (3, 4), (4, 6))
    assert MOBILENET_V3.named_coupling("none") is None
    assert parse_coupling("4:6, 2:3,3:4") == MOBILENET_V3.simple
    assert parse_coupling("1:2.5") == ((1, 2.5),)


@pytest.mark.parametrize(
    "text",
    [
        *("", "complex", "2", "2:3:4", "2:3,", "2.5:3", "2:3,2:4", "a:b", "2:3;3:4"),
        *("-1:3", "17:3", "2:0", "2:-1", "2:nan", "2:inf", "2:17"),
    ],
)
def test_bad_couplings_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(SpaceError) as caught:
        parse_coupling(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)
