"""Replicas come and go with the load of streams, on a real Ray Serve, and no stream notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from infra.protocol import Hello
from tests.end_to_end.test_live_serve import RAW, Client, require_whole
from tests.live_cluster import LiveCluster, live_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEP_MS = 40
FPS = 8.0
"""A stream of these wants 0.32 of an engine's time, 0.36 of what a replica may promise: two fill one to 0.71."""
HELLO = Hello(width=32, height=24, fps=FPS, **RAW)  # type: ignore[arg-type]
SCALING = {"min_replicas": 1, "max_replicas": 3, "target_load": 0.7, "upscale_delay_s": 0, "downscale_delay_s": 3}


async def until_replicas(cluster: LiveCluster, right: Callable[[int], bool]) -> int:
    """Wait until as many replicas run, and none comes or goes; returns their number."""
    deadline = time.monotonic() + 60
    while True:
        states = [one["state"] for one in (await asyncio.to_thread(cluster.replicas)).values()]
        if set(states) == {"RUNNING"} and right(len(states)):
            return len(states)
        assert time.monotonic() < deadline, states
        await asyncio.sleep(0.2)


def test_replicas_follow_the_load_and_streams_notice_nothing() -> None:
    async def run(cluster: LiveCluster) -> list[Client]:
        clients: list[Client] = []
        tasks: list[asyncio.Task[None]] = []

        async def open_streams(count: int) -> None:
            more = [Client(cluster.url, HELLO, rate=FPS) for _ in range(count)]
            clients.extend(more)
            tasks.extend(asyncio.create_task(client.run()) for client in more)
            await asyncio.gather(*(client.running.wait() for client in more))

        await open_streams(1)
        assert await until_replicas(cluster, lambda n: n == 1) == 1
        # Two more than one replica takes: one is refused until a second replica is there, which its refusal calls for.
        await open_streams(2)
        grown = await until_replicas(cluster, lambda n: n > 1)
        assert grown in (2, 3)
        for client in clients[:2]:
            client.stop.set()
        await asyncio.gather(*tasks[:2])
        assert await until_replicas(cluster, lambda n: n == 1) == 1
        seen = len(clients[2].answers)
        while len(clients[2].answers) < seen + 10:
            await asyncio.sleep(0.05)
        clients[2].stop.set()
        await asyncio.gather(*tasks)
        return clients

    with live_cluster(haproxy=True) as cluster:
        cluster.deploy(models=[f"stand-in:{STEP_MS}"], autoscaling=SCALING)
        clients = asyncio.run(run(cluster))
    for client in clients:
        require_whole(client.answers)
        assert client.stream is not None and client.stream.restarts == 0
