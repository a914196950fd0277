"""A bounded pipe of bytes between an event loop and a thread: one side awaits, the other blocks.

Request bodies go one way (awaited in, read by a thread), what a muxer writes the other (written by a thread, awaited
out). Memory never holds more than its bound. What does not fit waits in a file without a name, up to a bound of its
own, and when that is full too, the writing side waits. The file is there for two reasons: most HTTP clients send their
whole request before they read any of the answer, and Ray Serve takes what a client sends whether or not it is read.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Final

PIECE_BYTES: Final = 1 << 16  # that one `get` returns, at most


class Gone(ConnectionError):
    """Who was at the other side has gone; there is nobody to tell."""

    def __init__(self) -> None:
        super().__init__("the other side has gone")


class BytePipe:
    """Bytes in order, from one writer to one reader.

    Args:
        capacity_bytes: that are held in memory, at most.
        spill_bytes: that are held in a file besides; 0 is no file.
        folder: where that file lies; None is the system's folder for temporary files.

    Attributes:
        total_bytes: that were put in so far.
    """

    def __init__(self, capacity_bytes: int, *, spill_bytes: int = 0, folder: str | None = None) -> None:
        self.total_bytes = 0
        self._capacity, self._spill_limit, self._folder = capacity_bytes, spill_bytes, folder
        self._changed = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._at = 0  # what of the first piece was read
        self._held = 0
        self._file: Any = None
        self._file_start = self._file_end = 0  # what of the file has not been read
        self._ended = False
        self._last: BaseException | None = None  # raised when everything was read
        self._error: BaseException | None = None  # raised at once
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def held_bytes(self) -> int:
        """What is in memory now."""
        return self._held

    @property
    def spilled_bytes(self) -> int:
        """What is in the file now."""
        return self._file_end - self._file_start

    # The blocking side.

    def read(self, size: int) -> bytes:
        """Return at least one byte and at most `size`; nothing at the end. Waits for the first.

        Raises:
            Whatever the pipe was aborted or ended with.
        """
        with self._changed:
            while (taken := self._take(size)) is None:
                self._changed.wait()
            return taken

    def write(self, data: bytes) -> int:
        """Put all of `data` in; waits while there is no room.

        Raises:
            Whatever the pipe was aborted with.
        """
        rest = memoryview(data)
        with self._changed:
            while rest:
                given = self._give(rest)
                if not given:
                    self._changed.wait()
                rest = rest[given:]
        return len(data)

    # The side that awaits.

    async def put(self, data: bytes) -> None:
        """Put all of `data` in; waits while there is no room.

        Raises:
            Whatever the pipe was aborted with.
        """
        rest = memoryview(data)
        while rest:
            waiter: asyncio.Future[None] | None = None
            if self._needs_file(len(rest)):
                given = await asyncio.to_thread(self._give_locked, rest)  # a busy disk must not stop the loop
            else:
                given, waiter = self._give_or_wait(rest)
            if given:
                rest = rest[given:]
            else:
                await (waiter or self._waiter_unless(self._has_room))

    async def get(self) -> bytes:
        """Return at least one byte, nothing at the end. Waits for the first.

        Raises:
            Whatever the pipe was aborted or ended with.
        """
        while True:
            if self._file_end:
                taken = await asyncio.to_thread(self._take_locked, PIECE_BYTES)
            else:
                taken = self._take_locked(PIECE_BYTES)
            if taken is not None:
                return taken
            await self._waiter_unless(self._has_news)

    async def filled(self) -> None:
        """Wait for the first byte, or the end.

        Raises:
            Whatever the pipe was aborted with, or ended with before the first byte.
        """
        await self._waiter_unless(self._has_news)
        with self._changed:
            error = self._error or (self._last if self._is_empty() else None)
        if error is not None:
            raise error

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield everything up to the end."""
        while chunk := await self.get():
            yield chunk

    # Either side.

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes. With `error`, who has read everything gets that instead of the end."""
        with self._changed:
            if not self._ended:
                self._ended, self._last = True, error
            self._wake()

    def abort(self, error: BaseException) -> None:
        """End both sides at once with `error`; what is in the pipe is dropped. Later calls change nothing."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._pieces.clear()
            self._at = self._held = 0
            self._drop_file()
            self._wake()

    # All that follow need the lock, but for those that take it.

    def _take(self, size: int) -> bytes | None:
        """Some of the bytes, nothing at the end, None if they are still to come."""
        if self._error is not None:
            raise self._error
        if self._pieces:
            piece = self._pieces[0]
            taken = piece[self._at : self._at + size]
            self._at += len(taken)
            if self._at == len(piece):
                self._pieces.popleft()
                self._at = 0
                self._held -= len(piece)
        elif self._file_end:
            taken = os.pread(self._file.fileno(), min(size, self.spilled_bytes), self._file_start)
            self._file_start += len(taken)
            if self._file_start == self._file_end:
                self._drop_file()
        elif self._ended:
            if self._last is not None:
                raise self._last
            return b""
        else:
            return None
        self._wake()
        return taken

    def _give(self, data: memoryview) -> int:
        """Put in what there is room for; returns how much that was."""
        if self._error is not None:
            raise self._error
        if self._ended:
            raise ValueError("the pipe has ended")
        room = 0 if self._file_end else self._capacity - self._held
        if room:
            given = min(room, len(data))
            # A copy: a slice would keep alive all that it was cut from.
            self._pieces.append(bytes(data[:given]))
            self._held += given
        else:
            given = min(self._spill_limit - self._file_end, len(data))
            if not given:
                return 0
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  # closed by _drop_file
            given = os.pwrite(self._file.fileno(), data[:given], self._file_end)
            self._file_end += given
        self.total_bytes += given
        self._wake()
        return given

    def _is_empty(self) -> bool:
        return not self._pieces and not self._file_end

    def _has_room(self) -> bool:
        in_memory = not self._file_end and self._held < self._capacity
        return in_memory or self._file_end < self._spill_limit or self._error is not None or self._ended

    def _has_news(self) -> bool:
        return not self._is_empty() or self._ended or self._error is not None

    def _drop_file(self) -> None:
        """Begin the file anew; its room on the disk is given back."""
        if self._file is not None:
            self._file.close()
        self._file, self._file_start, self._file_end = None, 0, 0

    def _wake(self) -> None:
        self._changed.notify_all()
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with suppress(RuntimeError):  # its loop has ended, and with it who waited
                loop.call_soon_threadsafe(_settle, future)

    def _needs_file(self, size: int) -> bool:
        """Whether the next bytes may go to the file; only a guess, to be made without the lock."""
        return self._spill_limit > 0 and (self._file_end > 0 or self._held + size > self._capacity)

    def _take_locked(self, size: int) -> bytes | None:
        with self._changed:
            return self._take(size)

    def _give_locked(self, data: memoryview) -> int:
        with self._changed:
            return self._give(data)

    def _give_or_wait(self, data: memoryview) -> tuple[int, asyncio.Future[None] | None]:
        with self._changed:
            given = self._give(data)
            return given, None if given else self._waiter()

    def _waiter(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiters.append((loop, future))
        return future

    def _waiter_unless(self, condition: Callable[[], bool]) -> asyncio.Future[None]:
        """What to await for the next change; it is there already if `condition` holds."""
        with self._changed:
            waiter = self._waiter()
            if condition():
                self._waiters.pop()
                waiter.set_result(None)
            return waiter


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
