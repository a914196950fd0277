"""A man in the middle of an object store: what a real store does seldom, when the test wants it.

It passes requests on as they are (signatures hold, because the `Host` header is passed on too) and counts them.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.object_stores import Server


@dataclass
class Fault:
    """What to do with requests whose `METHOD path?query` contains `match`, `times` times.

    With `status`, answer with it and S3's error `code`, without asking the store. With `lose_answer`, let the store do
    it and close the connection. With `cut_after`, pass on so many bytes of the answer and close. With `whole`, send the
    whole object with status 200, whatever range is asked for. `before` is called first, with the request's name.
    """

    match: str
    times: int = 1
    status: int = 0
    code: str = ""
    lose_answer: bool = False
    cut_after: int | None = None
    whole: bool = False
    before: Callable[[str], None] | None = None


class FaultyStore(Server):
    """Stands before another store, on a port of its own."""

    def __init__(self, store: Server) -> None:
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self._lock = threading.Lock()
        self._store = store
        target = urlsplit(store.endpoint).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            log_message = _silent

            def _pass_on(handler) -> None:
                self._serve(handler, target)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, match: str) -> int:
        """How many requests named `METHOD path?query` there were that contain `match`."""
        return sum(match in name for name in self.seen)

    def _due(self, name: str) -> Fault | None:
        with self._lock:
            self.seen.append(name)
            for fault in self.faults:
                if fault.times and fault.match in name:
                    fault.times -= 1
                    return fault
        return None

    def _serve(self, handler: Any, target: str) -> None:
        name = f"{handler.command} {handler.path}"
        body = handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        fault = self._due(name)
        if fault and fault.before:
            fault.before(name)
        handler.close_connection = True
        if fault and fault.status:
            error = f"<Error><Code>{fault.code}</Code><Message>as asked</Message></Error>".encode()
            _answer(handler, fault.status, {"Content-Type": "application/xml"}, error, len(error))
            return
        if fault and fault.whole:
            bucket, _, key = unquote(urlsplit(handler.path).path).lstrip("/").partition("/")
            found = self._store.client().get_object(Bucket=bucket, Key=key)
            content = found["Body"].read()
            _answer(handler, 200, {"ETag": found["ETag"]}, content, len(content))
            return
        upstream = http.client.HTTPConnection(target, timeout=30)
        upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
        for header, value in handler.headers.items():
            if header.lower() not in ("connection", "expect"):
                upstream.putheader(header, value)
        upstream.endheaders(body)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault and fault.lose_answer:
            return
        cut = len(content) if fault is None or fault.cut_after is None else fault.cut_after
        _answer(handler, answer.status, dict(answer.getheaders()), content[:cut], len(content))


def _answer(handler: Any, status: int, headers: dict[str, str], content: bytes, length: int) -> None:
    handler.send_response_only(status)
    for header, value in headers.items():
        if header.lower() not in ("connection", "transfer-encoding", "content-length"):
            handler.send_header(header, value)
    declared = headers.get("Content-Length", str(length)) if handler.command == "HEAD" else str(length)
    handler.send_header("Content-Length", declared)
    handler.send_header("Connection", "close")
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


def _silent(*_: object) -> None:
    pass
