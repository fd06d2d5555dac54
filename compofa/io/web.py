"""Requests for a file, or the rest of one, over HTTPS or HTTP."""

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
"""A connection that transfers fewer bytes in this time counts as lost."""


class ConnectionLostError(Exception):
    """The connection was lost or timed out. Another attempt may continue the transfer."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https, and from http to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request of a redirect.

        Raises:
            OSError: The redirect is to another scheme.
        """
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme != "https" and (scheme, req.type) != ("http", "http"):
            fp.close()
            raise OSError(f"a redirect from {req.type} to {scheme}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_url(url: str, start: int, validator: str | None) -> Any:
    """Request a file from byte ``start`` on, or all of it if it no longer matches ``validator``.

    Args:
        url: URL with https or http.
        start: Number of bytes received already.
        validator: ETag or modification date of these bytes.

    Returns:
        The open response; status 416 if the file has no byte ``start``.

    Raises:
        ConnectionLostError: The server is unreachable or overloaded (HTTP status 408, 429, 5xx).
        OSError: The URL is invalid, or the server returned another error.
    """
    try:
        request = _request(url)
        opener = urllib.request.build_opener(_Redirects)
        if start:
            request.add_header("Range", f"bytes={start}-")
            request.add_header("If-Range", validator or "")
        return opener.open(request, timeout=TIMEOUT_S)
    except (ValueError, http.client.InvalidURL):  # they quote credentials
        raise OSError("not a URL") from None
    except urllib.error.HTTPError as error:
        if error.code == 416:  # range not satisfiable: the received bytes are of another file
            return error
        error.close()
        if error.code in (408, 429) or error.code >= 500:
            raise ConnectionLostError(f"HTTP status {error.code}") from error
        raise OSError(f"HTTP status {error.code}") from error
    except (ConnectionError, TimeoutError, http.client.HTTPException) as error:
        raise ConnectionLostError(error_message(error)) from error


def _request(url: str) -> urllib.request.Request:
    """Return the request for a URL, with its credentials in a header that redirects do not keep.

    Raises:
        OSError: The URL is invalid, or its scheme is not https or http.
    """
    parts = _split(url)
    if parts.scheme not in ("https", "http"):
        raise OSError(f"expected a URL of https or http, got {(parts.scheme or 'no scheme')[:20]}")
    user, _, host = parts.netloc.rpartition("@")
    headers = {"User-Agent": "compofa", "Accept-Encoding": "identity"}
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers=headers)
    if user:
        token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def file_facts(response: Any, start: int) -> dict[str, Any]:
    """Return the ETag, modification date and length in bytes of the file of a response.

    Args:
        response: Response of :func:`open_url`.
        start: First byte that was requested.

    Returns:
        ``etag``, ``modified`` and ``length``, each None if unknown.

    Raises:
        OSError: The response is not the file, or not the requested part of it.
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
            raise OSError(f"expected the file from byte {start}, got another part of it")
        return facts | {"length": int(match[2])}
    length = headers.get("Content-Length", "")
    return facts | {"length": int(length) if re.fullmatch(r"\d{1,18}", length) else None}


def validator_of(facts: Mapping[str, Any]) -> str | None:
    """Return the key of the strong validator in ``facts``, or None (RFC 9110, section 13.1.5).

    Weak ETags, ``W/"…"``, do not identify the bytes of a file.
    """
    for key, form in (("etag", r'"[!#-~]*"'), ("modified", r"\w{3}, [\w: ]{20,24} GMT")):
        if isinstance(facts.get(key), str) and re.fullmatch(form, facts[key], re.ASCII):
            return key
    return None


def chunks(response: Any) -> Iterator[bytes]:
    """Yield the content of a response as it is received.

    Raises:
        ConnectionLostError: The connection was lost or is too slow.
    """
    since, got = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise ConnectionLostError(error_message(error)) from error
        if not chunk:
            return
        got += len(chunk)
        if time.monotonic() - since >= WINDOW_S:
            if got < WINDOW_BYTES:
                raise ConnectionLostError(f"{got:,} bytes in {WINDOW_S:g} s")
            since, got = time.monotonic(), 0
        yield chunk


def redacted(url: str) -> str:
    """Return a URL without credentials, query and fragment, for messages."""
    try:
        parts = _split(url)
    except OSError:
        return "an invalid URL"
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        return urllib.parse.urlsplit(url)
    except ValueError:  # it quotes credentials
        raise OSError("not a URL") from None


def join_url(base: str, name: str) -> str:
    """Return the URL of a file below ``base``, with the same query.

    Raises:
        OSError: ``base`` is not a URL.
    """
    parts = _split(base)
    path = f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"
    return parts._replace(path=path).geturl()


def is_unencrypted(url: str) -> bool:
    """Return whether a file is transferred over a network without encryption.

    Raises:
        OSError: ``url`` is not a URL.
    """
    parts = _split(url)
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


def error_message(error: BaseException) -> str:
    """Return the message of an error, in one line."""
    inner = getattr(error, "reason", None) or error
    text = getattr(inner, "strerror", None) or str(inner) or type(inner).__name__
    return " ".join(str(text).split())[:160]
