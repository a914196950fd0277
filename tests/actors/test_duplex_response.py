"""Reading a request and answering it at the same time, on a real server."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from actors.byte_pipe import BytePipe, Gone
from actors.duplex_response import Answer, DuplexResponse, Exchange
from infra.refusals import AdmissionRefused, BadMessage, refusal_from_message
from tests.http_server import TIMEOUT_S, Duplex, served

PIECES = [bytes([number]) * 10_000 for number in range(5)]
IDLE_S = 0.5


class Left:
    """What the server's side saw, for the test to wait for."""

    def __init__(self) -> None:
        self.how: list[BaseException | None] = []
        self.event = threading.Event()

    def wait(self) -> BaseException | None:
        assert self.event.wait(TIMEOUT_S)
        return self.how[-1]


def make_app(left: Left) -> FastAPI:
    app = FastAPI()

    @app.post("/plain")
    async def plain(request: Request) -> StreamingResponse:
        return StreamingResponse(request.stream())

    @asynccontextmanager
    async def noted() -> AsyncIterator[None]:
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            left.how.append(error)
            left.event.set()

    def response(exchange: Exchange, *, max_bytes: int = 1 << 30, idle_s: float = TIMEOUT_S) -> DuplexResponse:
        return DuplexResponse(exchange, BytePipe(1 << 16), max_bytes=max_bytes, idle_s=idle_s)

    @asynccontextmanager
    async def echo(body: BytePipe) -> AsyncIterator[Answer]:
        async with noted():
            yield Answer(body.chunks(), headers={"Content-Type": "application/octet-stream"})

    @asynccontextmanager
    async def size(body: BytePipe) -> AsyncIterator[Answer]:
        """Answers only when all has come, three times as long."""
        async with noted():
            total = sum([len(chunk) async for chunk in body.chunks()])

            async def chunks() -> AsyncIterator[bytes]:
                for _ in range(3 * total // 1000):
                    yield bytes(1000)

            yield Answer(chunks())

    @app.post("/echo")
    async def echoed() -> DuplexResponse:
        return response(echo)

    @app.post("/small")
    async def small() -> DuplexResponse:
        return response(size, max_bytes=1000)

    @app.post("/impatient")
    async def impatient() -> DuplexResponse:
        return response(echo, idle_s=IDLE_S)

    @app.post("/after")
    async def after() -> DuplexResponse:
        body = BytePipe(1 << 16, spill_bytes=1 << 30)
        return DuplexResponse(size, body, max_bytes=1 << 30, idle_s=TIMEOUT_S)

    @app.post("/refuse")
    async def refuse() -> DuplexResponse:
        @asynccontextmanager
        async def exchange(body: BytePipe) -> AsyncIterator[Answer]:
            raise AdmissionRefused("No room.", remedy="Wait.", limit="2", retry_after_s=7)
            yield

        return response(exchange)

    @app.post("/break/{when}")
    async def breaks(when: str) -> DuplexResponse:
        @asynccontextmanager
        async def exchange(body: BytePipe) -> AsyncIterator[Answer]:
            async def chunks() -> AsyncIterator[bytes]:
                # What a server has not read when it closes makes a reset of the end, which may overtake the answer.
                async for _ in body.chunks():
                    pass
                yield b"a part of it"
                raise BadMessage("The rest is not possible.", remedy="None.") if when == "typed" else KeyError("secret")

            if when == "early":
                raise KeyError("secret")
            yield Answer(chunks())

        return response(exchange)

    return app


@pytest.fixture
def left() -> Left:
    return Left()


@pytest.fixture
def port(left: Left) -> Iterator[int]:
    with served(make_app(left)) as number:
        yield number


def test_the_framework_s_own_response_loses_what_it_listens_for_a_disconnect_with(port: int) -> None:
    """Why there is another one: if this fails, Starlette has mended it."""
    got = b""
    with Duplex(port, "/plain") as request:
        for piece in PIECES:
            request.send(piece)
            request.socket.settimeout(IDLE_S)
            try:
                got += _exactly(request, len(piece))
            except (TimeoutError, http.client.HTTPException, OSError):
                break  # it was eaten
    assert len(got) < sum(map(len, PIECES))


def test_a_piece_comes_back_before_the_next_is_sent(port: int) -> None:
    with Duplex(port, "/echo") as request:
        for piece in PIECES:
            request.send(piece)
            assert _exactly(request, len(piece)) == piece
        request.end()
        assert request.rest() == b""
        assert request.answer.headers["Content-Type"] == "application/octet-stream"


def test_nothing_is_lost_at_any_speed(port: int) -> None:
    content = b"".join(number.to_bytes(4, "big") for number in range(1_000_000))
    with Duplex(port, "/echo") as request:
        sending = threading.Thread(target=lambda: (request.send(content), request.end()))
        sending.start()
        assert request.rest() == content
        sending.join()


def test_a_client_that_sends_everything_before_it_reads_gets_its_answer(port: int) -> None:
    """As most HTTP libraries do. What does not fit into memory waits in a file, or both sides would wait for ever."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST", "/after", body=bytes(20_000_000))
    assert len(connection.getresponse().read()) == 60_000_000
    connection.close()


def test_a_refusal_is_the_answer_though_the_body_still_comes(port: int) -> None:
    with Duplex(port, "/refuse") as request:
        request.send(PIECES[0])
        told = request.refusal()
        assert told["status"] == 503 and request.answer.headers["Retry-After"] == "7"
        assert isinstance(refusal_from_message(told), AdmissionRefused)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_its_limit_is_refused(port: int, left: Left, declared: bool) -> None:
    headers = {"Content-Length": "1001"} if declared else {}
    with Duplex(port, "/small", headers=headers, chunked=not declared) as request:
        if not declared:
            request.send(bytes(1001))
        told = request.refusal()
        assert (told["status"], told["code"], told["limit"]) == (413, "upload-bytes", "1000 bytes")
    assert left.wait() is not None


def test_an_unknown_failure_tells_nothing_of_itself(port: int, caplog: pytest.LogCaptureFixture) -> None:
    with Duplex(port, "/break/early") as request:
        told = request.refusal()
    assert told["status"] == 500 and told["kind"] == "ServiceFailure" and "secret" not in str(told)
    assert "/break/early failed" in caplog.text


@pytest.mark.parametrize("when", ["typed", "untyped"])
def test_a_failure_after_the_beginning_is_seen_by_the_client_and_logged(
    port: int, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    with Duplex(port, f"/break/{when}") as request:
        request.end()
        assert request.answer.status == 200
        with pytest.raises(http.client.IncompleteRead) as caught:
            request.rest()
        assert caught.value.partial == b"a part of it"
    expected = "bad-message: The rest is not possible." if when == "typed" else "KeyError"
    assert f"the answer to /break/{when} ends early: {expected}" in caplog.text


def test_a_client_that_goes_away_is_noticed(port: int, left: Left) -> None:
    with Duplex(port, "/echo") as request:
        request.send(PIECES[0])
        assert _exactly(request, 10_000) == PIECES[0]
    assert isinstance(left.wait(), Gone | asyncio.CancelledError | GeneratorExit)


def test_a_client_that_goes_away_without_reading_is_noticed(port: int, left: Left) -> None:
    request = Duplex(port, "/after")
    request.send(bytes(20_000_000))
    request.end()
    assert request.answer.status == 200
    request.close()
    left.wait()


def test_a_client_that_falls_silent_is_told(port: int, left: Left) -> None:
    with Duplex(port, "/impatient") as request:
        request.send(PIECES[0])
        assert _exactly(request, 10_000) == PIECES[0]
        with pytest.raises(http.client.IncompleteRead):
            request.rest()
    assert left.wait() is not None


def test_a_client_that_does_not_read_is_let_go(port: int, left: Left) -> None:
    with Duplex(port, "/impatient") as request:
        request.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request.socket.settimeout(5 * IDLE_S)
        with pytest.raises(OSError):
            for _ in range(10_000):
                request.send(bytes(100_000))
        assert left.wait() is not None


def _exactly(request: Duplex, size: int) -> bytes:
    got = b""
    while len(got) < size:
        piece = request.read(size - len(got))
        assert piece, "the body ended"
        got += piece
    return got
