"""The table of sequences: turns, bounds, time, and what is known of those that are over. In front of a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from actors.live_server import LiveConfig, LiveServer
from actors.local_channel import local_transport
from actors.oip import NO_FRAMES, Clip
from actors.oip_parameters import CallParameters
from actors.sequences import DeadlineExceeded, Restored, SequenceKey, SequenceLimits, SequenceRefused, Sequences
from infra.client import LiveStream
from infra.protocol import Credentials, Hello
from infra.refusals import AdmissionRefused, BadMessage, RateExceeded
from tests.live_service import open_live_engine


class Table:
    """Sequences over a server of this process, whose model takes `step_ms` for a frame."""

    def __init__(self, server: LiveServer, sequences: Sequences) -> None:
        self.server, self.sequences = server, sequences

    async def ask(self, id_: str, number: int = 0, *, caller: bytes = b"a", frames: int = 1, **told: Any) -> list[int]:
        """Send frames; returns their indexes."""
        parameters = CallParameters(sequence_id=id_, **told)
        pixels = np.full((16, 16, 3), number, np.uint8).tobytes()
        clip = Clip("raw", (pixels,) * frames, ((16, 16),) * frames) if frames else NO_FRAMES
        hello = parameters.hello(clip, self.server.engine_named(None).name, Credentials()) if frames else None
        key = SequenceKey(caller, "m", id_)
        restored: Restored = await self.sequences.run(key, clip, parameters, hello, self.stream)
        for answer in restored.answers:
            assert (answer.picture() == number).all()
        return [answer.header.index for answer in restored.answers]

    def stream(self, hello: Hello) -> LiveStream:
        return LiveStream("local", hello, connect=local_transport(self.server, {}, None), open_s=0.0, give_up_s=0.0)


def run(
    work: Callable[[Table], Awaitable[None]],
    *,
    step_ms: int = 0,
    most: int = 10,
    queue: int = 2,
    idle_s: float = 60.0,
    sessions: int = 32,
) -> None:
    """Do `work` with a table, and see that it leaves nothing behind."""

    async def whole() -> None:
        engine = open_live_engine(f"stand-in:{step_ms}")
        server = LiveServer(LiveConfig(most_sessions=sessions), {engine.name: engine})
        server.start()
        sequences = Sequences(SequenceLimits(most=most, queue=queue, idle_s=idle_s))
        sequences.start()
        try:
            await work(Table(server, sequences))
        finally:
            await sequences.stop()
            while server.connections:  # the last of them say goodbye
                await asyncio.sleep(0.01)
            kept = await server._states.figures()
            await server.stop()
        assert kept["streams"] == 0  # all were closed, none was left to expire
        assert len(sequences) == 0

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_turns_are_taken_in_the_order_of_arrival_and_the_queue_is_bounded() -> None:
    async def work(table: Table) -> None:
        assert await table.ask("1", sequence_start=True) == [0]
        asked = [asyncio.create_task(table.ask("1", number)) for number in range(1, 5)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert found[:3] == [[1], [2], [3]]  # one has its turn, two wait
        assert isinstance(found[3], RateExceeded) and found[3].retry_after_s
        assert await table.ask("1", sequence_end=True) == [4]

    run(work, step_ms=30)


def test_a_sequence_is_its_callers_alone() -> None:
    async def work(table: Table) -> None:
        await table.ask("1", 1, sequence_start=True)
        with pytest.raises(SequenceRefused) as caught:
            await table.ask("1", 2, caller=b"b")
        assert caught.value.code == "sequence-unknown"
        assert await table.ask("1", 3, caller=b"b", sequence_start=True) == [0]
        assert await table.ask("1", 4) == [1]

    run(work)


def test_no_more_than_so_many_are_open() -> None:
    async def work(table: Table) -> None:
        for number in range(3):
            await table.ask(str(number), sequence_start=True)
        with pytest.raises(AdmissionRefused) as caught:
            await table.ask("3", sequence_start=True)
        assert caught.value.code == "sequences-full"
        await table.ask("0", frames=0, sequence_end=True)
        assert await table.ask("3", sequence_start=True) == [0]

    run(work, most=3)


def test_a_start_that_the_service_refuses_leaves_nothing() -> None:
    async def work(table: Table) -> None:
        await table.ask("0", sequence_start=True)
        with pytest.raises(AdmissionRefused) as caught:
            await table.ask("1", sequence_start=True)
        assert caught.value.code == "sessions-full" and len(table.sequences) == 1
        with pytest.raises(SequenceRefused):
            await table.ask("1")

    run(work, sessions=1)


def test_a_caller_that_gives_up_while_waiting_has_sent_nothing() -> None:
    async def work(table: Table) -> None:
        await table.ask("1", sequence_start=True)
        slow = asyncio.create_task(table.ask("1", frames=4))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded) as caught:
            await table.ask("1", timeout=10_000)
        assert caught.value.code == "deadline-in-queue"
        assert await slow == [1, 2, 3, 4]
        assert await table.ask("1") == [5]

    run(work, step_ms=30)


def test_a_caller_that_gives_up_later_has_sent_its_frames() -> None:
    async def work(table: Table) -> None:
        await table.ask("1", sequence_start=True)
        with pytest.raises(DeadlineExceeded, match="has the frames"):
            await table.ask("1", frames=3, timeout=20_000)
        asked = asyncio.create_task(table.ask("1"))
        while not table.sequences._open[SequenceKey(b"a", "m", "1")].waiting:
            await asyncio.sleep(0)
        asked.cancel()  # it waits for its turn: nothing was taken
        assert await table.ask("1") == [4]

        gone = asyncio.create_task(table.ask("1"))
        await asyncio.sleep(0.01)
        gone.cancel()  # it has its turn
        assert await table.ask("1") == [6]

    run(work, step_ms=30)


def test_a_start_begins_anew_and_those_that_wait_go_on_with_it() -> None:
    async def work(table: Table) -> None:
        await table.ask("1", 1, sequence_start=True)
        await table.ask("1", 2)
        again = asyncio.create_task(table.ask("1", 3, sequence_start=True))
        await asyncio.sleep(0)
        after = asyncio.create_task(table.ask("1", 4))
        assert (await again, await after) == ([0], [1])
        assert table.sequences.ended == {"restarted": 1}

        ending = asyncio.create_task(table.ask("1", 5, sequence_end=True))
        await asyncio.sleep(0)
        late, started = (asyncio.create_task(table.ask("1", 6, sequence_start=start)) for start in (False, True))
        assert await ending == [2]
        with pytest.raises(SequenceRefused) as caught:
            await late
        assert caught.value.code == "sequence-ended"
        assert await started == [0]

    run(work, step_ms=10)


def test_a_sequence_that_nobody_uses_ends_at_the_service_too() -> None:
    async def work(table: Table) -> None:
        await table.ask("1", sequence_start=True)
        while len(table.sequences) or table.server.connections:
            await asyncio.sleep(0.01)
        assert table.sequences.ended == {"expired": 1}
        with pytest.raises(SequenceRefused, match=r"not used for 0\.2 s") as caught:
            await table.ask("1")
        assert caught.value.code == "sequence-expired"

    run(work, idle_s=0.2)


def test_what_cannot_begin_a_sequence() -> None:
    async def work(table: Table) -> None:
        with pytest.raises(BadMessage, match="index 0"):
            await table.ask("1", sequence_start=True, frame_index=3)
        with pytest.raises(BadMessage, match="without a frame"):
            await table.ask("1", sequence_start=True, frames=0)
        assert len(table.sequences) == 0
        assert await table.ask("1", sequence_start=True, frame_index=0) == [0]

    run(work)


def test_a_stop_answers_what_has_its_turn_and_starts_nothing() -> None:
    async def work(table: Table) -> None:
        await table.ask("1", sequence_start=True)
        last = asyncio.create_task(table.ask("1", frames=3))
        await asyncio.sleep(0)
        await table.sequences.stop()
        assert await last == [1, 2, 3]
        with pytest.raises(SequenceRefused):
            await table.ask("1")
        with pytest.raises(AdmissionRefused) as caught:
            await table.ask("2", sequence_start=True)
        assert caught.value.code == "draining"

    run(work, step_ms=10)
