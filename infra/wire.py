"""One connection to a checked address, and one request on it, within limits of time and bytes that hold for any server.

`http.client` and `ssl` of the standard library speak HTTP and TLS; here is what they lack. A timeout of theirs is for a
single read, so a server that sends a byte a minute holds them for ever; heads and the frames of chunks are not counted.
Proxies, cookies and .netrc do not exist here. Knows nothing of policies.
"""

from __future__ import annotations

import functools
import http.client
import io
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from infra.errors import FetchFailed
from infra.network import Approved

HEAD_BYTES: Final = 256 << 10  # status and headers
_BUFFER_BYTES: Final = 64 << 10
_FIRST_ADDRESS_SECONDS: Final = 5.0  # for an address that does not answer, where there is another


class Patience:
    """How long a server may still be waited for. Only waiting counts: a slow reader here does not use it up."""

    def __init__(self, seconds: float, host: str) -> None:
        self._allowed_s = seconds
        self._left_s = seconds
        self._host = host

    @contextmanager
    def waiting(self) -> Iterator[float]:
        """Give the seconds that are left, and count those spent inside.

        Raises:
            FetchFailed: `fetch-timeout` when they are used up, before, inside (as TimeoutError) or afterwards.
        """
        if self._left_s <= 0:
            raise self._used_up()
        began = time.monotonic()
        try:
            yield self._left_s
        except TimeoutError:
            raise self._used_up() from None
        finally:
            self._left_s -= time.monotonic() - began

    def _used_up(self) -> FetchFailed:
        return FetchFailed(
            f"{self._host} was waited for {self._allowed_s:g} s, which is the limit.",
            code="fetch-timeout",
            remedy="Try again later, or use a faster source.",
            is_transient=True,
        )


class Wire(io.RawIOBase):
    """What comes from one connection; stands in for the socket that `http.client` reads from and writes to.

    Attributes:
        allowed_bytes: how much may still come, the overhead of HTTP included.
    """

    def __init__(self, line: socket.socket, patience: Patience, host: str) -> None:
        super().__init__()
        self.allowed_bytes = HEAD_BYTES
        self._line = line
        self._patience = patience
        self._host = host

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            with self._patience.waiting() as left_s:
                self._line.settimeout(left_s)
                count = self._line.recv_into(buffer)
        except OSError as error:
            raise broken(self._host) from error
        self.allowed_bytes -= count
        if self.allowed_bytes < 0:
            raise FetchFailed(
                f"{self._host} sends more around its answer than the answer itself.",
                code="fetch-too-large",
                remedy="Use another source.",
            )
        return count

    def sendall(self, content: bytes) -> None:
        """As of a socket."""
        try:
            with self._patience.waiting() as left_s:
                self._line.settimeout(left_s)
                self._line.sendall(content)
        except OSError as error:
            raise broken(self._host) from error

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket."""
        return io.BufferedReader(self, _BUFFER_BYTES)

    def close(self) -> None:
        self._line.close()
        super().close()


class _Borrowed:
    """A wire that `http.client` cannot close: it drops its socket at once when an answer ends with the connection."""

    def __init__(self, wire: Wire) -> None:
        self.sendall, self.makefile = wire.sendall, wire.makefile

    def close(self) -> None:
        pass


def request(
    approved: Approved, headers: Mapping[str, str], patience: Patience, ca_file: Path | None
) -> tuple[Wire, http.client.HTTPResponse]:
    """Connect to one of the checked addresses, send a GET, and return the connection and the head of the answer.

    Raises:
        FetchFailed: `fetch-connect`, `fetch-tls`, `fetch-timeout`, `fetch-too-large` or `fetch-broken`.
    """
    line = _connect(approved, patience)
    try:
        if approved.scheme == "https":
            line = _secured(line, approved, patience, ca_file)
        wire = Wire(line, patience, approved.host)
        connection = http.client.HTTPConnection("unused")  # it is connected already
        borrowed: Any = _Borrowed(wire)
        connection.sock = borrowed
        connection.putrequest("GET", approved.target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", approved.authority)
        for name, value in headers.items():
            connection.putheader(name, value)
        if approved.authorization is not None:
            connection.putheader("Authorization", approved.authorization)
        connection.endheaders()
        return wire, connection.getresponse()
    except http.client.HTTPException:
        line.close()
        raise broken(approved.host) from None  # the library quotes what came, which may repeat the request
    except BaseException:
        line.close()
        raise


def broken(host: str) -> FetchFailed:
    """Return the error for a connection that ended, or an answer that is not HTTP."""
    return FetchFailed(
        f"The connection to {host} broke, or what came is not HTTP.",
        code="fetch-broken",
        remedy="Try again later, or check the source.",
        is_transient=True,
    )


def _connect(approved: Approved, patience: Patience) -> socket.socket:
    last = len(approved.addresses) - 1
    for number, address in enumerate(approved.addresses):
        with patience.waiting() as left_s:
            try:
                # The address is a number already: no name is looked up again.
                timeout_s = left_s if number == last else min(left_s, _FIRST_ADDRESS_SECONDS)
                return socket.create_connection((address, approved.port), timeout_s)
            except OSError as error:
                if number == last and isinstance(error, TimeoutError):
                    raise
    raise FetchFailed(
        f"Nobody answers at {approved.host}, port {approved.port}.",
        code="fetch-connect",
        remedy="Check host and port, or try again later.",
        is_transient=True,
    )


def _secured(line: socket.socket, approved: Approved, patience: Patience, ca_file: Path | None) -> ssl.SSLSocket:
    """TLS, verified for the name in the URL, whichever address it is."""
    try:
        with patience.waiting() as left_s:
            line.settimeout(left_s)
            return _context(ca_file).wrap_socket(line, server_hostname=approved.host)
    except ssl.SSLCertVerificationError as error:
        reason = f"its certificate is not accepted ({error.verify_message.rstrip('.')})"
        raise _insecure(approved.host, reason) from None
    except OSError as error:
        raise _insecure(approved.host, "it does not speak TLS as it should") from error


@functools.lru_cache(maxsize=8)
def _context(ca_file: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    context.set_alpn_protocols(["http/1.1"])
    return context


def _insecure(host: str, reason: str) -> FetchFailed:
    return FetchFailed(
        f"No secure connection to {host}: {reason}.",
        code="fetch-tls",
        remedy="Use a source whose certificate is valid, or let the operator add its authority.",
    )
