"""A model hub on loopback: as much of its interface as fetching a snapshot needs, behind a token."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_COMMIT = "0" * 40
_TOKEN = "hf_" + "onlyforthistest"


@contextmanager
def hub(models: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Serve folders as models by their names `owner/name`; yields the address and the token that is wanted."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != f"Bearer {_TOKEN}":
                return self._answer(401, b"", {})
            path = self.path.partition("?")[0]
            for name, folder in models.items():
                if path.startswith(f"/api/models/{name}/tree/"):
                    files = sorted(file for file in folder.rglob("*") if file.is_file())
                    told: object = [
                        {"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size,
                         "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
                        for file in files
                    ]  # fmt: skip
                    return self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
                if path.startswith(f"/api/models/{name}"):
                    told = {"id": name, "modelId": name, "sha": _COMMIT, "siblings": []}
                    return self._answer(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
                file = folder / path.removeprefix(f"/{name}/resolve/{_COMMIT}/")
                if path.startswith(f"/{name}/resolve/{_COMMIT}/") and file.is_file():
                    content = file.read_bytes()
                    tag = hashlib.sha256(content).hexdigest()
                    return self._answer(200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": _COMMIT})
            return self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})

        def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", _TOKEN
    finally:
        server.shutdown()
        thread.join()
