"""Tables of subnets: what is written is read back, and what is wrong is named by its line."""

import csv
import gzip

import few
import numpy as np
import pytest
from few import same

from compofa.errors import CompofaError, TableError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.space.arrays import SubnetArrays, arrays_of
from nas.tables import lines, read_subnets, require_members, write_subnets

SPACE = MOBILENET_V3.compound_space(resolutions=(160, 224))
HEAD = "ks,e,d,r\n"
KERNELS = "3 3 0 0 5 5 0 0 3 3 0 0 3 3 0 0 5 5 0 0"
SMALLEST = f"{KERNELS},{' '.join(['3 3 0 0'] * 5)},2 2 2 2 2,160\n"


FORM = SPACE.config_format


def some(count: int = 30) -> SubnetArrays:
    return SPACE.arrays(SPACE.sample_genes(np.random.default_rng(0), count))


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_what_is_written_is_read_back(tmp_path, name):
    arrays, path = some(), tmp_path / name
    value = np.random.default_rng(1).standard_normal(30)
    write_subnets(path, arrays, FORM, {"latency_ms": value}, {"net": ["a, b"] * 30})
    back, columns = read_subnets(path, ["latency_ms"])
    assert same(arrays, back)
    assert all(values.dtype == np.int64 for values in back.blocks.values())
    assert (columns["latency_ms"] == value).all()
    assert path.read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")
    before = path.read_bytes()
    write_subnets(path, arrays, FORM, {"latency_ms": value}, {"net": ["a, b"] * 30})
    assert path.read_bytes() == before, "no time stamp in it"


def test_the_form_of_the_published_tables(tmp_path):
    path = tmp_path / "t.csv"
    arrays = some()[:2]
    write_subnets(path, arrays, FORM, {"macs": np.array([7, 8]), "latency_ms": [None, 1.5]})
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["ks", "e", "d", "r", "macs", "latency_ms"]
    assert [row[4:] for row in rows[1:]] == [["7", ""], ["8", "1.5"]]
    assert rows[1][0] == " ".join(map(str, arrays.blocks["kernel"][0].tolist()))
    assert rows[1][2] == " ".join(map(str, arrays.depths[0].tolist()))
    assert b"\r" not in path.read_bytes()


def test_order_of_columns_bom_and_line_ends_do_not_matter(tmp_path):
    ks, e, d, r = SMALLEST.strip().split(",")
    (tmp_path / "a.csv").write_text(HEAD + SMALLEST)
    text = f"\ufeffr,name,ks,d,e\r\n{r},mine,{ks},{d},{e}\r\n"
    (tmp_path / "b.csv").write_bytes(text.encode())
    assert same(read_subnets(tmp_path / "a.csv")[0], read_subnets(tmp_path / "b.csv")[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "ks, e, d, r"),
        ("ks,e,d\n", r"\br\b"),
        (HEAD, "rows"),
        (HEAD + SMALLEST + "3 3,3 3,2,160\n", "line 3: ks: .*20"),
        (HEAD + SMALLEST + SMALLEST.replace("5 5", "a 5"), "line 3: ks: "),
        (HEAD + SMALLEST.replace(",160", ",nan"), "line 2: r: "),
        (HEAD + SMALLEST.replace(",160", ","), "line 2: r: "),
        (HEAD + SMALLEST.replace(",160", ""), "line 2: r: "),
        (HEAD + SMALLEST.replace(",160", ",1e300"), "line 2: r: "),
        (HEAD + SMALLEST.replace(",160", ",160,9"), "line 2: .*4 fields"),
        (HEAD + SMALLEST + "\n" + SMALLEST, "line 4: "),
        (HEAD + '"' + SMALLEST, "line 2: "),
    ],
)
def test_malformed_tables_are_named_by_their_line(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TableError, match=message) as caught:
        read_subnets(path)
    assert str(path) in str(caught.value)


def test_blank_lines_at_the_end_are_no_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(HEAD + SMALLEST + "\n\n")
    assert len(read_subnets(path)[0].resolutions) == 1


def test_a_further_column_must_be_there_and_a_number(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(HEAD + SMALLEST)
    with pytest.raises(TableError, match="top1"):
        read_subnets(path, ["top1"])
    path.write_text("ks,e,d,r,top1\n" + SMALLEST.replace("\n", ",high\n"))
    with pytest.raises(TableError, match=r"line 2: top1: .*'high'"):
        read_subnets(path, ["top1"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:60],
        lambda data: data[:40] + bytes(255 - byte for byte in data[40:60]) + data[60:],
        lambda data: b"ks,e,d,r\n",
    ],
)
def test_a_damaged_archive_is_an_error(tmp_path, damage):
    path = tmp_path / "t.csv.gz"
    rows = [SMALLEST.replace(",160", f",{128 + 4 * place}") for place in range(25)]
    path.write_bytes(damage(gzip.compress((HEAD + "".join(rows)).encode(), mtime=0)))
    with pytest.raises(TableError, match=str(path)):
        read_subnets(path)


def test_what_is_no_text_or_no_file(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "t.csv", tmp_path / "nothing.csv", tmp_path):
        with pytest.raises(TableError, match=str(path)):
            read_subnets(path)
    with pytest.raises(CompofaError, match=str(tmp_path)):
        write_subnets(tmp_path, some(1), FORM, {})


def test_members_at_any_resolution_are_returned_as_they_are():
    arrays = few.changed(some(), resolutions=np.arange(128, 128 + 30))
    assert same(require_members(arrays, SPACE, "t.csv"), arrays)


def test_what_stands_past_a_depth_is_replaced_by_0():
    arrays = some()
    full = few.changed(
        arrays,
        kernel=np.where(arrays.blocks["kernel"] == 0, 3, arrays.blocks["kernel"]),
        expand=np.where(arrays.blocks["expand"] == 0, 6, arrays.blocks["expand"]),
    )
    assert not same(full, arrays)
    assert same(require_members(full, SPACE, "t.csv"), arrays)


def changed(name: str, rows: list[int], value: object) -> SubnetArrays:
    arrays = some()
    held = {**arrays.blocks, "depths": arrays.depths, "resolutions": arrays.resolutions}
    values = held[name].astype(float)
    values[(rows, 0) if values.ndim == 2 else rows] = value
    return few.changed(arrays, **{name: values})


@pytest.mark.parametrize(
    ("name", "rows", "value", "message"),
    [
        ("kernel", [4], 9, "line 6; line 6: .*expected 3, got 9"),
        ("kernel", [4], 3.5, "line 6; line 6: .*expected 3, got 3.5"),
        ("expand", [0, 1], 5, "lines 2, 3; line 2: "),
        ("expand", list(range(9)), 0, "lines 2, 3, 4, 5, 6 and 4 more; line 2: "),
        ("depths", [7], 5, "line 9; line 9: depth: .* 5"),
        ("depths", [7], 2.5, "line 9; line 9: depth: "),
        ("depths", [7], -1, "line 9; line 9: depth: "),
        ("depths", [7], 0, "line 9; line 9: stage 1 depth"),
        ("resolutions", [29], 160.5, "line 31; line 31: resolution"),
    ],
)
def test_others_are_named_by_their_lines(name, rows, value, message):
    with pytest.raises(TableError, match=message) as caught:
        require_members(changed(name, rows, value), SPACE, "t.csv")
    assert str(caught.value).startswith("t.csv: ")


def test_tables_of_networks_with_other_stages():
    arrays = some()
    with pytest.raises(TableError, match=r"\b20\b.*\b25\b"):
        require_members(arrays_of(list(SPACE.subnets_of(arrays)), SPACE.names, 5), SPACE, "t.csv")


def test_lines():
    assert lines([0]) == "line 2"
    assert lines([0, 5]) == "lines 2, 7"
    assert lines(range(8)) == "lines 2, 3, 4, 5, 6 and 3 more"
