"""Reading a remote file as if it were open: few requests when it is read in order, cheap jumps, little memory.

The first piece after a jump is small, because a demuxer that seeks often reads a header and jumps again. While reading
goes on in order, pieces double up to a limit, and the next one is fetched while the last is consumed. Recent pieces are
kept, so that going back to an index or to interleaved sound costs nothing. Knows nothing of stores or videos: what
fetches bytes is given.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

FIRST_BYTES = 256 << 10  # after a jump
MOST_BYTES = 8 << 20  # read in order: 125 requests for a gigabyte
KEPT_BYTES = 24 << 20

Fetch = Callable[[int, int], bytes]
"""Returns the bytes from the first argument up to, not including, the second."""


class RangedReader(io.RawIOBase):
    """A seekable binary file for reading, of `size` bytes that `fetch` gets. For one thread.

    Attributes:
        requests: calls of `fetch` so far. fetched_bytes: what they returned together.
    """

    def __init__(self, fetch: Fetch, size: int, name: str) -> None:
        super().__init__()
        self.name = name
        self.size = size
        self.requests = 0
        self.fetched_bytes = 0
        self._fetch = fetch
        self._at = 0
        self._pieces: list[tuple[int, bytes]] = []  # (start, content), the one used last at the end
        self._frontier = 0  # end of the piece fetched last
        self._length = FIRST_BYTES  # of the next piece
        self._ahead: tuple[int, int, Future[bytes]] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"a file cannot be read from {base + offset}")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def read(self, size: int | None = -1) -> bytes:
        """Return `size` bytes, fewer only at the end; all that are left for None and -1."""
        self._checkClosed()
        left = max(self.size - self._at, 0)
        wanted = left if size is None or size < 0 else min(size, left)
        parts = []
        while wanted:
            start, content = self._piece(wanted)
            part = content[self._at - start : self._at - start + wanted]
            parts.append(part)
            self._at += len(part)
            wanted -= len(part)
        self._look_ahead()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readall(self) -> bytes:
        return self.read(-1)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._ahead = None
        self._pieces.clear()
        super().close()

    def _piece(self, wanted: int) -> tuple[int, bytes]:
        """Return a piece that holds the current position."""
        for number in range(len(self._pieces) - 1, -1, -1):
            start, content = self._pieces[number]
            if start <= self._at < start + len(content):
                self._pieces.append(self._pieces.pop(number))
                return self._pieces[-1]
        if self._ahead is not None:
            start, stop, future = self._ahead
            self._ahead = None
            if start <= self._at < stop:
                return self._keep(start, future.result())
            future.cancel()
        if self._frontier <= self._at <= self._frontier + self._length:
            self._length = min(2 * self._length, MOST_BYTES) if self._frontier else FIRST_BYTES
        else:
            self._length = FIRST_BYTES
        stop = min(self._at + max(self._length, min(wanted, MOST_BYTES)), self.size)
        return self._keep(self._at, self._counted(self._at, stop))

    def _keep(self, start: int, content: bytes) -> tuple[int, bytes]:
        self._pieces.append((start, content))
        self._frontier = start + len(content)
        held = sum(len(one) for _, one in self._pieces)
        while held > KEPT_BYTES and len(self._pieces) > 1:
            held -= len(self._pieces.pop(0)[1])
        return self._pieces[-1]

    def _look_ahead(self) -> None:
        """Begin to fetch what follows when reading went on in order and is half through the newest piece."""
        if self._ahead is not None or self._length == FIRST_BYTES or self._frontier >= self.size:
            return
        if not self._frontier - self._length // 2 <= self._at <= self._frontier:
            return
        self._length = min(2 * self._length, MOST_BYTES)
        stop = min(self._frontier + self._length, self.size)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead = self._frontier, stop, self._pool.submit(self._counted, self._frontier, stop)

    def _counted(self, start: int, stop: int) -> bytes:
        self.requests += 1
        content = self._fetch(start, stop)
        self.fetched_bytes += len(content)
        return content
