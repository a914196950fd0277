"""Metrics and logs behind a real Ray Serve with two replicas: any of them shows both, and nothing goes back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text
from websockets.asyncio.client import connect

from infra.client import LiveStream
from infra.protocol import Hello, dump
from tests.object_stores import free_ports

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
HELLO = Hello(width=32, height=24, codec_in="raw", codec_out="raw")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Cluster:
    def __init__(self, port: int, logs: Path) -> None:
        self.http, self.url, self.logs = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}", logs

    def scrape(self) -> Samples:
        with urllib.request.urlopen(f"{self.http}/metrics", timeout=10) as answer:
            families = list(parse_text(answer.read().decode()))
        return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}

    def lines(self) -> list[dict[str, Any]]:
        """The lines of all replicas' files."""
        files = sorted((self.logs / "serve").glob("replica_*"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def cluster(repository: Path) -> Iterator[Cluster]:
    import os

    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.observed_cluster", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        logs = process.stdout.readline().strip()
        assert logs, "the cluster has not started"
        yield Cluster(port, Path(logs))
    finally:
        process.stdin.close()
        process.wait(60)


def replicas(samples: Samples) -> set[str]:
    return {dict(labels)["replica"] for name, labels in samples if name == "upriver_live_ready"}


async def both_shown(cluster: Cluster) -> Samples:
    async with asyncio.timeout(30):
        while len(replicas(samples := await asyncio.to_thread(cluster.scrape))) < 2:
            await asyncio.sleep(0.2)
    return samples


async def stream_frames(cluster: Cluster, count: int) -> None:
    picture = np.zeros((24, 32, 3), np.uint8)
    async with LiveStream(cluster.url, HELLO) as stream:
        for _ in range(count):
            await stream.send_picture(picture)
            await anext(stream)
        await stream.close()
        assert [answer async for answer in stream] == []


def test_any_replica_shows_all_and_no_counter_goes_back(cluster: Cluster) -> None:
    seen: list[Samples] = []

    async def run() -> None:
        seen.append(await both_shown(cluster))
        frames = [asyncio.create_task(stream_frames(cluster, 40)) for _ in range(4)]
        while not all(task.done() for task in frames) or len(seen) < 30:
            seen.append(await asyncio.to_thread(cluster.scrape))
        await asyncio.gather(*frames)
        name = "upriver_live_frames_answered_total"
        async with asyncio.timeout(30):
            while sum(value for (one, _), value in seen[-1].items() if one == name) < 160:
                await asyncio.sleep(0.3)
                seen.append(await asyncio.to_thread(cluster.scrape))

    asyncio.run(run())
    assert all(replicas(samples) == replicas(seen[0]) for samples in seen)
    counters = {key for samples in seen for key in samples if key[0].endswith(("_total", "_count", "_bucket"))}
    for key in counters:
        values = [samples[key] for samples in seen if key in samples]
        assert values == sorted(values), key
    frames = [value for (name, _), value in seen[-1].items() if name == "upriver_live_frames_answered_total"]
    assert sum(frames) == 160
    assert ("upriver_live_held_state_limit_bytes", frozenset()) in seen[-1]


def test_serves_own_lines_and_ours_are_in_one_file_and_one_format(cluster: Cluster) -> None:
    async def run() -> None:
        for _ in range(4):
            async with connect(cluster.url + "/v1/streams") as socket:
                await socket.send(dump(HELLO))
                await socket.recv()
                await socket.send(b"this is no frame")
                assert json.loads(await socket.recv())["kind"] == "BadMessage"
        async with asyncio.timeout(20):
            while sum("is refused" in line["message"] for line in cluster.lines()) < 4:
                await asyncio.sleep(0.2)

    asyncio.run(run())
    lines = cluster.lines()
    # What Serve says before it makes the replica is in its own JSON.
    others = [line for line in lines if not {"time", "level", "logger", "message", "replica"} <= set(line)]
    assert {line["message"] for line in others} == {"Started initializing replica."}
    refused = [line for line in lines if "is refused" in line["message"]]
    assert all(line["logger"] == "actors.live_connection" and line["tenant"] and line["session"] for line in refused)
    assert {line.get("logger") for line in lines} >= {"ray.serve", "actors.live_connection"}
