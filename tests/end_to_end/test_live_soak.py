"""Ten minutes of everything at once: streams of all policies that join, leave, stall, talk garbage and are killed.

Nothing may leak, no stream may see another's pictures, and every refusal is one of the typed ones.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from actors.replay import LogEntry, replay
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import Deadline, Hello, Lossless, Newest, dump
from infra.refusals import Refusal
from pipeline.engine import open_engine
from tests.live_cluster import LiveCluster, live_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SECONDS = float(os.environ.get("UPRIVER_SOAK_SECONDS", "600"))
SIZE = (48, 32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LiveCluster]:
    with live_cluster() as running:
        running.deploy(models=["tiny"], replicas=2, state_interval_s=0.5, idle_timeout_s=5.0, threads=1)
        yield running


def picture(seed: int, number: int) -> np.ndarray[Any, Any]:
    """A scene of its own for each stream, moving, with a cut now and then."""
    width, height = SIZE
    scene = np.random.default_rng(1000 * seed + number // 40)
    cells = scene.integers(0, 256, (height // 4, width // 4, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return np.ascontiguousarray(np.roll(cells, number % 40, axis=1))


class Actor:
    """One client after another, with moods."""

    def __init__(self, url: str, number: int, over: float) -> None:
        self.url, self.over = url, over
        self.mood = random.Random(number)
        self.number = number
        self.checked = self.streams = self.refused = 0
        self.problems: list[str] = []

    async def run(self) -> None:
        while time.monotonic() < self.over:
            self.streams += 1
            try:
                if self.mood.random() < 0.2:
                    await self.talk_garbage()
                else:
                    await self.restore()
            except Refusal as refusal:
                self.refused += 1
                if type(refusal) is Refusal or not refusal.remedy:
                    self.problems.append(f"untyped refusal {refusal!r}")
            except (OSError, ConnectionClosed) as error:
                self.problems.append(f"{type(error).__name__}: {error}")

    async def restore(self) -> None:
        seed = self.mood.randrange(1 << 30)
        policy = self.mood.choice([Lossless(), Newest(), Deadline(ms=400, late="resize")])
        hello = Hello(width=SIZE[0], height=SIZE[1], codec_in="raw", codec_out="raw", policy=policy, seed=seed)
        frames = self.mood.randrange(10, 120)
        answers: list[LiveAnswer] = []
        async with LiveStream(self.url, hello) as stream:

            async def send() -> None:
                for number in range(frames):
                    await stream.send_picture(picture(seed, number))
                    if self.mood.random() < 0.02:
                        await asyncio.sleep(self.mood.uniform(0, 1.5))  # a stall
                    await asyncio.sleep(self.mood.uniform(0, 0.1))
                await stream.close()

            sending = asyncio.create_task(send())
            leaves_at = frames if self.mood.random() < 0.7 else self.mood.randrange(frames)
            try:
                async for answer in stream:
                    answers.append(answer)
                    if answer.id >= leaves_at:
                        break  # without a word
                    if self.mood.random() < 0.01 and stream._wire is not None:
                        stream._wire._socket.transport.abort()  # type: ignore[attr-defined]
            finally:
                sending.cancel()
        # In a thread, one at a time: these clients must not stand still while one of them computes.
        async with CHECKING:
            await asyncio.to_thread(self.check, seed, answers)

    def check(self, seed: int, answers: list[LiveAnswer]) -> None:
        ids = [answer.id for answer in answers]
        if ids != list(range(len(ids))):
            self.problems.append(f"ids {ids}")
        kept = [(answer, entry) for answer in answers if (entry := LogEntry.from_header(answer.header))]
        torch.set_num_threads(1)
        pictures = replay(PIPE, [entry for _, entry in kept], lambda id_: picture(seed, id_), seed=seed)
        for (answer, entry), again in zip(kept, pictures, strict=True):
            far = np.abs(answer.picture().astype(int) - again.astype(int)) > 1
            self.checked += 1
            if far.mean() > 0.001:
                self.problems.append(f"stream {seed}: frame {entry} differs in {far.mean():.2%} of its values")
                return

    async def talk_garbage(self) -> None:
        async with connect(self.url + "/v1/streams", open_timeout=30) as socket:
            try:
                if self.mood.random() < 0.7:
                    await socket.send(dump(Hello(width=SIZE[0], height=SIZE[1])))
                for _ in range(20):
                    junk = self.mood.randbytes(self.mood.randrange(1, 5000))
                    await socket.send(junk if self.mood.random() < 0.5 else junk.hex())
                while True:
                    await socket.recv()
            except ConnectionClosed:
                pass


CHECKING = asyncio.Semaphore(1)
PIPE = open_engine("tiny", torch_dtype=torch.float32, device="cpu", flow=None, max_pixels=1 << 20)


def test_ten_minutes_of_everything(cluster: LiveCluster) -> None:
    began = time.monotonic()
    actors = [Actor(cluster.url, number, began + SECONDS) for number in range(8)]
    memory: list[tuple[float, float]] = []

    async def disturb() -> None:
        mood = random.Random(99)
        while time.monotonic() < began + SECONDS - 60:
            await asyncio.sleep(SECONDS / 8)
            replicas = await asyncio.to_thread(cluster.replicas)
            running = [one["pid"] for one in replicas.values() if one["state"] == "RUNNING"]
            if len(running) == 2:
                os.kill(mood.choice(running), signal.SIGKILL)

    async def watch() -> None:
        while time.monotonic() < began + SECONDS:
            await asyncio.sleep(1)
            memory.append((time.monotonic() - began, resident_mb()))

    async def run() -> None:
        disturbing, watching = asyncio.create_task(disturb()), asyncio.create_task(watch())
        await asyncio.gather(*(actor.run() for actor in actors))
        disturbing.cancel()
        watching.cancel()

    asyncio.run(run())
    problems = [problem for actor in actors for problem in actor.problems]
    warm = [mb for second, mb in memory if SECONDS * 0.4 < second < SECONDS * 0.6]
    late = [mb for second, mb in memory if second > SECONDS * 0.8]
    print(
        f"{sum(a.streams for a in actors)} streams, {sum(a.checked for a in actors)} frames checked, "
        f"{sum(a.refused for a in actors)} refused; memory {np.median(warm):.0f} -> {np.median(late):.0f} MB"
    )
    assert not problems, problems[:10]
    assert sum(actor.checked for actor in actors) > SECONDS
    assert np.median(late) <= 1.05 * np.median(warm)


def resident_mb() -> float:
    """Memory of Serve's proxy and of the keeper of states; replicas are killed, so theirs says nothing."""
    total = 0.0
    for process in psutil.process_iter(["cmdline", "memory_info"]):
        title = " ".join(process.info["cmdline"] or [])
        if "ProxyActor" in title or "StateHolder" in title:
            total += process.info["memory_info"].rss / 1e6
    return total
