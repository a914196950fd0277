"""Hosts and addresses: one spelling for each host, and addresses that a stranger's URL must not reach.

A name is resolved once; every address that it has must be allowed, and the connection goes to one of exactly these.
So a name that is answered differently a moment later (DNS rebinding) gains nothing. Categories are those of the IANA
registries of special-purpose addresses (RFC 6890). Knows neither URLs nor connections.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, Protocol, TypeAlias

from infra.errors import FetchFailed, UrlRefused

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

_LABEL: Final = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
# Whatever ends so is an address for some resolver or other: 127.1, 0x7f.1, 0177.0.0.1, 2130706433.
_ENDS_IN_A_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")

# Where clouds tell a machine its credentials; refused even inside an allowed network. The second is not in any private
# range: it is Azure's, answered by the host of a virtual machine.
_METADATA: Final = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",
        "168.63.129.16",
        "169.254.170.2",
        "169.254.170.23",
        "100.100.100.200",
        "192.0.0.192",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "fd20:ce::254",
    )
)
_SPECIAL: Final[tuple[tuple[str, tuple[Network, ...]], ...]] = tuple(
    (what, tuple(ipaddress.ip_network(text) for text in texts))
    for what, texts in {
        "an unspecified address": ("0.0.0.0/8", "::/128"),
        "a loopback address": ("127.0.0.0/8", "::1/128"),
        "a link-local address": ("169.254.0.0/16", "fe80::/10"),
        "a private address": ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10"),
        "an address of a provider's network": ("100.64.0.0/10",),
        "a multicast address": ("224.0.0.0/4", "ff00::/8"),
        "an IPv4 address in an IPv6 spelling": ("::ffff:0:0/96", "::/96", "::ffff:0:0:0/96"),
        "a tunnel's address": ("2002::/16", "2001::/32", "192.88.99.0/24", "64:ff9b:1::/48"),
        "a reserved address": (
            "192.0.0.0/24", "192.0.2.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4",
            "2001::/23", "2001:db8::/32", "3fff::/20",
        ),
    }.items()
)  # fmt: skip
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")  # RFC 4291: all that has been given out so far
_NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052: how IPv6-only networks reach IPv4
_ISATAP: Final = (0x00005EFE, 0x02005EFE)  # RFC 5214: bits 64 to 95 before an embedded IPv4 address


class Resolver(Protocol):
    """Finds the addresses of a name."""

    def __call__(self, name: str) -> Sequence[str]:
        """Return all addresses of `name` as text, none if there are none. Raises OSError where it cannot be asked."""


def system_resolver(name: str) -> Sequence[str]:
    """Ask the operating system; how long that may take is set there (resolv.conf)."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(where[4][0]) for where in found))


def read_host(text: str) -> str:
    """Return a host's one spelling: a name in lower case, an IPv4 address, or an IPv6 address without brackets.

    Args:
        text: as between `://` and the port of a URL.

    Raises:
        UrlRefused: `url-host` for whatever resolvers and libraries read differently: IPv4 addresses that are short,
            decimal, octal or hexadecimal, trailing dots, zone ids, characters beyond ASCII, percent signs.
    """
    if not text:
        raise _refused("A URL names no host.", "Write the host after the two slashes.")
    if text.startswith("["):
        return _read_ipv6(text)
    if not text.isascii():
        raise _refused("A URL's host has characters beyond ASCII.", "Write its ASCII form (xn--...).")
    host = text.lower()
    if host.endswith("."):
        raise _refused(f"The host {_shown(host)} ends in a dot.", "Leave the dot out.")
    if _ENDS_IN_A_NUMBER.fullmatch(host):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise _refused(
                f"The host {_shown(host)} is an address in an unusual spelling.", "Write four decimal numbers."
            ) from None
    if not _NAME.fullmatch(host):
        raise _refused(f"{_shown(host)} is no name of a host.", "Use letters, digits, hyphens and dots.")
    return host


def literal_address(host: str) -> Address | None:
    """Return the address that a host from `read_host` is, None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def reason_to_refuse(address: Address, networks: Iterable[Network] = ()) -> str | None:
    """Return what is wrong with an address ("a loopback address"), None if it may be connected to.

    Args:
        networks: private networks that may be reached all the same. Addresses of cloud metadata never are, and an
            address inside another one's spelling is judged by itself.
    """
    if address in _METADATA:
        return "an address of cloud metadata"
    if any(address.version == network.version and address in network for network in networks):
        return None
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return "a link-local address"
        if address in _NAT64:
            inner = reason_to_refuse(IPv4Address(int(address) & 0xFFFFFFFF))
            return inner and f"a translated address, and inside it {inner}"
    for what, special in _SPECIAL:
        if any(address.version == network.version and address in network for network in special):
            return what
    if isinstance(address, IPv6Address):
        if address not in _GLOBAL_UNICAST:
            return "a reserved address"
        if (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
            return "a tunnel's address"
    # A newer Python's registry may know more than the list above.
    return None if address.is_global else "a reserved address"


def resolve(host: str, networks: Iterable[Network], resolver: Resolver) -> tuple[str, ...]:
    """Return the addresses of a host from `read_host`, in the resolver's order, all of them checked.

    Raises:
        UrlRefused: `url-address` if any of them may not be reached; the message tells its kind, not the address.
        FetchFailed: `fetch-dns` if there is none.
    """
    networks = tuple(networks)
    literal = literal_address(host)
    addresses = [literal] if literal is not None else _looked_up(host, resolver)
    for address in addresses:
        reason = reason_to_refuse(address, networks)
        if reason is not None:
            is_what = f"is {reason}" if literal is not None else f"has {reason}"
            raise UrlRefused(
                f"The host {host} {is_what}, which this service does not fetch from.",
                code="url-address",
                remedy="Use a public host, or let the operator allow its network.",
            )
    return tuple(str(address) for address in addresses)


def _looked_up(name: str, resolver: Resolver) -> list[Address]:
    try:
        addresses = [ipaddress.ip_address(text) for text in resolver(name)]
    except (OSError, ValueError) as error:
        is_final = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
        raise _unknown(name, is_transient=not is_final) from None
    if not addresses:
        raise _unknown(name, is_transient=False)
    return addresses


def _read_ipv6(text: str) -> str:
    inner = text[1:-1] if text.endswith("]") else ""
    try:
        if "%" in inner:
            raise ValueError
        return str(IPv6Address(inner))
    except ValueError:
        raise _refused(
            "The brackets of a URL's host hold no IPv6 address.", "Write the address without a zone, or a name."
        ) from None


def _shown(host: str) -> str:
    """A host as it can stand in a message: what is no host may be anything, also somebody's password."""
    return host if len(host) <= 253 and re.fullmatch(r"[a-z0-9._-]+", host) else "what the URL gives"


def _refused(message: str, remedy: str) -> UrlRefused:
    return UrlRefused(message, code="url-host", remedy=remedy)


def _unknown(name: str, *, is_transient: bool) -> FetchFailed:
    return FetchFailed(
        f"The name {name} is not known (DNS).",
        code="fetch-dns",
        remedy="Check the host's name.",
        is_transient=is_transient,
    )
