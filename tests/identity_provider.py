"""A real identity provider on loopback: keys of its own, tokens signed with them, its key set over HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

ISSUER, AUDIENCE = "https://id.example", "upriver"


@cache
def rsa_key(name: str, bits: int = 2048) -> rsa.RSAPrivateKey:
    """Return the key pair of this name; making one takes a moment, so each is made once."""
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@cache
def ec_key(name: str) -> ec.EllipticCurvePrivateKey:
    """Return the key pair of this name on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def public_pem(key: Any) -> bytes:
    """Return the public half in PEM form."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def public_jwk(key: Any, kid: str | None = None, **more: Any) -> dict[str, Any]:
    """Return the public half as an entry of a key set."""
    kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    entry = json.loads(kind.to_jwk(key.public_key()))
    entry.pop("key_ops", None)
    return entry | ({} if kid is None else {"kid": kid}) | more


def claims(**changed: Any) -> dict[str, Any]:
    """Return the claims of a good token; None takes one away."""
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + 600}
    return {name: value for name, value in (good | changed).items() if value is not None}


def token(key: Any, algorithm: str = "RS256", *, headers: dict[str, Any] | None = None, **changed: Any) -> str:
    """Return a signed token."""
    return jwt.encode(claims(**changed), key, algorithm=algorithm, headers=headers)


class KeyServer:
    """What the provider answers, changeable while it runs, and how often it was asked."""

    def __init__(self) -> None:
        self.keys: list[dict[str, Any]] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] | None = None
        self.paths: list[str] = []
        self.url = ""

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        self.paths.append(request.path)
        if self.answer is not None:
            self.answer(request)
            return
        send(request, json.dumps({"keys": self.keys}).encode())


def send(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    """Send a whole answer."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@contextmanager
def key_server() -> Iterator[KeyServer]:
    """Yield a running server of key sets on loopback."""
    state = KeyServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                state.serve(self)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client has had enough

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/keys"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
