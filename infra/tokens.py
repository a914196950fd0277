"""JSON web tokens (RFC 7519) of the operator's identity provider, checked as RFC 8725 says.

What may sign a token is settled by the configuration and never by the token: the algorithms, the issuer, and where keys
come from. Of its header only ``alg`` (must be configured) and ``kid`` (a name to look up in a table) are read; ``jku``,
``x5u``, ``jwk`` and ``x5c`` are not. PyJWT checks signatures and claims.
"""

from __future__ import annotations

import http.client
import json
import logging
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infra.errors import SettingsError
from infra.tenants import Scope, Tenant, is_tenant_name

logger = logging.getLogger(__name__)

LONGEST_TOKEN: Final = 8192  # characters, as in a hello
LARGEST_KEY_SET: Final = 256 * 1024
FETCH_TIMEOUT_S: Final = 5.0
KEPT_WHILE_UNREACHABLE_S: Final = 3600.0  # an outage of the identity provider does not end the service at once

_SHORTEST_SECRETS: Final = {"HS256": 32, "HS384": 48, "HS512": 64}  # bytes; RFC 7518, section 3.2
_WITH_A_SECRET: Final = frozenset(_SHORTEST_SECRETS)
_WITH_A_KEY_PAIR: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)


class BadToken(Exception):
    """A token is not accepted; the text says why, for the log, and repeats nothing of the token."""


class TokenOptions(BaseModel):
    """How tokens are checked.

    Attributes:
        key_file: a public key (PEM), or with HS algorithms a secret. jwks_url: where the provider
            publishes its keys (RFC 7517). One of the two.
        algorithms: those that may sign; either all with a secret or all with a key pair.
        issuer, audience: what the claims ``iss`` and ``aud`` must say.
        leeway_s: how far clocks may differ.
        tenant_claim: the claim that names the tenant. scope_claim: names separated by spaces, or a list of them.
        default_scopes: of a token without that claim.
        refresh_s: the key set is fetched again after `lifetime_s`, or when a token names a key that is not in it, but
            never twice in so many seconds, whatever tokens come.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    key_file: Path | None = None
    jwks_url: str | None = Field(default=None, max_length=2000, repr=False)
    algorithms: tuple[str, ...] = ("RS256",)
    issuer: str = Field(min_length=1, max_length=500)
    audience: str = Field(min_length=1, max_length=500)
    leeway_s: float = Field(default=30.0, ge=0, le=300)
    tenant_claim: str = Field(default="sub", min_length=1, max_length=100)
    scope_claim: str = Field(default="scope", min_length=1, max_length=100)
    default_scopes: frozenset[Scope] = frozenset({Scope.LIVE})
    refresh_s: float = Field(default=30.0, ge=1, le=3600)
    lifetime_s: float = Field(default=300.0, ge=1, le=86_400)

    @model_validator(mode="after")
    def _one_kind_of_key(self) -> Self:
        if (self.key_file is None) == (self.jwks_url is None):
            raise ValueError("tokens need either a key file or the URL of a key set, and not both")
        chosen = set(self.algorithms)
        unknown = chosen - _WITH_A_SECRET - _WITH_A_KEY_PAIR
        if unknown or not chosen:
            known = ", ".join(sorted(_WITH_A_SECRET | _WITH_A_KEY_PAIR))
            raise ValueError(f"algorithms are one or more of {known}")
        if chosen & _WITH_A_SECRET and (chosen & _WITH_A_KEY_PAIR or self.jwks_url is not None):
            raise ValueError("HS algorithms share a secret: they go with a key file, and not with other algorithms")
        if self.jwks_url is not None and not _is_plain_url(self.jwks_url):
            raise ValueError("the URL of a key set is https://, or http:// on this machine, without a password in it")
        return self


class TokenVerifier:
    """Turns tokens into tenants; safe to use from several threads.

    `verify` may fetch the key set and then takes up to five seconds: call it off the event loop.

    Raises:
        SettingsError: the key file cannot be used. A key set that cannot be fetched is no error at the start: the
            identity provider may come later, and until then no token is accepted.
    """

    def __init__(self, options: TokenOptions, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        if options.key_file is not None:
            self._keys: _OneKey | KeySet = _OneKey(_read_key(options.key_file, options.algorithms))
        else:
            assert options.jwks_url is not None
            self._keys = KeySet(options.jwks_url, options.refresh_s, options.lifetime_s, clock=clock)

    def verify(self, token: str) -> Tenant:
        """Return whom a token lets in.

        Raises:
            BadToken: nobody.
        """
        import jwt

        if len(token) > LONGEST_TOKEN:
            raise BadToken(f"longer than {LONGEST_TOKEN} characters")
        options = self._options
        try:
            header = jwt.get_unverified_header(token)
            algorithm, key_id = header.get("alg"), header.get("kid")
            if algorithm not in options.algorithms:
                raise BadToken("an algorithm that is not configured")
            key, declared = self._keys.find(key_id if isinstance(key_id, str) else None)
            if declared is not None and declared != algorithm:
                raise BadToken("an algorithm that is not its key's")
            claims = jwt.decode(
                token,
                key=key,
                algorithms=list(options.algorithms),
                issuer=options.issuer,
                audience=options.audience,
                leeway=options.leeway_s,
                # Short keys are no keys: RSA of less than 2048 bits is refused instead of warned about.
                options={"require": ["exp", "iss", "aud"], "enforce_minimum_key_length": True},
            )
            return self._tenant(claims)
        except jwt.PyJWTError as error:
            raise BadToken(type(error).__name__) from None  # its text may repeat what the token says
        except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
            raise BadToken(f"malformed: {type(error).__name__}") from None

    def _tenant(self, claims: Mapping[str, Any]) -> Tenant:
        name = claims.get(self._options.tenant_claim)
        if not is_tenant_name(name):
            raise BadToken(f"the claim {self._options.tenant_claim} names no tenant")
        return Tenant(str(name), self._scopes(claims), expires_at_s=float(claims["exp"]) + self._options.leeway_s)

    def _scopes(self, claims: Mapping[str, Any]) -> frozenset[Scope]:
        told = claims.get(self._options.scope_claim)
        if told is None:
            return self._options.default_scopes
        names = told.split() if isinstance(told, str) else told if isinstance(told, list) else []
        return frozenset(scope for scope in Scope if scope.value in names)


class _OneKey:
    """The key of a file, whatever key a token names."""

    def __init__(self, key: str | bytes) -> None:
        self._key = key

    def find(self, key_id: str | None) -> tuple[Any, str | None]:
        return self._key, None


class KeySet:
    """The public keys at a URL (RFC 7517), fetched when they are needed, with limits on size, time and how often.

    Known keys are found while a fetch is under way: only one caller at a time waits for the network. Where the URL does
    not answer, the keys fetched before stay for an hour.

    Args:
        url: the operator's own. refresh_s, lifetime_s: see `TokenOptions`. clock: seconds, never going back.
    """

    def __init__(self, url: str, refresh_s: float, lifetime_s: float, *, clock: Callable[[], float]) -> None:
        self._url = url
        self._refresh_s = refresh_s
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._keys: dict[str | None, tuple[Any, str | None]] = {}
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._lock = threading.Lock()

    def find(self, key_id: str | None) -> tuple[Any, str | None]:
        """Return a key and the algorithm that the set declares for it, if it does.

        A token that names no key is checked with the only one; where there are several it is not accepted.

        Raises:
            BadToken: there is no such key.
        """
        if self._age() >= self._lifetime_s or key_id not in self._keys:
            is_known = key_id in self._keys and self._age() < self._lifetime_s + KEPT_WHILE_UNREACHABLE_S
            if self._lock.acquire(blocking=not is_known):
                try:
                    if self._age() >= self._lifetime_s or key_id not in self._keys:
                        self._refresh()
                finally:
                    self._lock.release()
        if self._age() >= self._lifetime_s + KEPT_WHILE_UNREACHABLE_S:
            raise BadToken("the key set could not be fetched")
        found = self._keys.get(key_id)
        if found is None:
            raise BadToken("a key that is not in the key set")
        return found

    def _age(self) -> float:
        return float("inf") if self._fetched_at is None else self._clock() - self._fetched_at

    def _refresh(self) -> None:
        now = self._clock()
        # Failed attempts count too: while the URL does not answer, tokens must not cost five seconds each.
        if self._tried_at is not None and now - self._tried_at < self._refresh_s:
            return
        self._tried_at = now
        try:
            keys = _public_keys(_fetch(self._url))
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            logger.error("the key set at %s cannot be used: %s", _host(self._url), _in_words(error))
            return
        if len(keys) == 1:
            keys[None] = next(iter(keys.values()))
        self._keys, self._fetched_at = keys, now


def _fetch(url: str) -> bytes:
    """Return what is at `url`: no redirects, at most `FETCH_TIMEOUT_S` for the body and `LARGEST_KEY_SET` bytes."""
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    opener = urllib.request.build_opener(_NoRedirects)
    request = urllib.request.Request(url, headers={"Accept": "application/jwk-set+json, application/json"})
    content = bytearray()
    with opener.open(request, timeout=FETCH_TIMEOUT_S) as answer:
        # The time-out above is that of each wait; a server that sends one byte a second is ended here.
        while piece := answer.read1(64 * 1024):
            content += piece
            if len(content) > LARGEST_KEY_SET:
                raise ValueError(f"it has more than {LARGEST_KEY_SET} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"it takes longer than {FETCH_TIMEOUT_S:g} s")
    return bytes(content)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The operator named one URL; another host must not answer for it."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


def _public_keys(content: bytes) -> dict[str | None, tuple[Any, str | None]]:
    """Return the signature keys of a key set by name; secrets, encryption keys and unknown kinds are left out."""
    import jwt

    document = json.loads(content)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("it is no key set")
    keys: dict[str | None, tuple[Any, str | None]] = {}
    for number, entry in enumerate(entries[:100]):
        if not isinstance(entry, dict) or entry.get("kty") == "oct" or entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK.from_dict(entry)
        except (jwt.PyJWTError, ValueError, TypeError):
            continue  # of a kind that this version of the library does not know
        name, declared = entry.get("kid"), entry.get("alg")
        # A key without a name can be found only where it is the only one; the number keeps it apart from names.
        keys[name if isinstance(name, str) else f"\0{number}"] = (
            key.key,
            declared if isinstance(declared, str) else None,
        )
    if not keys:
        raise ValueError("it has no key for signatures")
    return keys


def _read_key(path: Path, algorithms: tuple[str, ...]) -> str | bytes:
    """Return the secret, or the PEM text of the public key, in a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unusable(path, error.strerror or type(error).__name__) from error
    is_pem = b"-----BEGIN" in content
    if set(algorithms) <= _WITH_A_SECRET:
        secret = content.rstrip(b"\r\n")  # of an editor
        if is_pem or secret.startswith(b"ssh-"):
            # The public half of a pair taken for a secret is how tokens are forged by everybody.
            raise _unusable(path, f"it is a public key, and {', '.join(algorithms)} need a secret")
        shortest = max(_SHORTEST_SECRETS[algorithm] for algorithm in algorithms)
        if len(secret) < shortest:
            raise _unusable(path, f"the secret has {len(secret)} bytes; {', '.join(algorithms)} need {shortest}")
        return secret
    if not is_pem or b"PRIVATE KEY" in content:
        raise _unusable(path, "it is no public key in PEM form")
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        load_pem_public_key(content)
    except Exception as error:  # the library has several roots of errors
        raise _unusable(path, "it is no public key in PEM form") from error
    return content


def _unusable(path: Path, why: str) -> SettingsError:
    return SettingsError(
        f"The key file of tokens {path} cannot be used: {why}.",
        code="token-key-unusable",
        remedy="Give the identity provider's public key in PEM form, or for HS algorithms 64 random bytes.",
    )


def _is_plain_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, password, _ = parts.hostname or "", parts.password or parts.username, parts.port
    except ValueError:
        return False
    if not host or password is not None or not url.isascii() or not url.isprintable() or " " in url:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and host in ("localhost", "127.0.0.1", "::1"))


def _host(url: str) -> str:
    return urlsplit(url).hostname or "?"


def _in_words(error: Exception) -> str:
    status = getattr(error, "code", None)  # of an HTTPError
    if isinstance(status, int):
        return f"status {status}"
    return (
        str(error)
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
        else type(error).__name__
    )
