"""A Redis of one's own, with a password."""

from __future__ import annotations

import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.object_stores import free_ports

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server")


@dataclass(frozen=True)
class Redis:
    """`address` is HOST:PORT."""

    address: str
    password: str


@contextmanager
def redis_server(folder: Path) -> Iterator[Redis]:
    """Run one that keeps its data in `folder`."""
    (port,) = free_ports(1)
    redis = Redis(f"127.0.0.1:{port}", secrets.token_hex(16))
    process = subprocess.Popen(
        ["redis-server", "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdin is not None
        process.stdin.write(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\nappendonly yes\nrequirepass {redis.password}\n"
        )
        process.stdin.close()
        limit = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < limit and process.poll() is None
                time.sleep(0.05)
        yield redis
    finally:
        process.terminate()
        process.wait()
