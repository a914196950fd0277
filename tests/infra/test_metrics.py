"""What is counted is what happened; no client can make labels without end."""

from __future__ import annotations

import itertools
import time

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.exposition import generate_latest

from infra.metrics import (
    APPLICATION_FAMILIES,
    FAMILIES,
    LATENCY_BUCKETS_S,
    OTHER,
    LiveMetrics,
    ReplicaFigures,
    SessionFigures,
    application_metrics,
)
from infra.protocol import DropReason, Flag, FrameHeader

LABELS = {"tenant": "acme", "model": "tiny", "policy": "newest"}


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"upriver_live_{name}", labels)


def session(number: int, **values: float) -> SessionFigures:
    return SessionFigures(str(number), "acme", "tiny", "newest", values)


def test_frames_are_counted_where_they_belong() -> None:
    metrics = LiveMetrics()
    meter = metrics.stream("acme", "tiny", "newest")
    for _ in range(3):
        meter.received(100)
    answer = FrameHeader(1, level=2, flags=Flag.RESET, decode_us=1000, queue_us=2000, step_us=3000, encode_us=4000)
    meter.answered(answer, 500, 0.011, 0.001)
    meter.answered(FrameHeader(2, reason=DropReason.NEWER, flags=Flag.DROPPED), 64, 0.5, 0.001)
    meter.replayed()
    meter.ended("closed")
    registry = metrics.registry
    assert value(registry, "frames_received_total", **LABELS) == 3
    assert value(registry, "frames_answered_total", level="2", **LABELS) == 1
    assert value(registry, "frames_dropped_total", reason="newer", **LABELS) == 1
    assert value(registry, "frames_replayed_total", model="tiny") == 1
    assert value(registry, "received_bytes_total", tenant="acme") == 300
    assert value(registry, "sent_bytes_total", tenant="acme") == 564
    assert value(registry, "resets_total", model="tiny") == 1
    assert value(registry, "streams_opened_total", **LABELS) == 1
    assert value(registry, "streams_ended_total", model="tiny", how="closed") == 1
    # Dropped frames have no latency.
    assert value(registry, "frame_latency_seconds_count", **LABELS) == 1
    assert value(registry, "frame_latency_seconds_sum", **LABELS) == pytest.approx(0.011)
    spent = {
        stage: value(registry, "stage_seconds_sum", stage=stage, model="tiny")
        for stage in ("decode", "wait", "step", "encode", "send")
    }
    assert spent == pytest.approx({"decode": 0.001, "wait": 0.002, "step": 0.003, "encode": 0.004, "send": 0.001})


def test_batches_saves_hand_offs_and_refusals_are_counted() -> None:
    metrics = LiveMetrics()
    metrics.batch("tiny", 3, 0.02)
    metrics.saved(1000, 0.1)
    metrics.not_saved()
    metrics.handed_off("lost")
    metrics.refused("AdmissionRefused", "sessions-full")
    registry = metrics.registry
    assert value(registry, "batch_frames_bucket", model="tiny", le="3.0") == 1
    assert value(registry, "batch_frames_bucket", model="tiny", le="2.0") == 0
    assert value(registry, "step_seconds_sum", model="tiny") == 0.02
    assert value(registry, "state_saves_total", outcome="saved") == 1
    assert value(registry, "state_saves_total", outcome="failed") == 1
    assert value(registry, "state_saved_bytes_total") == 1000
    assert value(registry, "hand_offs_total", outcome="lost") == 1
    assert value(registry, "hand_offs_total", outcome="out") == 0, "there before the first, so that it is an increase"
    assert value(registry, "refusals_total", kind="AdmissionRefused", code="sessions-full") == 1


def test_the_buckets_cover_what_live_streams_are_about() -> None:
    assert LATENCY_BUCKETS_S[0] <= 0.005 and LATENCY_BUCKETS_S[-1] >= 10
    steps = [after / before for before, after in itertools.pairwise(LATENCY_BUCKETS_S)]
    assert max(steps) <= 2, "a quantile is known to within the width of its bucket"


def test_tenants_beyond_the_bound_share_their_labels() -> None:
    metrics = LiveMetrics(most_tenants=2)
    for number in range(50):
        metrics.stream(f"tenant-{number}", "tiny", "newest").received(1)
        metrics.refused("BadMessage", f"code-{number}-{'x' * number}")
    families = {family.name: family for family in metrics.registry.collect()}
    received = families["upriver_live_frames_received"].samples
    tenants = {sample.labels["tenant"] for sample in received}
    assert tenants == {"tenant-0", "tenant-1", OTHER}
    assert value(metrics.registry, "frames_received_total", tenant=OTHER, model="tiny", policy="newest") == 48


def test_the_number_of_series_is_bounded_whatever_comes() -> None:
    metrics = LiveMetrics(most_tenants=3, most_sessions=5)
    for number in range(500):
        meter = metrics.stream(f"t{number}", f"m{number}", "lossless")
        meter.received(1)
        metrics.refused("BadMessage", f"c{number}")
    metrics.figures = ReplicaFigures(sessions=tuple(session(number, level=4.0) for number in range(500)))
    ours = [family for family in metrics.registry.collect() if family.name.startswith("upriver_live")]
    # Histograms of latency have 20 series for each of 4 tenants and 33 models; nothing else is as large.
    assert sum(len(family.samples) for family in ours) < 4 * 33 * 40 + 33 * 150
    levels = next(family for family in ours if family.name == "upriver_live_session_level")
    assert [sample.labels["session"] for sample in levels.samples] == ["495", "496", "497", "498", "499"]


def test_sessions_are_in_no_histogram() -> None:
    assert [family.name for family in FAMILIES if "session" in family.labels and family.kind == "histogram"] == []
    assert all(family.live for family in FAMILIES if "session" in family.labels), "they would stay for ever"


def test_a_session_goes_with_its_gauges() -> None:
    metrics = LiveMetrics()
    labels = LABELS | {"session": "7"}
    metrics.figures = ReplicaFigures(
        values={"ready": 1.0, "engine_busy_seconds": 2.5},
        by_label={"streams": {"live": 1.0}},
        models=(("tiny", "ab", "cpu"),),
        sessions=(session(7, level=2.0, frames_received=9.0),),
    )
    registry = metrics.registry
    assert value(registry, "session_level", **labels) == 2
    assert value(registry, "session_frames_received_total", **labels) == 9
    assert value(registry, "streams", state="live") == 1
    assert value(registry, "engine_busy_seconds_total") == 2.5
    assert value(registry, "model_info", model="tiny", model_sha256="ab", device="cpu") == 1
    metrics.figures = ReplicaFigures(values={"ready": 0.0})
    assert value(registry, "session_level", **labels) is None
    assert value(registry, "ready") == 0


def test_no_sessions_are_shown_where_none_are_wanted() -> None:
    metrics = LiveMetrics(most_sessions=0)
    metrics.figures = ReplicaFigures(sessions=(session(7, level=2.0),))
    assert value(metrics.registry, "session_level", **LABELS, session="7") is None


def test_a_traced_frame_is_an_exemplar_of_its_latency() -> None:
    metrics = LiveMetrics()
    metrics.stream("acme", "tiny", "newest").answered(FrameHeader(1, level=4), 10, 0.3, 0.001, "ab" * 16)
    assert f'# {{trace_id="{"ab" * 16}"}} 0.3' in generate_latest(metrics.registry).decode()


def test_application_figures_have_no_values_but_those_that_are_known() -> None:
    names = [metric.name for metric in application_metrics({"held_states": {(): 3.0}})]
    assert names == ["upriver_live_held_states"]


def test_names_are_those_of_prometheus() -> None:
    """Base units, and a suffix that says them; see prometheus.io/docs/practices/naming."""
    for family in (*FAMILIES, *APPLICATION_FAMILIES):
        assert not family.name.endswith(("_total", "_ms", "_us", "_mb")), family.name
        assert family.help.endswith("."), family.name
        assert bool(family.buckets) == (family.kind == "histogram"), family.name
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_counting_a_frame_costs_little() -> None:
    """Of the 15 ms that a frame may cost beside its model, two hundredths; a bound with room for a busy machine."""
    metrics = LiveMetrics()
    meter = metrics.stream("acme", "tiny", "newest")
    header = FrameHeader(1, level=4, decode_us=1000, queue_us=2000, step_us=3000, encode_us=4000)

    def once() -> float:
        began = time.perf_counter()
        for _ in range(2000):
            meter.received(100)
            meter.answered(header, 500, 0.02, 0.001)
        return (time.perf_counter() - began) / 2000

    assert min(once() for _ in range(5)) < 300e-6
