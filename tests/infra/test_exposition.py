"""One page for many replicas: nothing is lost, nothing goes back, every scraper can read it."""

from __future__ import annotations

import gzip

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from infra.exposition import ScrapeBoard, merge, pack, render, unpack
from infra.metrics import LiveMetrics, ReplicaFigures
from infra.protocol import FrameHeader

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


def metrics_of(frames: int, trace_id: str | None = None) -> LiveMetrics:
    metrics = LiveMetrics()
    metrics.figures = ReplicaFigures(values={"ready": 1.0})
    meter = metrics.stream("acme", 'odd "name"\\\n', "newest")
    for _ in range(frames):
        meter.received(10)
        meter.answered(FrameHeader(1, level=4), 10, 0.3, 0.001, trace_id)
    return metrics


def received(page: bytes) -> dict[str, float]:
    return {
        sample.labels["replica"]: sample.value
        for family in parse_text(page.decode())
        for sample in family.samples
        if sample.name == "upriver_live_frames_received_total"
    }


def test_every_replica_is_on_the_page_under_its_name() -> None:
    merged = merge({name: unpack(pack(metrics_of(frames).registry)) for name, frames in (("a", 2), ("b", 3))})
    assert received(render(merged).body) == {"a": 2, "b": 3}
    names = [metric.name for metric in merged]
    assert len(names) == len(set(names)), "a family is there once, with the samples of all replicas"
    assert "process_resident_memory_bytes" in names


def test_what_was_packed_comes_out() -> None:
    registry = metrics_of(2, "ab" * 16).registry
    before = [
        (metric.name, metric.type, metric.documentation, metric.samples)
        for metric in registry.collect()
        if metric.name.startswith("upriver")
    ]
    after = [
        (metric.name, metric.type, metric.documentation, metric.samples)
        for metric in unpack(pack(registry))
        if metric.name.startswith("upriver")
    ]
    assert after == [
        (name, kind, text, [sample for sample in samples if not sample.name.endswith("_created")])
        for name, kind, text, samples in before
    ]


def test_both_formats_can_be_read() -> None:
    merged = merge({"a": unpack(pack(metrics_of(1, "ab" * 16).registry))})
    text = render(merged)
    assert text.content_type.startswith("text/plain; version=0.0.4") and "trace_id" not in text.body.decode()
    labels = (
        next(f for f in parse_text(text.body.decode()) if f.name == "upriver_live_frames_received").samples[0].labels
    )
    assert labels["model"] == 'odd "name"\\\n'
    modern = render(merged, OPENMETRICS)
    assert modern.content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(modern.body.decode())}
    latencies = families["upriver_live_frame_latency_seconds"].samples
    exemplars = [sample.exemplar for sample in latencies if sample.exemplar]
    assert [exemplar.labels for exemplar in exemplars] == [{"trace_id": "ab" * 16}]


@pytest.mark.parametrize(
    ("accept", "is_modern"),
    [
        ("", False),
        ("*/*", False),
        (OPENMETRICS, True),
        ("text/plain", False),
        ("application/openmetrics-text;q=0.3, text/plain;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=nonsense", False),
        (";;,,=;q", False),
    ],
)
def test_a_scraper_gets_the_format_that_it_likes_best(accept: str, is_modern: bool) -> None:
    assert render([], accept).content_type.startswith("application/openmetrics-text") == is_modern


def test_pages_are_compressed_for_those_who_ask() -> None:
    merged = merge({"a": unpack(pack(metrics_of(1).registry))})
    page = render(merged, "", "gzip;q=1.0, identity")
    assert page.encoding == "gzip" and gzip.decompress(page.body) == render(merged).body
    assert render(merged, "", "gzip;q=0").encoding == ""


def test_a_family_that_two_versions_mean_differently_is_shown_as_the_first_means_it() -> None:
    first, second = unpack(pack(metrics_of(1).registry)), unpack(pack(metrics_of(1).registry))
    for metric in second:
        if metric.name == "upriver_live_ready":
            metric.type = "counter"
    merged = {metric.name: metric for metric in merge({"a": first, "b": second})}
    assert [sample.labels for sample in merged["upriver_live_ready"].samples] == [{"replica": "a"}]


def test_the_board_forgets_silent_replicas_and_takes_nothing_older() -> None:
    now = [100.0]
    board = ScrapeBoard(stale_s=20, clock=lambda: now[0])
    board.post("a", 1, b"one")
    now[0] += 5
    board.post("b", 1, b"other")
    board.post("a", 0, b"late")
    assert board.read() == {"a": (5.0, b"one"), "b": (0.0, b"other")}
    now[0] += 16
    assert board.read() == {"b": (16.0, b"other")}
    board.post("a", 1, b"again")
    assert board.read()["a"] == (0.0, b"again")
