"""Web servers on loopback that answer as a test wants, good or evil; names that resolve as it wants; certificates.

A server may have an address of its own (127.0.0.2, ...): all of 127.0.0.0/8 is this machine's on Linux.
"""

from __future__ import annotations

import datetime
import ipaddress
import re
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Page = bytes | Callable[[Any], None]


class WebServer:
    """Answers GET by `pages`: bytes are sent whole or by ranges, functions get the request handler.

    Attributes:
        seen: (path, headers) of each request so far.
        stopping: set at the end; pages that send for ever wait on it.
    """

    def __init__(self, address: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Page] = {}
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.stopping = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(handler) -> None:
                self._answer(handler)

            def log_message(handler, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(listener, *_: object) -> None:
                """Clients that hang up in the middle are what many tests are about."""

        self._listener = Listener((address, port), Handler)
        if tls is not None:
            self._listener.socket = tls.wrap_socket(
                self._listener.socket, server_side=True, do_handshake_on_connect=False
            )
        self.scheme = "http" if tls is None else "https"
        self.address, self.port = self._listener.server_address[:2]
        threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self) -> WebServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._listener.shutdown()
        self._listener.server_close()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.seen]

    def url(self, path: str = "/film.mp4", host: str | None = None) -> str:
        return f"{self.scheme}://{host or self.address}:{self.port}{path}"

    def _answer(self, handler: Any) -> None:
        self.seen.append((handler.path, dict(handler.headers)))
        handler.close_connection = True
        page = self.pages.get(handler.path)
        if page is None:
            send(handler, b"not here", status=404)
        elif isinstance(page, bytes):
            send_ranges(handler, page)
        else:
            page(handler)


def send(handler: Any, content: bytes, *, status: int = 200, length: int | None = None, **headers: str) -> None:
    """Answer with `content`; underscores in the names of headers become hyphens."""
    handler.send_response_only(status)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(content)


def send_ranges(handler: Any, content: bytes, version: str = '"1"') -> None:
    """Answer as a server that gives ranges does."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    if asked is None:
        send(handler, content, ETag=version)
        return
    start, stop = int(asked[1]), min(int(asked[2]) + 1, len(content))
    where = f"bytes {start}-{stop - 1}/{len(content)}"
    send(handler, content[start:stop], status=206, ETag=version, Content_Range=where)


def redirect(to: str, status: int = 302) -> Page:
    """A page that sends its visitors elsewhere."""
    return lambda handler: send(handler, b"", status=status, Location=to)


def raw(content: bytes) -> Page:
    """A page whose answer is `content`, head included."""
    return lambda handler: handler.wfile.write(content)


def endless_page(head: bytes, part: bytes) -> Page:
    """A page that sends `part` again and again, as fast as it is read."""

    def page(handler: Any) -> None:
        handler.wfile.write(head)
        while True:
            handler.wfile.write(part)

    return page


@dataclass
class Names:
    """A resolver with a table: of several answers for a name, each is given once, and the last for ever."""

    table: dict[str, list[list[str]]]
    asked: list[str] = field(default_factory=list)

    def __call__(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        answers = self.table[name]
        return answers.pop(0) if len(answers) > 1 else answers[0]


class Authority:
    """A certificate authority of its own; `ca_file` is what clients need to trust it."""

    def __init__(self, folder: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric import ec

        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("Upriver's tests")
        self.ca_file = folder / "authority.pem"
        self._write(self.ca_file, self._certificate(self._name, self._key.public_key(), names=None))

    def context(self, *names: str, days: int = 1) -> ssl.SSLContext:
        """Return what a server needs that is called so; with `days` below zero, its certificate has expired."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        file = self._folder / f"{names[0]}{days}.pem"
        self._write(file, self._certificate(_name(names[0]), key.public_key(), names=names, days=days))
        with file.open("ab") as output:
            output.write(
                key.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.PKCS8,
                    serialization.NoEncryption(),
                )
            )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        return context

    def _certificate(self, subject: Any, public: Any, names: Sequence[str] | None, days: int = 1) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes

        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=9))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
        )
        if names is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(one) for one in names]), False)
        return builder.sign(self._key, hashes.SHA256())

    @staticmethod
    def _write(file: Path, certificate: Any) -> None:
        from cryptography.hazmat.primitives import serialization

        file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _name(text: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
