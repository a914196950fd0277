"""What a transport has to do for a live stream: WebSocket and gRPC are such channels."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Final, Protocol

logger = logging.getLogger(__name__)

FAREWELL_S: Final = 2.0


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


async def say_and_close(channel: Channel, message: str, code: int, reason: str) -> None:
    """Send the last message and close, for at most `FAREWELL_S`; never raises but for a cancellation.

    A client that reads nothing would otherwise keep its stream, and the stream's place, for as long as it likes.
    """
    try:
        async with asyncio.timeout(FAREWELL_S):
            await channel.send(message)
            await channel.close(code, reason)
    except Exception as error:  # the client may have gone meanwhile, or does not read; there is nobody to tell
        logger.debug("the last message was not sent: %r", error)
