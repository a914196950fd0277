"""A call that blocks for long, in a thread of its own, awaited from an event loop.

Not in the loop's pool of threads: that is small, and whoever waits for a slow client there keeps everybody else out.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ThreadCall(Generic[T]):
    """`call` begins at once; `await` gives what it returns or raises. Who stops waiting does not stop the call."""

    def __init__(self, call: Callable[[], T], name: str) -> None:
        self._future: Future[T] = Future()
        self._future.set_running_or_notify_cancel()
        self._call = call
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            result = self._call()
        except BaseException as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(result)

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._future).__await__()

    async def ended(self) -> None:
        """Wait until the call is over, however it ended."""
        future = asyncio.wrap_future(self._future)
        await asyncio.wait([future])
        future.exception()  # whoever awaited the call was told; nobody else is to be warned
