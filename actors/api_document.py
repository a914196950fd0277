"""What the OpenAPI document says beyond the routes: how to sign in, and the WebSocket, which OpenAPI lacks."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from fastapi import FastAPI

DESCRIPTION: Final = """
**Credentials.** Where the service asks for them: an API key or a JSON web token in `Authorization: Bearer`, or a key in
`X-Api-Key`. Never in the address: there they are ignored.

**Refusals** have one shape, `Refused`, whatever is refused: `kind` and `code` for programs, `message`, `limit` and
`remedy` for people, and `retry_after_s` (also in `Retry-After`) where another attempt may succeed.

**`WebSocket /v1/streams`**: one live stream. The client's first message is JSON, `{"type": "hello", "width": 320,
"height": 180}`, within 5 seconds; the credentials travel in it, because browsers cannot set header fields of
WebSockets. The service answers `welcome`, or `refused` and a close code. Then each binary message, both ways, is one
frame: 64 bytes of header and a picture. The client sends as many frames as it was granted, and acknowledges answers.
Text messages `reset`, `size`, `stats`, `delivered` and `close` control the stream. The same messages travel by gRPC
where it is on. All fields, close codes and a worked example are in `docs/reference/protocol.md`.
"""
_SCHEMES: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or a JSON web token."},
    "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": "An API key."},
}


def tell_of_credentials(app: FastAPI, *, open_paths: Collection[str]) -> None:
    """Have the application's document say which operations want credentials: all but those of `open_paths`."""
    make = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = make()
            made.setdefault("components", {})["securitySchemes"] = _SCHEMES
            for path, operations in made["paths"].items():
                for operation in operations.values():
                    operation["security"] = [] if path in open_paths else [{"bearer": []}, {"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way of extending the document
