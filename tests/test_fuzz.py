"""A few damaged files of every kind; ``python -m fuzz`` reads thousands."""

from collections.abc import Hashable
from pathlib import Path

import fuzz
import pytest

pytestmark = pytest.mark.usefixtures("few_digits")
COUNTS = {name: 40 for name, kind in fuzz.KINDS.items() if kind.text}


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_damage_is_refused_or_harmless(name: str) -> None:
    slow = "pt" in name or name in ("eval --subnet", "run_NAS", "subnet yaml")
    result = fuzz.fuzz(name, 6 if slow else COUNTS.get(name, 12))
    assert not result.faults
    assert result.outcomes["refused"] + result.outcomes["changed"] > 0


def misread(path: Path) -> Hashable:
    raise KeyError(path)


def lied(path: Path) -> Hashable:
    fuzz.require(path.read_bytes() == b"whole", "no sound file says that")
    return 1


@pytest.mark.parametrize(
    ("read", "checked", "outcome"),
    [
        (misread, False, "traceback"),
        (lied, False, "wrong"),
        (Path.read_bytes, True, "wrong"),
        (Path.read_bytes, False, "changed"),
    ],
)
def test_faults_are_seen(read, checked: bool, outcome: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"other")
    kind = fuzz.Kind(lambda folder: path, read, checked)
    assert fuzz.outcome_of(kind, path, b"whole")[0] == outcome


def test_the_same_seed_does_the_same_damage() -> None:
    whole = b"0123456789" * 9
    files = [[fuzz.damaged(whole, f"{seed} {i}", True) for i in range(20)] for seed in (1, 1, 2)]
    assert files[0] == files[1] != files[2]
