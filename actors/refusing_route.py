"""Routes whose refusals all look alike: JSON as `infra.refusals.Refusal.to_message` makes it, with its own status.

So do bad parameters and a cluster that does not answer: clients have one shape to read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final, Literal

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.responses import JSONResponse

from actors.duplex_response import refusal_headers
from infra.errors import CodedError, InfraError
from infra.refusals import AdmissionRefused, BadMessage, Refusal, ServiceFailure

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 10.0


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
                return await handle(request)
            except Refusal as refusal:
                return refusal_response(refusal)
            except RequestValidationError as error:
                return refusal_response(_explained(error))
            except InfraError as error:
                return refusal_response(_unavailable(error))

        return handled


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
