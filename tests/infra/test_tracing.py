"""A traced frame's spans tell its way; a frame that is not traced costs nothing; traces reach a real receiver."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from infra.errors import SettingsError
from infra.tracing import FrameTracer, open_tracer

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def tracer(exporter: InMemorySpanExporter, every: int = 1) -> FrameTracer:
    made = open_tracer(None, replica="live#1", every=every, exporter=exporter)
    assert made is not None
    return made


def trace_one(made: FrameTracer, traceparent: str | None = None) -> str | None:
    stream = made.stream(traceparent, {"upriver.tenant": "acme"})
    assert stream is not None
    now = time.monotonic()
    frame = stream.frame(7, now)
    assert frame is not None
    frame.stage("receive", now + 0.001)
    frame.stage("decode", now + 0.003)
    frame.batch = made.batch(now + 0.004, now + 0.010, "tiny", 3, clock=time.monotonic)
    frame.stage("wait", now + 0.004)
    frame.stage("step", now + 0.010)
    frame.stage("encode", now + 0.013, began=now + 0.012)
    frame.stage("send", now + 0.014)
    frame.finish(now + 0.014, {"upriver.level": 4})
    return frame.trace_id


def spans_of(made: FrameTracer, exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    made.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def length_ms(span: ReadableSpan) -> float:
    assert span.start_time is not None and span.end_time is not None
    return (span.end_time - span.start_time) / 1e6


def test_the_way_of_a_frame(exporter: InMemorySpanExporter) -> None:
    made = tracer(exporter)
    trace_id = trace_one(made)
    spans = spans_of(made, exporter)
    assert list(spans) == ["batch", "receive", "decode", "wait", "step", "encode", "send", "frame"]
    root, batch = spans.pop("frame"), spans.pop("batch")
    assert {name: round(length_ms(span)) for name, span in spans.items()} == {
        "receive": 1, "decode": 2, "wait": 1, "step": 6, "encode": 1, "send": 1,
    }  # fmt: skip
    assert round(length_ms(root)) == 14
    assert abs((root.start_time or 0) / 1e9 - time.time()) < 60, "times are of the calendar, not of the machine's start"
    assert all(span.parent is not None and span.parent.span_id == root.context.span_id for span in spans.values())
    assert trace_id == f"{root.context.trace_id:032x}" and root.parent is None
    assert root.attributes == {"upriver.tenant": "acme", "upriver.frame": 7, "upriver.level": 4}
    assert root.resource.attributes["service.name"] == "upriver"
    assert root.resource.attributes["service.instance.id"] == "live#1"
    # The batch is a trace of its own, because it belongs to several frames; their steps lead to it.
    (link,) = spans["step"].links
    assert link.context.span_id == batch.context.span_id and batch.context.trace_id != root.context.trace_id
    assert batch.attributes == {"upriver.model": "tiny", "upriver.batch_frames": 3}
    assert all(not span.links for name, span in spans.items() if name != "step")


def test_the_clients_trace_goes_on(exporter: InMemorySpanExporter) -> None:
    made = tracer(exporter)
    assert trace_one(made, TRACEPARENT) == TRACE_ID
    root = spans_of(made, exporter)["frame"]
    assert root.parent is not None and f"{root.parent.span_id:016x}" == SPAN_ID and root.parent.is_remote


@pytest.mark.parametrize("traceparent", ["", "nonsense", f"00-{'0' * 32}-{SPAN_ID}-01", "00-" + "a" * 10_000, "ü"])
def test_a_malformed_trace_counts_as_none(exporter: InMemorySpanExporter, traceparent: str) -> None:
    made = tracer(exporter)
    trace_one(made, traceparent)
    assert spans_of(made, exporter)["frame"].parent is None


def test_a_client_that_does_not_sample_is_not_traced(exporter: InMemorySpanExporter) -> None:
    made = tracer(exporter)
    assert made.stream(TRACEPARENT[:-2] + "00", {}) is None
    made.close()


def test_one_frame_in_n_is_traced(exporter: InMemorySpanExporter) -> None:
    made = tracer(exporter, every=10)
    stream = made.stream(None, {})
    assert stream is not None
    traced = [number for number in range(35) if stream.frame(number, 0.0) is not None]
    assert traced == [0, 10, 20, 30]
    made.close()


def test_nothing_is_imported_or_made_where_nobody_asks() -> None:
    assert open_tracer(None) is None


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SettingsError, match=r"pip install 'upriver\[otel\]'"):
        open_tracer(None)


@contextmanager
def collector() -> Iterator[tuple[str, list[Any], threading.Event]]:
    """A receiver of OTLP over HTTP: its URL, the spans that it got, and whether it got some."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    got: list[Any] = []
    some = threading.Event()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/traces"
            got.extend(span for part in request.resource_spans for scope in part.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()
            some.set()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", got, some
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("where", ["settings", "environment"])
def test_spans_reach_a_receiver(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with collector() as (url, got, some):
        if where == "environment":
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        made = open_tracer(url + "/" if where == "settings" else None, every=1)
        assert made is not None
        trace_one(made)
        made.close()
        assert some.wait(10)
        assert {span.name for span in got} == {
            "batch", "receive", "decode", "wait", "step", "encode", "send", "frame",
        }  # fmt: skip


def test_a_receiver_that_is_not_there_costs_nothing_but_its_traces() -> None:
    made = open_tracer("http://127.0.0.1:9", every=1)
    assert made is not None
    began = time.monotonic()
    trace_one(made)
    assert time.monotonic() - began < 1.0
    made.close()
    assert time.monotonic() - began < 5.0, "it does not hold up the end of the service either"


def test_the_frames_that_are_not_traced_cost_little(exporter: InMemorySpanExporter) -> None:
    made = tracer(exporter, every=10**9)
    stream = made.stream(None, {})
    assert stream is not None
    stream.frame(0, 0.0)

    def once() -> float:
        began = time.perf_counter()
        for number in range(20_000):
            stream.frame(number, 0.0)
        return (time.perf_counter() - began) / 20_000

    assert min(once() for _ in range(5)) < 5e-6
    made.close()
