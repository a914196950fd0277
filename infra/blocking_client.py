"""`infra.client` without `async`: a live stream for programs that have no event loop, in a thread of its own.

    with BlockingStream("ws://host:8000", Hello(width=320, height=180)) as stream:
        stream.send_picture(picture)
        answer = next(stream)

`send` and `next` may be called from two threads, one each: so frames are sent while answers are waited for.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import Hello

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_T = TypeVar("_T")


class BlockingStream:
    """See the module. Arguments and errors are those of `LiveStream`, which is at `stream`."""

    def __init__(self, url: str, hello: Hello, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="upriver-client", daemon=True)
        self._given = (url, hello, options)
        self.stream: LiveStream

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._run(self._open())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._run(self.stream.__aexit__(kind, error, where))
        finally:
            self._end()

    def send(self, payload: bytes, *, pts: int | None = None, cut: bool = False, key: bool = False) -> int:
        """Send a frame; returns its id. Blocks while a window of frames is under way."""
        return self._run(self.stream.send(payload, pts=pts, cut=cut, key=key))

    def send_picture(self, rgb_HWC: NDArray[np.uint8], *, pts: int | None = None, cut: bool = False) -> int:
        """Encode a picture and send it; returns its id."""
        return self._run(self.stream.send_picture(rgb_HWC, pts=pts, cut=cut))

    def resize(self, width: int, height: int) -> None:
        """The frames sent from now on have this size: see `LiveStream.resize`."""
        self.stream.resize(width, height)

    def close(self) -> None:
        """Say that no more frames come; the iteration ends after the last answer."""
        self._run(self.stream.close())

    def __iter__(self) -> Iterator[LiveAnswer]:
        return self

    def __next__(self) -> LiveAnswer:
        answer = self._run(self._next())
        if answer is None:
            raise StopIteration
        return answer

    async def _open(self) -> None:
        url, hello, options = self._given
        self.stream = await LiveStream(url, hello, **options).__aenter__()

    async def _next(self) -> LiveAnswer | None:
        return await anext(self.stream, None)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
