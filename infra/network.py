"""What may be fetched: the policy, and the check of a URL against it.

Everything in the service that fetches from a URL which a user gives goes through `approve`: `infra.downloads` over
HTTP, `infra.hls` for playlists and all that they name, cameras by the address that it pins. Nothing is sent here; only
names are resolved. There is one reader of URLs, so no two can disagree about what the host is.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final, Literal, TypeAlias
from urllib.parse import quote, unquote_to_bytes, urljoin

from pydantic import BaseModel, ConfigDict, Field, field_validator

from infra.addresses import Resolver, literal_address, read_host, resolve, system_resolver
from infra.errors import UrlRefused
from infra.urls import MAX_URL_CHARACTERS, SafeUrl

Scheme: TypeAlias = Literal["https", "http", "rtsp", "rtsps", "rtmp", "rtmps", "srt"]
DEFAULT_PORTS: Final[dict[str, int]] = {
    "https": 443, "http": 80, "rtsp": 554, "rtsps": 322, "rtmp": 1935, "rtmps": 443
}  # fmt: skip

_URL: Final = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?:(?P<user>[^/?#@]*)@)?(?P<host>\[[^/?#@\[\]]*\]|[^/?#@:\[\]]*)"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?(?:#.*)?"
)
_ABSOLUTE: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# RFC 3986, section 4.2: no colon in the first part of a relative reference (`subfile,,start,0,,:/etc/passwd`).
_RELATIVE: Final = re.compile(r"[^/?#:]*(?:[/?#].*)?")
# What a path or a query may hold as it is (RFC 3986); percent signs are taken for escapes that are there already.
_UNTOUCHED: Final = "!$%&'()*+,/:;=?@[]~"


class FetchLimits(BaseModel):
    """How much of a server is borne with.

    Attributes:
        bytes: of one file, or of all segments of a stream that is not said to be endless.
        seconds: of waiting for one request, its redirects included; a server that sends a byte now and then uses them
            up as one that sends none. Time in which nobody reads does not count.
        redirects: of one request.
        playlist_bytes, playlist_segments: of one HLS playlist.
        segment_bytes: of one HLS segment, which is held in memory.
        stall_seconds: for which a live playlist may bring nothing new.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(default=8 << 30, ge=1)
    seconds: float = Field(default=30.0, gt=0, le=86_400)
    redirects: int = Field(default=3, ge=0, le=20)
    playlist_bytes: int = Field(default=1 << 20, ge=64, le=16 << 20)
    playlist_segments: int = Field(default=10_000, ge=1, le=100_000)
    segment_bytes: int = Field(default=64 << 20, ge=1, le=1 << 30)
    stall_seconds: float = Field(default=30.0, gt=0, le=3600)


class FetchPolicy(BaseModel):
    """What a URL may name. The default allows public hosts by https on port 443, and nothing else.

    Attributes:
        schemes: allowed ones; those other than https and http are for cameras.
        hosts: names and addresses that may be fetched from, `*.example.com` for all names below one; None: any.
            An allowed name must have allowed addresses all the same.
        networks: private networks that may be reached, such as a LAN with cameras ("192.168.20.0/24").
        ports: None allows the scheme's own one alone.
        user_info: whether a URL may carry `user:password@`; over HTTP it becomes basic authentication.
        ca_file: certificates (PEM) that servers are checked by; None: those of the operating system.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schemes: frozenset[Scheme] = frozenset({"https"})
    hosts: tuple[str, ...] | None = None
    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    ports: frozenset[int] | None = None
    user_info: bool = False
    ca_file: Path | None = None
    limits: FetchLimits = FetchLimits()

    @field_validator("hosts")
    @classmethod
    def _hosts_have_one_spelling(cls, hosts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if hosts is None else tuple(_host_pattern(one) for one in hosts)

    @field_validator("ports")
    @classmethod
    def _ports_exist(cls, ports: frozenset[int] | None) -> frozenset[int] | None:
        if ports is not None and not all(1 <= port <= 65535 for port in ports):
            raise ValueError("a port is a number from 1 to 65535")
        return ports

    def allows_host(self, host: str) -> bool:
        """Whether a host from `read_host` is one of `hosts`."""
        if self.hosts is None or host in self.hosts:
            return True
        suffixes = (one[1:] for one in self.hosts if one.startswith("*."))
        return literal_address(host) is None and any(host.endswith(suffix) for suffix in suffixes)


@dataclass(frozen=True, slots=True)
class Approved:
    """A URL that was checked, and the addresses that the check holds for.

    Attributes:
        url: in its one spelling, without user info.
        target: path and query, as a request names them.
        addresses: of the host, all checked; whoever connects uses one of these and resolves nothing.
        authorization: value of the header for this host, None without.
        user_info: `user:password` as the URL has it, empty without.
    """

    url: SafeUrl
    scheme: str
    host: str
    port: int
    target: str
    addresses: tuple[str, ...]
    authorization: str | None = field(default=None, repr=False)
    user_info: str = field(default="", repr=False)

    @property
    def authority(self) -> str:
        """Host and port as the `Host` header has them."""
        return _authority(self.scheme, self.host, self.port)

    @property
    def pinned_url(self) -> SafeUrl:
        """The URL with the first address in place of the name, user info included: for libraries that would resolve.

        Not for schemes with TLS, whose certificate is for the name.
        """
        user = f"{self.user_info}@" if self.user_info else ""
        return SafeUrl(f"{self.scheme}://{user}{_authority(self.scheme, self.addresses[0], self.port)}{self.target}")

    def is_same_origin(self, other: Approved) -> bool:
        """Whether both have one scheme, host and port (RFC 6454): only then do they share credentials."""
        return (self.scheme, self.host, self.port) == (other.scheme, other.host, other.port)


def approve(
    url: str | SafeUrl,
    policy: FetchPolicy,
    *,
    resolver: Resolver = system_resolver,
    authorization: str | None = None,
) -> Approved:
    """Check a URL and resolve its host.

    Args:
        authorization: value of an Authorization header, for the host of this URL alone.

    Raises:
        UrlRefused: `url-syntax`, `url-scheme`, `url-host`, `url-port`, `url-credentials` or `url-address`.
        FetchFailed: `fetch-dns`: the name has no address.
    """
    text = url.reveal() if isinstance(url, SafeUrl) else url
    _check_characters(text)
    parts = _URL.fullmatch(text)
    if parts is None:
        raise UrlRefused(
            "That is no URL of a host and a path.", code="url-syntax", remedy="Write https://host/path, escaped."
        )
    scheme = parts["scheme"].lower()
    if scheme not in policy.schemes:
        raise UrlRefused(
            f"URLs with {scheme[:20]}: are not fetched.",
            code="url-scheme",
            remedy=f"Use {' or '.join(f'{one}:' for one in sorted(policy.schemes, reverse=True)) or 'no URL'}.",
        )
    host = read_host(parts["host"])
    port = _checked_port(scheme, parts["port"], host, policy)
    if not policy.allows_host(host):
        raise UrlRefused(
            f"The host {host} is not among those that this service fetches from.",
            code="url-host",
            remedy="Use an allowed host, or let the operator allow this one.",
        )
    user_info = parts["user"] or ""
    if parts["user"] is not None and not policy.user_info:
        raise UrlRefused(
            f"The URL of {host} carries a user or a password.",
            code="url-credentials",
            remedy="Leave them out of the URL.",
        )
    if user_info and scheme in ("https", "http"):
        authorization = "Basic " + base64.b64encode(unquote_to_bytes(user_info)).decode("ascii")
    if authorization is not None and not (authorization.isascii() and authorization.isprintable()):
        raise UrlRefused(
            f"The credentials for {host} cannot stand in a header.",
            code="url-credentials",
            remedy="Use printable ASCII characters.",
        )
    target = quote(parts["path"] or "/", safe=_UNTOUCHED)
    if parts["query"] is not None:
        target += "?" + quote(parts["query"], safe=_UNTOUCHED)
    return Approved(
        url=SafeUrl(f"{scheme}://{_authority(scheme, host, port)}{target}"),
        scheme=scheme,
        host=host,
        port=port,
        target=target,
        addresses=resolve(host, policy.networks, resolver),
        authorization=authorization,
        user_info=user_info,
    )


def follow(base: Approved, reference: str, policy: FetchPolicy, *, resolver: Resolver = system_resolver) -> Approved:
    """Check what a server refers to, by a redirect or in a playlist, as if a user had given it; with two rules more.

    Nothing leads from https to http, and credentials go along only to the same scheme, host and port.

    Args:
        reference: a URL, or one relative to `base`.

    Raises:
        UrlRefused, FetchFailed: as `approve`.
    """
    _check_characters(reference)
    is_absolute = _ABSOLUTE.match(reference) is not None
    if not is_absolute and not _RELATIVE.fullmatch(reference):
        raise UrlRefused(
            f"{base.host} refers to something that is not at a host, such as a file, or a protocol inside another.",
            code="url-scheme",
            remedy="Use a source whose parts are all fetched by https.",
        )
    try:
        joined = reference if is_absolute else urljoin(base.url.reveal(), reference)
    except ValueError:
        raise UrlRefused(
            f"{base.host} refers to something that is no URL.", code="url-syntax", remedy="Check the source."
        ) from None
    if base.scheme == "https" and joined.lower().startswith("http:"):
        raise UrlRefused(
            f"{base.host} leads from https to http.",
            code="url-scheme",
            remedy="Use a source that stays with https.",
        )
    found = approve(joined, policy.model_copy(update={"user_info": False}), resolver=resolver)
    return replace(found, authorization=base.authorization) if found.is_same_origin(base) else found


def _check_characters(text: str) -> None:
    """No line ends, which would begin a header of their own, no backslash, which some take for a slash."""
    if not text or len(text) > MAX_URL_CHARACTERS:
        raise UrlRefused(
            f"A URL has {len(text)} characters; 1 to {MAX_URL_CHARACTERS} are possible.",
            code="url-syntax",
            remedy="Give a shorter URL.",
        )
    if not text.isprintable() or "\\" in text or text != text.strip():
        raise UrlRefused(
            "A URL has a control character, a backslash, or a space at its ends.",
            code="url-syntax",
            remedy="Write such characters as %XX, or leave them out.",
        )


def _checked_port(scheme: str, text: str | None, host: str, policy: FetchPolicy) -> int:
    own = DEFAULT_PORTS.get(scheme)
    port = own if text is None else int(text)
    allowed = frozenset({own} if own else ()) if policy.ports is None else policy.ports
    if port is None or port not in allowed:
        named = "no port" if port is None else f"port {port}"
        raise UrlRefused(
            f"The URL of {host} has {named}; allowed is {', '.join(map(str, sorted(allowed))) or 'none'}.",
            code="url-port",
            remedy="Use an allowed port, or let the operator allow this one.",
        )
    return port


def _authority(scheme: str, host: str, port: int) -> str:
    shown = f"[{host}]" if ":" in host else host
    return shown if port == DEFAULT_PORTS.get(scheme) else f"{shown}:{port}"


def _host_pattern(text: str) -> str:
    try:
        if text.startswith("*."):
            return "*." + read_host(text[2:])
        return read_host(text)
    except UrlRefused as error:
        raise ValueError(error.message) from None
