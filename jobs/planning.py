"""The plans of a job as they are made: ahead of the workers where those leave the processors alone, else in between.

A plan decodes every picture of its video, which takes processors; restoring takes GPUs. So an archive is planned while
it is restored, never further ahead than the job asks for: the driver holds a window of plans, however many there are.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Self

from jobs.plan import Planned

_QUEUED = 16  # plans that are made and not asked for
_LOOK_S = 0.2


class Planning:
    """A context manager around plans that are being made.

    Args:
        planned: makes them, one by one; it is closed at the end.
        ahead: make them in a thread, before they are asked for.

    Attributes:
        finished: there are no more.
    """

    def __init__(self, planned: Iterator[Planned], *, ahead: bool) -> None:
        self._planned = planned
        self.ahead = ahead
        self.finished = False
        self._made: queue.Queue[Planned | BaseException | None] = queue.Queue(_QUEUED)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="planning", daemon=True)

    def __enter__(self) -> Self:
        if self.ahead:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def next(self, timeout_s: float) -> Planned | None:
        """Return the next plan; None where there is none after `timeout_s`, or, with `finished`, no more.

        Without `ahead` the plan is made now, which takes as long as it takes; with a timeout of 0 none is made.

        Raises:
            Exception: what the making raised.
        """
        if self.finished:
            return None
        if not self.ahead:
            made = next(self._planned, None) if timeout_s > 0 else None
            self.finished = made is None and timeout_s > 0
            return made
        try:
            found = self._made.get(timeout=timeout_s) if timeout_s > 0 else self._made.get_nowait()
        except queue.Empty:
            return None
        if found is None or isinstance(found, BaseException):
            self.finished = True
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self) -> None:
        try:
            for planned in self._planned:
                if not self._put(planned):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Planned | BaseException | None) -> bool:
        """Wait for room; return whether anybody still wants it."""
        while not self._stopped.is_set():
            try:
                self._made.put(item, timeout=_LOOK_S)
                return True
            except queue.Full:
                continue
        return False
