"""How many streams a live service steps together: as many as pay, found out while it serves. Over real sockets."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from infra.client import LiveStream
from infra.protocol import Hello
from tests.live_service import LiveService, live_service, open_live_engine

if TYPE_CHECKING:
    from torch import Tensor

STREAMS = 4
HELLO = Hello(width=32, height=24, codec_in="raw", codec_out="raw", cuts=False)


class Busy:
    """A stand-in whose step takes as long as `cost_s` says for so many streams; it notes its batches."""

    def __init__(self, engine: Any, cost_s: Callable[[int], float]) -> None:
        self._engine, self._cost_s = engine, cost_s
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, frames_B3HW: Tensor, states: Sequence[Any], **options: Any) -> Tensor:
        self.batches.append(len(states))
        time.sleep(self._cost_s(len(states)))
        output_B3HW: Tensor = self._engine.step(frames_B3HW, states, **options)
        return output_B3HW


async def watch(service: LiveService, frames: int) -> None:
    picture = np.zeros((24, 32, 3), np.uint8)

    async def one() -> None:
        async with LiveStream(service.url, HELLO) as stream:

            async def send() -> None:
                for _ in range(frames):
                    await stream.send_picture(picture)
                await stream.close()

            sending = asyncio.create_task(send())
            assert len([answer async for answer in stream]) == frames
            await sending

    await asyncio.gather(*(one() for _ in range(STREAMS)))


@pytest.mark.parametrize(
    ("cost_s", "wanted"),
    [(lambda streams: 0.008 * streams * (1 + 0.15 * streams), 1), (lambda streams: 0.010 + 0.0005 * streams, STREAMS)],
    ids=["a batch only moves more memory", "a step costs about the same for all"],
)
def test_streams_are_stepped_together_where_that_pays(cost_s: Callable[[int], float], wanted: int) -> None:
    engine = open_live_engine(largest_batch=8)
    engine.pipe = busy = Busy(engine.pipe, cost_s)  # type: ignore[assignment]
    with live_service(engine=engine) as service:
        asyncio.run(watch(service, 90))
    later = busy.batches[len(busy.batches) // 2 :]
    assert statistics.mode(later) == wanted, Counter(later)
