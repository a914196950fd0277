"""Routes whose refusals all look alike: JSON as `infra.refusals.Refusal.to_message` makes it, with its own status.

So do bad parameters and a cluster that does not answer: clients have one shape to read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, Literal

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import Message

from actors.duplex_response import refusal_headers
from infra.errors import CodedError, InfraError
from infra.refusals import AdmissionRefused, BadMessage, FrameTooLarge, Refusal, ServiceFailure, TimedOut

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 10.0
LARGEST_BODY: Final = 64 * 1024  # of a request that is read as a whole; uploads are streams and have their own limits
BODY_TIMEOUT_S: Final = 10.0


class Refused(BaseModel):
    """The body of every answer that is a refusal."""

    type: Literal["refused"] = "refused"
    kind: str
    code: str
    message: str
    limit: str
    remedy: str
    retry_after_s: float | None


RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": Refused, "description": "Refused: the request, its size or its place is not possible."},
    "5XX": {"model": Refused, "description": "Refused: the service cannot do it now."},
}


class RefusingRoute(APIRoute):
    """A route that answers with a refusal whatever goes wrong before its answer has begun."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                if self.body_field is not None:
                    request = await _with_body(request)
                return await handle(request)
            except Refusal as refusal:
                return refusal_response(refusal)
            except RequestValidationError as error:
                return refusal_response(_explained(error))
            except InfraError as error:
                return refusal_response(_unavailable(error))
            except ClientDisconnect:
                return Response(status_code=499)  # nobody is there to read it

        return handled


async def _with_body(request: Request) -> Request:
    """Return the request with its body read: FastAPI reads it before anybody is asked who he is, and without bound.

    Raises:
        FrameTooLarge: it has more than `LARGEST_BODY`. TimedOut: it did not come.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                content += piece
                if len(content) > LARGEST_BODY:
                    raise FrameTooLarge(
                        f"The body has more than {LARGEST_BODY} bytes.",
                        code="body-too-large",
                        limit=f"{LARGEST_BODY} bytes",
                        remedy="Send a smaller request; it is no place for a video.",
                    )
    except TimeoutError:
        raise TimedOut(
            f"The body did not come within {BODY_TIMEOUT_S:g} s.",
            code="body-late",
            limit=f"{BODY_TIMEOUT_S:g} s",
            remedy="Send the request at once.",
        ) from None
    told = False

    async def receive() -> Message:
        nonlocal told
        if told:
            return await request.receive()
        told = True
        return {"type": "http.request", "body": bytes(content), "more_body": False}

    return Request(request.scope, receive)


def refusal_response(refusal: Refusal) -> JSONResponse:
    """Return a refusal as an answer."""
    return JSONResponse(refusal.to_message(), refusal.http_status, refusal_headers(refusal))


def _explained(error: RequestValidationError) -> BadMessage:
    """Names the field and what is wrong with it, never its value."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return BadMessage(f"{place} is not possible: {first['msg']}.", code="bad-request", remedy="See /docs.")


def _unavailable(error: CodedError) -> Refusal:
    """What lies behind this service: the message may name its places, so it is logged and not told."""
    logger.error("%s: %s", error.code, error)
    if error.code in ("ray-unavailable", "ray-starting"):
        return AdmissionRefused(
            "The cluster that runs the jobs does not answer.",
            code=error.code,
            remedy="Try again later.",
            retry_after_s=RETRY_AFTER_S,
        )
    return ServiceFailure("The request failed.", code=error.code, remedy="Tell the operator the time and the code.")
