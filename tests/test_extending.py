"""The page on extending the library, run as it stands in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
FAMILY_LINES = 100
BRIEF = """
import functools
from nas.cost import measured
measured.Settings = functools.partial(measured.Settings, rounds=1, visit_ms=0.01, networks=3)
"""
"""Times layers as the page does, but not as often."""


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_page_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    family, *rest = blocks()
    assert len(family.splitlines()) < FAMILY_LINES
    assert len(rest) >= 8
    script = tmp_path / "page.py"
    script.write_text("\n".join([BRIEF, family, *rest]))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "winner.onnx").stat().st_size > 10_000


def test_no_module_of_the_library_knows_the_family() -> None:
    for folder in ("compofa", "nas"):
        for path in (PAGE.parents[1] / folder).rglob("*.py"):
            assert not re.search("two.?depthwise", path.read_text(), flags=re.IGNORECASE), path
