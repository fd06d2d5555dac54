import base64
import contextlib
import hashlib
import http.client
import io
import itertools
import os
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compofa.errors import CheckpointError, CompofaError
from compofa.io import download, web
from compofa.io.download import ENVIRONMENT, check_file, fetch, published_file
from compofa.io.open import open_network
from compofa.networks.zoo import PUBLISHED

CONTENT = bytes(range(256)) * 4000  # about a megabyte


def weights() -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.ones(3)}}, buffer)
    return buffer.getvalue()


WEIGHTS = weights()


@dataclass
class Server:
    """What the test's server does, and what it was asked."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"/a": CONTENT})
    cuts: list[int] = field(default_factory=list)  # bytes after which answers end, one each
    ranges: bool = True
    conditions: bool = True  # whether If-Range is understood
    length: bool = True
    chunked: bool = False
    tag: str = '"{}"'
    modified: str = ""
    status: int = 0
    to: str = ""  # where a redirect leads
    kind: str = "application/octet-stream"
    asked: list[str] = field(default_factory=list)  # the Range of every request
    given: list[str] = field(default_factory=list)  # its If-Range
    user: str = ""  # the last Authorization


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    does = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"

        def do_GET(self) -> None:
            asked = self.headers.get("Range", "")
            does.asked.append(asked)
            does.given.append(self.headers.get("If-Range", ""))
            does.user = self.headers.get("Authorization", "")
            content = does.files.get(self.path.partition("?")[0])
            if does.to and self.path != "/to":
                self.send_response(302)
                self.send_header("Location", does.to)
                self.end_headers()
                return
            if does.status or content is None:
                self.send_error(does.status or 404)
                return
            tag = does.tag.format(hashlib.md5(content).hexdigest())
            changed = does.conditions and does.given[-1] not in ("", tag, does.modified)
            ranges = asked and does.ranges and not changed
            start = int(asked.removeprefix("bytes=").rstrip("-")) if ranges else 0
            if start >= len(content):
                self.send_error(416)
                return
            if does.chunked:
                self.protocol_version = "HTTP/1.1"
            self.send_response(206 if start else 200)
            self.send_header("Content-Type", does.kind)
            if tag:
                self.send_header("ETag", tag)
            if does.modified:
                self.send_header("Last-Modified", does.modified)
            if start:
                whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", whole)
            if does.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            elif does.length:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            most = does.cuts.pop(0) if does.cuts else len(content)
            with contextlib.suppress(ConnectionError):  # who asked may have gone
                self.send(content[start : start + most], most >= len(content) - start)

        def send(self, content: bytes, whole: bool) -> None:
            step = len(content) // 10 + 1 if does.chunked else len(content) or 1
            for first in range(0, len(content), step):
                part = content[first : first + step]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part) if does.chunked else part)
            if does.chunked and whole:
                self.wfile.write(b"0\r\n\r\n")

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
    server.files = {"/ofa/nets/LG%20G8": WEIGHTS, "/other/b.config": b"{}"}
    path = published_file("nets/LG G8", bar=False)
    assert path == tmp_path / "hub" / "checkpoints" / "nets" / "LG G8"
    assert path.read_bytes() == WEIGHTS
    path = published_file("b.config", f"{server.url}/other?token=1", bar=False)
    assert path.read_bytes() == b"{}"


def test_compofa_weights_come_from_their_own_repository_or_the_mirror(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    name, urls = PUBLISHED["compofa-elastic"], []
    with monkeypatch.context() as patch:
        patch.setattr(download, "fetch", lambda url, *_: urls.append(url))
        for each in ("compofa", "compofa-elastic", "ofa_mbv3_d234_e346_k357_w1.0"):
            published_file(PUBLISHED[each])
    assert [url.removeprefix("https://raw.githubusercontent.com/") for url in urls] == [
        "gatech-sysml/CompOFA/main/ofa/checkpoints/model_best_compofa_simple.pth.tar",
        "gatech-sysml/CompOFA/main/ofa/checkpoints/model_best_compofa_simple_elastic.pth.tar",
        "han-cai/files/master/ofa/ofa_nets/ofa_mbv3_d234_e346_k357_w1.0",
    ]
    monkeypatch.setenv(ENVIRONMENT, f"{server.url}/mirror")
    server.files = {f"/mirror/{name}": WEIGHTS}
    path = published_file(name, bar=False)
    assert path == tmp_path / "hub" / "checkpoints" / name and path.read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.config", b"oops"), ("a.config", b"[]"), ("a", b"{}"), ("a", b"version https://git-lfs")],
)
def test_what_is_something_else_is_not_kept(
    name: str, content: bytes, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server.files = {f"/{name}": content}
    with pytest.raises(CheckpointError, match=rf"{server.url}.*{name}"):
        published_file(name, server.url, bar=False)
    folder = tmp_path / "hub" / "checkpoints"
    assert names(folder) == [] and len(server.asked) == 1
    server.files = {f"/{name}": b"{}" if name.endswith(".config") else WEIGHTS}
    published_file(name, server.url, bar=False)
    assert names(folder) == [name, f"{name}.sha256"]


@pytest.mark.parametrize(
    ("net", "file"),
    [
        ("ofa_mbv3_d234_e346_k357_w1.0", "ofa_nets/ofa_mbv3_d234_e346_k357_w1.0"),
        ("compofa", "compofa_nets/model_best_compofa_simple.pth.tar"),
        ("note10_lat@8ms_top1@71.4_finetune@25", "note10_lat-8ms_top1-71.4_finetune-25/init"),
    ],
)
def test_weights_of_another_network_can_be_replaced(
    net: str, file: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT, server.url)
    file = file if "_nets/" in file else f"ofa_specialized/{file}"
    server.files = {f"/{file}": WEIGHTS}
    name = Path(file).name
    with pytest.raises(CheckpointError, match=rf"\S+{name} .*\b{name}\.sha256"):
        open_network(net)


def test_a_damaged_record_is_quoted_as_one_plain_line(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    (tmp_path / "file.sha256").write_bytes(b"\x1b[31m\x00\r\n\x85" * 9)
    with pytest.raises(CheckpointError, match="SHA-256") as caught:
        check_file(path)
    assert str(caught.value).isprintable()


def test_more_than_the_kind_of_file_has_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    server.files = {"/a.config": b" " * 5_000_000}
    for server.length in (True, False):
        with pytest.raises(CheckpointError, match="4,000,000 bytes"):
            published_file("a.config", server.url, bar=False)
    assert names(tmp_path / "hub" / "checkpoints") == []


DATE = "Wed, 01 Jan 2025 10:20:30 GMT"


@pytest.mark.parametrize(
    ("tag", "modified", "given"),
    [('"{}"', DATE, f'"{hashlib.md5(CONTENT).hexdigest()}"'), ("", DATE, DATE),
     ('W/"{}"', DATE, DATE)],
)  # fmt: skip
@pytest.mark.parametrize("chunked", [True, False])
def test_a_download_continues_where_the_connection_ended(
    tag: str, modified: str, given: str, chunked: bool, server: Server, tmp_path: Path
) -> None:
    server.cuts, server.tag, server.modified = [300_000, 400_000], tag, modified
    server.chunked = chunked
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT
    assert server.asked == ["", "bytes=300000-", "bytes=700000-"]
    assert server.given == ["", given, given]
    assert names(tmp_path) == ["a", "a.sha256"]


@pytest.mark.parametrize("tag", ["", 'W/"{}"', '"\x7f"'])
def test_without_a_validator_it_starts_over(tag: str, server: Server, tmp_path: Path) -> None:
    server.cuts, server.tag = [300_000, 0, 0], tag
    with pytest.raises(CheckpointError):
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    server.files["/a"] = CONTENT[::-1]
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT[::-1]
    assert server.asked == [""] * 4


@pytest.mark.parametrize("conditions", [True, False])
@pytest.mark.parametrize("tag", ['"{}"', ""])
def test_two_versions_are_not_glued_together(
    tag: str, conditions: bool, server: Server, tmp_path: Path
) -> None:
    server.cuts, server.tag, server.modified = [300_000, 0, 0], tag, DATE
    server.conditions = conditions
    with pytest.raises(CheckpointError):
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    server.files["/a"], server.modified = CONTENT[::-1], DATE.replace("30 GMT", "31 GMT")
    assert fetch(f"{server.url}/a", tmp_path / "a", bar=False).read_bytes() == CONTENT[::-1]


def test_a_part_from_elsewhere_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.cuts, server.tag, server.modified = [300_000, 0, 0], "", DATE
    server.files["/b"] = CONTENT[::-1]
    with pytest.raises(CheckpointError):
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert fetch(f"{server.url}/b", tmp_path / "a", bar=False).read_bytes() == CONTENT[::-1]


def test_the_next_call_continues_too(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 0]
    with pytest.raises(CheckpointError, match=r"1,024,000 bytes.* 300,000") as caught:
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert f"{server.url}/a" in str(caught.value)
    assert f" {tmp_path / 'a'}" in str(caught.value)
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
        patched.setattr(download, "chunks", interrupted)
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
        ({"status": 404}, "404"),
        ({"files": {}}, "404"),
        ({"status": 503}, "503"),
        (
            {"kind": "text/html; charset=utf-8"},
            "200.* text/html",
        ),
        ({"cuts": [100] + [0] * 9}, "1,024,000 bytes.* 100"),
        ({"url": "http://127.0.0.1:1"}, "Connection refused"),
        ({"url": "http://no-such-host.invalid"}, "."),
        ({"url": "no url"}, "URL"),
        ({"url": "http://[1"}, "URL"),
        ({"url": "file:///etc"}, r"https or http.*\bfile"),
        ({"url": "ftp://127.0.0.1"}, r"https or http.*\bftp"),
        ({"to": "ftp://127.0.0.1/a"}, "http to ftp"),
        ({"to": "file:///etc/passwd"}, "302"),
        ({"length": False}, "long"),
        ({"chunked": True, "cuts": [100] * 9}, "IncompleteRead"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    change: dict, message: str, server: Server, tmp_path: Path
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert "\n" not in str(caught.value)
    assert f" {tmp_path / 'a'}" in str(caught.value)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("cut", range(0, len(WEIGHTS), 97))
def test_without_a_length_what_is_whole_by_itself_is_taken(
    cut: int, server: Server, tmp_path: Path
) -> None:
    server.files["/a"], server.length, server.cuts = WEIGHTS, False, [cut]
    found = fetch(f"{server.url}/a", tmp_path / "a", False, download._check_weights)
    assert found.read_bytes() == WEIGHTS
    assert server.asked == [""] * 2


def test_a_trickle_counts_as_cut(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Body(io.BytesIO):
        def read1(self, most: int = -1) -> bytes:
            return self.read(step)

    clock = itertools.count(0, 20)  # seconds, by 20 with every look
    monkeypatch.setattr(web, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    step = 10
    with pytest.raises(web.ConnectionLostError, match=r"30 bytes.* 60 s"):
        list(web.chunks(Body(CONTENT)))
    step = web.WINDOW_BYTES // 3
    assert b"".join(web.chunks(Body(CONTENT))) == CONTENT
    monkeypatch.setattr(web, "WINDOW_S", 0)
    server.files["/a"] = CONTENT[:1000]
    with pytest.raises(CheckpointError, match=r"1,000 bytes.* 0 s"):
        fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert len(server.asked) == 2, "what little has come does not make an attempt a good one"


def test_a_name_and_password_reach_the_mirror_and_nothing_else(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = server.url.removeprefix("http://")
    url = f"http://me:s%40cret@{place}/a?token=s3cret"
    fetch(url, tmp_path / "a", bar=False)
    assert base64.b64decode(server.user.removeprefix("Basic ")) == b"me:s@cret"
    server.files["/to"] = CONTENT
    server.to = f"http://localhost:{place.partition(':')[2]}/to"
    fetch(url, tmp_path / "b", bar=False)
    assert server.user == ""
    server.to, server.status = "", 403
    for broken in (url, url.replace("/a?", "/\t?"), "http://me:s3cret@[1/a"):
        with pytest.raises(CheckpointError) as caught:
            fetch(broken, tmp_path / "c", bar=False)
        assert (
            "cret" not in str(caught.value) and "me" not in str(caught.value).split("put that")[0]
        )
    (tmp_path / "c.part").write_bytes(b"x")
    server.status, server.cuts = 0, [100_000, 0, 0]
    with pytest.raises(CheckpointError):
        fetch(url, tmp_path / "c", bar=False)
    assert "cret" not in (tmp_path / "c.part.json").read_text() + caplog.text


def test_http_is_said_to_verify_nothing(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fetch(f"{server.url}/a", tmp_path / "a", bar=False)
    assert not caplog.records, "nobody else is on this machine's own network"
    with pytest.raises(CheckpointError):
        fetch("http://no-such-host.invalid/a?token=1", tmp_path / "b", bar=False)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "http" in record.message
    assert "token" not in record.message


def test_redirects_keep_to_https() -> None:
    redirect = web._Redirects().redirect_request
    for start, end, kept in (
        ("https", "https", True), ("http", "http", True), ("http", "https", True),
        ("https", "http", False), ("https", "ftp", False),
    ):  # fmt: skip
        request = urllib.request.Request(f"{start}://a.invalid/a")
        if kept:
            assert redirect(request, io.BytesIO(), 302, "", {}, f"{end}://b.invalid/b") is not None
        else:
            with pytest.raises(OSError, match=f"{start} to {end}"):
                redirect(request, io.BytesIO(), 302, "", {}, f"{end}://b.invalid/b")


def test_a_file_put_there_by_hand_is_used_and_watched(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"mine")
    url = "http://no-such-host.invalid/a"
    assert fetch(url, tmp_path / "a").read_bytes() == b"mine"
    assert names(tmp_path) == ["a", "a.sha256"]
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"SHA-256 [0-9a-f]{64} .*a\.sha256"):
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

    with pytest.raises(web.ConnectionLostError, match="IncompleteRead"):
        list(web.chunks(Broken()))
