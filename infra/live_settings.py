"""Settings of the live service: where it listens, whom it lets in, what it accepts.

They come from `UPRIVER_LIVE_*` in the environment, then the table `[live]` of the configuration file that
`infra.settings` reads, then defaults. In the environment, lists have commas (`UPRIVER_LIVE_MODELS=tiny,film`), and
tables are JSON. Secrets are never settings: keys and secrets lie in files, which settings name.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeAlias

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from infra.errors import SettingsError
from infra.origins import ANY, parse_origin
from infra.protocol import HELLO_TIMEOUT_S, LARGEST_SIDE, SMALLEST_SIDE
from infra.restore_job import JobRules
from infra.settings import LIVE_TABLE, LayeredSettings, Loaded, load_layers
from infra.telemetry import TelemetryConfig
from infra.tenants import Scope, TenantLimits, is_tenant_name
from infra.tokens import TokenOptions

LIVE_PREFIX: Final = "UPRIVER_LIVE_"


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names: TypeAlias = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Scopes: TypeAlias = Annotated[tuple[Scope, ...], NoDecode, BeforeValidator(_split)]


class LiveSettings(LayeredSettings):
    """Everything that can be set of the live service. Build it with `load_live_settings`."""

    model_config = SettingsConfigDict(env_prefix=LIVE_PREFIX, env_ignore_empty=True)

    # Where it listens.
    host: str = Field(default="127.0.0.1", max_length=253, description="address or name to listen on for HTTP")
    port: int = Field(default=8000, ge=1, le=65535, description="port for HTTP and WebSockets")
    grpc_port: int | None = Field(
        default=None, ge=1, le=65535, description="port for gRPC, on all interfaces; none: no gRPC"
    )
    insecure: bool = Field(
        default=False, description="listen beyond this machine although nobody is asked for credentials"
    )
    cors_origins: Names = Field(
        default=(), description="origins, such as https://example.org, whose pages may use the service; or *"
    )
    allowed_hosts: Names = Field(
        default=(), description="names by which the service may be called; none: any, but on loopback loopback's"
    )
    trusted_proxies: Names = Field(
        default=(),
        description="networks, such as 10.0.0.0/8, of proxies whose X-Forwarded-For tells the client's address",
    )

    # Whom it lets in.
    keys_file: Path | None = Field(default=None, description="file of API keys, made by `upriver keys create`")
    jwt_key_file: Path | None = Field(
        default=None, description="public key (PEM), or secret, that tokens are checked with"
    )
    jwt_jwks_url: str | None = Field(
        default=None, max_length=2000, repr=False, description="https URL of the identity provider's key set (JWKS)"
    )
    jwt_algorithms: Names = Field(default=("RS256",), description="algorithms that may sign tokens")
    jwt_issuer: str | None = Field(default=None, description="the claim iss that tokens must have")
    jwt_audience: str | None = Field(default=None, description="the claim aud that tokens must have")
    jwt_leeway_s: float = Field(default=30.0, ge=0, le=300, description="how far clocks may differ, in seconds")
    jwt_tenant_claim: str = Field(default="sub", description="the claim that names the tenant")
    jwt_scope_claim: str = Field(default="scope", description="the claim that lists scopes")
    jwt_default_scopes: Scopes = Field(default=(Scope.LIVE,), description="scopes of tokens without that claim")
    jwt_refresh_s: float = Field(
        default=30.0, ge=1, le=3600, description="least seconds between fetches of the key set"
    )
    failures_per_minute: int = Field(
        default=60, ge=0, le=100_000, description="how often an address may present wrong credentials; 0: no limit"
    )
    limits: TenantLimits = Field(default=TenantLimits(), description="what each tenant may have of a replica")
    tenants: dict[str, dict[str, int]] = Field(default={}, description="by tenant, the limits that differ from those")

    # What a replica serves.
    models: Names = Field(default=("tiny",), min_length=1, description="models to serve; the first is the default")
    sessions: int = Field(default=8, ge=1, le=10_000, description="most streams of a replica, whatever its capacity")
    window: int = Field(default=8, ge=1, le=1024, description="frames that a client may have sent without an answer")
    hello_timeout_s: float = Field(
        default=HELLO_TIMEOUT_S, gt=0, le=60, description="time for a client's first message"
    )
    idle_timeout_s: float = Field(
        default=60.0, gt=0, le=86_400, description="a stream without frames for so long is closed"
    )
    max_life_s: float = Field(default=86_400.0, gt=0, le=31_536_000, description="no stream gets older than this")
    state_interval_s: float = Field(
        default=2.0, gt=0, le=3600, description="how often a stream's state is saved: what a crash can cost at most"
    )
    ladder: bool = Field(default=True, description="restore with fewer steps, and in the end only resize, under load")
    least_side: int = Field(
        default=SMALLEST_SIDE, ge=SMALLEST_SIDE, le=LARGEST_SIDE, description="smallest width and height"
    )
    greatest_side: int = Field(
        default=4096, ge=SMALLEST_SIDE, le=LARGEST_SIDE, description="largest width and height of an input frame"
    )

    telemetry: TelemetryConfig = Field(default=TelemetryConfig(), description="how metrics, traces and logs look")

    # Uploads, and archive jobs.
    spool_bytes: int = Field(
        default=1_000_000_000, ge=1024, le=10**13, description="most of an upload that is kept in a file at a time"
    )
    upload_idle_s: float = Field(
        default=30.0, gt=0, le=3600, description="an upload that sends nothing for so long is ended"
    )
    uploads: int = Field(default=2, ge=0, le=1000, description="uploads at a time of a replica")
    job_sources: Names = Field(
        default=(), description="places, such as s3://tapes/in/{tenant}/, that archive jobs may read; none: no jobs"
    )
    job_destinations: Names = Field(default=(), description="places that archive jobs may write")

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value == (ANY,):
            return value
        parsed = [parse_origin(each) for each in value]
        if None in parsed:
            raise ValueError("an origin is scheme://host or scheme://host:port, without a path; * stands alone")
        return tuple(each for each in parsed if each is not None)

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(each.lower().removeprefix("[").removesuffix("]") for each in value)

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(ipaddress.ip_network(each)) for each in value)

    @field_validator("job_sources", "job_destinations")
    @classmethod
    def _places(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            return JobRules(sources=value).sources
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    @field_validator("tenants")
    @classmethod
    def _tenant_names(cls, value: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
        for name in value:
            if not is_tenant_name(name):
                raise ValueError(f"{name!r} is no tenant's name")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.tenants:
            try:
                self.limits_of(name)
            except ValidationError as error:
                first = error.errors()[0]
                raise ValueError(f"tenants.{name}.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if self.least_side > self.greatest_side:
            raise ValueError(f"least_side={self.least_side} is larger than greatest_side={self.greatest_side}")
        if self.jwt_key_file is None and self.jwt_jwks_url is None:
            if self.jwt_issuer is not None or self.jwt_audience is not None:
                raise ValueError("jwt_issuer and jwt_audience need jwt_jwks_url or jwt_key_file")
        elif not self.jwt_issuer or not self.jwt_audience:
            raise ValueError("tokens need jwt_issuer and jwt_audience: otherwise those made for others would count")
        else:
            try:
                self.token_options()
            except ValidationError as error:
                raise ValueError(f"jwt: {error.errors()[0]['msg']}") from None
        return self

    @property
    def asks_for_credentials(self) -> bool:
        """Whether anything is configured that lets somebody in, so that others are not."""
        return self.keys_file is not None or self.jwt_key_file is not None or self.jwt_jwks_url is not None

    def token_options(self) -> TokenOptions | None:
        """Return how tokens are checked; None: none is accepted."""
        if self.jwt_key_file is None and self.jwt_jwks_url is None:
            return None
        return TokenOptions(
            key_file=self.jwt_key_file,
            jwks_url=self.jwt_jwks_url,
            algorithms=self.jwt_algorithms,
            issuer=self.jwt_issuer or "",
            audience=self.jwt_audience or "",
            leeway_s=self.jwt_leeway_s,
            tenant_claim=self.jwt_tenant_claim,
            scope_claim=self.jwt_scope_claim,
            default_scopes=frozenset(self.jwt_default_scopes),
            refresh_s=self.jwt_refresh_s,
        )

    def limits_of(self, tenant: str) -> TenantLimits:
        """Return the limits of a tenant: `limits`, with what `tenants` says of this one."""
        special = self.tenants.get(tenant)
        return TenantLimits(**(self.limits.model_dump() | special)) if special else self.limits


def load_live_settings(
    flags: Mapping[str, object] | None = None, config_file: Path | None = None
) -> Loaded[LiveSettings]:
    """Merge flags, `UPRIVER_LIVE_*`, the table `[live]` and defaults; the arguments are those of `load_settings`.

    Raises:
        SettingsError: as `load_settings`; also for an unknown name that begins with `UPRIVER_LIVE_`, since a misspelt
            limit is no limit.
    """
    known = {f"{LIVE_PREFIX}{name.upper()}" for name in LiveSettings.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith(LIVE_PREFIX) and name.upper() not in known:
            raise SettingsError(
                f"Unknown setting {name} in the environment.",
                code="settings-invalid",
                remedy="Correct its name, or unset it; docs/reference/live_settings.md has all names.",
            )
    return load_layers(LiveSettings, flags, config_file, table=LIVE_TABLE)


def describe() -> list[tuple[str, Any, str]]:
    """Return (name, default, description) of every setting, for its documentation."""
    return [(name, field.default, field.description or "") for name, field in LiveSettings.model_fields.items()]
