"""An ASGI application on a real uvicorn on loopback, and a client that sends and receives at the same time."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

TIMEOUT_S = 30.0


@contextmanager
def served(app: Any) -> Iterator[int]:
    """Serve `app` in a thread; gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        listener.close()
        assert not thread.is_alive()


class Duplex:
    """One request with a chunked body, whose answer can be read before the body is complete. Closes when it is left."""

    def __init__(
        self, port: int, path: str, *, headers: dict[str, str] | None = None, method: str = "POST", chunked: bool = True
    ) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self._connection.putrequest(method, path)
        told = ({"Transfer-Encoding": "chunked"} if chunked else {}) | (headers or {})
        for name, value in told.items():
            self._connection.putheader(name, value)
        self._connection.endheaders()
        assert self._connection.sock is not None
        self.socket: socket.socket = self._connection.sock
        self._chunked = chunked
        self._answer: http.client.HTTPResponse | None = None

    def __enter__(self) -> Duplex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._answer is not None:
            self._answer.close()
        self._connection.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        if data:
            self.socket.sendall(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    def end(self) -> None:
        if self._chunked:
            self.socket.sendall(b"0\r\n\r\n")

    @property
    def answer(self) -> http.client.HTTPResponse:
        """The answer; waits for its headers."""
        if self._answer is None:
            self._answer = self._connection.getresponse()
        return self._answer

    def read(self, size: int = 1 << 16) -> bytes:
        """What has arrived of the answer's body, at least one byte; nothing at the end."""
        return self.answer.read1(size)

    def rest(self) -> bytes:
        """All that is left of the body; raises `IncompleteRead` if it ends without its last chunk."""
        return self.answer.read()

    def refusal(self) -> dict[str, Any]:
        """The status, and the body as JSON."""
        return {"status": self.answer.status, **json.loads(self.rest())}
