import contextlib
import hashlib
import http.client
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from compofa import download
from compofa.download import ENVIRONMENT, fetch, published_file
from compofa.errors import CheckpointError, CompofaError

CONTENT = bytes(range(256)) * 4000  # about a megabyte


@dataclass
class Server:
    """What the test's server does, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"/a": CONTENT})
    cuts: list[int] = field(default_factory=list)  # bytes after which answers end, one each
    ranges: bool = True
    length: bool = True
    tags: bool = True
    status: int = 0
    kind: str = "application/octet-stream"
    asked: list[str] = field(default_factory=list)  # the Range of every request


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    does = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            does.asked.append(asked)
            content = does.files.get(self.path)
            if does.status or content is None:
                self.send_error(does.status or 404)
                return
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and does.ranges else 0
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", does.kind)
            if does.tags:
                self.send_header("ETag", f'W/"{hashlib.md5(content).hexdigest()}"')
            if start:
                whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", whole)
            if does.length:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            most = does.cuts.pop(0) if does.cuts else len(content)
            with contextlib.suppress(ConnectionError):  # who asked may have gone
                self.wfile.write(content[start : start + most])

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(download, "ATTEMPTS", 2)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        does.url = f"http://127.0.0.1:{http_server.server_port}"
        thread = threading.Thread(target=http_server.serve_forever, args=(0.01,))
        thread.start()
        yield does
        http_server.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once_and_its_checksum_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a"
    for _ in range(2):
        assert fetch(f"{server.url}/a", path, bar=False).read_bytes() == CONTENT
    assert server.asked == [""]
    assert names(path.parent) == ["a", "a.sha256"]
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert (path.parent / "a.sha256").read_text() == f"{digest}  a\n"


def test_where_files_come_from_and_go_to(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT, f"{server.url}/ofa/")
    server.files = {"/ofa/nets/LG%20G8": b"x" * 10, "/other/b": b"y"}
    path = published_file("nets/LG G8", bar=False)
    assert path == tmp_path / "hub" / "checkpoints" / "nets" / "LG G8"
    assert path.read_bytes() == b"x" * 10
    path = published_file("b", f"{server.url}/other", bar=False)
    assert path.read_bytes() == b"y"


@pytest.mark.parametrize("tags", [True, False])
def test_a_download_goes_on_where_the_connection_ended(
    tags: bool, server: Server, tmp_path: Path
) -> None:
    server.cuts, server.tags = [300_000, 400_000], tags
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=300000-", "bytes=700000-"]
    assert names(tmp_path) == ["a", "a.sha256"]


def test_the_next_call_goes_on_too(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 0]
    with pytest.raises(CheckpointError, match=r"1,024,000 bytes, got 300,000.*go on") as caught:
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert f"{server.url}/a" in str(caught.value)
    assert f"put that file at {tmp_path / 'a'}" in str(caught.value)
    assert names(tmp_path) == ["a.part", "a.part.json"]
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=300000-"


def test_an_interrupted_process_leaves_what_it_has(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(response: object) -> Iterator[bytes]:
        yield CONTENT[:5000]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(download, "_chunks", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert (tmp_path / "a.part").stat().st_size == 5000
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=5000-"]


def test_a_file_that_changed_meanwhile_starts_over(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 0]
    with pytest.raises(CheckpointError):
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    for content in (CONTENT[::-1], b"short"):  # the second has no byte 300,000
        server.files["/a"] = content
        (tmp_path / "a").unlink(missing_ok=True)
        (tmp_path / "a.part").write_bytes(CONTENT[:300_000])
        assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == content


def test_a_server_without_ranges_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.cuts, server.ranges = [300_000], False
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT


def test_a_part_of_unknown_origin_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.part").write_bytes(b"something else")
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT
    assert server.asked == [""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404}, "HTTP status 404"),
        ({"files": {}}, "HTTP status 404"),
        ({"status": 503}, "HTTP status 503"),
        (
            {"kind": "text/html; charset=utf-8"},
            "expected a file, got HTTP status 200 with text/html",
        ),
        ({"cuts": [100] + [0] * 9}, "expected 1,024,000 bytes, got 100"),
        ({"url": "http://127.0.0.1:1"}, "Connection refused"),
        ({"url": "http://no-such-host.invalid"}, "."),
        ({"url": "no url"}, "not a URL"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    change: dict, message: str, server: Server, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(CheckpointError, match=f"cannot download .*{message}") as caught:
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert "\n" not in str(caught.value)
    assert f"put that file at {tmp_path / 'a'}" in str(caught.value)
    assert not (tmp_path / "a").exists()


def test_a_server_need_not_say_how_long_a_file_is(server: Server, tmp_path: Path) -> None:
    server.length = False
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT


def test_a_file_put_there_by_hand_is_used_and_watched(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    url = "http://no-such-host.invalid/a"
    assert fetch(url, tmp_path / "a").read_bytes() == b"mine"
    assert names(tmp_path) == ["a", "a.sha256"]
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"expected SHA-256 [0-9a-f]{64} as in a.sha256, got"):
        fetch(url, tmp_path / "a")


def test_a_full_disk_is_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompofaError, match="No space left on device"):
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert not (tmp_path / "a").exists()


def test_two_at_once_download_once(server: Server, tmp_path: Path) -> None:
    results: list[bytes] = []
    threads = [
        threading.Thread(
            target=lambda: results.append(
                fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes()
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT] * 4
    assert server.asked == [""]
    assert names(tmp_path) == ["a", "a.sha256"]


def test_a_broken_answer_counts_as_an_attempt(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def read1(self, _: int) -> bytes:
            raise http.client.IncompleteRead(b"")

    with pytest.raises(download._CutError, match="IncompleteRead"):
        list(download._chunks(Broken()))
