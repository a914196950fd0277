"""A live stream inside one process: the service's end is a `Channel`, the client's a `Wire`, nothing is between them.

Frames are handed over, not copied. Each direction holds a few messages and then makes its sender wait, as a transport
does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from infra.live_grpc import MESSAGE_LIMIT
from infra.live_wire import Connect, ConnectionLost, Wire

if TYPE_CHECKING:
    from actors.live_server import LiveServer

_WAITING: Final = 4
_Queue = asyncio.Queue[str | bytes | None]


class LocalChannel:
    """The service's end.

    Args:
        headers: of the request that the stream is for, names in lower case. peer: address that it came from.
    """

    message_limit = MESSAGE_LIMIT
    is_web = False

    def __init__(self, headers: Mapping[str, str], peer: str | None) -> None:
        self.headers, self.peer = headers, peer
        self.incoming, self.outgoing = _Queue(_WAITING), _Queue(_WAITING)
        self._gone = asyncio.Event()

    async def receive(self) -> str | bytes | None:
        """Return the next message; None when the client has gone."""
        return await _unless(self._gone, self.incoming.get())

    async def send(self, message: str | bytes) -> None:
        """Send a message; to a client that has gone, nothing."""
        if not self._gone.is_set():
            await _unless(self._gone, self.outgoing.put(message))

    async def close(self, code: int, reason: str) -> None:
        """Close the stream; once."""
        if not self._gone.is_set():
            await _unless(self._gone, self.outgoing.put(None))

    def leave(self) -> None:
        """The client has gone."""
        self._gone.set()


class LocalWire:
    """The client's end."""

    def __init__(self, channel: LocalChannel, serving: asyncio.Task[None]) -> None:
        self._channel, self._serving = channel, serving

    async def send(self, message: str | bytes) -> None:
        """Hand a message to the service.

        Raises:
            ConnectionLost: it serves this stream no more.
        """
        if self._serving.done():
            raise ConnectionLost("the stream has ended")
        try:
            self._channel.incoming.put_nowait(message)
        except asyncio.QueueFull:
            putting = asyncio.ensure_future(self._channel.incoming.put(message))
            try:
                await asyncio.wait([putting, self._serving], return_when=asyncio.FIRST_COMPLETED)
                if not putting.done():
                    raise ConnectionLost("the stream has ended") from None
            finally:
                putting.cancel()

    async def receive(self) -> str | bytes | None:
        """Return the next message; None when the service has closed the stream, or ended without a word."""
        outgoing = self._channel.outgoing
        if outgoing.empty() and not self._serving.done():
            coming = asyncio.ensure_future(outgoing.get())
            try:
                await asyncio.wait([coming, self._serving], return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    return coming.result()
            finally:
                coming.cancel()
        return None if outgoing.empty() else outgoing.get_nowait()

    async def close(self) -> None:
        """Leave."""
        self._channel.leave()


def local_transport(server: LiveServer, headers: Mapping[str, str], peer: str | None) -> Connect:
    """Return what connects a client to a server of this process, for the request with these headers.

    The server goes on with a stream whose client was cancelled, to save or to forget its state.
    """

    async def connect(url: str) -> Wire:
        channel = LocalChannel(headers, peer)
        serving = asyncio.create_task(server.serve(channel))
        _SERVING.add(serving)
        serving.add_done_callback(_SERVING.discard)
        return LocalWire(channel, serving)

    return connect


_SERVING: Final[set[asyncio.Task[None]]] = set()  # asyncio itself holds its tasks only weakly


async def _unless(gone: asyncio.Event, work: object) -> str | bytes | None:
    """Return what `work` does, or None where the client goes first."""
    working = asyncio.ensure_future(work)  # type: ignore[call-overload]
    leaving = asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
