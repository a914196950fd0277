"""What a transport has to do for a live stream: WebSocket and gRPC are such channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Channel(Protocol):
    """A transport's end of one stream.

    Attributes:
        message_limit: bytes of the largest message that the transport carries.
        headers: that came with the connection, names in lower case. peer: address of the other end.
        is_web: browsers can open it, from any page.
    """

    message_limit: int
    is_web: bool
    headers: Mapping[str, str]
    peer: str | None

    async def receive(self) -> str | bytes | None:
        """Return the next message; None when the client has gone."""

    async def send(self, message: str | bytes) -> None:
        """Send a message; to a client that has gone, nothing."""

    async def close(self, code: int, reason: str) -> None:
        """Close the stream; once."""
