"""Live streams over a real gRPC server, by the client and by hand: the same contract as by WebSocket, without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import cv2
import grpc
import numpy as np
import pytest

from actors import live_connection
from actors.grpc_channel import GrpcChannel, serve_call
from actors.live_server import Guest, LiveConfig, LiveServer
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.live_grpc import MESSAGE_LIMIT, METHOD, SERVICE, Packet, add_LiveServicer_to_server, pack, unpack
from infra.protocol import Deadline, DropReason, Flag, FrameHeader, Hello, Newest, dump
from infra.refusals import BadMessage, FrameTooLarge
from tests.live_service import open_live_engine

RAW = {"codec_in": "raw", "codec_out": "raw"}


def picture(number: int, width: int = 32, height: int = 24) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


class Servicer:
    def __init__(self, server: LiveServer) -> None:
        self.server = server

    async def Stream(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        metadata = dict(context.invocation_metadata())
        async for packet in serve_call(self.server.serve, GrpcChannel(requests, metadata, None)):
            yield packet


@asynccontextmanager
async def grpc_service(
    config: LiveConfig | None = None, model: str = "stand-in:0", **options: Any
) -> AsyncIterator[tuple[LiveServer, str]]:
    engine = open_live_engine(model)
    server = LiveServer(config or LiveConfig(), {engine.name: engine}, **options)
    server.start()
    limits = [("grpc.max_send_message_length", MESSAGE_LIMIT), ("grpc.max_receive_message_length", MESSAGE_LIMIT)]
    listener = grpc.aio.server(options=limits)
    add_LiveServicer_to_server(Servicer(server), listener)
    port = listener.add_insecure_port("127.0.0.1:0")
    await listener.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await listener.stop(0)
        await server.stop()


@asynccontextmanager
async def call(address: str) -> AsyncIterator[Any]:
    """A call by hand."""
    async with grpc.aio.insecure_channel(address) as channel:
        method = channel.stream_stream(
            f"/{SERVICE}/{METHOD}", request_serializer=Packet.SerializeToString, response_deserializer=Packet.FromString
        )
        yield method()


async def run_stream(address: str, hello: Hello, pictures: list[Any], after: Any = None) -> tuple[Any, LiveStream]:
    async with asyncio.timeout(60), LiveStream(f"grpc://{address}", hello) as stream:

        async def send() -> None:
            for one in pictures:
                await stream.send_picture(one)
            await stream.close()

        sending = asyncio.create_task(send())
        answers: list[LiveAnswer] = []
        async for answer in stream:
            answers.append(answer)
            if after is not None:
                after(stream, answer.id)
        await sending
        return answers, stream


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["drain", "cancel", None])
def test_every_frame_comes_back_once_and_in_order(how: str | None) -> None:
    async def run() -> None:
        async with grpc_service(LiveConfig(state_interval_s=0.05)) as (server, address):
            drains = []

            def after(stream: LiveStream, id_: int) -> None:
                if how == "cancel" and id_ == 10:
                    stream._wire._call.cancel()  # type: ignore[union-attr]
                if how == "drain" and id_ == 10:
                    (connection,) = server.connections.values()
                    drains.append(asyncio.create_task(connection.drain()))

            pictures = [picture(number) for number in range(40)]
            answers, stream = await run_stream(address, Hello(width=32, height=24, **RAW), pictures, after)
            assert [answer.id for answer in answers] == list(range(40))
            assert [answer.header.index for answer in answers] == list(range(40))
            assert all((answer.picture()[::4, ::4] == picture(answer.id)).all() for answer in answers)
            assert (stream.hand_overs, stream.restarts) == (int(how is not None), 0)
            await until(lambda: not server.connections)

    asyncio.run(run())


def test_policies_hold_over_a_resumption() -> None:
    """Policy newest: what was dropped is not sent again, and indices stay contiguous."""

    async def run() -> None:
        async with grpc_service(LiveConfig(state_interval_s=0.05), "stand-in:20") as (_, address):

            def after(stream: LiveStream, id_: int) -> None:
                if id_ == 12:
                    stream._wire._call.cancel()  # type: ignore[union-attr]

            hello = Hello(width=32, height=24, policy=Newest(), **RAW)
            answers, stream = await run_stream(address, hello, [picture(n) for n in range(40)], after)
            assert stream.hand_overs == 1
            assert [answer.id for answer in answers] == list(range(40))
            restored = [answer for answer in answers if answer.dropped is None]
            assert {answer.dropped for answer in answers} == {None, DropReason.NEWER}
            assert [answer.header.index for answer in restored] == list(range(len(restored)))
            assert not any(Flag.GAP in answer.header.flags for answer in answers)

    asyncio.run(run())


def test_frames_above_the_limit_of_a_websocket() -> None:
    """Raw 4K in (25 MB a message), JPEG out; too late for its deadline, which saves the test the model's 132 Mpx."""

    async def run() -> None:
        config = LiveConfig(max_pixels=3840 * 2160, unread_timeout_s=60)
        async with grpc_service(config) as (_, address):
            small = cv2.GaussianBlur(picture(0, 96, 54), (0, 0), 2)
            frame = cv2.resize(small, (3840, 2160), interpolation=cv2.INTER_CUBIC)
            policy = Deadline(ms=1e-6, late="resize")
            hello = Hello(width=3840, height=2160, out_height=1080, codec_in="raw", codec_out="jpeg", policy=policy)
            (answer,), _ = await run_stream(address, hello, [frame])
            error = answer.picture().astype(int) - cv2.resize(frame, (1920, 1080), interpolation=cv2.INTER_CUBIC)
            assert answer.dropped is None and np.abs(error).mean() < 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("hello", "kind"),
    [
        ({"width": 32, "height": 24, "model": "none"}, BadMessage),
        ({"width": 1900, "height": 1000, "scale": 4, "codec_out": "raw"}, None),
        ({"width": 4000, "height": 4000}, FrameTooLarge),
    ],
)
def test_hellos(hello: dict[str, Any], kind: type[Exception] | None) -> None:
    async def run() -> None:
        async with grpc_service() as (_, address):
            if kind is None:  # 91 MB a result: not by WebSocket, but by gRPC
                async with LiveStream(f"grpc://{address}", Hello(**hello)):
                    return
            with pytest.raises(kind):
                async with LiveStream(f"grpc://{address}", Hello(**hello)):
                    pass

    asyncio.run(run())


def test_a_client_that_half_closes_gets_the_rest() -> None:
    async def run() -> None:
        async with grpc_service() as (server, address), call(address) as stream:
            await stream.write(pack(dump(Hello(width=32, height=24, **RAW))))
            for id_ in range(5):
                await stream.write(pack(FrameHeader(id_).pack(picture(id_).tobytes())))
            await stream.done_writing()
            messages = [unpack(packet) async for packet in stream]
            assert [FrameHeader.unpack(one)[0].id for one in messages if isinstance(one, bytes)] == list(range(5))
            assert json.loads(messages[-1])["type"] == "closed"
            assert await stream.code() is grpc.StatusCode.OK
            assert not server.connections

    asyncio.run(run())


@pytest.mark.parametrize("after_hello", [True, False])
def test_a_cancelled_call_leaves_nothing(after_hello: bool) -> None:
    left: list[str] = []

    async def gate(hello: Hello, channel: Any) -> Guest:
        return Guest("local", leave=lambda: left.append("left"))

    async def run() -> None:
        async with grpc_service(gate=gate) as (server, address), call(address) as stream:
            if after_hello:
                await stream.write(pack(dump(Hello(width=32, height=24, **RAW))))
                await stream.read()
                for id_ in range(4):
                    await stream.write(pack(FrameHeader(id_).pack(picture(id_).tobytes())))
            else:
                await stream.wait_for_connection()
                await until(lambda: server._hellos == 1)
            stream.cancel()
            await until(lambda: not server.connections and not server._hellos and not server.stepper.seats)
            await until(lambda: left == ["left"] * after_hello)

    asyncio.run(run())


def test_a_call_whose_client_does_not_read_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits into the call's buffers any more, not even why it is closed; what is there can be read."""
    monkeypatch.setattr(live_connection, "_FLUSH_S", 0.3)

    async def run() -> None:
        async with grpc_service(LiveConfig(unread_timeout_s=1.5)) as (server, address), call(address) as stream:
            await stream.write(pack(dump(Hello(width=480, height=270, **RAW))))
            granted = json.loads(unpack(await stream.read()))["granted"]
            for id_ in range(granted):
                await stream.write(pack(FrameHeader(id_).pack(picture(id_, 480, 270).tobytes())))
            await until(lambda: len(server.connections) == 1)
            await until(lambda: not server.connections)
            async with asyncio.timeout(10):
                with pytest.raises(grpc.aio.AioRpcError):  # larger than this client takes: only the end matters
                    while await stream.read() is not grpc.aio.EOF:
                        pass

    asyncio.run(run())


def test_a_call_that_is_cancelled_twice_still_saves_its_stream() -> None:
    """The first cancellation ends the stream; the second one, of a server that stops, finds it saving its state."""

    async def run() -> None:
        saving, may_go, saved = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def serve(channel: GrpcChannel) -> None:
            assert await channel.receive() is None
            saving.set()
            await may_go.wait()
            saved.set()

        async def requests() -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield

        async def answer() -> None:
            async for _ in serve_call(serve, GrpcChannel(requests(), {}, None)):
                pass

        call = asyncio.create_task(answer())
        await asyncio.sleep(0)
        call.cancel()
        await saving.wait()
        call.cancel()
        await asyncio.wait([call])
        may_go.set()
        async with asyncio.timeout(5):
            await saved.wait()

    asyncio.run(run())
