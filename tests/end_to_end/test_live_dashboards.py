"""A real Prometheus scrapes a real service under load; every query of the dashboard and of the alerts has data."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect

from actors.live_server import Guest, LiveConfig
from infra.client import LiveStream
from infra.protocol import Deadline, FrameHeader, Hello, Newest, Resume, dump
from infra.refusals import Refusal, Unauthorized
from infra.telemetry import Telemetry
from infra.tracing import open_tracer
from tests.dashboards import ALERTS, Query, alerts, panel_queries
from tests.live_service import LiveService, live_service
from tests.prometheus_server import Prometheus, prometheus

pytestmark = pytest.mark.slow

HELLO = Hello(width=32, height=24, codec_in="raw", codec_out="raw", fps=20)
# What a CPU, a service without defects, and so short a time cannot show.
WITHOUT_DATA = {"Memory of the GPUs A", "UpriverServiceFailures"}
# The figure that an alert compares: everything before its last comparison.
COMPARISON = re.compile(r"^(.*\S)\s*(?:>|==)\s*[\d.]+(?: or absent\(.*\))?$", re.S)


def picture(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)


async def gate(hello: Hello, channel: Any) -> Guest:
    """Two tenants, by key; one of them without any rate."""
    key = hello.credentials.api_key.get_secret_value() if hello.credentials.api_key else "acme"
    if key == "wrong":
        raise Unauthorized("Nobody knows this key.", code="key-unknown", remedy="Use another.")
    return Guest(key)


async def stream(service: LiveService, hello: Hello, until: asyncio.Event, key: str | None = None) -> None:
    """Send at the rate of the hello until it is over; take what comes."""
    async with LiveStream(service.url, hello, api_key=key) as client:

        async def send() -> None:
            number = 0
            while not until.is_set():
                await client.send_picture(picture(number % 8), cut=number % 20 == 7)
                number += 1
                await asyncio.sleep(0.05 if isinstance(hello.policy, Deadline) or hello.latency_ms else 0.02)
            await client.close()

        sending = asyncio.create_task(send())
        async for _ in client:
            pass
        await sending


async def garbage(service: LiveService, until: asyncio.Event) -> None:
    """What clients get wrong: no such model, wrong keys, states that are gone, pictures that are none, too many."""
    jpeg = HELLO.model_copy(update={"codec_in": "jpeg", "policy": Newest()})
    lost = HELLO.model_copy(update={"resume": Resume(session="gone", token="none", received=0)})  # type: ignore[arg-type]
    while not until.is_set():
        for hello, key in ((HELLO.model_copy(update={"model": "nothing"}), None), (HELLO, "wrong")):
            with contextlib.suppress(Refusal):
                async with LiveStream(service.url, hello, api_key=key):
                    pass
        for hello, frames in ((jpeg, 2), (lost, 0)):
            async with connect(service.url + "/v1/streams") as socket:
                await socket.send(dump(hello))
                await socket.recv()
                for number in range(frames):
                    await socket.send(FrameHeader(number).pack(b"no picture"))
                    await socket.recv()
        async with contextlib.AsyncExitStack() as many:
            with contextlib.suppress(Refusal):
                for _ in range(service.server.config.most_sessions):
                    await many.enter_async_context(LiveStream(service.url, HELLO.model_copy(update={"fps": None})))
        await asyncio.sleep(0.2)


async def hand_over(service: LiveService, until: asyncio.Event) -> None:
    """Streams go from the server to itself, as from replica to replica; frames are sent again."""
    while not until.is_set():
        await asyncio.sleep(0.5)
        for connection in list(service.server.connections.values())[:2]:
            asyncio.run_coroutine_threadsafe(connection.drain(), service._loop)


async def load(service: LiveService, server: Prometheus, until_query: str) -> None:
    until = asyncio.Event()
    hurried = HELLO.model_copy(update={"latency_ms": 3.0, "least_steps": 0})
    tasks = [
        asyncio.create_task(one)
        for one in (
            stream(service, HELLO, until),
            stream(service, HELLO, until, key="globex"),
            stream(service, hurried, until),
            stream(service, HELLO.model_copy(update={"policy": Newest()}), until),
            stream(service, HELLO.model_copy(update={"policy": Deadline(ms=4.0)}), until),
            garbage(service, until),
            hand_over(service, until),
        )
    ]
    try:
        await asyncio.to_thread(server.wait_for, until_query, 60.0)
    finally:
        until.set()
        await asyncio.gather(*tasks)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has watched a busy service, and still does."""
    tracer = open_tracer(None, every=10, exporter=_exporter())
    config = LiveConfig(most_sessions=12, state_interval_s=0.1)
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        live_service(config, "stand-in:4", gate=gate, telemetry=Telemetry("one", tracer=tracer)) as service,
        prometheus(folder, f"127.0.0.1:{service.port}", ALERTS) as running,
    ):
        # Twelve seconds of scrapes, so that rates over ten have two ends.
        asyncio.run(load(service, running, "count_over_time(upriver_live_ready[12s]) > 22"))
        yield running


def _exporter() -> Any:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return InMemorySpanExporter()


def test_the_service_is_scraped_without_a_complaint(server: Prometheus) -> None:
    (target,) = server.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


def test_every_panel_has_data(server: Prometheus) -> None:
    empty = {query.place for query in panel_queries() if not server.query(query.filled("15s"))}
    assert empty - WITHOUT_DATA == set()


def test_every_alert_looks_at_data(server: Prometheus) -> None:
    empty = set()
    for rule in alerts():
        match = COMPARISON.match(rule["expr"])
        assert match is not None, rule["expr"]
        figure = Query(rule["alert"], re.sub(r"\[\d+m\]", "[15s]", match[1])).filled()
        if not server.query(figure):
            empty.add(rule["alert"])
    assert empty - WITHOUT_DATA == set()


def test_the_rules_are_evaluated(server: Prometheus) -> None:
    (group,) = server.get("rules")["groups"]
    assert [(rule["name"], rule["health"]) for rule in group["rules"]] == [(rule["alert"], "ok") for rule in alerts()]


def test_variables_offer_something_to_choose_from(server: Prometheus) -> None:
    for label, series in (
        ("tenant", "upriver_live_streams_opened_total"),
        ("model", "upriver_live_model_info"),
        ("policy", "upriver_live_streams_opened_total"),
        ("replica", "upriver_live_ready"),
    ):
        assert server.get(f"label/{label}/values", **{"match[]": series}), label


def test_latencies_lead_to_traces(server: Prometheus) -> None:
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    window = {"start": (now - timedelta(minutes=5)).isoformat(), "end": now.isoformat()}
    found = server.get("query_exemplars", query="upriver_live_frame_latency_seconds_bucket", **window)
    traces = {exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]}
    assert traces and all(re.fullmatch(r"[0-9a-f]{32}", trace) for trace in traces)


def test_no_counter_went_back(server: Prometheus) -> None:
    """Prometheus takes a counter that goes back for a restart; there was none."""
    for name in ("frames_received", "frames_answered", "sent_bytes", "engine_busy_seconds"):
        resets = server.query(f"sum(resets(upriver_live_{name}_total[5m]))")
        assert [one["value"][1] for one in resets] == ["0"], name


def test_what_came_was_answered_dropped_or_sent_again(server: Prometheus) -> None:
    received = float(server.query("sum(upriver_live_frames_received_total)")[0]["value"][1])
    accounted = "sum(upriver_live_frames_answered_total) + sum(upriver_live_frames_dropped_total)"
    known = float(server.query(f"{accounted} + (sum(upriver_live_frames_replayed_total) or vector(0))")[0]["value"][1])
    # Streams that were handed over have left frames unanswered, at most a window each.
    assert received * 0.5 < known <= received


def test_the_example_configuration_is_what_prometheus_reads(tmp_path: Path) -> None:
    """The one in docs/live/observability.md."""
    import subprocess

    from tests.prometheus_server import program

    page = (Path(__file__).parents[2] / "docs/live/observability.md").read_text()
    (text,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", page, re.S)
    file = tmp_path / "prometheus.yml"
    file.write_text(text.replace("/etc/prometheus/upriver-alerts.yaml", str(ALERTS)))
    done = subprocess.run(
        [program("promtool"), "check", "config", "--syntax-only", str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
