"""How large the head of a request may be: its header fields and its address. Knows ASGI, and none of the routes.

Servers bound this in different ways or not at all; here it is the same whatever server stands in front.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from actors.duplex_response import refusal_headers
from infra.refusals import Refusal

MOST_FIELDS: Final = 100
LARGEST_HEAD: Final = 32 * 1024  # bytes of names, values and address; a token alone may have 8 KiB


class HeadTooLarge(Refusal):
    """More header fields, or longer ones, than anybody needs (RFC 6585, section 5)."""

    close_code = 1009
    http_status = 431
    default_code = "head-too-large"


class RequestHeadLimits:
    """Refuses a request or a WebSocket whose head is too large, before any route sees it.

    Args:
        tell: makes the JSON of the refusal.
    """

    def __init__(self, app: ASGIApp, tell: Callable[[Refusal], object] = Refusal.to_message) -> None:
        self._app, self._tell = app, tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _is_small(scope):
            await self._app(scope, receive, send)
            return
        refusal = HeadTooLarge(
            "The head of the request is too large.",
            limit=f"{MOST_FIELDS} header fields, {LARGEST_HEAD} bytes with the address",
            remedy="Send fewer and shorter header fields.",
        )
        content = json.dumps(self._tell(refusal))
        if scope["type"] == "websocket":
            await receive()  # websocket.connect; accepted first, because what is not reaches clients as HTTP 500
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.send", "text": content})
            await send({"type": "websocket.close", "code": refusal.close_code, "reason": refusal.code})
            return
        headers = [(name.lower().encode(), value.encode()) for name, value in refusal_headers(refusal).items()]
        await send({"type": "http.response.start", "status": refusal.http_status, "headers": headers})
        await send({"type": "http.response.body", "body": content.encode()})


def _is_small(scope: Scope) -> bool:
    fields = scope["headers"]
    if len(fields) > MOST_FIELDS:
        return False
    address = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    return address + sum(len(name) + len(value) for name, value in fields) <= LARGEST_HEAD
