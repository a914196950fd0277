"""From the metrics of several replicas to one page for Prometheus.

A replica packs its metrics into bytes, a board keeps the latest of each replica, and whoever is asked merges them. All
values that are shown come from the board, the own ones too: so a counter of a replica never goes back, whichever
replica answers which scrape (Prometheus takes a counter that goes back for a restart). Knows no Ray, no web framework.
"""

from __future__ import annotations

import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Exemplar, Metric, Sample
from prometheus_client.openmetrics import exposition as openmetrics

POST_EVERY_S: Final = 5.0
STALE_S: Final = 20.0  # a replica that has not been heard of for so long is gone
_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"


def pack(registry: CollectorRegistry) -> bytes:
    """Return all metrics of a registry as compressed JSON, which replicas of two versions of the program understand."""
    families = [
        (
            metric.name,
            metric.documentation,
            metric.type,
            metric.unit,
            [
                (sample.name, sample.labels, sample.value, list(sample.exemplar) if sample.exemplar else None)
                for sample in metric.samples
                if not sample.name.endswith("_created")  # a series more for each counter, and of no use here
            ],
        )
        for metric in registry.collect()
    ]
    return zlib.compress(json.dumps(families, separators=(",", ":")).encode(), 1)


def unpack(packed: bytes) -> list[Metric]:
    """Return what `pack` packed."""
    metrics = []
    for name, documentation, kind, unit, samples in json.loads(zlib.decompress(packed)):
        metric = Metric(name, documentation, kind, unit)
        metric.samples = [
            Sample(sample, labels, value, None, Exemplar(*exemplar) if exemplar else None)
            for sample, labels, value, exemplar in samples
        ]
        metrics.append(metric)
    return metrics


def merge(replicas: Mapping[str, Iterable[Metric]]) -> list[Metric]:
    """Return the metrics of several replicas as one list of families, each sample with the label `replica`."""
    families: dict[str, Metric] = {}
    for replica, metrics in replicas.items():
        for metric in metrics:
            family = families.get(metric.name)
            if family is None:
                family = families[metric.name] = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            if family.type != metric.type:  # of another version of the program: one name cannot be two things
                continue
            family.samples += [
                sample._replace(labels=sample.labels | {"replica": replica}) for sample in metric.samples
            ]
    return list(families.values())


@dataclass(frozen=True, slots=True)
class Page:
    """An answer to a scrape. `encoding`: `gzip`, or empty."""

    body: bytes
    content_type: str
    encoding: str = ""


def render(metrics: Iterable[Metric], accept: str = "", accept_encoding: str = "") -> Page:
    """Return the metrics as text, in the format that the scraper likes best.

    Args:
        accept, accept_encoding: the request's headers. OpenMetrics 1.0 goes only to those that ask for it, because only
            they understand exemplars; all others get the Prometheus text format 0.0.4.
    """
    collected = _Collected(list(metrics))
    if _weight(accept, "application/openmetrics-text") > _weight(accept, "text/plain"):
        body, content_type = openmetrics.generate_latest(collected), openmetrics.CONTENT_TYPE_LATEST
    else:
        body, content_type = generate_latest(collected), _TEXT
    if _weight(accept_encoding, "gzip") > 0:
        return Page(gzip.compress(body, 1), content_type, "gzip")
    return Page(body, content_type)


class ScrapeBoard:
    """The latest metrics of each replica. Not for several threads.

    Args:
        stale_s: a replica that posts nothing for so long is forgotten.
    """

    def __init__(self, *, stale_s: float = STALE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._stale_s, self._clock = stale_s, clock
        self._posts: dict[str, tuple[int, float, bytes]] = {}

    def post(self, replica: str, number: int, packed: bytes) -> None:
        """Put up a replica's metrics.

        Args:
            number: grows from post to post; an older one that comes late is not put up.
        """
        known = self._posts.get(replica)
        if known is None or number > known[0]:
            self._posts[replica] = (number, self._clock(), packed)

    def read(self) -> dict[str, tuple[float, bytes]]:
        """Return by replica how old its metrics are, in seconds, and the metrics."""
        now = self._clock()
        self._posts = {name: post for name, post in self._posts.items() if now - post[1] <= self._stale_s}
        return {name: (now - when, packed) for name, (_, when, packed) in self._posts.items()}


class _Collected:
    """What has been collected before, as a registry."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _weight(header: str, wanted: str) -> float:
    """Return the quality of a value in an Accept header (RFC 9110, section 12.4.2), 0 where it is not named."""
    best = 0.0
    for entry in header.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        if name == wanted:
            best = max(best, _quality(parameters))
    return best


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0
