"""The head node dies under live streams, and comes back from Redis: what survives, on real processes.

docs/operations/head_failure.md says what is measured here.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.client import LiveStream
from tests.end_to_end.test_live_serve import HELLO, Client, picture, require_whole
from tests.object_stores import free_ports
from tests.ray_cluster import ROOT, RayCluster, ray_cluster
from tests.redis_server import needs_redis, redis_server

pytestmark = [needs_redis, pytest.mark.slow, pytest.mark.timeout(400)]

DOWN_S = 8.0
WORKER_PORT = "RAY_SERVE_WORKER_PROXY_HTTP_PORT"
PROXY_PORTS = ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT")
ARGUMENTS = {
    "replicas": 2,
    "num_cpus": 0.5,
    "live": {"models": ["stand-in:5"], "state_interval_s": 0.5},
    "engine": {"threads": 1},
}


@pytest.fixture
def cluster_and_port(tmp_path: Path) -> Iterator[tuple[RayCluster, int]]:
    """A head without processors, whose memory is in Redis, a worker with four, and the port of the worker's proxy."""
    (tmp_path / "redis").mkdir()
    (tmp_path / "cluster").mkdir()
    with redis_server(tmp_path / "redis") as redis:
        variables = {
            "RAY_REDIS_ADDRESS": redis.address,
            "RAY_REDIS_PASSWORD": redis.password,
            "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
        }
        # One machine has each port once: the head's proxies, and the worker's.
        names = ("RAY_SERVE_FALLBACK_PROXY_HTTP_PORT", "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT", *PROXY_PORTS)
        variables |= dict(zip(names, map(str, free_ports(len(names))), strict=True))
        own = dict(zip((WORKER_PORT, *PROXY_PORTS), map(str, free_ports(3)), strict=True))
        with ray_cluster(tmp_path / "cluster", cpus=0, redis_password=redis.password, **variables) as made:
            made.add_node("worker", cpus=4, code=ROOT, **own)
            yield made, int(own[WORKER_PORT])


def ask(cluster: RayCluster, *arguments: str) -> str:
    with cluster._started(
        [sys.executable, "-m", "tests.serve_on_cluster", *arguments], {"RAY_ADDRESS": cluster.address}
    ) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stdout


async def one_frame(url: str) -> float:
    """Open a stream, have a frame restored; returns the seconds it took."""
    began = time.monotonic()
    async with LiveStream(url, HELLO) as stream:
        await stream.send_picture(picture(0))
        assert (await anext(stream)).id == 0
    return time.monotonic() - began


def test_streams_go_on_without_a_head_and_it_comes_back(cluster_and_port: tuple[RayCluster, int]) -> None:
    cluster, port = cluster_and_port
    url = f"ws://127.0.0.1:{port}"
    ask(cluster, "deploy", str(free_ports(1)[0]), json.dumps(ARGUMENTS))

    async def run() -> tuple[list[Client], dict[str, float]]:
        measured: dict[str, float] = {}
        clients = [Client(url) for _ in range(3)]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        await asyncio.gather(*(client.running.wait() for client in clients))
        await asyncio.to_thread(cluster.head.kill)
        measured["new stream without a head"] = await one_frame(url)
        seen = [len(client.answers) for client in clients]
        await asyncio.sleep(DOWN_S)  # time without a head is what is tried here
        assert all(len(client.answers) > before + DOWN_S * 5 for client, before in zip(clients, seen, strict=True))
        measured["longest gap without a head"] = max(client.longest_gap_s() for client in clients)

        began = time.monotonic()
        await asyncio.to_thread(cluster.start_head)
        measured["head started"] = time.monotonic() - began
        replicas = json.loads(await asyncio.to_thread(ask, cluster, "replicas"))
        measured["Serve answers"] = time.monotonic() - began
        assert {one["state"] for one in replicas.values()} <= {"RUNNING", "RECOVERING"} and len(replicas) == 2
        assert all(client.stream and client.stream.hand_overs == 0 for client in clients)
        measured["new stream"] = await one_frame(url)

        before = len(clients[0].answers)
        while len(clients[0].answers) < before + 20:
            await asyncio.sleep(0.05)
        pids = await asyncio.to_thread(replica_pids)
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            while (
                len([one for one in json.loads(await asyncio.to_thread(ask, cluster, "replicas")).values()
                     if one["state"] == "RUNNING"]) < 2
            ):  # fmt: skip
                await asyncio.sleep(0.2)
        for client in clients:
            client.stop.set()
        await asyncio.gather(*tasks)
        return clients, measured

    def replica_pids() -> list[int]:
        """Return the replicas' processes, by the numbers that they have here."""
        import psutil

        (node,) = cluster.nodes
        family = psutil.Process(node.process.pid).children(recursive=True)
        return [one.pid for one in family if one.name().startswith("ray::ServeRepl")]

    clients, measured = asyncio.run(run())
    print({what: round(value, 2) for what, value in measured.items()})
    for client in clients:
        require_whole(client.answers)
        assert client.stream is not None and client.stream.restarts == 0
    assert sum(client.stream.hand_overs for client in clients if client.stream) >= 3  # by the replicas' deaths
