"""Asking a server for a file, or for the rest of one, over https or http."""

from __future__ import annotations

import base64
import http.client
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

TIMEOUT_S, CHUNK = 30.0, 1 << 20
WINDOW_S, WINDOW_BYTES = 60.0, 60_000
"""Fewer bytes in so many seconds count as a connection that ended."""


class CutError(Exception):
    """The connection ended, or nothing came; another attempt may go on from there."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to https, and from http to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows.

        Raises:
            OSError: It would be of another kind.
        """
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and (scheme, req.type) != ("http", "http"):
            fp.close()
            raise OSError(f"a redirect from {req.type} to {scheme}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def ask(url: str, start: int, validator: str | None) -> Any:
    """Ask for a file from byte ``start`` on, if it is the one of ``validator``; else for all."""
    try:
        request = _request(url)
        opener = urllib.request.build_opener(_Redirects)
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", validator or "")
        return opener.open(request, timeout=TIMEOUT_S)
    except (ValueError, http.client.InvalidURL):  # which quote what may be secret
        raise OSError("not a URL") from None
    except urllib.error.HTTPError as error:
        if error.code == 416:  # it has no such bytes: what is here is not the start of it
            return error
        error.close()
        if error.code in (408, 429) or error.code >= 500:
            raise CutError(f"HTTP status {error.code}") from error
        raise OSError(f"HTTP status {error.code}") from error
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise CutError(reason_of(error)) from error


def _request(url: str) -> urllib.request.Request:
    """Return the request for a URL, its name and password in a header for its host alone.

    Raises:
        OSError: It is neither https nor http, or no URL.
    """
    parts = _split(url)
    if parts.scheme not in ("https", "http"):
        raise OSError(f"not a URL of https or http: {(parts.scheme or 'no scheme')[:20]}")
    user, _, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": "compofa", "Accept-Encoding": "identity"}
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    if user:
        token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def describe(response: Any, start: int) -> dict[str, Any]:
    """Return what tells one file from another: its length, its tag, the time of its last change.

    Raises:
        OSError: The answer is not the file, or not the part of it that was asked for.
    """
    headers = response.headers
    facts: dict[str, Any] = {
        "etag": headers.get("ETag"), "modified": headers.get("Last-Modified"), "length": None
    }  # fmt: skip
    if response.status == 416:
        return facts
    if response.status not in (200, 206) or headers.get_content_type() == "text/html":
        kind = headers.get_content_type()
        raise OSError(f"expected a file, got HTTP status {response.status} with {kind}")
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise OSError("expected the rest of the file, got another part of it")
        return facts | {"length": int(match[2])}
    length = headers.get("Content-Length", "")
    return facts | {"length": int(length) if re.fullmatch(r"\d{1,18}", length) else None}


def validator_of(facts: Mapping[str, Any]) -> str | None:
    """Return which of the facts can be held against the server's: RFC 9110, section 13.1.5.

    A weak tag, ``W/"…"``, stays the same for other bytes of the same meaning.
    """
    for key, form in (("etag", r'"[!#-~]*"'), ("modified", r"\w{3}, [\w: ]{20,24} GMT")):
        if isinstance(facts.get(key), str) and re.fullmatch(form, facts[key], re.ASCII):
            return key
    return None


def chunks(response: Any) -> Iterator[bytes]:
    """Yield the content as it comes.

    Raises:
        CutError: The connection ended before the content, or is too slow.
    """
    since, got = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise CutError(reason_of(error)) from error
        if not chunk:
            return
        got += len(chunk)
        if time.monotonic() - since >= WINDOW_S:
            if got < WINDOW_BYTES:
                raise CutError(f"{got:,} bytes in {WINDOW_S:g} s")
            since, got = time.monotonic(), 0
        yield chunk


def shown(url: str) -> str:
    """Return a URL without what may be secret in it: a name and password, a query."""
    try:
        parts = _split(url)
    except OSError:
        return "what is no URL"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:  # it quotes what may be secret
        raise OSError("not a URL") from None


def below(base: str, name: str) -> str:
    """Return the URL of a file below ``base``, whose query stays.

    Raises:
        OSError: ``base`` is no URL.
    """
    parts = _split(base)
    path = f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
    return parts._replace(path=path).geturl()


def unverified(url: str) -> bool:
    """Whether a file comes over a network with nothing to tell that it was changed on the way.

    Raises:
        OSError: ``url`` is no URL.
    """
    parts = _split(url)
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


def reason_of(error: BaseException) -> str:
    """Return what an error says, in one line."""
    inner = getattr(error, "reason", None) or error
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return " ".join(str(text).split())[:160]
