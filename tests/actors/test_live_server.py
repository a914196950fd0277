"""Live streams over real sockets, through the client: order, hand-over, lost connections, refusals. Without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import weakref
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from actors import live_connection
from actors.live_server import Guest, LiveConfig
from actors.session import Session
from actors.state_book import LocalStates
from infra.blocking_client import BlockingStream
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import Deadline, DropReason, Flag, FrameHeader, Hello, Newest, Welcome, dump
from infra.refusals import AdmissionRefused, BadMessage, FrameTooLarge, ServiceFailure, StateLost
from pipeline.state import VERSION, StreamState
from tests.live_service import LiveService, live_service, open_live_engine

RAW = {"codec_in": "raw", "codec_out": "raw"}


def picture(number: int, width: int = 32, height: int = 24) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def is_restored(answer: LiveAnswer, number: int, width: int = 32, height: int = 24) -> bool:
    return bool((answer.picture()[::4, ::4] == picture(number, width, height)).all())


async def run_stream(
    service: LiveService, hello: Hello, count: int, **options: Any
) -> tuple[list[LiveAnswer], LiveStream]:
    async with LiveStream(service.url, hello, **options) as stream:

        async def send() -> None:
            for number in range(count):
                await stream.send_picture(picture(number), pts=1000 + number)
            await stream.close()

        sending = asyncio.create_task(send())
        answers = [answer async for answer in stream]
        await sending
        return answers, stream


def test_every_frame_comes_back_restored_in_order() -> None:
    with live_service() as service:
        answers, stream = asyncio.run(run_stream(service, Hello(width=32, height=24, **RAW), 40))
    assert [answer.id for answer in answers] == list(range(40))
    assert [answer.header.pts for answer in answers] == list(range(1000, 1040))
    assert [answer.header.index for answer in answers] == list(range(40))
    assert all(is_restored(answer, answer.id) for answer in answers)
    assert Flag.RESET in answers[0].header.flags
    assert {answer.header.level for answer in answers} == {4}
    assert stream.hand_overs == stream.restarts == 0


def test_the_first_answer_comes_before_the_second_frame_is_sent() -> None:
    async def run(service: LiveService) -> None:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            for number in range(3):
                await stream.send_picture(picture(number))
                async with asyncio.timeout(10):
                    assert (await anext(stream)).id == number

    with live_service() as service:
        asyncio.run(run(service))


def test_a_drained_replica_loses_and_repeats_nothing() -> None:
    """Both 'replicas' are one server here: the stream is handed over to a new connection of it, twice."""

    async def run(service: LiveService) -> tuple[list[LiveAnswer], LiveStream]:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:

            async def send() -> None:
                for number in range(60):
                    await stream.send_picture(picture(number))
                await stream.close()

            sending = asyncio.create_task(send())
            answers = []
            async for answer in stream:
                answers.append(answer)
                if answer.id in (10, 30):
                    (connection,) = service.server.connections.values()
                    asyncio.run_coroutine_threadsafe(connection.drain(), service._loop)
            await sending
            return answers, stream

    with live_service() as service:
        answers, stream = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(60))
    assert [answer.header.index for answer in answers] == list(range(60))  # the state went along
    assert all(is_restored(answer, answer.id) for answer in answers)
    assert stream.hand_overs == 2 and stream.restarts == 0
    assert sum(Flag.RESUMED in answer.header.flags for answer in answers) == 2


def test_a_lost_connection_is_resumed_from_the_last_state() -> None:
    async def run(service: LiveService) -> tuple[list[LiveAnswer], LiveStream]:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:

            async def send() -> None:
                for number in range(60):
                    await stream.send_picture(picture(number))
                await stream.close()

            sending = asyncio.create_task(send())
            answers = []
            async for answer in stream:
                answers.append(answer)
                if answer.id in (10, 30):
                    stream._wire._socket.transport.abort()  # type: ignore[union-attr]
            await sending
            return answers, stream

    with live_service(LiveConfig(state_interval_s=0.05)) as service:
        answers, stream = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(60))
    assert [answer.header.index for answer in answers] == list(range(60))
    assert stream.hand_overs == 2 and stream.restarts == 0


def test_a_state_of_a_newer_version_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a service is rolled back: the version before has the stream begin anew, visibly."""

    async def run(service: LiveService) -> tuple[list[LiveAnswer], LiveStream]:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            answers = []
            for number in range(10):
                await stream.send_picture(picture(number))
                answers.append(await anext(stream))
                if number == 5:
                    (entry,) = states.book._entries.values()
                    while not entry.snapshots[-1].below:
                        await asyncio.sleep(0.01)
                    stream._wire._socket.transport.abort()  # type: ignore[union-attr]
            return answers, stream

    states, write = LocalStates(), StreamState.to_bytes
    monkeypatch.setattr(StreamState, "to_bytes", lambda state: write(dataclasses.replace(state, version=VERSION + 1)))
    with live_service(LiveConfig(state_interval_s=0.001), states=states) as service:
        answers, stream = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(10))
    assert (stream.restarts, Flag.RESET in answers[6].header.flags) == (1, True)


def test_a_stream_whose_state_is_lost_begins_anew_and_says_so() -> None:
    async def run(service: LiveService, elsewhere: LiveService) -> tuple[list[LiveAnswer], LiveStream]:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            answers = []
            for number in range(10):
                await stream.send_picture(picture(number))
                answers.append(await anext(stream))
                if number == 5:
                    stream._url = elsewhere.url  # which has none of the first one's states
                    stream._wire._socket.transport.abort()  # type: ignore[union-attr]
            return answers, stream

    with live_service() as service, live_service() as elsewhere:
        answers, stream = asyncio.run(run(service, elsewhere))
    assert [answer.id for answer in answers] == list(range(10))
    assert stream.restarts == 1
    assert [answer.header.index for answer in answers] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert Flag.RESET in answers[6].header.flags


def test_a_keeper_of_states_that_is_replaced_resets_no_stream() -> None:
    """Its successor knows nothing; the replica enters its streams again, and they can be resumed again."""

    async def run(service: LiveService) -> None:
        book = service.server._states.book  # type: ignore[attr-defined]
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            for number in range(10):
                await stream.send_picture(picture(number))
                assert (await anext(stream)).header.index == number
                if number == 4:
                    book._entries.clear()
                if number == 6:
                    async with asyncio.timeout(5):
                        while not len(book):
                            await asyncio.sleep(0.02)
                    stream._wire._socket.transport.abort()  # type: ignore[union-attr]
            assert (stream.hand_overs, stream.restarts) == (1, 0)
            await stream.close()
            assert [answer async for answer in stream] == []
            assert not len(book)

    with live_service(LiveConfig(state_interval_s=0.05)) as service:
        asyncio.run(run(service))


def test_newest_drops_and_tells() -> None:
    async def run(service: LiveService) -> list[LiveAnswer]:
        hello = Hello(width=32, height=24, policy=Newest(), **RAW)
        return (await run_stream(service, hello, 30))[0]

    with live_service(None, "stand-in:40") as service:
        answers = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(30))
    restored = [answer for answer in answers if answer.dropped is None]
    assert 2 <= len(restored) < 30
    assert {answer.dropped for answer in answers} == {None, DropReason.NEWER}
    assert [answer.header.index for answer in restored] == list(range(len(restored)))
    assert all(is_restored(answer, answer.id) for answer in restored)


@pytest.mark.parametrize("policy", [Newest(), Deadline(ms=100, late="drop")])
def test_dropped_frames_are_not_sent_again(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[tuple[int, int]] = []  # epoch and id of every frame that the service got
    arrive = Session.arrive

    def noting(session: Session, header: FrameHeader, now: float) -> Any:
        came.append((session.epoch, header.id))
        return arrive(session, header, now)

    async def run(service: LiveService) -> list[LiveAnswer]:
        hello = Hello(width=32, height=24, policy=policy, least_steps=4, **RAW)
        async with LiveStream(service.url, hello) as stream:

            async def send() -> None:
                for number in range(60):
                    await stream.send_picture(picture(number))
                await stream.close()

            sending = asyncio.create_task(send())
            answers = []
            async for answer in stream:
                answers.append(answer)
                if answer.id == 25:
                    stream._wire._socket.transport.abort()  # type: ignore[union-attr]
            await sending
            assert stream.hand_overs == 1 and stream.restarts == 0
            return answers

    monkeypatch.setattr(Session, "arrive", noting)
    with live_service(LiveConfig(state_interval_s=30), "stand-in:20") as service:
        answers = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(60))
    restored = [answer for answer in answers if answer.dropped is None]
    assert 2 <= len(restored) < 60
    assert [answer.header.index for answer in restored] == list(range(len(restored)))
    assert all(is_restored(answer, answer.id) for answer in restored)
    before = {answer.id for answer in answers if answer.connection == 1 and answer.dropped is not None}
    again = {id_ for epoch, id_ in came if epoch == 2}
    assert before and not before & again
    assert not any(Flag.GAP in answer.header.flags for answer in answers)


def test_under_load_the_quality_goes_down_before_frames_are_late() -> None:
    async def run(service: LiveService) -> list[LiveAnswer]:
        hello = Hello(width=32, height=24, policy=Deadline(ms=30, late="resize"), **RAW)
        return (await run_stream(service, hello, 30))[0]

    with live_service(None, "stand-in:40") as service:
        answers = asyncio.run(run(service))
    assert answers[-1].header.level == 0 and answers[-1].dropped is None
    assert answers[-1].picture().shape == (96, 128, 3)
    levels = [answer.header.level for answer in answers]
    assert levels == sorted(levels, reverse=True)


def test_a_size_that_changes_is_a_marked_reset() -> None:
    async def run(service: LiveService) -> list[LiveAnswer]:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            answers = []
            for number in range(6):
                width, height = (32, 24) if number < 3 else (24, 16)
                stream.resize(width, height)
                await stream.send_picture(picture(number, width, height))
                answers.append(await anext(stream))
            return answers

    with live_service() as service:
        answers = asyncio.run(run(service))
    assert [Flag.RESET in answer.header.flags for answer in answers] == [True, False, False, True, False, False]
    assert answers[3].picture().shape == (64, 96, 3) and is_restored(answers[3], 3, 24, 16)


def test_a_client_may_mark_a_cut() -> None:
    async def run(service: LiveService) -> list[bool]:
        async with LiveStream(service.url, Hello(width=32, height=24, cuts=False, **RAW)) as stream:
            flags = []
            for number in range(4):
                await stream.send_picture(picture(number), cut=number == 2)
                flags.append(Flag.RESET in (await anext(stream)).header.flags)
            return flags

    with live_service() as service:
        assert asyncio.run(run(service)) == [True, False, True, False]


def test_refused_when_full_and_let_in_when_there_is_room() -> None:
    async def run(service: LiveService) -> None:
        hello = Hello(width=32, height=24, **RAW)
        async with LiveStream(service.url, hello) as first:
            with pytest.raises(AdmissionRefused, match="1 streams") as caught:
                async with LiveStream(service.url, hello, give_up_s=0.2):
                    pass
            assert caught.value.retry_after_s
            await first.close()
            async for _ in first:
                pass
        async with LiveStream(service.url, hello) as second:
            await second.send_picture(picture(0))
            await anext(second)

    with live_service(LiveConfig(most_sessions=1)) as service:
        asyncio.run(run(service))


def test_refused_by_what_it_would_cost() -> None:
    async def run(service: LiveService) -> None:
        hello = Hello(width=128, height=96, fps=15, **RAW)  # 15 steps of 40 ms a second: 60 %
        async with LiveStream(service.url, hello):
            with pytest.raises(AdmissionRefused, match=r"6\d% of this replica"):
                async with LiveStream(service.url, hello, give_up_s=0.2):
                    pass

    with live_service(None, "stand-in:40") as service:
        asyncio.run(run(service))


@pytest.mark.parametrize(
    ("hello", "kind", "code"),
    [
        ({"width": 4000, "height": 4000}, FrameTooLarge, "frame-too-large"),
        ({"width": 1900, "height": 1000, "codec_out": "raw"}, FrameTooLarge, "frame-too-large"),
        ({"width": 1024, "height": 16, "out_height": 1100}, FrameTooLarge, "frame-too-large"),
        ({"width": 1000, "height": 100, "out_height": 1700, "codec_out": "h264"}, FrameTooLarge, "frame-too-large"),
        ({"width": 320, "height": 180, "out_height": 16384}, FrameTooLarge, "frame-too-large"),
        ({"width": 32, "height": 24, "model": "no-such"}, BadMessage, "model-unknown"),
    ],
)
def test_hellos_that_are_refused(hello: dict[str, Any], kind: type, code: str) -> None:
    async def run(service: LiveService) -> None:
        with pytest.raises(kind) as caught:
            async with LiveStream(service.url, Hello(**hello)):
                pass
        assert caught.value.code == code and caught.value.remedy

    with live_service() as service:
        asyncio.run(run(service))


def test_a_result_that_grows_beyond_the_limits_in_mid_stream_is_refused_before_it_is_made() -> None:
    """The pixels of the frame are as agreed; by its shape its result would have 268 million."""

    async def run(service: LiveService) -> None:
        async with LiveStream(service.url, Hello(width=64, height=64, out_height=4096)) as stream:
            await stream.send_picture(picture(0, 256, 16))
            with pytest.raises(FrameTooLarge, match="Results of 65536x4096"):
                await anext(stream)

    with live_service() as service:
        asyncio.run(run(service))


async def first_words(service: LiveService, *messages: str | bytes) -> tuple[dict[str, Any], int]:
    """Send raw messages; returns the last text message and the close code."""
    async with connect(service.url + "/v1/streams") as socket:
        try:
            for message in messages:
                await socket.send(message)
            last: dict[str, Any] = {}
            while True:
                answer = await socket.recv()
                if isinstance(answer, str):
                    last = json.loads(answer)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None
            return last, closed.rcvd.code


HELLO = dump(Hello(width=32, height=24, **RAW))
FRAME = FrameHeader(0).pack(picture(0).tobytes())


@pytest.mark.parametrize(
    ("messages", "code", "close_code"),
    [
        (["{"], "bad-message", 4400),
        (["[]"], "bad-message", 4400),
        (['{"type":"hello"}'], "bad-message", 4400),
        (['{"type":"hello","width":1e9,"height":24}'], "bad-message", 4400),
        (["x" * 20_000], "bad-message", 4400),
        ([FRAME], "bad-message", 4400),
        ([HELLO, b"short"], "bad-message", 4400),
        ([HELLO, b"XX" + FRAME[2:]], "bad-message", 4400),
        ([HELLO, FRAME[:2] + b"\x09" + FRAME[3:]], "bad-message", 4400),
        ([HELLO, '{"type":"no-such"}'], "bad-message", 4400),
        ([HELLO, FRAME + bytes(1 << 20)], "frame-too-large", 1009),
        ([HELLO, *[FrameHeader(n).pack(bytes(16)) for n in range(17)]], "window-exceeded", 4429),
        ([HELLO, FRAME, FRAME], "out-of-order", 4409),
        ([HELLO, FrameHeader(0, acknowledged=7, receipt=1).pack(picture(0).tobytes())], "bad-receipt", 4400),
    ],
)
def test_what_is_not_the_protocol_is_refused_in_words(messages: list[Any], code: str, close_code: int) -> None:
    with live_service() as service:
        refusal, closed = asyncio.run(first_words(service, *messages))
        assert (refusal["type"], refusal["code"], closed) == ("refused", code, close_code)
        assert refusal["remedy"]
        answers, _ = asyncio.run(run_stream(service, Hello(width=32, height=24, **RAW), 3))  # the others go on
        assert len(answers) == 3


def test_a_client_that_says_nothing_is_sent_away() -> None:
    with live_service(LiveConfig(hello_timeout_s=0.1)) as service:
        refusal, closed = asyncio.run(first_words(service))
    assert (refusal["code"], closed) == ("hello-late", 4408)


def test_an_idle_stream_is_closed() -> None:
    with live_service(LiveConfig(idle_timeout_s=0.1)) as service:
        refusal, closed = asyncio.run(first_words(service, HELLO))
    assert (refusal["code"], closed) == ("session-idle", 4408)


def test_somebody_elses_stream_cannot_be_resumed() -> None:
    async def run(service: LiveService) -> None:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            welcome = stream.welcome
            resume = {"session": welcome.session, "token": "x" * 32, "received": 0}
            hello = Hello(width=32, height=24, resume=resume)  # type: ignore[arg-type]
            refusal, closed = await first_words(service, dump(hello))
            assert (refusal["kind"], closed) == (StateLost.__name__, 4410)
            await stream.send_picture(picture(0))
            assert (await anext(stream)).id == 0  # and the stream itself did not notice

    with live_service() as service:
        asyncio.run(run(service))


def test_a_poisoned_state_reaches_nobody_else() -> None:
    """A stream whose memory is NaN shares batches with others; they, and a stream after it, see nothing of it."""

    async def run(service: LiveService) -> None:
        hello = Hello(width=32, height=24, **RAW)
        async with LiveStream(service.url, hello) as bad, LiveStream(service.url, hello) as good:
            for number in range(4):
                await asyncio.gather(bad.send_picture(picture(number)), good.send_picture(picture(number)))
                await anext(bad)
                assert is_restored(await anext(good), number)
                state = next(
                    one.session.stream
                    for key, one in service.server.connections.items()
                    if key.session == bad.welcome.session
                )
                assert state.prev_output_3HW is not None
                state.prev_output_3HW.fill_(float("nan"))
            kept = state
            await bad.close()
            async for _ in bad:
                pass
            while len(service.server.connections) > 1:
                await asyncio.sleep(0.01)
            assert kept.prev_output_3HW is None and not kept.detector

    with live_service() as service:
        asyncio.run(run(service))


def test_answers_are_acknowledged_after_the_last_frame_too() -> None:
    """The service closes streams that do not read; one that waits for its last answers reads."""

    async def run(service: LiveService) -> list[LiveAnswer]:
        return (await run_stream(service, Hello(width=32, height=24, **RAW), 8))[0]

    with live_service(LiveConfig(unread_timeout_s=1.2), "stand-in:300") as service:
        assert [answer.id for answer in asyncio.run(run(service))] == list(range(8))


def test_a_program_without_an_event_loop() -> None:
    with live_service() as service, BlockingStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
        for number in range(3):
            stream.send_picture(picture(number))
        stream.close()
        assert [answer.id for answer in stream] == [0, 1, 2]
    with live_service() as service, pytest.raises(BadMessage, match="no model"):
        BlockingStream(service.url, Hello(width=32, height=24, model="none")).__enter__()


def test_health_and_models() -> None:
    import httpx2 as httpx

    with live_service() as service:
        assert httpx.get(service.http + "/healthz").json()["status"] == "ok"
        assert httpx.get(service.http + "/readyz").status_code == 200
        (model,) = httpx.get(service.http + "/v1/models").json()["models"]
        assert model["name"] == "stand-in:0" and model["default"]
        service.call(service.server.drain())
        told = httpx.get(service.http + "/readyz")
        assert told.status_code == 503 and told.json()["code"] == "draining" and told.headers["retry-after"]


def test_sizes_do_not_pile_up_behind_a_frame() -> None:
    async def gate(hello: Hello, channel: Any) -> Guest:
        return Guest(
            "local", charges=(lambda size_bytes, now: 0.0, lambda pixels, now: 60.0)
        )  # the first frame waits for its tenant's rate

    with live_service(gate=gate) as service:
        size = '{"type":"size","width":16,"height":16}'
        refusal, closed = asyncio.run(first_words(service, HELLO, FRAME, *[size] * 100))
    assert (refusal["code"], closed) == ("controls-exceeded", 4429)


def test_questions_for_figures_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that asks and does not read costs one answer, however often it asks."""
    monkeypatch.setattr(live_connection, "_FLUSH_S", 0.2)

    async def run(service: LiveService) -> None:
        async with connect(service.url + "/v1/streams") as socket:
            await socket.send(HELLO)
            await socket.recv()
            (connection,) = service.server.connections.values()

            async def stall(message: str | bytes) -> None:
                await asyncio.Event().wait()

            connection._channel.send = stall  # type: ignore[method-assign]  # a socket that takes no more
            for _ in range(500):
                await socket.send('{"type":"stats"}')
            await socket.send("{")  # refused, which shows that all the others were read
            while not connection._failed.done() and service.server.connections:
                assert connection._outbox.qsize() <= 1
                await asyncio.sleep(0.01)

    with live_service() as service:
        asyncio.run(run(service))


def test_a_client_that_does_not_read_is_sent_away_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket takes no more, not even the refusal: the stream and its tenant's place are free all the same."""
    monkeypatch.setattr(live_connection, "_FLUSH_S", 0.3)
    left: list[str] = []

    async def gate(hello: Hello, channel: Any) -> Guest:
        return Guest("local", leave=lambda: left.append("left"))

    async def run(service: LiveService) -> None:
        hello = dump(Hello(width=480, height=270, **RAW))
        async with connect(service.url + "/v1/streams", max_size=None, max_queue=1) as socket:
            await socket.send(hello)
            granted = json.loads(await socket.recv())["granted"]
            frame = picture(0, 480, 270).tobytes()
            for id_ in range(granted):
                await socket.send(FrameHeader(id_).pack(frame))  # answers of 6 MB each, never read
            async with asyncio.timeout(10):
                while not left:
                    await asyncio.sleep(0.02)
            assert not service.server.connections and not service.server.stepper.seats
            socket.transport.abort()

    with live_service(LiveConfig(unread_timeout_s=1.5), gate=gate) as service:
        asyncio.run(run(service))


def test_an_answer_that_no_frame_follows_is_acknowledged() -> None:
    """A client that sends a frame now and then reads its answers, and is not sent away as one that does not."""

    async def run(service: LiveService) -> None:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            await stream.send_picture(picture(0))
            await anext(stream)
            (connection,) = service.server.connections.values()
            async with asyncio.timeout(5):
                while connection.session.outstanding:
                    await asyncio.sleep(0.02)

    with live_service() as service:
        asyncio.run(run(service))


def test_leaving_the_stream_ends_a_send_that_waits_for_credit() -> None:
    async def run(service: LiveService) -> None:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:

            async def send() -> None:
                for number in range(100):  # nobody takes the answers: it has to wait
                    await stream.send_picture(picture(number))

            sending = asyncio.create_task(send())
            while stream._backlog() < stream._window:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            with pytest.raises(ServiceFailure, match="closed"):
                await sending

    with live_service() as service:
        asyncio.run(run(service))


def test_a_client_ignores_what_a_newer_service_says() -> None:
    told = dict.fromkeys(("epoch", "resume_at", "granted", "max_message_bytes", "width", "height"), 1)
    told |= {"out_width": 1, "out_height": 1, "idle_timeout_s": 1, "max_life_s": 1, "resumable": 1, "news": "more"}
    Welcome(**told, session="s", resume_token="t", model="m", model_sha256="0")  # type: ignore[arg-type]


def test_more_streams_than_there_is_room_for_do_not_slip_in_together() -> None:
    """While the keeper of states takes its time, others may come in: room is looked for again."""

    class SlowStates(LocalStates):
        waiting = 0

        async def open(self, *arguments: Any) -> str:
            self.waiting += 1
            while self.waiting < 4:
                await asyncio.sleep(0.01)
            return await super().open(*arguments)

    async def run(service: LiveService) -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            sockets = [await stack.enter_async_context(connect(service.url + "/v1/streams")) for _ in range(4)]
            for socket in sockets:
                await socket.send(HELLO)
            answers = [json.loads(await socket.recv()) for socket in sockets]
            assert len(states.book) == 1  # what was entered for those that were refused is gone
            return [answer["type"] for answer in answers]

    states = SlowStates()
    with live_service(LiveConfig(most_sessions=1), states=states) as service:
        assert sorted(asyncio.run(run(service))) == ["refused"] * 3 + ["welcome"]


def test_a_model_that_is_replaced_serves_its_streams_to_their_end_and_is_freed() -> None:
    new = open_live_engine("stand-in:1")
    new.model_sha256 = new.pipe.model_sha256 = "another"

    async def run(service: LiveService) -> None:
        (old,) = service.server.engines.values()
        sha256, freed = old.model_sha256, weakref.ref(old)
        hello = Hello(width=32, height=24, model=old.name, **RAW)
        async with LiveStream(service.url, hello) as first, LiveStream(service.url, hello) as other:
            service.server.engines.clear()
            service.server.engines[new.name] = new
            old = None
            for number in range(3):
                await first.send_picture(picture(number))
                assert (await anext(first)).header.index == number
            first._wire._socket.transport.abort()  # type: ignore[union-attr]
            await first.send_picture(picture(3))  # the model is still here: the other stream has it
            assert (await anext(first)).header.index == 3
            assert first.welcome.model_sha256 == sha256 != new.model_sha256 and first.restarts == 0
            await other.close()
            assert [answer async for answer in other] == []
            await first.close()
            assert [answer async for answer in first] == []
        async with asyncio.timeout(10):
            while freed() is not None:
                gc.collect()
                await asyncio.sleep(0.05)
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as later:
            assert later.welcome.model_sha256 == new.model_sha256

    with live_service() as service:
        asyncio.run(run(service))


def test_a_stream_whose_model_is_gone_begins_anew_and_says_so() -> None:
    """Handed over to a replica that has another model only."""

    async def run(service: LiveService, next_one: LiveService) -> None:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            for number in range(3):
                await stream.send_picture(picture(number))
                await anext(stream)
            stream._url = next_one.url
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(service.server.drain(), service._loop))
            await stream.send_picture(picture(3))
            answer = await anext(stream)
            assert (answer.id, answer.header.index) == (3, 0) and Flag.RESET in answer.header.flags
            assert stream.restarts == 1 and stream.hand_overs == 0

    states = LocalStates()
    other = open_live_engine("stand-in:1")
    other.model_sha256 = other.pipe.model_sha256 = "another"
    with live_service(states=states) as service, live_service(states=states, engine=other) as next_one:
        asyncio.run(run(service, next_one))


def test_a_defect_in_one_stream_does_not_stop_the_others() -> None:
    async def run(service: LiveService) -> None:
        hello = Hello(width=32, height=24, **RAW)
        async with LiveStream(service.url, hello) as bad, LiveStream(service.url, hello) as good:
            session = next(
                one.session for key, one in service.server.connections.items() if key.session == bad.welcome.session
            )
            session.stepped = None  # type: ignore[assignment,method-assign]  # whatever breaks in it
            await bad.send_picture(picture(0))
            assert (await anext(bad)).header.index == 0  # it began anew in another session
            assert bad.restarts == 1
            for number in range(3):
                await good.send_picture(picture(number))
                async with asyncio.timeout(10):
                    assert is_restored(await anext(good), number)

    with live_service() as service:
        asyncio.run(run(service))


def test_a_stream_whose_task_is_cancelled_at_its_end_lets_nobody_wait() -> None:
    async def cancel_and_drain(service: LiveService) -> None:
        (connection,) = service.server.connections.values()
        (serving,) = (task for task in asyncio.all_tasks() if "LiveServer.serve" in repr(task.get_coro()))
        serving.cancel()
        await asyncio.sleep(0)
        serving.cancel()  # while it cleans up
        async with asyncio.timeout(5):
            await connection.drain()

    async def run(service: LiveService) -> None:
        async with LiveStream(service.url, Hello(width=32, height=24, **RAW)) as stream:
            await stream.send_picture(picture(0))
            await anext(stream)
            await asyncio.to_thread(service.call, cancel_and_drain(service))

    with live_service() as service:
        asyncio.run(run(service))
