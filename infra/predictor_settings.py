"""Settings of the KServe predictor: where it listens, what it fronts, how much one caller may have of it.

They come from `UPRIVER_PREDICTOR_*` in the environment, then the table `[predictor]` of the configuration file, then
defaults. With an engine of its own, whom it lets in and what a tenant may have are those of the live service:
`infra.live_settings`. In front of a service, that service decides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from infra.errors import SettingsError
from infra.network import FetchPolicy
from infra.settings import PREDICTOR_TABLE, LayeredSettings, Loaded, load_layers

PREDICTOR_PREFIX: Final = "UPRIVER_PREDICTOR_"
SERVICE_SCHEMES: Final = ("ws", "wss", "grpc", "grpcs")


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class PredictorSettings(LayeredSettings):
    """Everything that can be set of the predictor. Build it with `load_predictor_settings`."""

    model_config = SettingsConfigDict(env_prefix=PREDICTOR_PREFIX, env_ignore_empty=True)

    # Where it listens.
    host: str = Field(default="127.0.0.1", max_length=253, description="address or name to listen on, for both ports")
    http_port: int = Field(default=8080, ge=1, le=65535, description="port for REST, health and metrics")
    grpc_port: int = Field(default=8081, ge=1, le=65535, description="port for gRPC")
    insecure: bool = Field(
        default=False, description="listen beyond this machine although nobody is asked for credentials"
    )

    # What it fronts.
    service: str | None = Field(
        default=None,
        max_length=500,
        description="ws://, wss://, grpc:// or grpcs:// address of a live service; none: an engine in this process",
    )
    models: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=("tiny",),
        min_length=1,
        description="models to serve: NAME=SOURCE, or a source whose last part is its name",
    )
    loadable: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)] = Field(
        default=(), description="models that those with the scope admin may load and unload, written alike; none: none"
    )

    # How much of it one may have.
    sequences: int = Field(default=256, ge=1, le=100_000, description="sequences open at a time")
    sequence_idle_s: float = Field(
        default=60.0, gt=0, le=86_400, description="a sequence without a request for so long is ended"
    )
    sequence_queue: int = Field(
        default=16, ge=1, le=10_000, description="requests of one sequence that wait for their turn at most"
    )
    requests: int = Field(default=64, ge=1, le=10_000, description="requests under way at a time")
    max_frames: int = Field(default=64, ge=1, le=10_000, description="frames of one request")
    max_request_bytes: int = Field(
        default=128 << 20, ge=1 << 16, le=(2 << 30) - 1, description="largest body or message of a request, inflated"
    )
    max_result_bytes: int = Field(
        default=256 << 20, ge=1 << 16, le=(2 << 30) - 1, description="most that the pixels of one answer may take"
    )
    patience_s: float = Field(
        default=5.0, ge=0, le=600, description="how long a request waits for room, or for a service that is not there"
    )
    hand_over_s: float = Field(
        default=30.0, ge=0, le=3600, description="how long an open sequence waits for a service that has gone away"
    )
    drain_s: float = Field(
        default=30.0, ge=0, le=86_400, description="after SIGTERM, how long open sequences may take to end"
    )
    fetch: FetchPolicy | None = Field(
        default=None, description="which addresses `video_uri` may name, see `infra.network`; none: no `video_uri`"
    )
    fetch_bytes: int = Field(default=64 << 20, ge=1024, le=4 << 30, description="largest video that is fetched")

    @staticmethod
    def sources(models: tuple[str, ...]) -> dict[str, str]:
        """Return the source of each model by the name that callers use: a part of an address, so without slashes."""
        named = {}
        for model in models:
            name, separator, source = model.partition("=")
            named[name if separator else model.rstrip("/").rpartition("/")[2]] = source if separator else model
        return named

    @field_validator("models", "loadable")
    @classmethod
    def _have_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        named = cls.sources(value)
        if len(named) < len(value) or any(not name or "/" in name or not named[name] for name in named):
            raise ValueError("each model has a source, and a name of its own without slashes")
        return value

    @field_validator("service")
    @classmethod
    def _is_a_service(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, separator, rest = value.partition("://")
        if scheme not in SERVICE_SCHEMES or not separator or not rest or "@" in rest or "?" in rest:
            raise ValueError(
                f"a service is one of {', '.join(SERVICE_SCHEMES)}, then ://host:port, without user or query"
            )
        return value.rstrip("/")


def load_predictor_settings(
    flags: Mapping[str, object] | None = None, config_file: Path | None = None
) -> Loaded[PredictorSettings]:
    """Merge flags, `UPRIVER_PREDICTOR_*`, the table `[predictor]` and defaults, as `load_settings` does.

    Raises:
        SettingsError: as `load_settings`; also for an unknown name that begins with `UPRIVER_PREDICTOR_`, since a
            misspelt limit is no limit.
    """
    known = {f"{PREDICTOR_PREFIX}{name.upper()}" for name in PredictorSettings.model_fields}
    for name in sorted(os.environ):
        # Kubernetes sets UPRIVER_PREDICTOR_PORT and the like for a Service of that name (enableServiceLinks).
        if name.upper().startswith(PREDICTOR_PREFIX) and name.upper() not in known and not _is_service_link(name):
            raise SettingsError(
                f"Unknown setting {name} in the environment.",
                code="settings-invalid",
                remedy="Correct its name, or unset it; docs/reference/predictor_settings.md has all names.",
            )
    return load_layers(PredictorSettings, flags, config_file, table=PREDICTOR_TABLE)


def _is_service_link(name: str) -> bool:
    rest = name.upper().removeprefix(PREDICTOR_PREFIX)
    return rest in ("SERVICE_HOST", "PORT") or rest.startswith(("SERVICE_PORT", "PORT_"))


def describe() -> list[tuple[str, Any, str]]:
    """Return (name, default, description) of every setting, for its documentation."""
    return [(name, field.default, field.description or "") for name, field in PredictorSettings.model_fields.items()]
