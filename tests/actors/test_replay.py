"""The replay of a stream's log gives the pictures that the service sent: across levels, cuts and a hand-over."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import cv2
import numpy as np
import pytest

from actors.live_engine import LiveEngine
from actors.live_server import LiveConfig
from actors.replay import LogEntry, replay
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import Flag, Hello, output_size
from tests.live_service import LiveService, live_service, open_live_engine

LEVELS = (4, 4, 2, 2, 1, 1, 0, 4, 4, 2, 4, 4)
CUT = 3


@pytest.fixture(scope="module")
def tiny() -> LiveEngine:
    return open_live_engine("tiny")


def frame(number: int) -> np.ndarray[Any, Any]:
    """A textured picture that moves by a pixel a frame; at `CUT` it is another one."""
    noise = np.random.default_rng(number >= CUT).integers(0, 256, (20, 26, 3), np.uint8)
    large = cv2.resize(noise, (104, 80), interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(large[8:56, 8 + number : 72 + number])


async def answers_of(service: LiveService, hello: Hello) -> list[LiveAnswer]:
    """Send a stream frame by frame at the levels above, hand it over after half of it."""
    async with asyncio.timeout(60), LiveStream(service.url, hello) as stream:
        answers = []
        for number, level in enumerate(LEVELS):
            connection = next(iter(service.server.connections.values()))
            if number == len(LEVELS) // 2:
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(connection.drain(), service._loop))
                while connection in service.server.connections.values() or not service.server.connections:
                    await asyncio.sleep(0.01)
                connection = next(iter(service.server.connections.values()))
            connection.session.ladder.level = level  # as its load would have it
            await stream.send_picture(frame(number), cut=number == CUT)
            answers.append(await anext(stream))
        assert stream.hand_overs == 1 and stream.restarts == 0
        return answers


def test_an_adaptive_stream_says_which_steps_it_took_and_is_replayed_by_them(tiny: LiveEngine) -> None:
    hello = Hello(width=64, height=48, codec_in="raw", codec_out="raw", seed=11, adaptive=True)

    async def answers() -> list[LiveAnswer]:
        async with asyncio.timeout(60), LiveStream(service.url, hello) as stream:
            found = []
            for number in (0, 1, 2, 2, 2, CUT, 4, 5):
                await stream.send_picture(frame(number), cut=number == CUT)
                found.append(await anext(stream))
            return found

    with live_service(LiveConfig(), engine=tiny) as service:
        given = asyncio.run(answers())
    log = [entry for answer in given if (entry := LogEntry.from_header(answer.header)) is not None]
    levels = [entry.level for entry in log]
    assert levels[0] == levels[5] == 4 and levels[3:5] == [1, 1] and 0 not in levels
    again = replay(tiny.pipe, log, lambda number: frame((0, 1, 2, 2, 2, CUT, 4, 5)[number]), seed=11)
    for answer, picture in zip(given, again, strict=True):
        assert np.mean(np.abs(answer.picture().astype(int) - picture) <= 1) >= 0.999, answer.id


@pytest.mark.parametrize("scale", [4, 2])
def test_a_replay_is_equivalent_to_what_was_sent(scale: Any, tiny: LiveEngine) -> None:
    hello = Hello(width=64, height=48, scale=scale, codec_in="raw", codec_out="raw", seed=11)
    with live_service(LiveConfig(state_interval_s=0.05), engine=tiny) as service:
        answers = asyncio.run(answers_of(service, hello))
    log = [entry for answer in answers if (entry := LogEntry.from_header(answer.header)) is not None]
    assert tuple(entry.level for entry in log) == LEVELS
    assert [entry.index for entry in log] == list(range(len(LEVELS)))
    assert [entry.reset for entry in log] == [number in (0, CUT, LEVELS.index(0) + 1) for number in range(len(LEVELS))]
    assert Flag.RESUMED in answers[len(LEVELS) // 2].header.flags
    again = list(replay(tiny.pipe, log, frame, seed=11, size_of=partial(output_size, hello)))
    for answer, picture in zip(answers, again, strict=True):
        error = np.abs(answer.picture().astype(int) - picture)
        assert picture.shape == (48 * scale, 64 * scale, 3)
        assert np.mean(error <= 1) >= 0.999, (answer.id, answer.header.level)
    other = list(replay(tiny.pipe, log, frame, seed=12, size_of=partial(output_size, hello)))
    assert any(np.abs(a.astype(int) - b).max() > 1 for a, b in zip(again, other, strict=True))  # the noise counts
