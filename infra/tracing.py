"""One frame's way through a replica as OpenTelemetry spans: receive, decode, wait, step, encode, send.

One frame in N of each stream is traced. Its spans are made when its answer has been sent, from the times that its
stations noted: until then a traced frame costs a few assignments, and one that is not traced costs a comparison with
None. The step is linked to the span of its batch, which other frames shared. Knows no session and no transport.

The SDK and the exporter (OTLP over HTTP, `pip install 'upriver[otel]'`) are imported only when traces are asked for.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from infra.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import SpanContext

TRACE_EVERY: Final = 100
_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # OpenTelemetry's own names
_LONGEST_TRACEPARENT: Final = 512
_CLOSE_S: Final = 3.0


def open_tracer(
    endpoint: str | None, *, replica: str = "", every: int = TRACE_EVERY, exporter: SpanExporter | None = None
) -> FrameTracer | None:
    """Return what traces frames, or None where nobody asked for traces.

    Args:
        endpoint: base URL of an OTLP/HTTP receiver, such as ``http://collector:4318``; None: the one that
            OTEL_EXPORTER_OTLP_ENDPOINT names, if it does. Headers and the rest come from OpenTelemetry's own variables.
        every: one frame in so many of each stream is traced.
        exporter: takes the place of OTLP.

    Raises:
        SettingsError: traces are asked for, and the exporter is not installed.
    """
    if exporter is None and endpoint is None and not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            # Given in code the URL is taken as it is; from the environment the exporter adds the path itself.
            exporter = OTLPSpanExporter(endpoint=endpoint and f"{endpoint.rstrip('/')}/v1/traces")
    except ImportError:
        raise SettingsError(
            "Traces are asked for, but the exporter of OpenTelemetry is not installed.",
            code="tracing-unavailable",
            remedy="Install it with pip install 'upriver[otel]', or unset OTEL_EXPORTER_OTLP_ENDPOINT.",
        ) from None
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "upriver")})
    if replica:
        resource = resource.merge(Resource({"service.instance.id": replica}))
    # A provider of our own, never the global one: Ray has its own use of OpenTelemetry in the same process.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return FrameTracer(provider, every)


class FrameTracer:
    """Makes the spans of a replica. `open_tracer` returns one."""

    def __init__(self, provider: TracerProvider, every: int) -> None:
        self._provider, self._every = provider, every
        self._tracer = provider.get_tracer("upriver.live")

    def stream(
        self, traceparent: str | None, attributes: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic
    ) -> StreamTracer | None:
        """Return what traces the frames of a stream; None where its client says that it is not to be sampled.

        Args:
            traceparent: the client's, as in W3C Trace Context, section 3.2; its frames become children of that span.
                A malformed one counts as none.
            clock: of the times that are noted, in seconds.
        """
        from opentelemetry.trace import get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent: Context | None = None
        if traceparent and len(traceparent) <= _LONGEST_TRACEPARENT:
            parent = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
            remote = get_current_span(parent).get_span_context()
            if remote.is_valid and not remote.trace_flags.sampled:
                return None
        return StreamTracer(self._tracer, parent, attributes, self._every, clock)

    def batch(self, began: float, ended: float, model: str, frames: int, *, clock: Callable[[], float]) -> SpanContext:
        """Make the span of a batch; frames link their steps to it."""
        shift_ns = _shift_ns(clock)
        span = self._tracer.start_span(
            "batch",
            context=_no_parent(),
            attributes={"upriver.model": model, "upriver.batch_frames": frames},
            start_time=shift_ns + round(1e9 * began),
        )
        span.end(shift_ns + round(1e9 * ended))
        return span.get_span_context()

    def close(self) -> None:
        """Send what is left, for a few seconds at most; blocks."""
        # The exporter goes on trying for longer where its collector does not answer; nobody waits for that.
        closing = threading.Thread(target=self._provider.shutdown, name="upriver-traces", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)


class StreamTracer:
    """Traces one frame in N of a stream."""

    def __init__(
        self,
        tracer: Any,
        parent: Context | None,
        attributes: Mapping[str, str],
        every: int,
        clock: Callable[[], float],
    ) -> None:
        self.tracer, self.parent, self.attributes, self.clock = tracer, parent, dict(attributes), clock
        self._every, self._count = every, 0

    def frame(self, id_: int, arrived: float) -> FrameTrace | None:
        """Return what notes the times of a frame that has come; None for those that are not traced."""
        self._count += 1
        return FrameTrace(self, id_, arrived) if self._count % self._every == 1 % self._every else None


class FrameTrace:
    """The times of one frame, in seconds of the stream's clock; `finish` makes spans of them.

    Attributes:
        batch: the span of its batch.
        trace_id: 32 hexadecimal digits, when it is finished.
    """

    __slots__ = ("_arrived", "_id", "_stages", "_stream", "batch", "trace_id")

    def __init__(self, stream: StreamTracer, id_: int, arrived: float) -> None:
        self._stream, self._id, self._arrived = stream, id_, arrived
        self._stages: list[tuple[str, float, float]] = []  # name, begin, end
        self.batch: SpanContext | None = None
        self.trace_id: str | None = None

    def stage(self, name: str, ended: float, *, began: float | None = None) -> None:
        """Note that the frame has left a station; it came there when it left the one before, or at `began`."""
        if began is None:
            began = self._stages[-1][2] if self._stages else self._arrived
        self._stages.append((name, began, ended))

    def finish(self, ended: float, attributes: Mapping[str, str | int]) -> None:
        """Make the spans. `attributes`: what became of the frame."""
        from opentelemetry.trace import Link, SpanKind, format_trace_id, set_span_in_context

        stream = self._stream
        shift_ns = _shift_ns(stream.clock)
        root = stream.tracer.start_span(
            "frame",
            context=_no_parent() if stream.parent is None else stream.parent,
            kind=SpanKind.SERVER,
            attributes={**stream.attributes, "upriver.frame": self._id, **attributes},
            start_time=shift_ns + round(1e9 * self._arrived),
        )
        inside = set_span_in_context(root, _no_parent())
        for name, began, stage_ended in self._stages:
            links = [Link(self.batch)] if name == "step" and self.batch is not None else None
            span = stream.tracer.start_span(name, context=inside, links=links, start_time=shift_ns + round(1e9 * began))
            span.end(shift_ns + round(1e9 * stage_ended))
        root.end(shift_ns + round(1e9 * ended))
        self.trace_id = format_trace_id(root.get_span_context().trace_id)


def _no_parent() -> Context:
    from opentelemetry.context import Context

    return Context()


def _shift_ns(clock: Callable[[], float]) -> int:
    """Return what is to be added to a time of this clock for nanoseconds since 1970."""
    return time.time_ns() - round(1e9 * clock())
