"""What a running service tells of itself: metrics over HTTP, traces of frames, lines in its log."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from websockets.asyncio.client import connect

from actors.live_figures import gpu_memory
from actors.live_server import LiveConfig
from infra.client import LiveStream
from infra.exposition import ScrapeBoard
from infra.protocol import Deadline, Flag, FrameHeader, Hello, dump
from infra.refusals import BadMessage, StateLost, Unauthorized
from infra.structured_logs import LogSettings, start_logs
from infra.telemetry import Telemetry
from infra.tracing import open_tracer
from tests.live_service import LiveService, live_service

HELLO = Hello(width=32, height=24, codec_in="raw", codec_out="raw")
STREAM = {"tenant": "local", "model": "stand-in:0", "policy": "lossless"}
ASKS_FOR_OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def picture(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)


def get(service: LiveService, **headers: str) -> tuple[bytes, Any]:
    request = urllib.request.Request(f"{service.http}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read(), answer.headers


def scrape(service: LiveService, *, fresh: bool = True) -> Samples:
    """The samples of a page, by name and labels. Figures may be a second old; `fresh` ones are not."""
    if fresh:
        service.server.desk._packed_at = float("-inf")
    body, _ = get(service)
    return {
        (sample.name.removeprefix("upriver_live_"), frozenset(sample.labels.items())): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, frozenset({"replica": "local", **labels}.items())))


@asynccontextmanager
async def running(service: LiveService, hello: Hello = HELLO, count: int = 5) -> AsyncIterator[LiveStream]:
    """An open stream, all of whose frames so far have been answered."""
    async with LiveStream(service.url, hello) as stream:
        for number in range(count):
            await stream.send_picture(picture(number))
            await anext(stream)
        yield stream


async def finish(stream: LiveStream) -> None:
    await stream.close()
    assert [answer async for answer in stream] == []


def test_the_page_says_what_clients_saw() -> None:
    async def run(service: LiveService) -> Samples:
        async with running(service) as stream, running(service, count=3):
            during = await asyncio.to_thread(scrape, service)
            session = {"session": stream.welcome.session, **STREAM}
            assert value(during, "session_frames_answered_total", **session) == 5
            assert value(during, "session_level", **session) == 4
            assert value(during, "streams", state="live") == 2
            await finish(stream)
        return during

    with live_service() as service:
        during = asyncio.run(run(service))
        service.call(_until(lambda: not service.server.connections))
        after = scrape(service)
    assert value(during, "ready") == 1 and value(during, "streams_limit") == 32
    assert value(after, "frames_received_total", **STREAM) == 8
    assert value(after, "frames_answered_total", level="4", **STREAM) == 8
    assert value(after, "frame_latency_seconds_count", **STREAM) == 8
    assert value(after, "received_bytes_total", tenant="local") == 8 * (64 + 32 * 24 * 3)
    assert value(after, "sent_bytes_total", tenant="local") == 8 * (64 + 16 * 32 * 24 * 3)
    assert value(after, "batch_frames_sum", model="stand-in:0") == 8
    assert value(after, "resets_total", model="stand-in:0") == 2
    assert value(after, "streams_opened_total", **STREAM) == 2
    assert value(after, "streams_ended_total", model="stand-in:0", how="closed") == 1
    assert value(after, "streams_ended_total", model="stand-in:0", how="lost") == 1
    assert value(after, "streams", state="live") == 0
    assert not [labels for name, labels in after if name.startswith("session_")], "they went with their sessions"
    assert (value(after, "engine_busy_seconds_total") or 0) > 0
    assert (value(after, "process_resident_memory_bytes") or 0) > 1e7
    for stage in ("decode", "wait", "step", "encode", "send"):
        assert value(after, "stage_seconds_count", stage=stage, model="stand-in:0") == 8


async def _until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_hand_offs_saves_and_refusals_are_told() -> None:
    async def run(service: LiveService) -> None:
        async with running(service) as stream:
            (connection,) = service.server.connections.values()
            await asyncio.to_thread(service.call, connection.drain())
            await stream.send_picture(picture(5))
            await anext(stream)
            await finish(stream)
        with pytest.raises(BadMessage):
            async with running(service, HELLO.model_copy(update={"model": "nothing"})):
                pass
        from infra.protocol import Resume

        lost = HELLO.model_copy(update={"resume": Resume(session="gone", token="none", received=0)})  # type: ignore[arg-type]
        async with connect(service.url + "/v1/streams") as socket:
            await socket.send(dump(lost))
            assert json.loads(await socket.recv())["kind"] == StateLost.__name__

    with live_service(LiveConfig(state_interval_s=0.01)) as service:
        asyncio.run(run(service))
        samples = scrape(service)
    assert value(samples, "hand_offs_total", outcome="out") == 1
    assert value(samples, "hand_offs_total", outcome="resumed") == 1
    assert value(samples, "hand_offs_total", outcome="lost") == 1
    assert value(samples, "streams_ended_total", model="stand-in:0", how="handed_over") == 1
    assert value(samples, "refusals_total", kind="BadMessage", code="model-unknown") == 1
    assert value(samples, "refusals_total", kind="StateLost", code="state-lost") == 1
    assert (value(samples, "state_saves_total", outcome="saved") or 0) >= 1
    assert (value(samples, "state_saved_bytes_total") or 0) > 1000


def test_states_that_cannot_be_saved_are_told() -> None:
    async def run(service: LiveService) -> None:
        async with running(service):
            book = service.server._states.book  # type: ignore[attr-defined]  # the local one

            def refuse(*arguments: object) -> None:
                raise OSError("no room")

            book.put = refuse
            await asyncio.to_thread(service.call, _until(lambda: failures(service) > 0))

    def failures(service: LiveService) -> float:
        found = service.server.telemetry.metrics.registry.get_sample_value(
            "upriver_live_state_saves_total", {"outcome": "failed"}
        )
        return found or 0.0

    with live_service(LiveConfig(state_interval_s=0.01)) as service:
        asyncio.run(run(service))


def test_levels_and_drops_are_told() -> None:
    hurried = HELLO.model_copy(update={"latency_ms": 0.001, "least_steps": 0})
    late = HELLO.model_copy(update={"policy": Deadline(ms=0.001)})

    async def run(service: LiveService) -> None:
        async with running(service, hurried, count=8):
            pass
        async with running(service, late, count=3):
            pass

    with live_service() as service:
        asyncio.run(run(service))
        samples = scrape(service)
    levels = [value(samples, "frames_answered_total", level=level, **STREAM) for level in ("4", "2", "1", "0")]
    assert all(levels) and sum(filter(None, levels)) == 8
    assert value(samples, "frames_dropped_total", reason="late", **(STREAM | {"policy": "deadline"})) == 3


def test_a_draining_replica_is_not_ready() -> None:
    with live_service() as service:
        assert value(scrape(service), "ready") == 1
        service.call(service.server.drain())
        samples = scrape(service)
    assert value(samples, "ready") == 0 and value(samples, "draining") == 1


def test_the_scraper_chooses_format_and_compression() -> None:
    with live_service() as service:
        plain, headers = get(service)
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        packed, headers = get(service, **ASKS_FOR_OPENMETRICS)
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert headers["Content-Encoding"] == "gzip" and "Accept-Encoding" in headers["Vary"]
    modern = {family.name for family in parse_openmetrics(gzip.decompress(packed).decode())}
    assert modern == {family.name for family in parse_text(plain.decode())}
    assert {"upriver_live_held_states", "upriver_live_figures_age_seconds", "process_cpu_seconds"} <= modern


def test_metrics_can_be_for_some_only() -> None:
    async def admit(request: Any) -> None:
        if request.headers.get("authorization") != "Bearer good":
            raise Unauthorized("No credentials.", remedy="Bring some with the scope admin.")

    with live_service(admit_scrape=admit) as service:
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(service)
        with caught.value as answer:
            assert answer.code == 401 and json.loads(answer.read())["kind"] == "Unauthorized"
        assert b"upriver_live_ready" in get(service, Authorization="Bearer good")[0]


class SharedBoard:
    """The board of an application whose replicas are in one process."""

    def __init__(self) -> None:
        self.board = ScrapeBoard()
        self.broken = False

    async def exchange_metrics(self, replica: str, number: int, packed: bytes) -> dict[str, tuple[float, bytes]]:
        if self.broken:
            raise ConnectionError("the holder restarts")
        self.board.post(replica, number, packed)
        return self.board.read()


@pytest.fixture
def two() -> Iterator[tuple[LiveService, LiveService, SharedBoard]]:
    board = SharedBoard()
    with (
        live_service(telemetry=Telemetry("one"), board=board) as first,
        live_service(telemetry=Telemetry("two"), board=board) as second,
    ):
        yield first, second, board


def test_whoever_is_asked_shows_all_and_no_counter_goes_back(
    two: tuple[LiveService, LiveService, SharedBoard],
) -> None:
    first, second, _ = two
    seen: list[float] = []

    async def run() -> None:
        await asyncio.to_thread(scrape, first)
        await asyncio.to_thread(scrape, second)
        async with running(first) as stream:
            for number in range(5, 25):
                await stream.send_picture(picture(number))
                await anext(stream)
                # The first shows what it has just counted; the second must not show what it had heard before.
                await asyncio.to_thread(scrape, second, fresh=False)
                await asyncio.to_thread(scrape, first)
                samples = await asyncio.to_thread(scrape, second, fresh=False)
                name = ("frames_received_total", frozenset({"replica": "one", **STREAM}.items()))
                seen.append(samples.get(name, 0.0))
                assert {dict(labels)["replica"] for name, labels in samples if name == "ready"} == {"one", "two"}

    asyncio.run(run())
    assert seen == sorted(seen) and seen[-1] >= 20


def test_a_replica_shows_itself_where_the_others_cannot_be_had(
    two: tuple[LiveService, LiveService, SharedBoard],
) -> None:
    first, _, board = two
    board.broken = True
    assert {dict(labels)["replica"] for name, labels in scrape(first) if name == "ready"} == {"one"}


def test_whoever_asks_often_has_no_figures_collected_again(two: tuple[LiveService, LiveService, SharedBoard]) -> None:
    first, _, _ = two
    scrape(first)
    collected = first.server.telemetry.metrics.figures
    get(first)
    assert first.server.telemetry.metrics.figures is collected
    scrape(first)
    assert first.server.telemetry.metrics.figures is not collected


def test_a_frames_way_is_traced() -> None:
    exporter = InMemorySpanExporter()
    tracer = open_tracer(None, every=2, exporter=exporter)
    trace_id, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"

    async def run(service: LiveService) -> None:
        headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
        async with connect(service.url + "/v1/streams", additional_headers=headers) as socket:
            await socket.send(dump(HELLO))
            json.loads(await socket.recv())
            for number in range(4):
                await socket.send(FrameHeader(number).pack(picture(number).tobytes()))
                answer = await socket.recv()
                assert isinstance(answer, bytes)
                assert Flag.DROPPED not in FrameHeader.unpack(answer)[0].flags

    with live_service(telemetry=Telemetry("local", tracer=tracer)) as service:
        asyncio.run(run(service))
        service.call(_until(lambda: not service.server.connections))
        service.server.desk._packed_at = float("-inf")
        page = gzip.decompress(get(service, **ASKS_FOR_OPENMETRICS)[0]).decode()
    spans = exporter.get_finished_spans()
    frames = [span for span in spans if span.name == "frame"]
    assert [(span.attributes or {})["upriver.frame"] for span in frames] == [0, 2]
    for frame in frames:
        parts = [span for span in spans if span.parent and span.parent.span_id == frame.context.span_id]
        assert [span.name for span in parts] == ["receive", "decode", "wait", "step", "encode", "send"]
        times = [time for span in parts for time in (span.start_time or 0, span.end_time or 0)]
        assert times == sorted(times), "one station after the other"
        assert frame.start_time == times[0] and frame.end_time == times[-1]
        assert f"{frame.context.trace_id:032x}" == trace_id
        (link,) = parts[3].links
        (batch,) = [span for span in spans if span.context.span_id == link.context.span_id]
        assert batch.name == "batch" and (batch.attributes or {})["upriver.batch_frames"] == 1
        attributes = dict(frame.attributes or {})
        assert attributes.pop("upriver.session")
        assert attributes == {
            "upriver.tenant": "local", "upriver.model": "stand-in:0", "upriver.policy": "lossless",
            "upriver.frame": attributes["upriver.frame"], "upriver.level": 4,
            "upriver.index": attributes["upriver.frame"], "upriver.dropped": "none",
        }  # fmt: skip
    assert f'trace_id="{trace_id}"' in page, "the latency of a traced frame leads to its trace"


def test_a_streams_lines_name_tenant_and_session() -> None:
    text = io.StringIO()
    level = logging.getLogger("actors").level
    start_logs(LogSettings(format="json", level="info"), stream=text)
    told: list[str] = []

    async def run(service: LiveService) -> None:
        async with connect(service.url + "/v1/streams") as socket:
            await socket.send(dump(HELLO))
            told.append(json.loads(await socket.recv())["session"])
            await socket.send(b"this is no frame")
            assert json.loads(await socket.recv())["kind"] == "BadMessage"

    try:
        with live_service() as service:
            asyncio.run(run(service))
            service.call(_until(lambda: not service.server.connections))
    finally:
        start_logs(LogSettings(format="off"))
        logging.getLogger("actors").setLevel(level)
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    (refused,) = [line for line in lines if "is refused" in line["message"]]
    assert (refused["tenant"], refused["session"]) == ("local", told[0])


def test_a_cpu_has_no_gpu_memory() -> None:
    assert gpu_memory(torch.device("cpu")) == {}


@pytest.mark.gpu
def test_the_memory_of_a_gpu_is_told() -> None:
    held = torch.zeros(2**20, device="cuda")
    memory = gpu_memory(held.device)
    assert set(memory) == {"allocated", "reserved", "free", "total"}
    assert 4 * 2**20 <= memory["allocated"] <= memory["reserved"] < memory["total"]
