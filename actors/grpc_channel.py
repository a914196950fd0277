"""A gRPC call as `actors.live_connection.Channel`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, Final

from infra import protocol
from infra.live_grpc import MESSAGE_LIMIT, pack, unpack

logger = logging.getLogger(__name__)

_WAITING: Final = 4  # messages between the stream and gRPC, which has its own flow control


class GrpcChannel:
    """See the module.

    Args:
        requests: asynchronous iterator of packets from the client. Where it ends, the client has sent its last frame.
        headers: the call's metadata. peer: the client's address, where it is known.
    """

    message_limit = MESSAGE_LIMIT
    is_web = False

    def __init__(self, requests: Any, headers: Mapping[str, str], peer: str | None) -> None:
        self.headers, self.peer = headers, peer
        self._requests = aiter(requests)
        self._outgoing: asyncio.Queue[str | bytes | None] = asyncio.Queue(_WAITING)
        self._gone = asyncio.Event()
        self._half_closed = self._over = False

    async def receive(self) -> str | bytes | None:
        """Return the next message; None when the client has gone."""
        if self._half_closed or self._gone.is_set():
            await self._gone.wait()
            return None
        coming = asyncio.ensure_future(anext(self._requests, None))
        leaving = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait([coming, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                return None
            packet = coming.result()
        except Exception as error:  # the call was cancelled or its connection is lost
            logger.debug("a call ended: %s", error)
            return None
        finally:
            leaving.cancel()
            coming.cancel()
        if packet is None:
            self._half_closed = True
            return protocol.dump(protocol.Close())
        return unpack(packet)

    async def send(self, message: str | bytes) -> None:
        """Send a message; to a client that has gone, nothing."""
        if self._gone.is_set():
            return
        putting = asyncio.ensure_future(self._outgoing.put(message))
        leaving = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait([putting, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:  # also where the sender is cancelled: what waits in vain must not come later
            putting.cancel()
            leaving.cancel()

    async def close(self, code: int, reason: str) -> None:
        """End the call after what was sent; the last message has said why."""
        self.end()

    def end(self) -> None:
        """Nothing more is sent. A client that is slow is not waited for."""
        self._over = True
        if self._outgoing.empty():
            self._outgoing.put_nowait(None)

    def leave(self) -> None:
        """The client has gone."""
        self._gone.set()

    async def packets(self) -> AsyncIterator[Any]:
        """Yield what is sent, until it is closed."""
        while not (self._over and self._outgoing.empty()):
            message = await self._outgoing.get()
            if message is None:
                return
            yield pack(message)


def peer_address(peer: str | None) -> str | None:
    """Return the address in gRPC's name for the other end, ``ipv4:10.0.0.1:5000`` or ``ipv6:[::1]:5000``."""
    kind, _, rest = (peer or "").partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else None


async def serve_call(
    serve: Callable[[GrpcChannel], Coroutine[Any, Any, None]], channel: GrpcChannel
) -> AsyncGenerator[Any, None]:
    """Yield the packets of one stream while `serve` serves it, and see it to its end."""
    serving = asyncio.create_task(serve(channel))
    serving.add_done_callback(lambda done: channel.end())
    try:
        async for packet in channel.packets():
            yield packet
    finally:
        channel.leave()
        await asyncio.wait([serving])  # which a second cancellation ends, and not the stream: its state is being saved
