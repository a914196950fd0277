"""The live page: its files, as the service answers with them. They are read once and held in memory.

The page needs nothing from elsewhere and says so: its security policy allows it scripts, styles and connections of its
own origin only. Knows no stream and no server.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.responses import Response

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi import FastAPI
    from starlette.requests import Request

_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# A video at an address that a person types is played, not run: pictures of another origin reach the script only with
# that origin's permission (CORS). http: is for services and cameras inside a house; under https browsers refuse it.
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "media-src 'self' blob: https: http:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=(), display-capture=()",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked again each time, answered with 304: after an upgrade no browser mixes files of two versions.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    body: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> _File:
        body = path.read_bytes()
        return cls(body, _MEDIA_TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')

    async def respond(self, request: Request) -> Response:
        headers = {**HEADERS, "ETag": self.etag}
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if self.etag in known or "*" in known:  # RFC 9110, section 13.1.2: compared weakly
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)


def add_page(app: FastAPI, folder: Path) -> None:
    """Serve the folder's ``index.html`` at ``/`` and its other files below ``/page/``, as they are now."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _MEDIA_TYPES:
            place = "/" if path.name == "index.html" else f"/page/{path.name}"
            app.add_route(place, _File.read(path).respond, methods=["GET"], include_in_schema=False)
