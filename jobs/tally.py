"""How far a job is, counted as it goes, and told to the work area every few seconds.

The telling has a thread of its own, because a job may be busy for long: others take a silent driver for dead. The same
thread looks whether somebody asked the job to stop.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from infra.errors import StorageError
from infra.job_records import Progress
from jobs.cancel import is_cancelled
from jobs.manifest import timestamp
from jobs.workarea import WorkArea

logger = logging.getLogger(__name__)

INTERVAL_S = 3.0
_MOST_POINTS = 500


class Tally:
    """The counts of one job; used by several threads.

    `shown` maps a video to the frames that are finished or under way, `restored` counts those of this run.

    Args:
        videos_total: of the job. to_deliver: how many of them are finished and get extras only.
    """

    def __init__(self, videos_total: int, to_deliver: int = 0) -> None:
        self.actors = 0
        self.restored = 0
        self._videos_total = videos_total
        self._to_plan = videos_total - to_deliver
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._frames_total: dict[str, int] = {}
        self._rows: dict[str, dict[int, int]] = {}  # frames by video and shot
        self._started: set[str] = set()
        self._done: list[str] = []
        self._failed: list[str] = []
        self._history: list[tuple[float, int]] = []

    @property
    def frames_total(self) -> int:
        """Frames of all videos that are planned."""
        with self._lock:
            return sum(self._frames_total.values())

    @property
    def frames_shown(self) -> int:
        """Frames finished or under way, earlier runs' included."""
        with self._lock:
            return sum(sum(rows.values()) for rows in self._rows.values())

    def plan(self, name: str, frames: int, finished: dict[int, int]) -> None:
        """Count a video with `frames`, of which `finished` (by shot) are there from earlier runs."""
        with self._lock:
            self._frames_total[name] = frames
            self._rows[name] = dict(finished)
            if any(finished.values()):
                self._started.add(name)

    def advance(self, name: str, shot: int, frames: int, *, restored: bool) -> None:
        """Count that a shot is at `frames`; `restored`: by work of this run, not taken over."""
        with self._lock:
            rows = self._rows[name]
            self._started.add(name)
            if restored:
                self.restored += max(0, frames - rows.get(shot, 0))
            rows[shot] = frames

    def finish(self, name: str) -> None:
        """Count a video as done."""
        with self._lock:
            self._done.append(name)
            self._started.discard(name)
            self._rows[name] = {0: self._frames_total.get(name, 0)}  # its shots need not be remembered

    def fail(self, name: str) -> None:
        """Count a video as failed."""
        with self._lock:
            self._failed.append(name)
            self._started.discard(name)

    def progress(self) -> Progress:
        """Return the counts as a record, and remember them as a point of the history."""
        with self._lock:
            elapsed_s = round(time.monotonic() - self._began, 3)
            self._history.append((elapsed_s, self.restored))
            if len(self._history) > _MOST_POINTS:
                del self._history[1::2]
            given_up = sum(self._frames_total.get(name, 0) for name in self._failed)
            shown = sum(sum(rows.values()) for name, rows in self._rows.items() if name not in self._failed)
            total = sum(self._frames_total.values())
            return Progress(
                updated_at=timestamp(),
                elapsed_s=elapsed_s,
                actors=self.actors,
                videos_total=self._videos_total,
                done=list(self._done),
                failed=list(self._failed),
                running={name: sum(self._rows[name].values()) for name in sorted(self._started)},
                frames_total=total,
                frames_left=max(0, total - given_up - shown),
                frames_done=self.restored,
                history=list(self._history),
                unplanned=max(0, self._to_plan - len(self._frames_total.keys() | set(self._failed))),
            )


class Reporter:
    """A context manager around a job: tells its progress, at the end once more; `cancelled` when somebody asked."""

    def __init__(self, area: WorkArea, tally: Tally, interval_s: float = INTERVAL_S) -> None:
        self._area, self._tally, self._interval_s = area, tally, interval_s
        self._over = threading.Event()
        self._cancelled = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    @property
    def cancelled(self) -> bool:
        """Whether the job is to stop."""
        return self._cancelled.is_set()

    def __enter__(self) -> Self:
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._tell()

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            self._tell()
            try:
                if is_cancelled(self._area.place):
                    self._cancelled.set()
            except StorageError as error:
                logger.warning("it is not known whether the job was cancelled: %s", error)

    def _tell(self) -> None:
        try:
            self._area.write_progress(self._tally.progress())
        except StorageError as error:  # a store that is away for a while must not stop a job that has nothing to write
            logger.warning("the progress could not be told: %s", error)
