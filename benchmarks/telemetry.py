"""What it costs a frame to be counted and traced, without anything else.

    python -m benchmarks.telemetry

Prints microseconds a frame, the best of seven runs; and milliseconds for one page of metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from infra.exposition import merge, pack, render, unpack
from infra.metrics import LiveMetrics, ReplicaFigures, SessionFigures
from infra.protocol import FrameHeader
from infra.tracing import StreamTracer, open_tracer

_FRAMES: Final = 20_000
_RUNS: Final = 7


class _Nowhere(SpanExporter):
    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def best_us(work: Callable[[], object], count: int = _FRAMES) -> float:
    """Return microseconds of one call."""
    times = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        for _ in range(count):
            work()
        times.append(time.perf_counter() - began)
    return 1e6 * min(times) / count


def main() -> None:
    """Measure and print."""
    metrics = LiveMetrics()
    meter = metrics.stream("acme", "tiny", "newest")
    header = FrameHeader(1, level=4, decode_us=1000, queue_us=2000, step_us=3000, encode_us=4000)

    def counted() -> None:
        meter.received(20_000)
        meter.answered(header, 200_000, 0.02, 0.001)

    off: StreamTracer | None = None

    def not_traced() -> None:
        if off is not None:
            off.frame(1, 0.0)

    tracer = open_tracer(None, every=_FRAMES * _RUNS * 2, exporter=_Nowhere())
    every = open_tracer(None, every=1, exporter=_Nowhere())
    assert tracer is not None and every is not None
    seldom, always = tracer.stream(None, {}), every.stream(None, {"upriver.tenant": "acme"})
    assert seldom is not None and always is not None
    seldom.frame(0, 0.0)

    def traced() -> None:
        now = time.monotonic()
        frame = always.frame(1, now)
        assert frame is not None
        for name in ("receive", "decode", "wait", "step", "encode", "send"):
            frame.stage(name, now)
        frame.finish(now, {"upriver.level": 4})

    print(f"counted                 {best_us(counted):8.2f} us a frame")
    print(f"traces off              {best_us(not_traced):8.3f} us a frame")
    print(f"traces on, not this one {best_us(lambda: seldom.frame(1, 0.0)):8.3f} us a frame")
    print(f"traces on, this one     {best_us(traced, 1000):8.1f} us a frame")
    sessions = tuple(
        SessionFigures(str(number), "acme", "tiny", "newest", {"level": 4.0, "latency_seconds": 0.1})
        for number in range(50)
    )
    metrics.figures = ReplicaFigures(values={"ready": 1.0}, sessions=sessions)
    packed = pack(metrics.registry)
    print(f"pack a replica          {best_us(lambda: pack(metrics.registry), 20) / 1000:8.2f} ms, {len(packed)} bytes")
    replicas = {str(number): packed for number in range(8)}

    def page() -> None:
        render(merge({name: unpack(one) for name, one in replicas.items()}))

    print(f"page of eight replicas  {best_us(page, 3) / 1000:8.1f} ms")
    tracer.close()
    every.close()


if __name__ == "__main__":
    main()
