"""The web application of the live service: FastAPI routes around a `LiveServer`. Knows no Ray.

Every route but the health checks and the page asks who is there. Refusals are JSON of one shape, see `infra.refusals`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.websockets import WebSocketDisconnect, WebSocketState

from actors.api_document import DESCRIPTION, tell_of_credentials
from actors.live_server import LiveServer
from actors.page_routes import add_page
from actors.refusing_route import RESPONSES
from actors.request_head import RequestHeadLimits
from infra.origins import OriginPolicy
from infra.protocol import SUBPROTOCOL, WEBSOCKET_MESSAGE_LIMIT
from infra.refusals import AdmissionRefused, BadMessage, Refusal, ServiceFailure

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
_UNSERVED: Final = {
    404: ("not-found", "Nothing is at this address."),
    405: ("method-not-allowed", "This address does not have this method."),
}
_LONGEST_REASON = 120  # bytes: RFC 6455, section 5.5, leaves 123 for a close frame's reason


class ModelCard(BaseModel):
    """One model that streams can ask for.

    Attributes:
        model_sha256: fingerprint of its weights and configuration.
        step_ms: what a frame of 320x180 costs at each number of steps, as far as it is known.
    """

    name: str
    model_sha256: str
    default: bool
    step_ms: dict[str, float]


class Models(BaseModel):
    """All models of the replica that answered."""

    models: list[ModelCard]


class Health(BaseModel):
    """`ok`, or why not."""

    status: str
    streams: int = 0


class WebSocketChannel:
    """A WebSocket as `actors.live_connection.Channel`."""

    message_limit = WEBSOCKET_MESSAGE_LIMIT
    is_web = True

    def __init__(self, socket: WebSocket) -> None:
        self.socket = socket
        self.headers: Mapping[str, str] = socket.headers
        self.peer = socket.client.host if socket.client else None
        self._gone = asyncio.Event()

    def leave(self) -> None:
        """The client has gone."""
        self._gone.set()

    async def receive(self) -> str | bytes | None:
        """Return the next message; None when the client has gone."""
        coming = asyncio.ensure_future(self.socket.receive())
        leaving = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait([coming, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return None
            message = coming.result()
        finally:
            coming.cancel()
            leaving.cancel()
        if message["type"] == "websocket.disconnect":
            return None
        text: str | None = message.get("text")
        return text if text is not None else message.get("bytes") or b""

    async def send(self, message: str | bytes) -> None:
        """Send a message; to a client that has gone, nothing."""
        if self.socket.application_state is not WebSocketState.CONNECTED:
            return
        try:
            if isinstance(message, str):
                await self.socket.send_text(message)
            else:
                await self.socket.send_bytes(message)
        except (WebSocketDisconnect, RuntimeError, OSError):  # RuntimeError: sent after the close, by ASGI's rules
            logger.debug("a message to a client that has gone")

    async def close(self, code: int, reason: str) -> None:
        """Close the socket; once."""
        if self.socket.application_state is WebSocketState.CONNECTED:
            await self.socket.close(code, reason[:_LONGEST_REASON])


def make_app(
    get_server: Callable[[], LiveServer],
    *,
    origins: OriginPolicy | None = None,
    admit: Callable[[Request], Awaitable[object]] | None = None,
    admit_scrape: Callable[[Request], Awaitable[object]] | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        get_server: returns the replica's server; asked at each request, because the application is made before it.
        origins: whose pages may use it; None: only its own.
        admit: raises a refusal for those who may not see what models there are; None: everybody may.
        admit_scrape: the same, of the metrics.
    """
    app = FastAPI(
        title="Upriver",
        summary="Live video super-resolution: each frame is restored from the frames before it.",
        description=DESCRIPTION,
        version="1",
        docs_url=None,  # its page loads scripts from elsewhere; the document itself is at /openapi.json
        redoc_url=None,
        responses=RESPONSES,
    )
    tell_of_credentials(app, open_paths=("/healthz", "/readyz"))

    app.add_middleware(CORSMiddleware, **(origins or OriginPolicy()).cors_arguments())
    app.add_middleware(RequestHeadLimits)  # the outermost: nobody else has to read what is too large

    @app.exception_handler(Refusal)
    async def refused(request: Request, refusal: Refusal) -> Response:
        return problem(refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return problem(
            BadMessage(f"{place} is not possible: {first['msg']}.", code="bad-request", remedy="See GET /openapi.json.")
        )

    @app.exception_handler(HTTPException)
    async def unserved(request: Request, error: HTTPException) -> Response:
        """No such address, or another method than it has: told in the one shape that refusals have."""
        code, message = _UNSERVED.get(error.status_code, ("bad-request", "The request is not possible."))
        refusal = BadMessage(message, code=code, remedy="See GET /openapi.json.")
        return JSONResponse(refusal.to_message(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        """What nobody foresaw: logged by the server with its traceback, which the client never sees."""
        return problem(ServiceFailure("The request failed.", remedy="Try again; if it lasts, tell the operator."))

    add_page(app, PAGE)

    @app.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> Health:
        return Health(status="ok")

    @app.get("/readyz", summary="Whether it restores: models are loaded and have made a step")
    async def readyz() -> Health:
        server = get_server()
        if server.draining:
            raise AdmissionRefused(
                "This replica is going away.", code="draining", remedy="Ask another one.", retry_after_s=1.0
            )
        return Health(status="ok", streams=len(server.connections))

    @app.get("/v1/models", summary="The models that streams can ask for")
    async def models(request: Request) -> Models:
        if admit is not None:
            await admit(request)
        cards = []
        for number, engine in enumerate(get_server().engines.values()):
            step_ms = {str(steps): round(1000 * engine.cost_s(180, 320, steps), 3) for steps in (4, 2, 1)}
            cards.append(
                ModelCard(name=engine.name, model_sha256=engine.model_sha256, default=number == 0, step_ms=step_ms)
            )
        return Models(models=cards)

    @app.get(
        "/metrics",
        summary="Metrics of all replicas for Prometheus",
        response_class=Response,  # of no type: FastAPI would describe refusals as of the same type
        responses={
            200: {
                "content": {
                    "text/plain": {"schema": {"type": "string"}},
                    "application/openmetrics-text": {"schema": {"type": "string"}},
                }
            }
        },
    )
    async def metrics(request: Request) -> Response:
        if admit_scrape is not None:
            await admit_scrape(request)
        accept, encoding = (request.headers.get(name, "") for name in ("accept", "accept-encoding"))
        page = await get_server().desk.page(accept, encoding)
        headers = {"Content-Type": page.content_type, "Vary": "Accept, Accept-Encoding"}
        if page.encoding:
            headers["Content-Encoding"] = page.encoding
        return Response(page.body, headers=headers)

    add_streams(app, get_server)
    return app


def add_streams(app: FastAPI, get_server: Callable[[], LiveServer]) -> None:
    """Add `/v1/streams`, the WebSocket of live streams."""

    @app.websocket("/v1/streams")
    async def streams(socket: WebSocket) -> None:
        offered = socket.scope.get("subprotocols") or []
        # Accepted before anything is refused: what is refused before it reaches clients as HTTP 500 through Ray Serve.
        await socket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        channel = WebSocketChannel(socket)
        serving = asyncio.create_task(get_server().serve(channel))
        try:
            # Serve may cancel the handler of a client that has gone; its stream's state is saved all the same.
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            channel.leave()
            raise


def problem(refusal: Refusal) -> Response:
    """Return a refusal as an answer to a request, with Retry-After (RFC 9110, section 10.2.3) where it has one."""
    headers: dict[str, str] = {}
    if refusal.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(refusal.retry_after_s)))
    body: dict[str, Any] = refusal.to_message()
    return JSONResponse(body, status_code=refusal.http_status, headers=headers)
