"""What the live service counts and measures, as Prometheus metrics: every family, and where a frame enters them.

One registry a replica. Labels are bounded: tenants, models and codes by number, sessions by showing the newest only,
and only in what is read from the sessions when somebody asks, so that it goes when the session goes. Knows no session
and no web framework; `infra.exposition` makes text of it, docs/live/observability.md has the table.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from infra.protocol import DropReason, Flag, FrameHeader

Kind = Literal["counter", "gauge", "histogram"]

LATENCY_BUCKETS_S: Final = (
    0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0,
)  # fmt: skip
STAGE_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0, 10.0)
SAVE_BUCKETS_S: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BATCH_BUCKETS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
STAGES: Final = ("decode", "wait", "step", "encode", "send")
MOST_TENANTS: Final = 100
MOST_SESSIONS: Final = 50
OTHER: Final = "other"  # what a label says of values beyond its bound
_MOST_MODELS: Final = 32
_MOST_CODES: Final = 100

_PREFIX: Final = "upriver_live_"
_STREAM: Final = ("tenant", "model", "policy")
_SESSION: Final = ("session", "tenant", "model", "policy")


@dataclass(frozen=True, slots=True)
class Family:
    """One family of metrics.

    Attributes:
        name: without `upriver_live_`, and without the `_total` of counters.
        live: read from the replica when somebody asks; the others are counted as things happen.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: Sequence[float] = ()
    live: bool = False

    @property
    def shown_name(self) -> str:
        """As queries name it; histograms without `_bucket`, `_sum`, `_count`."""
        return f"{_PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


FAMILIES: Final = (
    Family("frames_received", "counter", "Frames that came.", _STREAM),
    Family("frames_answered", "counter", "Frames answered by a picture, by denoising steps.", (*_STREAM, "level")),
    Family("frames_dropped", "counter", "Frames answered without a picture, by reason.", (*_STREAM, "reason")),
    Family("frames_replayed", "counter", "Frames sent again after a hand-off: the state needs them.", ("model",)),
    Family("received_bytes", "counter", "Bytes of frames that came, headers included.", ("tenant",)),
    Family("sent_bytes", "counter", "Bytes of answers, headers included.", ("tenant",)),
    Family("resets", "counter", "Frames restored without memory: first ones, cuts, other sizes.", ("model",)),
    Family(
        "frame_latency_seconds",
        "histogram",
        "From a frame's arrival until its answer was sent; frames with a picture only.",
        _STREAM,
        LATENCY_BUCKETS_S,
    ),
    Family(
        "stage_seconds",
        "histogram",
        "What a frame with a picture spent at each station.",
        ("stage", "model"),
        STAGE_BUCKETS_S,
    ),
    Family("step_seconds", "histogram", "What a batch took in the engine.", ("model",), STAGE_BUCKETS_S),
    Family("batch_frames", "histogram", "Frames that shared a batch.", ("model",), BATCH_BUCKETS),
    Family("engine_busy_seconds", "counter", "Time in which the engine computed.", live=True),
    Family("streams_opened", "counter", "Streams that were let in, resumed ones included.", _STREAM),
    Family(
        "streams_ended",
        "counter",
        "Streams that ended here: closed, connection lost, handed over, refused.",
        ("model", "how"),
    ),
    Family("refusals", "counter", "Refusals, of streams before and after they were opened.", ("kind", "code")),
    Family(
        "hand_offs",
        "counter",
        "Streams handed out to another replica, resumed here, or not resumed because their state was lost.",
        ("outcome",),
    ),
    Family("state_saves", "counter", "Snapshots of streams' states that were saved, or not.", ("outcome",)),
    Family("state_save_seconds", "histogram", "What a snapshot took, from copy to keeper.", (), SAVE_BUCKETS_S),
    Family("state_saved_bytes", "counter", "Bytes of saved snapshots."),
    Family("ready", "gauge", "1 where models are loaded and new streams are taken, else 0.", live=True),
    Family("draining", "gauge", "1 where streams are handed over because the replica goes, else 0.", live=True),
    Family("streams", "gauge", "Streams by state of life.", ("state",), live=True),
    Family("streams_limit", "gauge", "Streams that the replica takes at most.", live=True),
    Family("streams_by_level", "gauge", "Streams by the level that their next frame gets.", ("level",), live=True),
    Family("waiting_frames", "gauge", "Frames that wait to be restored.", live=True),
    Family("outstanding_frames", "gauge", "Frames that came and whose answers are not acknowledged.", live=True),
    Family("promised_load_ratio", "gauge", "Share of the engine's time that is promised to streams.", live=True),
    Family("promised_load_limit_ratio", "gauge", "Share of the engine's time that may be promised.", live=True),
    Family("model_info", "gauge", "1 for each loaded model.", ("model", "model_sha256", "device"), live=True),
    Family("gpu_memory_bytes", "gauge", "Memory of the GPU: allocated, reserved, free, total.", ("kind",), live=True),
    Family("session_level", "gauge", "Denoising steps that the session's next frame gets.", _SESSION, live=True),
    Family("session_latency_seconds", "gauge", "Latency of the session's last answer.", _SESSION, live=True),
    Family("session_waiting_frames", "gauge", "Frames of the session that wait.", _SESSION, live=True),
    Family("session_age_seconds", "gauge", "Since the session was opened here.", _SESSION, live=True),
    Family("session_state_bytes", "gauge", "The session's last snapshot.", _SESSION, live=True),
    Family("session_hand_offs", "gauge", "How often the session was handed over.", _SESSION, live=True),
    Family("session_frames_received", "counter", "Frames of the session that came here.", _SESSION, live=True),
    Family("session_frames_answered", "counter", "Of these, answered by a picture.", _SESSION, live=True),
    Family("session_frames_dropped", "counter", "Of these, answered without one.", _SESSION, live=True),
)  # fmt: skip
# Of the application as a whole: without the label `replica` that all others get when they are shown.
APPLICATION_FAMILIES: Final = (
    Family("held_states", "gauge", "Streams whose state is kept, whether they have a replica or not.", live=True),
    Family("held_state_bytes", "gauge", "Bytes of all kept states.", live=True),
    Family("held_state_limit_bytes", "gauge", "Bytes of states that are kept at most.", live=True),
    Family("figures_age_seconds", "gauge", "How old a replica's figures are on this page.", ("replica",), live=True),
)


@dataclass(frozen=True, slots=True)
class SessionFigures:
    """One session as it is now. `values`: by family, without its `session_`."""

    session: str
    tenant: str
    model: str
    policy: str
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class ReplicaFigures:
    """A replica as it is now.

    Attributes:
        values: families without labels. by_label: families with one label, by its value.
        models: name, fingerprint and device. sessions: oldest first.
    """

    values: dict[str, float] = field(default_factory=dict)
    by_label: dict[str, dict[str, float]] = field(default_factory=dict)
    models: tuple[tuple[str, str, str], ...] = ()
    sessions: tuple[SessionFigures, ...] = ()


class LiveMetrics:
    """The metrics of one replica. Counting is for any thread.

    Args:
        most_tenants: so many have label values of their own, first come, first served.
        most_sessions: so many, the newest, have gauges of their own.

    Attributes:
        figures: what is read from the replica before each collection.
    """

    def __init__(self, *, most_tenants: int = MOST_TENANTS, most_sessions: int = MOST_SESSIONS) -> None:
        self.registry = CollectorRegistry()
        self.figures = ReplicaFigures()
        self.most_sessions = most_sessions
        self._tenant = _Bounded(most_tenants)
        self._model, self._code = _Bounded(_MOST_MODELS), _Bounded(_MOST_CODES)
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for family in FAMILIES:
            name = _PREFIX + family.name
            if family.live:
                continue
            if family.kind == "counter":
                self._counters[family.name] = Counter(name, family.help, family.labels, registry=self.registry)
            else:
                self._histograms[family.name] = Histogram(
                    name, family.help, family.labels, registry=self.registry, buckets=family.buckets
                )
        for outcome in ("out", "resumed", "lost"):  # present from the start, so that a first one is an increase
            self._counters["hand_offs"].labels(outcome)
        for outcome in ("saved", "failed"):
            self._counters["state_saves"].labels(outcome)
        self.registry.register(_Live(self))
        ProcessCollector(registry=self.registry)

    def stream(self, tenant: str, model: str, policy: str) -> StreamMeter:
        """Return where the frames of a stream are counted; the stream itself counts as opened."""
        tenant, model = self._tenant(tenant), self._model(model)
        self._counters["streams_opened"].labels(tenant, model, policy).inc()
        return StreamMeter(self._counters, self._histograms, tenant, model, policy)

    def batch(self, model: str, frames: int, seconds: float) -> None:
        """Count a batch that was stepped."""
        model = self._model(model)
        self._histograms["batch_frames"].labels(model).observe(frames)
        self._histograms["step_seconds"].labels(model).observe(seconds)

    def refused(self, kind: str, code: str) -> None:
        """Count a refusal: its class and its code."""
        self._counters["refusals"].labels(kind, self._code(code)).inc()

    def handed_off(self, outcome: Literal["out", "resumed", "lost"]) -> None:
        """Count a stream that went, came, or could not come because its state was lost."""
        self._counters["hand_offs"].labels(outcome).inc()

    def saved(self, size_bytes: int, seconds: float) -> None:
        """Count a snapshot that is safe."""
        self._counters["state_saves"].labels("saved").inc()
        self._counters["state_saved_bytes"].inc(size_bytes)
        self._histograms["state_save_seconds"].observe(seconds)

    def not_saved(self) -> None:
        """Count a snapshot that could not be saved."""
        self._counters["state_saves"].labels("failed").inc()

    def live_families(self) -> Iterable[Metric]:
        """Yield the families that are read from `figures`."""
        figures = self.figures
        for family in FAMILIES:
            if not family.live:
                continue
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(_PREFIX + family.name, family.help, labels=family.labels)
            if family.name == "model_info":
                for card in figures.models:
                    metric.add_metric(card, 1)
            elif family.labels == _SESSION:
                for one in figures.sessions[-self.most_sessions :] if self.most_sessions else ():
                    labels = (one.session, self._tenant(one.tenant), self._model(one.model), one.policy)
                    value = one.values.get(family.name.removeprefix("session_"))
                    if value is not None:
                        metric.add_metric(labels, value)
            elif family.labels:
                for label, value in figures.by_label.get(family.name, {}).items():
                    metric.add_metric((label,), value)
            elif family.name in figures.values:
                metric.add_metric((), figures.values[family.name])
            yield metric


def application_metrics(values: Mapping[str, Mapping[tuple[str, ...], float]]) -> list[Metric]:
    """Return `APPLICATION_FAMILIES` with their values, by family and label values; those without one are left out."""
    metrics: list[Metric] = []
    for family in APPLICATION_FAMILIES:
        if family.name in values:
            metric = GaugeMetricFamily(_PREFIX + family.name, family.help, labels=family.labels)
            for labels, value in values[family.name].items():
                metric.add_metric(labels, value)
            metrics.append(metric)
    return metrics


class StreamMeter:
    """Where one stream's frames are counted; its metrics are looked up once, not for every frame."""

    def __init__(
        self, counters: dict[str, Counter], histograms: dict[str, Histogram], tenant: str, model: str, policy: str
    ) -> None:
        labels = (tenant, model, policy)
        self._labels, self._model, self._counters = labels, model, counters
        self._received = counters["frames_received"].labels(*labels)
        self._received_bytes = counters["received_bytes"].labels(tenant)
        self._sent_bytes = counters["sent_bytes"].labels(tenant)
        self._latency = histograms["frame_latency_seconds"].labels(*labels)
        self._stages = [histograms["stage_seconds"].labels(stage, model) for stage in STAGES]
        self._levels: dict[int, Counter] = {}
        # Looked up at once, so that they are there, as 0, before anything happens.
        self._replayed, self._resets = (counters[name].labels(model) for name in ("frames_replayed", "resets"))

    def received(self, size_bytes: int) -> None:
        """Count a frame that came."""
        self._received.inc()
        self._received_bytes.inc(size_bytes)

    def replayed(self) -> None:
        """Count a frame that was sent again and gets no answer."""
        self._replayed.inc()

    def answered(
        self, header: FrameHeader, size_bytes: int, latency_s: float, send_s: float, trace_id: str | None = None
    ) -> None:
        """Count an answer that was sent.

        Args:
            latency_s: since the frame came. send_s: of that, since it was encoded.
            trace_id: where the frame's way was traced; becomes an exemplar of its latency.
        """
        self._sent_bytes.inc(size_bytes)
        if header.reason is not DropReason.NONE:
            self._counters["frames_dropped"].labels(*self._labels, header.reason.name.lower()).inc()
            return
        answered = self._levels.get(header.level)
        if answered is None:
            answered = self._counters["frames_answered"].labels(*self._labels, header.level)
            self._levels[header.level] = answered
        answered.inc()
        self._latency.observe(latency_s, None if trace_id is None else {"trace_id": trace_id})
        times_us = (header.decode_us, header.queue_us, header.step_us, header.encode_us)
        for stage, us in zip(self._stages, times_us, strict=False):
            stage.observe(us * 1e-6)
        self._stages[-1].observe(send_s)
        if Flag.RESET in header.flags:
            self._resets.inc()

    def ended(self, how: Literal["closed", "lost", "handed_over", "refused"]) -> None:
        """Count the end of the stream on this replica."""
        self._counters["streams_ended"].labels(self._model, how).inc()


class _Live:
    """Collects what is read from the replica."""

    def __init__(self, metrics: LiveMetrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        return self._metrics.live_families()

    def collect(self) -> Iterable[Metric]:
        return self._metrics.live_families()


class _Bounded:
    """Lets so many values of a label through as they are; those that come later are one."""

    def __init__(self, most: int) -> None:
        self._most, self._known, self._lock = most, set[str](), threading.Lock()

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        with self._lock:
            if len(self._known) < self._most:
                self._known.add(value)
        return value if value in self._known else OTHER
