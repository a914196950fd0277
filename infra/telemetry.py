"""How a live replica is seen from outside: metrics, traces and logs, set up together and handed to what it observes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from infra.metrics import MOST_SESSIONS, MOST_TENANTS, LiveMetrics
from infra.structured_logs import LogSettings
from infra.tracing import TRACE_EVERY, FrameTracer, open_tracer


class TelemetryConfig(BaseModel):
    """What is shown, and how much of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    log_format: Literal["off", "text", "json"] = Field(default="text", description="how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="the least logged")
    metrics_tenants: int = Field(
        default=MOST_TENANTS, ge=0, le=10_000, description="tenants with metrics of their own; the others share some"
    )
    metrics_sessions: int = Field(
        default=MOST_SESSIONS, ge=0, le=1000, description="sessions of a replica, the newest, with metrics of their own"
    )
    traces_endpoint: str | None = Field(
        default=None,
        max_length=2000,
        repr=False,
        description="base URL of an OTLP/HTTP receiver of traces; none: OTEL_EXPORTER_OTLP_ENDPOINT, if it is set",
    )
    trace_every: int = Field(default=TRACE_EVERY, ge=1, le=10**9, description="one frame in so many is traced")

    @property
    def logs(self) -> LogSettings:
        """The part that `infra.structured_logs` understands."""
        return LogSettings(format=self.log_format, level=self.log_level)


@dataclass(frozen=True, slots=True)
class Telemetry:
    """What a replica reports to. Made without arguments it counts, and traces nothing.

    Attributes:
        replica: its name in all three.
    """

    replica: str = "local"
    metrics: LiveMetrics = field(default_factory=LiveMetrics)
    tracer: FrameTracer | None = None

    @classmethod
    def start(cls, config: TelemetryConfig, replica: str) -> Telemetry:
        """Return what a replica reports to, as configured; logs are set up by `infra.structured_logs`.

        Raises:
            SettingsError: traces are asked for and cannot be sent.
        """
        metrics = LiveMetrics(most_tenants=config.metrics_tenants, most_sessions=config.metrics_sessions)
        tracer = open_tracer(config.traces_endpoint, replica=replica, every=config.trace_every)
        return cls(replica, metrics, tracer)
