"""A response that reads the request's body while it is being sent, and notices when either side stops.

Starlette's `StreamingResponse` listens for a disconnect by reading from the request, and drops what it reads: a body
that is still arriving then loses pieces. Here one task alone receives, all that comes goes into a pipe, and another
task sends.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.byte_pipe import BytePipe, Gone
from infra.refusals import FrameTooLarge, Refusal, ServiceFailure, TimedOut

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is sent: everything in `body`, in chunks as they come."""

    body: AsyncIterator[bytes]
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Exchange = Callable[[BytePipe], AbstractAsyncContextManager[Answer]]
"""Gets the request's body and gives the answer. It is left when the answer has been sent, or cannot be sent."""


class DuplexResponse(Response):
    """Sends an answer while the body arrives.

    - A `Refusal` raised before the answer begins is sent as JSON with its status.
    - A failure after that ends the connection without the last chunk, so that the client sees it, and is logged.
    - Nothing comes, or nothing is taken, for `idle_s` seconds: the end, by `TimedOut`.
    - The client goes away: `body` is aborted with `Gone`, and the exchange is cancelled.

    Args:
        exchange: what to do.
        body: the pipe that the request's body goes into.
        max_bytes: of the request's body.
    """

    def __init__(self, exchange: Exchange, body: BytePipe, *, max_bytes: int, idle_s: float) -> None:
        super().__init__()
        self._exchange, self._pipe = exchange, body
        self._max_bytes, self._idle_s = max_bytes, idle_s
        self._started = self._sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        receiving = asyncio.create_task(self._receive(scope, receive))
        answering = asyncio.create_task(self._answer(scope, send))
        try:
            await asyncio.wait({receiving, answering}, return_when=asyncio.FIRST_COMPLETED)
            if self._sent:  # a server says then, too, that the client has gone
                await answering
        finally:
            self._pipe.abort(Gone())
            for task in (receiving, answering):
                task.cancel()
            await asyncio.gather(receiving, answering, return_exceptions=True)
        if self.background is not None:
            await self.background()

    async def _receive(self, scope: Scope, receive: Receive) -> None:
        """Put the body into the pipe, then wait for the client to go."""
        try:
            declared = _content_length(scope)
            if declared > self._max_bytes:
                raise self._too_large(declared)
            more = True
            while more:
                try:
                    async with asyncio.timeout(self._idle_s):
                        message = await receive()
                except TimeoutError:
                    raise self._idle("Nothing came") from None
                if message["type"] != "http.request":
                    return
                content: bytes = message.get("body", b"")
                if self._pipe.total_bytes + len(content) > self._max_bytes:
                    raise self._too_large(self._pipe.total_bytes + len(content))
                await self._pipe.put(content)
                more = message.get("more_body", False)
            self._pipe.end()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Who reads the pipe raises it again, and so it becomes the answer.
            self._pipe.abort(error)
        while (await receive())["type"] != "http.disconnect":
            pass  # what comes of a body that is refused already

    async def _answer(self, scope: Scope, send: Send) -> None:
        try:
            async with self._exchange(self._pipe) as answer:
                await self._send(send, _start(answer.status, answer.headers))
                self._started = True
                async for chunk in answer.body:
                    await self._send(send, {"type": "http.response.body", "body": chunk, "more_body": True})
                await self._send(send, {"type": "http.response.body", "body": b"", "more_body": False})
                self._sent = True
        except Gone:
            pass
        except Exception as error:
            await self._fail(scope, send, error)

    async def _fail(self, scope: Scope, send: Send, error: Exception) -> None:
        if self._started:
            told = f"{error.code}: {error}" if isinstance(error, Refusal) else repr(error)
            logger.error("the answer to %s ends early: %s", scope["path"], told)
            return
        if not isinstance(error, Refusal):
            logger.error("%s failed", scope["path"], exc_info=error)
            error = ServiceFailure("The request failed.", remedy="Try again later.")
        content = json.dumps(error.to_message()).encode()
        with suppress(Refusal):
            await self._send(send, _start(error.http_status, refusal_headers(error)))
            await self._send(send, {"type": "http.response.body", "body": content, "more_body": False})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._idle_s):
                await send(message)
        except TimeoutError:
            raise self._idle("Nothing was taken") from None
        except OSError:
            raise Gone from None

    def _idle(self, what: str) -> TimedOut:
        return TimedOut(
            f"{what} for {self._idle_s:g} seconds.", limit=f"{self._idle_s:g} seconds", remedy="Send and read steadily."
        )

    def _too_large(self, size: int) -> FrameTooLarge:
        return FrameTooLarge(
            f"The body has {size} bytes or more; the limit is {self._max_bytes}.",
            code="upload-bytes",
            limit=f"{self._max_bytes} bytes",
            remedy="Send it in parts, or restore it as a job (POST /v1/jobs).",
        )


def refusal_headers(refusal: Refusal) -> dict[str, str]:
    """Return the headers of an answer that is a refusal in JSON."""
    headers = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(refusal.retry_after_s)))
    return headers


def _start(status: int, headers: Mapping[str, str]) -> dict[str, Any]:
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
