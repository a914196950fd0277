"""Transports of the live protocol as a client sees them: a WebSocket here, gRPC in `infra.live_grpc`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

from infra import protocol


class Wire(Protocol):
    """A transport's end of one stream. What fails raises OSError."""

    async def send(self, message: str | bytes) -> None: ...

    async def receive(self) -> str | bytes | None:
        """Return the next message; None when the other side has gone."""

    async def close(self) -> None: ...


Connect: TypeAlias = Callable[[str], Awaitable[Wire]]


class ConnectionLost(ConnectionError):
    """The other side has gone."""


class _WebSocketWire:
    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def send(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise ConnectionLost(str(error)) from error

    async def receive(self) -> str | bytes | None:
        from websockets.exceptions import ConnectionClosed

        try:
            message: str | bytes = await self._socket.recv()
        except ConnectionClosed:
            return None
        return message

    async def close(self) -> None:
        await self._socket.close()


async def connect_websocket(url: str, headers: Mapping[str, str] | None = None) -> Wire:
    """Connect to ``ws://`` or ``wss://``; the path is the service's unless there is one.

    Args:
        headers: sent with the request, such as whom a gateway speaks for.

    Raises:
        OSError: nobody is there, or somebody else.
    """
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    address = url if "/v1/streams" in url else url.rstrip("/") + "/v1/streams"
    try:
        socket = await connect(
            address,
            additional_headers=headers,
            subprotocols=[protocol.SUBPROTOCOL],  # type: ignore[list-item]  # a plain string, to the library a type
            max_size=None,
            compression=None,  # pictures are compressed already
            close_timeout=1.0,
        )
    except WebSocketException as error:
        raise ConnectionLost(str(error)) from error
    return _WebSocketWire(socket)


def transport_for(url: str, headers: Mapping[str, str] | None = None) -> Connect:
    """Return what connects to an address of this scheme, with these headers (gRPC: metadata)."""
    if url.startswith(("grpc://", "grpcs://")):
        from infra.live_grpc import connect_grpc

        return partial(connect_grpc, headers=headers)
    return partial(connect_websocket, headers=headers)
