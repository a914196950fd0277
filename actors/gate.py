"""Who may open a stream, and how much of it: credentials, scopes, origins and the limits of tenants, at one door."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from actors.live_server import Guest
from infra.auth import client_address
from infra.listening import authenticator_for, origin_policy_for
from infra.tenants import Accounts, Scope, Tenant, require

if TYPE_CHECKING:
    from actors.live_channel import Channel
    from infra.live_settings import LiveSettings
    from infra.protocol import Credentials, Hello


class SettingsGate:
    """The door of a replica, by the settings of the service.

    Attributes:
        authenticator, accounts, origins: also for the routes that are not streams.

    Raises:
        SettingsError: a file of keys cannot be used.
    """

    def __init__(self, settings: LiveSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self.authenticator = authenticator_for(settings)
        self.accounts = Accounts(settings.limits_of)
        self.origins = origin_policy_for(settings)
        self._proxies = [ipaddress.ip_network(each) for each in settings.trusted_proxies]
        self._clock = clock

    async def __call__(self, hello: Hello, channel: Channel) -> Guest:
        """Let a client in.

        Raises:
            Unauthorized, Forbidden, RateExceeded, FrameTooLarge, AdmissionRefused: not this one, or not now.
        """
        if channel.is_web:
            self.origins.check(origin=channel.headers.get("origin"), host=channel.headers.get("host"))
        given = hello.credentials
        presented = channel.headers if given.api_key is None and given.token is None else given
        tenant = await self._tenant(presented, channel.headers, channel.peer)
        require(tenant, Scope.LIVE)
        self.accounts.check_frame(tenant, hello.width, hello.height)
        lease = self.accounts.open_session(tenant)
        return Guest(
            tenant.name,
            charges=(partial(self.accounts.charge_bytes, tenant), partial(self.accounts.charge_pixels, tenant)),
            leave=lease.close,
            may_stay=lambda: self.authenticator.still_admits(tenant),
        )

    async def tenant_of(
        self, headers: Mapping[str, str], peer: str | None, scope: Scope | None, *, is_web: bool = True
    ) -> Tenant:
        """Return whose request this is.

        Args:
            headers: of the request, names in lower case. peer: address of the connection.
            scope: what it needs; None: any credentials will do.
            is_web: browsers can send it, from any page.

        Raises:
            Unauthorized, Forbidden, RateExceeded: not this one, or not now.
        """
        if is_web:
            self.origins.check(origin=headers.get("origin"), host=headers.get("host"))
        tenant = await self._tenant(headers, headers, peer)
        if scope is not None:
            require(tenant, scope)
        return tenant

    async def _tenant(
        self, presented: Credentials | Mapping[str, str], headers: Mapping[str, str], peer: str | None
    ) -> Tenant:
        address = client_address(peer, headers, self._proxies)
        return await asyncio.to_thread(self.authenticator.authenticate, presented, address=address)
