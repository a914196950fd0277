"""A signal that ends a run between two iterations instead of in the middle of one, so that nothing learnt is lost.

Machines that can be taken away at any time (spot instances, batch queues) send SIGTERM some seconds before.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final, Self

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Within ``with``, SIGTERM and SIGINT are noted and nothing more: what they ask for is under way.

    A second one often comes by another way, when a launcher hands on what its children got too. Elsewhere than in a
    process's main thread, where Python takes no signals, nothing is noted.

    Attributes:
        received: number of the signal; None: none came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._note) for one in _SIGNALS}
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number


def ignore_stop_signals(_: int = 0) -> None:
    """Let this process, a worker of one that notes signals, leave it to that one when to end."""
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)
