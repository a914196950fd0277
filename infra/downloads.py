"""Files fetched over HTTP from URLs that users give: as a stream within limits, whole, or as a file that can seek.

Every step of a redirection is checked as the first URL was. Nothing is inflated: a small answer stays a small one.
"""

from __future__ import annotations

import http.client
import io
import re
from collections.abc import Callable
from typing import Any, BinaryIO, Final, TypeVar, cast
from urllib.parse import unquote, urlsplit

from infra.addresses import Resolver, system_resolver
from infra.errors import FetchFailed, UrlRefused
from infra.network import Approved, FetchPolicy, approve, follow
from infra.ranged import RangedReader
from infra.urls import SafeUrl
from infra.wire import HEAD_BYTES, Patience, Wire, broken, request

_REDIRECTIONS: Final = (301, 302, 303, 307, 308)
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)  # the same request may succeed later
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_ATTEMPTS: Final = 2
_Result = TypeVar("_Result")


class Download(io.RawIOBase):
    """The body of an answer as a file: `read(n)` returns up to n bytes as they come, b"" at the end.

    Close it, or use it as a context manager; whatever it raises, the connection is closed.

    Attributes:
        source: where it came from in the end, after redirections.
        size: bytes of this body as announced, None where the server does not say.
        total: bytes of the whole file, of which this may be a range; None where unknown.
        version: the server's mark of this content; empty without.
        media_type: as the server calls it, in lower case; empty without.
        received_bytes: so far.

    Raises:
        FetchFailed: from reading: `fetch-too-large`, `fetch-timeout`, `fetch-broken`.
    """

    def __init__(self, source: Approved, wire: Wire, response: http.client.HTTPResponse, limit_bytes: int) -> None:
        super().__init__()
        self._wire = wire
        self.source = source
        self.size = _announced_size(response, source.host)
        self.total = self.size
        self.version = response.getheader("ETag") or response.getheader("Last-Modified") or ""
        self.media_type = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
        self.received_bytes = 0
        self._response = response
        self._limit_bytes = limit_bytes
        if self.size is not None and self.size > limit_bytes:
            raise _too_large(source.host, self.size, limit_bytes)
        wire.allowed_bytes = 2 * limit_bytes + HEAD_BYTES  # chunks of a few bytes each are slow, not endless

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._checkClosed()
        wanted = len(buffer) if self.size is None else min(len(buffer), self.size - self.received_bytes)
        if not wanted:
            return 0
        try:
            content = self._response.read1(wanted)
            if len(content) > wanted or (not content and self.size is not None):
                raise broken(self.source.host)
            self.received_bytes += len(content)
            if self.received_bytes > self._limit_bytes:
                raise _too_large(self.source.host, None, self._limit_bytes)
        except http.client.HTTPException:
            self.close()
            raise broken(self.source.host) from None
        except BaseException:
            self.close()
            raise
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._wire.close()
        super().close()


def fetch(
    url: str | SafeUrl | Approved,
    policy: FetchPolicy,
    *,
    resolver: Resolver = system_resolver,
    authorization: str | None = None,
    byte_range: tuple[int, int] | None = None,
    limit_bytes: int | None = None,
) -> Download:
    """Ask for what a URL names, and return its body to be read.

    Args:
        url: unchecked, or just approved under this policy.
        authorization: value of the Authorization header, sent to this URL's scheme, host and port alone.
        byte_range: the first byte, and the one after the last; None: everything.
        limit_bytes: of the body; None: the policy's. Compared with the announced size before anything is read.

    Raises:
        UrlRefused: the URL, or one that it is redirected to, is not allowed; `url-redirect` for too many steps.
        FetchFailed: `fetch-dns`, `fetch-connect`, `fetch-tls`, `fetch-timeout`, `fetch-status`, `fetch-too-large`,
            `fetch-encoding` (compressed), `fetch-ranges` (the server has no ranges), `fetch-broken`.
    """
    limit = policy.limits.bytes if limit_bytes is None else limit_bytes
    source = url if isinstance(url, Approved) else approve(url, policy, resolver=resolver, authorization=authorization)
    headers = {"User-Agent": "upriver", "Accept": "*/*", "Accept-Encoding": "identity", "Connection": "close"}
    if byte_range is not None:
        headers["Range"] = f"bytes={byte_range[0]}-{byte_range[1] - 1}"
    if source.scheme not in ("https", "http"):
        raise UrlRefused(
            f"URLs with {source.scheme}: are for cameras.", code="url-scheme", remedy="Use https: for files."
        )
    patience = Patience(policy.limits.seconds, source.host)
    for _ in range(policy.limits.redirects + 1):
        wire, response = request(source, headers, patience, policy.ca_file)
        try:
            if response.status not in _REDIRECTIONS:
                return _accepted(source, wire, response, byte_range, limit)
            target = response.getheader("Location")
        except BaseException:
            wire.close()
            raise
        wire.close()
        if not target:
            raise UrlRefused(
                f"{source.host} redirects to nowhere.", code="url-redirect", remedy="Check the URL in a browser."
            )
        with patience.waiting():
            source = follow(source, target, policy, resolver=resolver)
    raise UrlRefused(
        f"{source.host} redirects again and again; the limit is {policy.limits.redirects}.",
        code="url-redirect",
        remedy="Give the URL where the file is.",
    )


def fetch_whole(
    url: str | SafeUrl | Approved,
    policy: FetchPolicy,
    *,
    limit_bytes: int,
    resolver: Resolver = system_resolver,
    byte_range: tuple[int, int] | None = None,
) -> bytes:
    """Return a small file, or a range of one; tries once more when that may help. Raises as `fetch` and `Download`."""

    def content() -> bytes:
        with fetch(url, policy, resolver=resolver, byte_range=byte_range, limit_bytes=limit_bytes) as download:
            return download.readall()

    return again(content)


def again(attempt: Callable[[], _Result]) -> _Result:
    """Return what `attempt` does, called a second time where it failed for a passing reason."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return attempt()
        except FetchFailed as error:
            if not error.is_transient:
                raise
    return attempt()


class RangedSource:
    """A film on a web server that gives ranges, for demuxers that jump: `open` gives handles that can seek.

    It stands for the content that was there at first: reading fails with `fetch-changed` when there is another. Every
    range is a request of its own, checked from the URL on.

    Attributes:
        name: the last part of the path, by which containers are guessed.
        size: in bytes.
        version: the server's mark of this content; empty without.

    Raises:
        UrlRefused, FetchFailed: as `fetch`; `fetch-ranges` for a server without ranges: read it by `fetch`.
    """

    def __init__(
        self,
        url: str | SafeUrl,
        policy: FetchPolicy,
        *,
        resolver: Resolver = system_resolver,
        authorization: str | None = None,
    ) -> None:
        self.url = url if isinstance(url, SafeUrl) else SafeUrl(url)
        self._policy = policy
        self._resolver = resolver
        self._authorization = authorization
        first = again(lambda: self._ask(0, 1))
        with first:
            total = first.total
            self.version = first.version
        if total is None:
            raise _no_ranges(first.source.host)
        if total > policy.limits.bytes:
            raise _too_large(first.source.host, total, policy.limits.bytes)
        self.size = total
        path = unquote(urlsplit(first.source.url.reveal()).path)
        self.name = "".join(one for one in path.rpartition("/")[2] if one.isprintable())[:200] or "video"

    def open(self) -> BinaryIO:
        """Return a fresh handle at the beginning, with bounded memory; for one thread at a time."""
        return cast(BinaryIO, RangedReader(self._range, self.size, self.name))

    def _ask(self, start: int, stop: int) -> Download:
        return fetch(
            self.url,
            self._policy,
            resolver=self._resolver,
            authorization=self._authorization,
            byte_range=(start, stop),
            limit_bytes=stop - start,
        )

    def _range(self, start: int, stop: int) -> bytes:
        def content() -> bytes:
            with self._ask(start, stop) as part:
                if (part.total, part.version) != (self.size, self.version):
                    raise FetchFailed(
                        f"The file at {part.source.host} was changed meanwhile.",
                        code="fetch-changed",
                        remedy="Start again: a changed source is a new job.",
                    )
                return part.readall()

        return again(content)


def _accepted(
    source: Approved,
    wire: Wire,
    response: http.client.HTTPResponse,
    byte_range: tuple[int, int] | None,
    limit_bytes: int,
) -> Download:
    """Return the body of an answer that is what was asked for."""
    if response.status == 200 and byte_range is not None:
        raise _no_ranges(source.host)
    if response.status != (200 if byte_range is None else 206):
        raise _bad_status(source.host, response.status)
    content_coding, transfer_coding = (
        (response.getheader(name) or "").strip().lower() for name in ("Content-Encoding", "Transfer-Encoding")
    )
    if content_coding not in ("", "identity") or transfer_coding not in ("", "chunked"):
        raise FetchFailed(
            f"{source.host} compresses its answer, which was not asked for.",
            code="fetch-encoding",
            remedy="Use a source that is sent as it is.",
        )
    download = Download(source, wire, response, limit_bytes)
    if byte_range is not None:
        start, stop = byte_range
        found = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
        asked = found is not None and (int(found[1]), int(found[2]) + 1) == (start, stop)
        if found is None or not asked or download.size not in (None, stop - start):
            raise FetchFailed(
                f"{source.host} sends another range than was asked for.",
                code="fetch-ranges",
                remedy="Use a server that gives ranges (RFC 9110, section 14).",
            )
        download.size = stop - start
        download.total = None if found[3] == "*" else int(found[3])
    return download


def _announced_size(response: http.client.HTTPResponse, host: str) -> int | None:
    texts = {text.strip() for text in response.headers.get_all("Content-Length") or ()}
    if not texts or response.getheader("Transfer-Encoding"):
        return None
    text = texts.pop()
    if texts or not re.fullmatch(r"[0-9]{1,18}", text):
        raise broken(host)
    return int(text)


def _too_large(host: str, size: int | None, limit_bytes: int) -> FetchFailed:
    what = "more" if size is None else f"{size} bytes"
    return FetchFailed(
        f"{host} sends {what}; the limit is {limit_bytes} bytes.",
        code="fetch-too-large",
        remedy="Use a smaller source, or let the operator raise the limit.",
    )


def _no_ranges(host: str) -> FetchFailed:
    return FetchFailed(
        f"{host} does not send parts of the file.",
        code="fetch-ranges",
        remedy="Use a server that gives ranges (RFC 9110, section 14), or upload the file.",
    )


def _bad_status(host: str, status: int) -> FetchFailed:
    if status in (401, 403, 407):
        reason, remedy = "refuses access", "Use a URL that may be read."
    elif status in (404, 410):
        reason, remedy = "has no such file", "Check the URL's path."
    elif status in _PASSING:
        reason, remedy = "cannot answer now", "Try again later."
    else:
        reason, remedy = "does not send the file", "Check the URL in a browser."
    return FetchFailed(
        f"{host} {reason} (HTTP {status}).",
        code="fetch-status",
        remedy=remedy,
        status=status,
        is_transient=status in _PASSING,
    )
