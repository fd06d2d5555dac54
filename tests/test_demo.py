import csv
from dataclasses import replace
from pathlib import Path

import pytest

from compofa.io.open import open_network
from compofa.training.recipes import RECIPES, SMALL_IMAGES, Recipe
from nas.cli import search
from nas.cli.demo import main


@pytest.fixture
def quick(few_digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that is over at once."""
    phases = (replace(phase, epochs=1, warmup_epochs=0, subnets=1) for phase in SMALL_IMAGES.phases)
    monkeypatch.setitem(RECIPES, "digits", Recipe(tuple(phases), batch_size=45, quick=True))


def test_the_demo(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    searches: list[list[str]] = []
    monkeypatch.setattr(search, "search", searches.append)  # it has tests of its own
    tables = []
    for more in ([], ["--no-search"]):  # the second begins again in the same folder
        assert main(["--epochs", "1", "--output", "one", "--quiet", *more]) == 0
        tables.append((tmp_path / "one" / "subnets.csv").read_text())
    assert tables[0] == tables[1], "to the bit: the table has the checkpoint's hash"
    (words,) = searches
    asked = search.parser().parse_args(words)
    assert asked.net == "one/compofa-digits.pt" and Path(asked.output) == Path("one/search")
    out, err = capsys.readouterr()
    assert "30 test images, not used in training" in out and "Traceback" not in err
    lines = out.split("not used in training:\n\n")[1].splitlines()
    assert lines[0].split() == ["subnet", "params", "MACs", "top-1", "top-5"]
    labels = [line[:9].strip() for line in lines[1:13]]
    assert labels == ["smallest", "largest", *(f"random {i}" for i in range(1, 11))]

    with (tmp_path / "one" / "subnets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 == len({(row["d"], row["e"], row["ks"]) for row in rows})
    assert rows[0]["d"] == "2 2 2 2 2" and rows[1]["d"] == "4 4 4 4 4"
    assert {row["part"] for row in rows} == {"test"} and {row["r"] for row in rows} == {"16"}
    smallest, largest = int(rows[0]["macs"]), int(rows[1]["macs"])
    for row, line in zip(rows, lines[1:], strict=False):
        assert smallest <= int(row["macs"]) <= largest
        assert f"{int(row['params']):,}" in line and f"{float(row['top1']):.2f}%" in line

    opened = open_network("one/compofa-digits.pt")
    path, checkpoint = opened.path, opened.checkpoint
    assert checkpoint.training is None and checkpoint.network.space.size == 243
    assert path.stat().st_size < 2_000_000
    assert (tmp_path / "one" / "accuracy_vs_macs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--epochs", "-3"], ["--seed", "x"]])
def test_bad_input_is_one_line_and_nothing_is_lost(quick, tmp_path, capsys, words):
    (tmp_path / "teacher").mkdir()
    try:
        status = main([*words, "--output", str(tmp_path)])
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status in (1, 2) and out == "" and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_an_unwritable_folder_is_found_before_training(quick, tmp_path, capsys):
    (tmp_path / "run").write_text("in the way")
    assert main(["--output", str(tmp_path / "run"), "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "run" in err
