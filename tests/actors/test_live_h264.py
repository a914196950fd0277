"""H.264 through the whole live service, both ways: damage, delay, hand-over and lost connections in the middle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from actors.live_server import LiveConfig
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import DropReason, Flag, Hello, Newest
from infra.refusals import BadMessage
from pipeline.colour import from_rgb
from tests.coded_frames import Frame, access_units, psnr, walk
from tests.live_service import LiveService, live_service

SIZE = {"width": 320, "height": 180}
KEYS_EVERY = 8
NO_DELAY = f"bframes=0:keyint={KEYS_EVERY}:min-keyint={KEYS_EVERY}:scenecut=0"


def delayed_units(frames: Sequence[Frame], keys: Sequence[int]) -> list[bytes]:
    """H.264 that permits reordering and makes no use of it: a decoder gives each picture out some messages later."""
    height, width = frames[0].shape[:2]
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
    encoder.framerate, encoder.time_base = Fraction(25), Fraction(1, 25)
    encoder.thread_count = 1
    encoder.options = {"preset": "veryfast", "crf": "12", "x264-params": "bframes=2:b-adapt=0:scenecut=0"}
    packets = []
    for index, rgb_HWC in enumerate(frames):
        picture = from_rgb(rgb_HWC, "yuv420p", 1, 1)
        picture.pts, picture.time_base = index, Fraction(1, 25)
        picture.pict_type = PictureType.I if index in keys else PictureType.P
        packets += encoder.encode(picture)
    return [bytes(packet) for packet in [*packets, *encoder.encode(None)]]


def is_key(id_: int) -> bool:
    return id_ % KEYS_EVERY == 0


async def run_stream(
    service: LiveService,
    hello: Hello,
    units: Iterable[bytes],
    *,
    after: Callable[[LiveStream, int], None] = lambda stream, id_: None,
    key: Callable[[int], bool] = is_key,
) -> tuple[list[LiveAnswer], LiveStream]:
    """Send access units and close; `after` is called with the id of each answer."""
    async with asyncio.timeout(30), LiveStream(service.url, hello) as stream:

        async def send() -> None:
            for id_, unit in enumerate(units):
                await stream.send(unit, key=key(id_))
            await stream.close()

        sending = asyncio.create_task(send())
        answers = []
        async for answer in stream:
            answers.append(answer)
            after(stream, answer.id)
        await sending
        return answers, stream


def decoded(answers: list[LiveAnswer]) -> dict[int, np.ndarray[Any, Any]]:
    """Decode answers in H.264 as a player would: one decoder, in the order of their arrival; pictures by id."""
    context: Any = av.CodecContext.create("h264", "r")
    pictures: dict[int, np.ndarray[Any, Any]] = {}
    for answer in answers:
        if answer.dropped is None:
            packet = av.Packet(answer.payload)
            packet.pts = packet.dts = answer.id
            for frame in context.decode(packet):
                pictures[frame.pts] = frame.to_ndarray(format="rgb24")
    for frame in context.decode(None):
        pictures[frame.pts] = frame.to_ndarray(format="rgb24")
    return pictures


def test_what_a_decoder_gives_up_is_answered() -> None:
    """A stream with delay and a missing reference: frames that were accepted before the gap get no picture any more."""
    units = delayed_units(walk(12), keys=(0, 8))
    del units[4]

    async def run(service: LiveService) -> list[LiveAnswer]:
        hello = Hello(**SIZE, codec_in="h264", codec_out="raw")
        return (await run_stream(service, hello, units, key=lambda id_: id_ in (0, 7)))[0]

    with live_service() as service:
        answers = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(11))
    lost = [answer.id for answer in answers if answer.dropped is DropReason.UNDECODABLE]
    assert lost == [2, 3, 4, 5, 6]  # 2 and 3 wait in the decoder when the gap shows
    source = [frame for id_, frame in enumerate(walk(12)) if id_ != 4]
    for answer in answers:
        if answer.id not in lost:
            assert psnr(answer.picture()[::4, ::4], source[answer.id]) > 30
    assert [answer.header.index for answer in answers if answer.dropped is None] == list(range(6))


def test_a_stream_that_waits_in_the_decoder_for_ever_is_idle() -> None:
    units = delayed_units(walk(2), keys=(0,))

    async def run(service: LiveService) -> str:
        async with LiveStream(service.url, Hello(**SIZE, codec_in="h264")) as stream:
            await stream.send(units[0], key=True)
            async with asyncio.timeout(10):
                with pytest.raises(Exception, match=r"No frame came") as caught:
                    await anext(stream)
            return str(getattr(caught.value, "code", ""))

    with live_service(LiveConfig(idle_timeout_s=0.5)) as service:
        assert asyncio.run(run(service)) == "session-idle"


def test_b_frames_are_refused_in_words() -> None:
    async def run(service: LiveService) -> None:
        units = access_units(walk(12), x264="bframes=2:b-adapt=0:scenecut=0")
        with pytest.raises(BadMessage, match="shown after") as caught:
            await run_stream(service, Hello(**SIZE, codec_in="h264"), units, key=lambda id_: id_ == 0)
        assert caught.value.code == "frames-reordered" and "B frames" in caught.value.remedy

    with live_service() as service:
        asyncio.run(run(service))


@pytest.mark.parametrize("how", ["drain", "abort"])
def test_both_ways_over_a_hand_over_and_a_lost_connection(how: str) -> None:
    """The client sends again from the last key frame; what it has had is decoded, not restored, or not sent twice."""
    frames = walk(48)

    async def run(service: LiveService) -> tuple[list[LiveAnswer], LiveStream]:
        def after(stream: LiveStream, id_: int) -> None:
            if id_ not in (5, 26):  # in the middle of a group of pictures, with more than a window to come
                return
            if how == "abort":
                stream._wire._socket.transport.abort()  # type: ignore[union-attr]
            else:
                (connection,) = service.server.connections.values()
                asyncio.run_coroutine_threadsafe(connection.drain(), service._loop)

        hello = Hello(**SIZE, codec_in="h264", codec_out="h264", quality=95)
        return await run_stream(service, hello, access_units(frames, x264=NO_DELAY), after=after)

    with live_service(LiveConfig(state_interval_s=0.05)) as service:
        answers, stream = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(48))
    assert all(answer.dropped is None for answer in answers)
    assert [answer.header.index for answer in answers] == list(range(48))
    assert stream.hand_overs == 2 and stream.restarts == 0
    resumed = [answer for answer in answers if Flag.RESUMED in answer.header.flags]
    assert len(resumed) == 2 and all(Flag.KEY in answer.header.flags for answer in resumed)
    pictures = decoded(answers)
    assert sorted(pictures) == list(range(48))
    assert min(psnr(pictures[id_][1::4, 1::4], frames[id_]) for id_ in pictures) > 30
    assert not any(Flag.GAP in answer.header.flags for answer in answers)


def test_a_dropped_frame_is_sent_again_for_the_decoder_alone() -> None:
    frames = walk(40)

    async def run(service: LiveService) -> tuple[list[LiveAnswer], LiveStream]:
        def after(stream: LiveStream, id_: int) -> None:
            if id_ == 20:
                stream._wire._socket.transport.abort()  # type: ignore[union-attr]

        hello = Hello(**SIZE, codec_in="h264", codec_out="raw", policy=Newest())
        return await run_stream(service, hello, access_units(frames, x264=NO_DELAY), after=after)

    with live_service(LiveConfig(state_interval_s=0.05), "stand-in:20") as service:
        answers, stream = asyncio.run(run(service))
    assert [answer.id for answer in answers] == list(range(40))
    assert stream.hand_overs == 1 and stream.restarts == 0
    restored = [answer for answer in answers if answer.dropped is None]
    assert {answer.dropped for answer in answers} == {None, DropReason.NEWER}
    assert [answer.header.index for answer in restored] == list(range(len(restored)))
    assert all(psnr(answer.picture()[::4, ::4], frames[answer.id]) > 30 for answer in restored)
