"""The live service on a real Ray Serve: hand-over by rolling updates, crashes, and what Serve does by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import Flag, Hello
from infra.refusals import AdmissionRefused
from tests.live_cluster import LiveCluster, live_cluster

RAW = {"codec_in": "raw", "codec_out": "raw"}
HELLO = Hello(width=32, height=24, **RAW)  # type: ignore[arg-type]


def picture(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (24, 32, 3), np.uint8)


def require_whole(answers: list[LiveAnswer], *, indexes: bool = True) -> None:
    """Nothing was lost, repeated or reordered, every picture is its frame's, and the stream's memory went along."""
    assert [answer.id for answer in answers] == list(range(len(answers)))
    for answer in answers:
        assert answer.dropped is None
        assert (answer.picture()[::4, ::4] == picture(answer.id)).all()
    if indexes:
        assert [answer.header.index for answer in answers] == list(range(len(answers)))


@pytest.fixture(scope="module", params=["haproxy", pytest.param("python", marks=pytest.mark.slow)])
def cluster(request: pytest.FixtureRequest) -> Iterator[LiveCluster]:
    """Both ingresses of Serve; HAProxy is what `upriver serve` uses."""
    with live_cluster(haproxy=request.param == "haproxy") as running:
        yield running


class Client:
    """A stream that sends at a steady rate until it is told to stop."""

    def __init__(self, url: str, hello: Hello = HELLO, rate: float = 20.0) -> None:
        self.url, self.hello, self.rate = url, hello, rate
        self.answers: list[LiveAnswer] = []
        self.arrived: list[float] = []
        self.stop = asyncio.Event()
        self.running = asyncio.Event()
        self.stream: LiveStream | None = None

    async def run(self) -> None:
        async with LiveStream(self.url, self.hello) as stream:
            self.stream = stream

            async def send() -> None:
                number = 0
                while not self.stop.is_set():
                    await stream.send_picture(picture(number))
                    number += 1
                    await asyncio.sleep(1 / self.rate)
                await stream.close()

            sending = asyncio.create_task(send())
            async for answer in stream:
                self.answers.append(answer)
                self.arrived.append(time.monotonic())
                if len(self.answers) >= 10:
                    self.running.set()
            await sending

    def longest_gap_s(self) -> float:
        return max(b - a for a, b in zip(self.arrived, self.arrived[1:], strict=False))


async def with_clients(url: str, count: int, event: Any) -> list[Client]:
    """Run streams, let `event` happen in the middle of them, and let them go on for a while."""
    clients = [Client(url) for _ in range(count)]
    tasks = [asyncio.create_task(client.run()) for client in clients]
    await asyncio.gather(*(client.running.wait() for client in clients))
    await event(clients)
    marks = [len(client.answers) for client in clients]
    for client, mark in zip(clients, marks, strict=True):
        while len(client.answers) < mark + 20:
            await asyncio.sleep(0.05)
        client.stop.set()
    await asyncio.gather(*tasks)
    return clients


def test_a_rolling_update_loses_nothing(cluster: LiveCluster) -> None:
    cluster.deploy(models=["stand-in:5"], replicas=1)

    async def event(clients: list[Client]) -> None:
        await asyncio.to_thread(cluster.deploy, models=["stand-in:5"], replicas=1, window=15)
        while not all(client.stream and client.stream.hand_overs for client in clients):
            await asyncio.sleep(0.05)

    clients = asyncio.run(with_clients(cluster.url, 4, event))
    for client in clients:
        require_whole(client.answers)
        assert client.stream is not None and client.stream.hand_overs >= 1 and client.stream.restarts == 0
        assert any(Flag.RESUMED in answer.header.flags for answer in client.answers)
    print("longest gap", [round(client.longest_gap_s(), 2) for client in clients])
    assert (
        max(client.longest_gap_s() for client in clients) < 5.0
    )  # starting a replica takes longer: that was waited for


def test_a_killed_replica_costs_a_moment(cluster: LiveCluster) -> None:
    """SIGKILL, with a warm spare: streams go on from their last durable state; clients send the rest again."""
    cluster.deploy(models=["stand-in:5"], replicas=2, state_interval_s=0.5)

    async def event(clients: list[Client]) -> None:
        replicas = await asyncio.to_thread(cluster.replicas)
        running = [one["pid"] for one in replicas.values() if one["state"] == "RUNNING"]
        assert len(running) == 2
        os.kill(running[0], signal.SIGKILL)

    clients = asyncio.run(with_clients(cluster.url, 4, event))
    for client in clients:
        require_whole(client.answers)
    moved = [client for client in clients if client.stream and client.stream.hand_overs]
    print("moved", len(moved), "longest gap", [round(client.longest_gap_s(), 2) for client in clients])
    assert moved
    assert max(client.longest_gap_s() for client in clients) <= 2.0


@pytest.mark.slow
def test_scaling_down_hands_over(cluster: LiveCluster) -> None:
    cluster.deploy(models=["stand-in:5"], replicas=2)

    async def event(clients: list[Client]) -> None:
        await asyncio.to_thread(cluster.deploy, models=["stand-in:5"], replicas=1)

    clients = asyncio.run(with_clients(cluster.url, 4, event))
    for client in clients:
        require_whole(client.answers)


def test_deleting_tells_clients_where_they_are(cluster: LiveCluster) -> None:
    """Nobody is left to go on: raw clients get `drain, resume at N` and close code 1012."""
    import json

    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    from infra.protocol import FrameHeader, dump

    cluster.deploy(models=["stand-in:5"], replicas=1)

    async def run() -> None:
        async with connect(cluster.url + "/v1/streams") as socket:
            await socket.send(dump(HELLO))
            await socket.recv()
            for number in range(3):
                await socket.send(FrameHeader(number).pack(picture(number).tobytes()))
                await socket.recv()
            await asyncio.to_thread(cluster.order, "delete")
            messages = []
            try:
                while True:
                    messages.append(await socket.recv())
            except ConnectionClosed as closed:
                assert closed.rcvd is not None and closed.rcvd.code == 1012
            last = json.loads(messages[-1])
            assert (last["type"], last["resume_at"]) == ("drain", 3)

    asyncio.run(run())


def test_a_full_service_says_so(cluster: LiveCluster) -> None:
    """Not HTTP 500, which is what Serve makes of a WebSocket that is refused before it is accepted."""
    cluster.deploy(models=["stand-in:5"], replicas=1, sessions=1)

    async def run() -> None:
        async with LiveStream(cluster.url, HELLO) as first:
            await first.send_picture(picture(0))
            await anext(first)
            with pytest.raises(AdmissionRefused, match="1 streams"):
                async with LiveStream(cluster.url, HELLO, give_up_s=0.5):
                    pass

    asyncio.run(run())


@pytest.mark.slow
def test_grpc_carries_the_same_streams(cluster: LiveCluster) -> None:
    """Rolled over in the middle, and with a frame that is too large for a WebSocket."""
    cluster.deploy(models=["stand-in:5"], replicas=1, greatest_side=3000, limits={"pixels_per_second": 10**9})

    async def large() -> None:
        hello = Hello(width=2560, height=2200, codec_in="raw", codec_out="jpeg", scale=2, cuts=False)
        async with LiveStream(cluster.grpc_url, hello) as stream:
            await stream.send(bytes(2560 * 2200 * 3))
            answer = await anext(stream)
            assert answer.dropped is None and answer.payload

    async def event(clients: list[Client]) -> None:
        await asyncio.to_thread(cluster.deploy, models=["stand-in:5"], replicas=1, window=15)
        while not all(client.stream and client.stream.hand_overs for client in clients):
            await asyncio.sleep(0.05)

    asyncio.run(large())
    for client in asyncio.run(with_clients(cluster.grpc_url, 2, event)):
        require_whole(client.answers)


def test_another_model_comes_without_closing_streams(cluster: LiveCluster) -> None:
    cluster.deploy(models=["stand-in:5"], replicas=1)

    async def event(clients: list[Client]) -> None:
        await asyncio.to_thread(cluster.deploy, models=["stand-in:6", "stand-in:5"], replicas=1)

    before = cluster.replicas()
    clients = asyncio.run(with_clients(cluster.url, 2, event))
    assert set(cluster.replicas()) == set(before)  # the same replica
    for client in clients:
        require_whole(client.answers)
        assert client.stream is not None and client.stream.hand_overs == 0
