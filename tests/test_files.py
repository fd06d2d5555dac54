import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from compofa.errors import CompofaError
from compofa.io.atomic import (
    draft_folder,
    is_stream,
    remove_drafts,
    require_other,
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

    with pytest.raises(CompofaError, match=r"file: No space left on device$"):
        write_atomic(tmp_path / "file", writer)
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CompofaError, match=str(tmp_path)):
        write_text_atomic(tmp_path / "file" / "below", "text")
    with pytest.raises(CompofaError, match=str(tmp_path)):
        write_text_atomic(tmp_path, "the target is a folder")
    with pytest.raises(CompofaError, match="file/below"):
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


# --- links, devices and other special files ---


def test_the_target_of_a_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "file", tmp_path / "link"
    link.symlink_to("there/file")
    for text in ("one", "two"):  # first a broken link, then one to a file
        write_text_atomic(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_the_previous_target_of_a_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "last").symlink_to("there/last")
    for text in (b"one", b"two"):
        write_atomic(
            tmp_path / "last", lambda file, text=text: file.write(text), tmp_path / "previous"
        )
    assert (tmp_path / "previous").read_bytes() == b"one"
    assert (tmp_path / "there" / "last").read_bytes() == b"two"


def test_a_loop_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CompofaError, match="loop: Too many levels"):
        write_text_atomic(tmp_path / "loop", "text")
    assert (tmp_path / "loop").is_symlink()


def test_a_file_keeps_its_mode_and_other_names_of_it_keep_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o604)
    os.link(path, tmp_path / "other")
    write_text_atomic(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert (tmp_path / "other").read_text() == "old"


def test_devices_and_fifos_are_written_to(tmp_path: Path) -> None:
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    (tmp_path / "null").symlink_to("/dev/null")
    thread = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    thread.start()
    write_text_atomic(fifo, "through")
    thread.join()
    write_text_atomic(tmp_path / "null", "away")
    assert read == [b"through"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fifo", "null"]


def test_a_failing_writer_writes_nothing_to_a_stream(tmp_path: Path) -> None:
    def writer(file: BinaryIO) -> None:
        file.write(b"half")
        raise WriterError

    with pytest.raises(WriterError):
        write_atomic("/dev/full", writer)
    with pytest.raises(CompofaError, match="No space left"):
        write_text_atomic("/dev/full", "text")


@pytest.mark.parametrize(
    ("name", "piped"),
    [("/dev/stdout", True), ("/dev/fd/1", True), ("/dev/stdout", False), ("log", False)],
)
def test_stdout_is_appended_to(name: str, piped: bool, tmp_path: Path) -> None:
    program = (
        "from compofa.io.atomic import write_text_atomic\n"
        "from compofa.io.locks import exclusive\n"
        "print('before', flush=True)\n"
        f"with exclusive({name!r}):\n"
        f"    write_text_atomic({name!r}, 'content\\n')\n"
        "print('after')\n"
    )
    with (tmp_path / "log").open("wb") as log:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE if piped else log,
            check=True,
            cwd=tmp_path,
            env=environment,
        )
    found = done.stdout if piped else (tmp_path / "log").read_bytes()
    assert found == b"before\ncontent\nafter\n"
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("read")
    (tmp_path / "link").symlink_to("file")
    os.link(path, tmp_path / "name")
    for name in ("file", "link", "name", "../" + tmp_path.name + "/file"):
        with pytest.raises(CompofaError, match="input"):
            require_other(tmp_path / name, None, "an-id", path)
    require_other(tmp_path / "new" / "file", path)
    assert is_stream("/dev/null") and not is_stream(path) and not is_stream(tmp_path)
    require_other("/dev/null", path)
    assert path.read_text() == "read" and not (tmp_path / "new").exists()


def test_a_draft_folder_is_removed(
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
