"""Bytes that nobody meant: whatever comes, it is answered in words, and the service goes on as before."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
from hypothesis import example, given, settings
from hypothesis import strategies as st

from actors.live_server import LiveConfig, LiveServer
from actors.state_book import LocalStates, StateBook
from infra.protocol import FrameHeader, Hello, dump, parse_control, parse_hello
from infra.refusals import KINDS, BadMessage, Refusal
from tests.live_service import open_live_engine

HELLO = json.loads(dump(Hello(width=16, height=16, codec_in="raw", codec_out="raw")))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=3000)
@given(st.binary(max_size=200))
@example(FrameHeader(1).pack(b"x"))
def test_headers(message: bytes) -> None:
    try:
        header, payload = FrameHeader.unpack(message)
    except BadMessage as refusal:
        assert refusal.remedy
    else:
        assert header.pack(payload) == message


@settings(max_examples=2000)
@given(
    st.builds(
        FrameHeader,
        id=st.integers(0, 2**64 - 1),
        pts=st.integers(-(2**63), 2**63 - 1),
        index=st.integers(0, 2**32 - 1),
        receipt=st.integers(0, 2**32 - 1),
        acknowledged=st.integers(0, 2**64 - 1),
        granted=st.integers(0, 2**64 - 1),
        step_us=st.integers(0, 2**32 - 1),
    ),
    st.binary(max_size=50),
)
def test_headers_travel(header: FrameHeader, payload: bytes) -> None:
    again, rest = FrameHeader.unpack(header.pack(payload))
    assert (again, bytes(rest)) == (header, payload)


@settings(max_examples=3000)
@given(st.text(max_size=200) | JSON_VALUES.map(json.dumps))
def test_texts(text: str) -> None:
    for parse in (parse_hello, parse_control):
        try:
            parse(text)
        except BadMessage as refusal:
            assert refusal.remedy


@settings(max_examples=3000)
@given(st.dictionaries(st.sampled_from(sorted(HELLO)), JSON_VALUES, min_size=1, max_size=3))
def test_hellos(changes: dict[str, Any]) -> None:
    try:
        hello = parse_hello(json.dumps(HELLO | changes))
    except BadMessage as refusal:
        assert refusal.remedy
    else:
        assert parse_hello(dump(hello)) == hello


PAUSE = "(pause)"


class ScriptedChannel:
    """A client that says what is in its script, then goes away. `PAUSE` in it is said by nobody."""

    message_limit = 1 << 24
    is_web = False
    headers: Mapping[str, str] = {}
    peer = None

    def __init__(self, script: list[str | bytes]) -> None:
        self._script = iter([*script, PAUSE])
        self.sent: list[str | bytes] = []
        self.closed: int | None = None

    async def receive(self) -> str | bytes | None:
        message = next(self._script, None)
        if message == PAUSE:
            await asyncio.sleep(0.005)  # a client that looks at its answers
            return await self.receive()
        return message

    async def send(self, message: str | bytes) -> None:
        assert self.closed is None
        self.sent.append(message)

    async def close(self, code: int, reason: str) -> None:
        assert self.closed is None
        self.closed = code


def conversation(mood: random.Random) -> list[str | bytes]:
    """A client that is mostly right, and then is not."""
    picture = np.zeros((16, 16, 3), np.uint8).tobytes()
    script: list[str | bytes] = [dump(Hello(width=16, height=16, codec_in="raw", codec_out="raw"))]
    for number in range(mood.randrange(6)):
        script += [FrameHeader(number).pack(picture), PAUSE]
    for _ in range(mood.randrange(1, 4)):
        victim = mood.choice(script)
        kind = mood.randrange(5)
        if kind == 0 or not victim:
            spoilt: str | bytes = mood.randbytes(mood.randrange(300))
        elif kind == 1:
            place = mood.randrange(len(victim))
            junk: Any = mood.randbytes(3) if isinstance(victim, bytes) else mood.choice(['"', "{", "9", "\u2603"])
            spoilt = victim[:place] + junk + victim[place:]  # type: ignore[operator]
        elif kind == 2:
            spoilt = victim[: mood.randrange(len(victim))]
        elif kind == 3:
            spoilt = mood.choice(['{"type":"close"}', '{"type":"reset"}', '{"type":"stats"}', '{"type":"delivered"}'])
        else:
            spoilt = victim
        script.insert(mood.randrange(mood.random() < 0.8, len(script) + 1), spoilt)
    return script


def test_whole_conversations_with_a_server_that_goes_on() -> None:
    memory: list[float] = []

    async def run() -> int:
        answered = 0
        states = LocalStates(StateBook(kept_s=0.01))  # those of clients that have gone are kept, and would be counted
        server = LiveServer(LiveConfig(most_sessions=64), {"stand-in:0": open_live_engine()}, states=states)
        server.start()
        process = psutil.Process()
        for batch in range(40):
            channels = [ScriptedChannel(conversation(random.Random(1000 * batch + n))) for n in range(25)]
            await asyncio.gather(*(server.serve(channel) for channel in channels))
            for channel in channels:
                refusals = [one for one in channel.sent if isinstance(one, str) and '"refused"' in one]
                for refusal in refusals:
                    told = json.loads(refusal)
                    assert told["kind"] in KINDS and told["kind"] != "ServiceFailure" and told["remedy"], told
                    assert channel.closed is not None and channel.closed != 1000
            answered += sum(isinstance(one, bytes) for channel in channels for one in channel.sent)
            assert not server.connections and not server.stepper.seats
            memory.append(process.memory_info().rss / 1e6)
        await server.stop()
        return answered

    assert asyncio.run(run()) > 200  # how many depends on how soon frames are answered
    assert memory[-1] - memory[10] < 20, memory


def test_every_refusal_comes_back_as_itself() -> None:
    from infra.refusals import refusal_from_message

    for kind in KINDS.values():
        refusal = kind("m", remedy="r", limit="l", retry_after_s=1.5)
        again = refusal_from_message(json.loads(json.dumps(refusal.to_message())))
        assert type(again) is kind and again.to_message() == refusal.to_message()
    assert type(refusal_from_message({"kind": "FromTheFuture"})) is Refusal
