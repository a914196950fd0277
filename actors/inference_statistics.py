"""What a predictor has done, model by model: as Triton's statistics extension shows it, and as Prometheus metrics.

Times are those that the live service measured for each frame. Source: Triton's `extension_statistics`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from infra.protocol import FrameHeader

_NS_PER_US: Final = 1000
_BUCKETS_S: Final = (0.002, 0.005, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DURATIONS: Final = (
    "success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss",
)  # fmt: skip


@dataclass(slots=True)
class Duration:
    """How often something was done, and for how many nanoseconds altogether."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count it."""
        self.count += count
        self.ns += ns


@dataclass(slots=True)
class ModelStatistics:
    """Of one model.

    Attributes:
        inferences: frames. executions: requests. last_ms: milliseconds since 1970 when the last one came.
    """

    inferences: int = 0
    executions: int = 0
    last_ms: int = 0
    durations: dict[str, Duration] = field(default_factory=lambda: {name: Duration() for name in DURATIONS})

    def succeeded(self, ns: int, headers: Iterable[FrameHeader]) -> None:
        """Count a request that was answered after `ns` nanoseconds, by the headers of its answers."""
        frames = list(headers)
        self.inferences += len(frames)
        self.executions += 1
        self.durations["success"].add(ns)
        for name, us in (
            ("queue", sum(header.queue_us for header in frames)),
            ("compute_input", sum(header.decode_us for header in frames)),
            ("compute_infer", sum(header.step_us for header in frames)),
            ("compute_output", sum(header.encode_us for header in frames)),
        ):
            self.durations[name].add(us * _NS_PER_US, len(frames))

    def as_json(self, name: str, version: str) -> dict[str, Any]:
        """Return what REST shows."""
        stats = {what: {"count": one.count, "ns": one.ns} for what, one in self.durations.items()}
        return {
            "name": name,
            "version": version,
            "last_inference": self.last_ms,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": stats,
            "batch_stats": [],
            "memory_usage": [],
        }


class InferenceStatistics:
    """Of all models of a predictor."""

    def __init__(self) -> None:
        self.models: dict[str, ModelStatistics] = {}
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "upriver_predictor_requests",
            "Requests, by how they ended: ok, or the code of the refusal.",
            ("model", "transport", "code"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "upriver_predictor_request_seconds",
            "From a request that has been read to its answer.",
            ("model", "transport"),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )

    def of(self, model: str) -> ModelStatistics:
        """Return what is counted for a model that exists."""
        return self.models.setdefault(model, ModelStatistics())

    def count(self, model: str, transport: str, code: str, began_s: float, headers: Iterable[FrameHeader] = ()) -> None:
        """Count a request.

        Args:
            model: one that exists; others are not counted by name, because callers choose them.
            began_s: by `time.perf_counter`.
        """
        took_s = time.perf_counter() - began_s
        statistics = self.of(model)
        statistics.last_ms = round(1000 * time.time())
        if code == "ok":
            statistics.succeeded(round(1e9 * took_s), headers)
        else:
            statistics.durations["fail"].add(round(1e9 * took_s))
        self._requests.labels(model, transport, code).inc()
        self._seconds.labels(model, transport).observe(took_s)

    def page(self, *, sequences: int, under_way: int, ended: dict[str, int]) -> bytes:
        """Return the metrics as Prometheus text."""

        class Now:
            def collect(self) -> Iterable[GaugeMetricFamily]:
                for name, what, value in (
                    ("sequences", "Sequences that are open.", sequences),
                    ("requests_under_way", "Requests that have no answer yet.", under_way),
                ):
                    yield GaugeMetricFamily(f"upriver_predictor_{name}", what, value=value)
                family = GaugeMetricFamily(
                    "upriver_predictor_sequences_ended", "Sequences that have ended, by how.", labels=["how"]
                )
                for how, count in ended.items():
                    family.add_metric([how], count)
                yield family

        registry = CollectorRegistry(auto_describe=False)
        registry.register(Now())  # a collector by its method alone
        return generate_latest(self._registry) + generate_latest(registry)
