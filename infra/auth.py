"""Who is there: API keys and tokens, from headers or from a hello, turned into tenants.

Every failure is told in the same words, so that nobody learns what was wrong; the reason is in the log, without
anything that was presented. Addresses that fail often are refused for a while.
"""

from __future__ import annotations

import ipaddress
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NoReturn, TypeAlias

from pydantic import SecretStr

from infra.api_keys import ApiKeys, looks_like_a_key
from infra.protocol import Credentials
from infra.refusals import RateExceeded, Unauthorized
from infra.tenants import Scope, Tenant, TokenBucket
from infra.tokens import BadToken, TokenVerifier

logger = logging.getLogger(__name__)

FAILURES_AT_ONCE: Final = 20
ADDRESSES_REMEMBERED: Final = 4096
LOCAL_TENANT: Final = Tenant("local", frozenset(Scope))  # everybody, where nobody is asked

Headers: TypeAlias = Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


class Authenticator:
    """Turns credentials into a tenant; safe to use from several threads.

    Args:
        keys, tokens: what is accepted; None: not that kind. Without either everybody is `LOCAL_TENANT`, which is for a
            service on loopback alone: `infra.listening` sees to it.
        failures_per_minute: how often an address may fail in the long run, and `FAILURES_AT_ONCE` times at once; 0: as
            often as it likes.
        clock: seconds since 1970. ticks: seconds that never go back.
    """

    def __init__(
        self,
        *,
        keys: ApiKeys | None = None,
        tokens: TokenVerifier | None = None,
        failures_per_minute: int = 60,
        clock: Callable[[], float] = time.time,
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._clock = clock
        self._failures = FailureLimit(failures_per_minute, ticks) if failures_per_minute else None

    @property
    def asks(self) -> bool:
        """Whether credentials are needed at all."""
        return self._keys is not None or self._tokens is not None

    def authenticate(self, presented: Credentials | Headers, *, address: str | None = None) -> Tenant:
        """Return whom credentials let in. May read a file or fetch a key set: call it off the event loop.

        Args:
            presented: a hello's credentials; or the headers of a request or the metadata of a gRPC call, of which
                ``Authorization: Bearer`` (a key or a token) and ``X-Api-Key`` count.
            address: the client's, for the limit on failures: see `client_address`; None: not limited.

        Raises:
            Unauthorized: nobody, whatever the cause. RateExceeded: the address failed too often; nothing was checked.
        """
        if not self.asks:
            return LOCAL_TENANT
        if self._failures is not None and address is not None:
            self._failures.check(address)
        key, token = _from_hello(presented) if isinstance(presented, Credentials) else _from_headers(presented)
        if key is not None and token is not None:
            self._refuse("a key and a token together, or the same header twice", address)
        if key is not None:
            return self._by_key(key, address)
        if token is not None:
            return self._by_token(token, address)
        self._refuse("no credentials", address)

    def still_admits(self, tenant: Tenant) -> bool:
        """Return whether a tenant that was let in may stay: its key is not revoked, its credentials have not expired.

        For streams, which may last longer than what opened them.
        """
        if not self.asks:
            return True
        now_s = self._clock()
        if tenant.expires_at_s is not None and now_s >= tenant.expires_at_s:
            return False
        return tenant.key_id is None or (
            self._keys is not None and self._keys.find_id(tenant.key_id, now_s) is not None
        )

    def _by_key(self, key: str, address: str | None) -> Tenant:
        if self._keys is None:
            self._refuse("a key, and keys are not configured", address)
        record = self._keys.find(key, self._clock())
        if record is None:
            self._refuse("a key that is unknown, wrong, expired or revoked", address)
        return record.to_tenant()

    def _by_token(self, token: str, address: str | None) -> Tenant:
        if self._tokens is None:
            self._refuse("a token, and tokens are not configured", address)
        try:
            return self._tokens.verify(token)
        except BadToken as error:
            why = str(error)
        self._refuse(f"a token: {why}", address)

    def _refuse(self, why: str, address: str | None) -> NoReturn:
        if self._failures is not None and address is not None:
            self._failures.note(address)
        logger.warning("credentials refused, from %s: %s", _printable(address), why)
        # Raised outside of any handler: a traceback must not carry the cause to where refusals are told.
        raise Unauthorized(
            "The credentials are missing or not accepted.",
            remedy="Give a valid API key, or a valid token, of this service.",
        )


def credentials_in(headers: Headers) -> Credentials:
    """Return what the headers of a request, or the metadata of a gRPC call, present; for those that hand them on.

    Raises:
        Unauthorized: it is not clear which of several is meant.
    """
    key, token = _from_headers(headers)
    if key is not None and token is not None:
        raise Unauthorized("Several credentials came with one request.", remedy="Send one of them.")
    return Credentials(
        api_key=None if key is None else SecretStr(key), token=None if token is None else SecretStr(token)
    )


class FailureLimit:
    """How often an address may present wrong credentials; remembers a bounded number of addresses.

    An IPv6 address counts as its network of 64 bits, which one customer has to himself (RFC 6177).
    """

    def __init__(self, per_minute: int, ticks: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._ticks = ticks
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, address: str) -> None:
        """Do nothing where the address may try.

        Raises:
            RateExceeded: it failed too often.
        """
        with self._lock:
            bucket = self._buckets.get(_network_of(address))
            wait_s = 0.0 if bucket is None else bucket.wait_for(_FAILURE, self._ticks())
        if wait_s > 0:
            raise RateExceeded(
                "Wrong credentials came too often from this address.",
                limit=f"{self._per_minute} a minute",
                retry_after_s=wait_s,
                remedy="Correct the credentials, and try again later.",
            )

    def note(self, address: str) -> None:
        """Count one failure."""
        with self._lock:
            name = _network_of(address)
            bucket = self._buckets.get(name)
            if bucket is None:
                # In units of a sixtieth of a failure, so that failures per minute are whole units per second.
                bucket = TokenBucket(self._per_minute, FAILURES_AT_ONCE * _FAILURE, self._ticks())
                self._buckets[name] = bucket
            bucket.take(_FAILURE, self._ticks())
            self._buckets.move_to_end(name)
            if len(self._buckets) > ADDRESSES_REMEMBERED:
                self._buckets.popitem(last=False)

    def __len__(self) -> int:
        return len(self._buckets)


_FAILURE: Final = 60


def client_address(peer: str | None, headers: Headers, trusted_proxies: Sequence[Network]) -> str | None:
    """Return the address that a request comes from.

    Args:
        peer: of the connection. headers: of the request. trusted_proxies: whose word in ``X-Forwarded-For`` counts. The
            header is read from its end, where each proxy writes whom it saw; what stands before the first address that
            is no trusted proxy was written by the client itself, and could be anything.
    """
    if peer is None or not trusted_proxies:
        return peer
    hops = [hop.strip() for value in _values(headers, "x-forwarded-for") for hop in value.split(",")]
    address = peer
    for hop in reversed(hops[-20:]):
        if not _is_in(address, trusted_proxies):
            break
        if _parsed(hop) is None:
            break
        address = hop
    return address


def _from_hello(credentials: Credentials) -> tuple[str | None, str | None]:
    key, token = credentials.api_key, credentials.token
    return (
        None if key is None else key.get_secret_value(),
        None if token is None else token.get_secret_value(),
    )


def _from_headers(headers: Headers) -> tuple[str | None, str | None]:
    """Return (key, token); both, where it is not clear which is meant."""
    keys, bearers = _values(headers, "x-api-key"), []
    for value in _values(headers, "authorization"):
        scheme, _, rest = value.partition(" ")
        bearers.append(rest.strip() if scheme.lower() == "bearer" else "")
    if len(keys) + len(bearers) > 1:
        return "", ""
    if keys:
        return keys[0].strip(), None
    if bearers:
        return (bearers[0], None) if looks_like_a_key(bearers[0]) else (None, bearers[0])
    return None, None


def _values(headers: Headers, name: str) -> list[str]:
    """Return all values of a header, whatever its case. ASGI has pairs of bytes, gRPC pairs of texts."""
    pairs: Iterable[tuple[str | bytes, str | bytes]] = headers.items() if isinstance(headers, Mapping) else headers
    return [_text(value) for key, value in pairs if _text(key).lower() == name]


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    mapped = getattr(parsed, "ipv4_mapped", None)
    return parsed if mapped is None else mapped


def _is_in(address: str, networks: Sequence[Network]) -> bool:
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in networks)


def _network_of(address: str) -> str:
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(parsed), 64), strict=False))
    return str(parsed) if parsed is not None else address[:64]


def _printable(address: str | None) -> str:
    return "?" if address is None else "".join(c if c.isprintable() else "?" for c in address[:64])
