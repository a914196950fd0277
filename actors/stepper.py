"""The heart of a replica: takes the next frames of the sessions that have some, and steps them together.

One coroutine decides, one thread computes: while it does, new frames gather, so that the next batch is as large as the
load demands, and a frame that comes to an idle replica starts at once. Most urgent first; frames of equal size share a
batch; a session has at most one frame in it, so that every frame meets the state that the one before left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from actors.live_engine import LiveEngine, StepRequest
from actors.session import Answer, Incoming, Session
from infra.protocol import NO_FLAGS, Flag
from infra.telemetry import Telemetry
from pipeline.flow_ahead import NextFlow
from pipeline.step_policy import StepPolicy

logger = logging.getLogger(__name__)
_POLICY = StepPolicy()


@dataclass(slots=True, eq=False)
class Seat:
    """A session's place at the stepper: its engine, and where its answers go.

    `failed` is called instead of `answer` for a frame whose step failed.
    """

    session: Session
    engine: LiveEngine
    answer: Callable[[Answer], None]
    failed: Callable[[BaseException], None]
    next_flow: NextFlow | None = field(init=False)

    def __post_init__(self) -> None:
        self.next_flow = None if self.engine.ahead is None else NextFlow(self.engine.ahead)

    def look_ahead(self) -> None:
        """While a frame is in a step, begin to look for the flow from the one that waits behind it."""
        following = None if self.next_flow is None else self.session.following()
        if self.next_flow is not None and following is not None and following.rgb_HWC is not None:
            self.next_flow.look(following.rgb_HWC)


@dataclass(slots=True, eq=False)
class _Taken:
    seat: Seat
    frame: Incoming
    request: StepRequest
    taken: float

    def session_failed(self, error: BaseException) -> None:
        self.seat.session.in_step = None
        self.seat.failed(error)


class Stepper:
    """See the module. `start` it in the event loop in which the sessions live.

    Args:
        clock: seconds, as in the frames' `arrived`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, telemetry: Telemetry | None = None) -> None:
        self._telemetry = telemetry or Telemetry()
        self.seats: dict[str, Seat] = {}
        self.busy_s = 0.0
        self._clock = clock
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="upriver-step")
        self._task: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self) -> None:
        """Begin to step."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="upriver-stepper")

    async def stop(self) -> None:
        """End after the batch in hand."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=True)

    def wake(self) -> None:
        """Look at the sessions again: one has a new frame, or has come or gone."""
        self._wake.set()

    def arrived(self, session: Session) -> None:
        """A session has a new frame."""
        seat = self.seats.get(str(session.key))
        if seat is not None:
            seat.look_ahead()
        self.wake()

    async def in_thread(self, work: Callable[[], None]) -> None:
        """Run `work` in the thread that owns the device, between two batches."""
        await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def idle(self) -> None:
        """Return when no batch is in hand."""
        await self._idle.wait()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while await self._step_next():
                pass

    async def _step_next(self) -> bool:
        """Step the most urgent frames; False if there are none. When it returns, no frame and no model is held."""
        batches = self._take()
        self._idle.clear()
        try:
            for engine, batch in batches:
                await self._step(engine, batch)
        finally:
            self._idle.set()
        return bool(batches)

    def _take(self) -> list[tuple[LiveEngine, list[_Taken]]]:
        """Return the most urgent batch (two where a late frame was dropped and the one behind it has another size)."""
        now = self._clock()
        urgent = [(due, seat) for seat in self.seats.values() if (due := seat.session.due()) is not None]
        if not urgent:
            return []
        urgent.sort(key=lambda pair: pair[0])
        first = urgent[0][1]
        wanted = (id(first.engine), first.session.size())
        largest = self._batch_size(first, [(due, seat) for due, seat in urgent if self._is_like(seat, first)], now)
        groups: dict[tuple[int, tuple[int, int]], list[_Taken]] = defaultdict(list)
        for _, seat in urgent:
            session = seat.session
            size = session.size()
            if size is not None and (id(seat.engine), size) != wanted:
                continue
            if sum(map(len, groups.values())) >= largest and size is not None:
                break
            step_s = seat.engine.cost_s(*size, session.ladder.level) if size is not None else 0.0
            try:
                frame, level, answers = session.take(now, step_s)
                for answer in answers:
                    seat.answer(answer)
            except Exception as error:
                self._dismiss(seat, error)
                continue
            if frame is None:
                continue
            assert frame.rgb_HWC is not None
            request = StepRequest(
                frame.rgb_HWC,
                session.stream,
                level,
                cut=Flag.CUT in frame.flags,
                find_cuts=session.hello.cuts,
                policy=_POLICY if session.hello.adaptive and not frame.replayed else None,
            )
            if seat.next_flow is not None:
                request.search = seat.next_flow.take(frame.rgb_HWC)
                seat.next_flow.begin(frame.rgb_HWC if level > 0 else None)
                seat.look_ahead()
            taken = _Taken(seat, frame, request, now)
            groups[id(seat.engine), frame.rgb_HWC.shape[:2]].append(taken)
        if not groups:
            self._wake.set()  # only answers came of it; something may be due all the same
        return [(batch[0].seat.engine, batch) for batch in groups.values()]

    @staticmethod
    def _is_like(seat: Seat, first: Seat) -> bool:
        return seat.engine is first.engine and seat.session.size() == first.session.size()

    @staticmethod
    def _batch_size(first: Seat, waiting: list[tuple[float, Seat]], now: float) -> int:
        """Return how many of those that wait with `first` are stepped with it.

        Its level stands for all: where others have another one, the time to expect is a guess.
        """
        size = first.session.size()
        if size is None:
            return first.engine.largest_batch
        in_haste = [due - now for due, seat in waiting if seat.session.ladder.budget_s is not None]
        budget_s = min(in_haste) if in_haste else None
        return first.engine.batch_for(*size, first.session.ladder.level, len(waiting), budget_s)

    def _dismiss(self, seat: Seat, error: Exception) -> None:
        """A defect in one stream ends that stream, not the one coroutine that steps them all."""
        logger.error("stream %s cannot be stepped", seat.session.key, exc_info=error)
        self.seats = {key: other for key, other in self.seats.items() if other is not seat}
        seat.session.in_step = None
        seat.failed(error)

    async def _step(self, engine: LiveEngine, batch: list[_Taken]) -> None:
        requests = [taken.request for taken in batch]
        loop = asyncio.get_running_loop()
        began = self._clock()
        try:
            seconds = await loop.run_in_executor(self._thread, engine.step, requests)
        except Exception as error:  # a defect: these streams end, and the others go on
            logger.exception("a step of %d streams failed", len(batch))
            for taken in batch:
                taken.session_failed(error)
            return
        self.busy_s += seconds
        try:
            self._telemetry.metrics.batch(engine.name, len(batch), seconds)
            self._trace(engine, batch, began)
        except Exception:
            logger.exception("a step of %d streams could not be reported", len(batch))
        for taken in batch:
            try:
                self._finish(taken, seconds)
            except Exception as error:
                self._dismiss(taken.seat, error)

    def _trace(self, engine: LiveEngine, batch: list[_Taken], began: float) -> None:
        tracer, traces = self._telemetry.tracer, [taken.frame.trace for taken in batch if taken.frame.trace is not None]
        if tracer is None or not traces:
            return
        ended = self._clock()
        span = tracer.batch(began, ended, engine.name, len(batch), clock=self._clock)
        for trace in traces:
            trace.batch = span
            trace.stage("wait", began)
            trace.stage("step", ended)

    def _finish(self, taken: _Taken, seconds: float) -> None:
        session, frame, request = taken.seat.session, taken.frame, taken.request
        if request.error is not None:
            taken.session_failed(request.error)
            return
        if taken.seat.next_flow is not None:
            taken.seat.next_flow.done()
        session.step_s = seconds
        flags = (frame.flags & Flag.GAP) | (Flag.RESET if request.reset else NO_FLAGS)
        answer = Answer(
            frame,
            level=request.steps,
            index=request.index,
            flags=flags,
            queue_us=round(1e6 * (taken.taken - (frame.ready or frame.arrived))),
            step_us=round(1e6 * seconds),
            output=request.output_3HW,
        )
        taken.seat.answer(session.stepped(answer))
