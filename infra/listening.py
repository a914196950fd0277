"""Whether the live service may listen where it is told to: beyond this machine only where it asks for credentials.

Ray's own ports count as well. Whoever reaches them runs code on the cluster (CVE-2023-48022), so a machine that serves
others needs Ray's token authentication.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Final

from infra.api_keys import ApiKeys
from infra.auth import Authenticator
from infra.errors import SettingsError
from infra.live_settings import LiveSettings
from infra.origins import ANY, LOOPBACK_HOSTS, OriginPolicy
from infra.tokens import TokenVerifier

RAY_AUTH_MODE: Final = "RAY_AUTH_MODE"


def require_safe_listening(settings: LiveSettings, environment: Mapping[str, str] | None = None) -> None:
    """Do nothing where it is safe to serve with these settings, or where `insecure` says that it need not be.

    Args:
        environment: in which Ray was or will be started; None: this process's.

    Raises:
        SettingsError: others could reach a service that asks nobody for credentials, or Ray's ports beside it; any web
            page could use a service that asks nobody.
    """
    if settings.insecure:
        return
    if ANY in settings.cors_origins and not settings.asks_for_credentials:
        raise SettingsError(
            "cors_origins=* would let every web page use a service that asks nobody for credentials.",
            code="origins-unsafe",
            remedy=f"List the origins that are meant, or {_ASK}.",
        )
    where = _reachable(settings)
    if where is None:
        return
    if not settings.asks_for_credentials:
        raise SettingsError(
            f"The service would listen on {where}, where others reach it, and ask nobody for credentials.",
            code="listening-unsafe",
            remedy=f"{_ASK.capitalize()}; or listen on 127.0.0.1 without gRPC; or, in a network where everybody may do "
            "everything, set insecure.",
        )
    mode = (os.environ if environment is None else environment).get(RAY_AUTH_MODE, "")
    if mode.lower() != "token":
        raise SettingsError(
            f"The service would listen on {where}, where others reach it, beside a Ray that asks nobody for a token "
            f"({RAY_AUTH_MODE}={mode!r}): whoever reaches Ray's ports runs code here.",
            code="ray-unsafe",
            remedy=f"Start Ray and the service with {RAY_AUTH_MODE}=token (`ray get-auth-token --generate` makes a "
            "token); or, where nobody else reaches Ray's ports, set insecure.",
        )


def require_asking(settings: LiveSettings, host: str, *, insecure: bool) -> None:
    """Do nothing where a server that lets callers in by these settings may listen on `host`; it needs no Ray.

    Raises:
        SettingsError: others could reach it, and it asks nobody for credentials; `insecure` says that it may.
    """
    if not (insecure or settings.asks_for_credentials or is_loopback(host)):
        raise SettingsError(
            f"The predictor would listen on {host or 'all interfaces'}, where others reach it, and ask nobody for "
            "credentials.",
            code="listening-unsafe",
            remedy=f"{_ASK.capitalize()}; or listen on 127.0.0.1; or, in a network where everybody may do everything, "
            "set insecure.",
        )


_ASK: Final = "make keys with `upriver keys create` and name their file in keys_file, or set jwt_jwks_url"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches what listens on `host`: an address, or a name of such addresses.

    A name that cannot be looked up is taken for one that others reach; the empty one means all interfaces.
    """
    bare = host.removeprefix("[").removesuffix("]")
    if not bare:
        return False
    try:
        addresses = [bare] if _is_address(bare) else [str(each[4][0]) for each in socket.getaddrinfo(bare, None)]
    except (OSError, UnicodeError):
        return False
    return bool(addresses) and all(_is_loopback_address(address) for address in addresses)


def authenticator_for(settings: LiveSettings) -> Authenticator:
    """Return what checks credentials with these settings.

    Raises:
        SettingsError: a file of keys, or a key of tokens, cannot be used.
    """
    options = settings.token_options()
    return Authenticator(
        keys=None if settings.keys_file is None else ApiKeys(settings.keys_file),
        tokens=None if options is None else TokenVerifier(options),
        failures_per_minute=settings.failures_per_minute,
    )


def origin_policy_for(settings: LiveSettings) -> OriginPolicy:
    """Return whose web pages may use a service with these settings.

    A service on loopback that asks nobody is called by loopback's names alone, unless others are listed: see
    `infra.origins` on rebinding. Elsewhere names say nothing, and credentials decide.
    """
    hosts: tuple[str, ...] | None = settings.allowed_hosts or None
    if hosts is None and not settings.asks_for_credentials and _reachable(settings) is None:
        hosts = LOOPBACK_HOSTS
    return OriginPolicy(settings.cors_origins, hosts)


def _reachable(settings: LiveSettings) -> str | None:
    """Return, in words, where others reach the service; None: nowhere."""
    if not is_loopback(settings.host):
        return f"{settings.host or 'all interfaces'}:{settings.port}"
    if settings.grpc_port is not None:
        return f"port {settings.grpc_port} for gRPC"  # Ray Serve's gRPC ingress knows no host: it takes all interfaces
    return None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return (address if mapped is None else mapped).is_loopback
