"""Keeps a live stream's state safe, off the way of its frames: snapshots between two steps, and what is durable.

A snapshot counts once the client has acknowledged all answers that it covers: only then could the stream go on from it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Final

from actors.state_book import Snapshot, StateSink
from infra.refusals import StateLost

if TYPE_CHECKING:
    from actors.live_report import StreamReport
    from actors.session import Session
    from pipeline.state import StreamState

logger = logging.getLogger(__name__)

_LAST_S: Final = 5.0


class StateSaver:
    """See the module. Belongs to one connection, and to its event loop.

    Args:
        pool: where states are written to bytes.
        lost: called when another replica has the stream.
        interval_s: between two snapshots.
    """

    def __init__(
        self,
        session: Session,
        states: StateSink,
        pool: Executor,
        report: StreamReport,
        lost: Callable[[BaseException], None],
        *,
        interval_s: float,
        now: float,
    ) -> None:
        self._session, self._states, self._pool, self._report = session, states, pool, report
        self._lost, self._interval_s = lost, interval_s
        self._saved: deque[int] = deque()  # ids below which the stream is safe, as soon as the client has the answers
        self._due = self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._last = now

    def count_durable(self) -> None:
        """Bring `Session.durable_below` up to date."""
        while self._saved and self._saved[0] <= self._session.received:
            self._session.durable_below = self._saved.popleft()

    def look(self, now: float) -> None:
        """Save the state if it is time to; call it now and then."""
        session = self._session
        safe = self._saved[-1] if self._saved else session.durable_below
        if (
            session.stepped_below > safe
            and now - self._last >= self._interval_s
            and self._task is None
            and not self._stopped
        ):
            self._due = True
            self.between_steps(now)

    def between_steps(self, now: float) -> None:
        """Save the state if it is due and nothing is being stepped; call it after each step."""
        if not self._due or self._session.in_step is not None:
            return
        self._due, self._last = False, now
        self._task = asyncio.create_task(self._put(*self._snapshot()))
        self._task.add_done_callback(self._done)

    async def save_last(self) -> None:
        """Save the state after the last frame; a failure only means that the client has to send more again."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=_LAST_S)
        try:
            async with asyncio.timeout(_LAST_S):  # a keeper that does not answer must not keep the stream's place
                await self._put(*self._snapshot())
        except Exception as error:
            logger.warning("stream %s: its last state was not saved: %s", self._session.key, str(error))

    async def stop(self) -> None:
        """Give up a snapshot that is under way; none follows, so that nothing enters again a stream that is closed."""
        self._stopped, self._due = True, False
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, StateLost):
            self._lost(error)
        else:
            logger.warning("stream %s: its state was not saved: %s", self._session.key, error)

    def _snapshot(self) -> tuple[StreamState, int]:
        # A step replaces the tensors and leaves the old ones as they are: a thread may write them later.
        return dataclasses.replace(self._session.stream), self._session.stepped_below

    async def _put(self, state: StreamState, below: int) -> None:
        session = self._session
        with self._report.saving() as safe:
            data = await asyncio.get_running_loop().run_in_executor(self._pool, state.to_bytes)
            await self._states.put(session.key, session.epoch, Snapshot(below, data), session.received)
            safe(len(data))
        self._saved.append(below)
