import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from compofa.errors import CompofaError
from compofa.files import (
    draft_folder,
    remove_drafts,
    require_writable,
    write_atomic,
    write_text_atomic,
)


class WriterError(Exception):
    pass


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    write_text_atomic(path, "one\n")
    write_text_atomic(path, "zwölf\n")
    assert path.read_text(encoding="utf-8") == "zwölf\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [WriterError("half way"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def writer(file: BinaryIO) -> None:
        file.write(b"half of the new")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, writer)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_content_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def writer(file: BinaryIO) -> None:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    with path.open("rb") as reader:
        write_atomic(path, writer)
        assert reader.read() == b"old", "who has the file open keeps what was there"
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def writer(file: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CompofaError, match=r"^cannot write .*file: No space left on device$"):
        write_atomic(tmp_path / "file", writer)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CompofaError, match="cannot write"):
        write_text_atomic(tmp_path / "file" / "below", "text")
    with pytest.raises(CompofaError, match="cannot write"):
        write_text_atomic(tmp_path, "the target is a folder")
    with pytest.raises(CompofaError, match="cannot write to the output folder"):
        require_writable(tmp_path / "file" / "below")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "file", "text")
        assert os.umask(0o027) == 0o027, "the umask must stay as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    folder = require_writable(tmp_path / "out" / "run")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_a_draft_folder_is_gone_afterwards_or_found_when_its_process_was_killed(
    tmp_path: Path,
) -> None:
    with draft_folder(tmp_path / "a.net") as folder:
        (folder / "deep").mkdir()
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "deep").write_text("half of a network")
    others = tmp_path / ".a.net.more.a1b2c3d4.draft"
    others.touch()
    remove_drafts(tmp_path, "a.net")
    assert list(tmp_path.iterdir()) == [others]
    remove_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == []
