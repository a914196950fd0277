"""Ends a process whose work stands still: a decoder, a driver or a store that hangs would otherwise hang for ever.

An actor that hangs cannot be asked to stop, and Ray would wait for it. So its process ends itself; what it worked on is
told in a small file, from which the job knows that this was no crash.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

EXIT_STATUS = 75  # "temporary failure" in sysexits.h
# Native code that holds Python's lock stops this module's thread too; then C code ends the process, a little later.
_SECOND_LINE_S = 60.0


class Watchdog:
    """Watches one or more tasks of this process; each must `beat` now and then.

    Args:
        limit_s: the longest pause between two beats.
        tell: called with the name of a task that stands still, just before the process ends.
        end: ends the process; replaced in tests.
    """

    def __init__(self, limit_s: float, tell: Callable[[str], None], end: Callable[[int], object] | None = None) -> None:
        self._limit_s = limit_s
        self._tell = tell
        self._end = end or os._exit
        self._last: dict[str, float] = {}
        self._changed = threading.Condition()
        self._armed_at = 0.0
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, task: str) -> None:
        """Say that `task` goes on."""
        now = time.monotonic()
        with self._changed:
            self._last[task] = now
            self._changed.notify_all()
        if now - self._armed_at > min(1.0, self._limit_s / 4):  # arming starts a thread
            self._armed_at = now
            faulthandler.dump_traceback_later(self._limit_s + _SECOND_LINE_S, exit=True)

    def finish(self, task: str) -> None:
        """Say that `task` is over."""
        with self._changed:
            self._last.pop(task, None)
            if not self._last:
                faulthandler.cancel_dump_traceback_later()
                self._armed_at = 0.0
            self._changed.notify_all()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if not self._last:
                    self._changed.wait()
                    continue
                task = min(self._last, key=self._last.__getitem__)
                left_s = self._last[task] + self._limit_s - time.monotonic()
                if left_s > 0:
                    self._changed.wait(left_s)
                    continue
                del self._last[task]
            logger.error("%s stood still for %.0f s; its process ends", task, self._limit_s)
            try:
                self._tell(task)
            except Exception:
                logger.exception("nobody could be told of it")
            self._end(EXIT_STATUS)
