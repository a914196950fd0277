"""Decode, model and encode at the same time: one thread before the model, one after it, short queues between them.

Both ends keep the order, hold at most `depth` items, and hand an error of their thread to the caller. Knows nothing of
videos. Threads suffice because decoders, encoders and tensor operations release Python's lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Iterate over `items` in a thread that stays at most `depth` items ahead of the consumer.

    An exception raised by `items` reaches the consumer after the items before it. `close` stops the thread; the source
    is touched by no other thread until then, and by none afterwards.
    """

    def __init__(self, items: Iterable[T], depth: int = 4) -> None:
        self.waited_s = 0.0  # how long the consumer waited for items
        self._items = items
        self._depth = depth
        self._ready: deque[T] = deque()
        self._changed = threading.Condition()
        self._finished = False
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
                    if self._stopped:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._finished)
            self.waited_s += time.perf_counter() - began
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
        if self._error is not None:
            raise self._error
        raise StopIteration

    def peek(self) -> T | None:
        """Return the next item without taking it; None if it is not there yet, or there is none."""
        with self._changed:
            return self._ready[0] if self._ready else None

    def close(self) -> None:
        """Stop the thread and wait for it; items that were read and not taken are dropped."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()


class WriteBehind(Generic[T]):
    """Hand items to `consume` in a thread; `put` blocks while `depth` items wait.

    An exception raised by `consume` is raised by the next `put` or by `finish`.
    """

    def __init__(self, consume: Callable[[T], None], depth: int = 4) -> None:
        self.waited_s = 0.0  # how long the producer waited for room, and at the end for the rest
        self._consume = consume
        self._depth = depth
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing or self._stopped)
                if self._stopped or not self._waiting:
                    return
                item = self._waiting[0]
            try:
                self._consume(item)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._waiting.clear()
                    self._stopped = True
                    self._changed.notify_all()
                return
            with self._changed:
                if self._waiting:  # `close` may have emptied it meanwhile
                    self._waiting.popleft()
                self._changed.notify_all()

    def put(self, item: T) -> None:
        """Append `item`; wait while the queue is full."""
        began = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._waiting) < self._depth)
            self.waited_s += time.perf_counter() - began
            if self._error is not None:
                raise self._error
            if self._stopped or self._closing:
                raise RuntimeError("the queue is closed")
            self._waiting.append(item)
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until every item has been consumed, then end the thread."""
        began = time.perf_counter()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self.waited_s += time.perf_counter() - began
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread as soon as the item in hand is consumed; the others are dropped. No error is raised."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join()
