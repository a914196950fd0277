"""Which web pages may use the service: CORS for requests, the ``Origin`` of WebSockets, the ``Host`` against rebinding.

Browsers let every page open a WebSocket to every host, and send its ``Origin`` (RFC 6455, section 10.2): a service that
asks nobody for credentials would be used by any page that its user looks at. Where such a service listens on loopback,
``Host`` is checked too, since a page can point a name of its own to 127.0.0.1 and is then of the same origin by name.
Clients that are no browsers send no ``Origin``; nothing here is an obstacle to them, and nothing replaces credentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from infra.refusals import Forbidden

ANY: Final = "*"
LOOPBACK_HOSTS: Final = ("localhost", "127.0.0.1", "::1")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class OriginPolicy:
    """Whose pages may use the service.

    Attributes:
        origins: in the form of `parse_origin`, or "*"; pages of the service itself are always among them.
        hosts: the names, without port, by which the service may be called; None: any.
    """

    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None

    def cors_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of starlette's `CORSMiddleware`; without origins they allow nothing.

        Cookies are not allowed: the service knows none, and credentials that a browser adds by itself invite misuse.
        """
        return {
            "allow_origins": list(self.origins),
            "allow_methods": ["GET", "POST", "DELETE"],
            "allow_headers": ["Authorization", "X-Api-Key", "Content-Type"],
            "allow_credentials": False,
            "expose_headers": ["Retry-After"],
            "max_age": 600,
        }

    def check(self, *, origin: str | None, host: str | None, secure: bool = False) -> None:
        """Do nothing where a request with these headers may be served; for WebSockets, and for requests that change.

        Args:
            origin: of ``Origin``; None where the header is missing. host: of ``Host``, or HTTP/2's ``:authority``.
            secure: the connection is encrypted up to here; then a page without encryption is no page of the service.

        Raises:
            Forbidden: a page of another origin, or a name that is not the service's.
        """
        self.check_host(host)
        if origin is None or ANY in self.origins:
            return
        normal = parse_origin(origin)
        if normal is not None and (normal in self.origins or _is_same(normal, host, secure=secure)):
            return
        raise Forbidden(
            "Pages of this origin may not use the service.",
            remedy="Open the page from the service itself, or ask its operator to list the origin in `cors_origins`.",
        )

    def check_host(self, host: str | None) -> None:
        """Do nothing where the service may be called by this name.

        Raises:
            Forbidden: it may not.
        """
        if self.hosts is None:
            return
        name = _host_and_port(host, 0)
        if name is None or name[0] not in self.hosts:
            raise Forbidden(
                "The service is not called by this name.",
                remedy="Call it by its own address, or ask its operator to list the name in `allowed_hosts`.",
            )


def parse_origin(text: str) -> str | None:
    """Return an origin as browsers write it (RFC 6454, section 6.1): no default port, no path; None where it is none.

    The origin "null" of sandboxed pages and local files is none: any page can take it on.
    """
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in _DEFAULT_PORTS or not host or "@" in parts.netloc or not text.isascii():
        return None
    if parts.path or parts.query or parts.fragment or any(c.isspace() or not c.isprintable() for c in text):
        return None
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}" + ("" if port in (None, _DEFAULT_PORTS[parts.scheme]) else f":{port}")


def _is_same(origin: str, host: str | None, *, secure: bool) -> bool:
    """Whether a page of `origin` came from the service called `host`.

    The scheme is not compared where encryption ends at a proxy: the page says https, and here it is http.
    """
    parts = urlsplit(origin)
    if secure and parts.scheme != "https":
        return False
    default = _DEFAULT_PORTS[parts.scheme]
    return _host_and_port(host, default) == (parts.hostname, parts.port or default)


def _host_and_port(host: str | None, default: int) -> tuple[str, int] | None:
    """Return name and port of a ``Host`` header; None where it is missing or none."""
    if not host or not host.isprintable() or not set(host).isdisjoint("/?#@\\ "):
        return None
    address, bracket, rest = host.rpartition("]")
    if bracket and (not address.startswith("[") or (rest and not rest.startswith(":"))):
        return None  # urlsplit takes [::1].example.org for ::1
    try:
        parts = urlsplit(f"//{host}")
        return None if not parts.hostname else (parts.hostname.rstrip("."), parts.port or default)
    except ValueError:
        return None
