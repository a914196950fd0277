"""One live stream on its replica: its life, the order of its frames, what waits, what is dropped, and its credit.

Plain arithmetic on ids and times: no sockets, no threads, no clock of its own. `actors.live_connection` moves frames
through it: arrived -> (decoded) -> waiting -> taken by the stepper -> answered -> acknowledged.

- Ids grow. A gap is allowed and marked; a repeated or older id is answered as dropped, and ends a lossless stream.
- Everything between a client's sending and its acknowledgement is at most one window: that bounds all memory.
- A dropped frame does not advance the stream's index; it is answered in its place all the same.
"""

from __future__ import annotations

import secrets
from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from actors.errors import ActorsError
from actors.quality import LEVELS, QualityLadder
from infra.protocol import NO_FLAGS, Deadline, DropReason, Flag, FrameHeader, Hello, Lossless, Newest, Stats
from infra.refusals import BadMessage, OutOfOrder, RateExceeded, TimedOut

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from infra.tracing import FrameTrace
    from pipeline.state import StreamState

SMALLEST_WINDOW: Final = 2
LARGEST_WINDOW: Final = 16
WINDOW_BYTES: Final = 32 * 1024 * 1024
LARGEST_ID: Final = 2**64 - 1  # `acknowledged` is an id plus one, and has 64 bits as well


class SessionState(StrEnum):
    """Where a stream is in its life."""

    CREATED = "created"
    WARMING = "warming"
    LIVE = "live"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


_S = SessionState
LEGAL_MOVES: Final[dict[SessionState, frozenset[SessionState]]] = {
    _S.CREATED: frozenset({_S.WARMING, _S.CLOSED, _S.FAILED}),
    _S.WARMING: frozenset({_S.LIVE, _S.DRAINING, _S.CLOSED, _S.FAILED}),
    _S.LIVE: frozenset({_S.DRAINING, _S.CLOSED, _S.FAILED}),
    _S.DRAINING: frozenset({_S.CLOSED, _S.FAILED}),
    _S.CLOSED: frozenset(),
    _S.FAILED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class SessionKey:
    """What a state belongs to. The tenant is part of it: nobody can name another's stream."""

    tenant: str
    session: str

    def __str__(self) -> str:
        return f"{self.tenant}/{self.session}"


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Times in seconds."""

    window: int
    idle_timeout_s: float = 60.0
    max_life_s: float = 24 * 3600.0
    unread_timeout_s: float = 30.0


@dataclass(slots=True, eq=False)
class Incoming:
    """One frame on its way: a picture that waits, or (with a `reason`) only its place in the order of the answers.

    Attributes:
        replayed: it is sent again; the client has its answer, the stream needs its step.
        decode_only: it is sent again, and only the decoder needs it.
        level: of a replayed frame, that of its answer.
        arrived, ready: when it came, and when it had been decoded.
        trace: notes its way, of one frame in many.
    """

    id: int
    pts: int
    flags: Flag
    arrived: float
    ready: float = 0.0
    rgb_HWC: NDArray[np.uint8] | None = None
    reason: DropReason = DropReason.NONE
    replayed: bool = False
    decode_only: bool = False
    level: int = 0
    trace: FrameTrace | None = None


@dataclass(slots=True, eq=False)
class Answer:
    """What the client is told of one frame. `output_3HW` or `picture` is what is to be encoded, if anything is."""

    frame: Incoming
    reason: DropReason = DropReason.NONE
    level: int = 0
    index: int = 0
    flags: Flag = NO_FLAGS
    queue_us: int = 0
    step_us: int = 0
    output: Tensor | None = None


@dataclass(slots=True)
class Totals:
    """Counted since the stream was opened here."""

    frames_in: int = 0
    frames_out: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Session:
    """See the module. All methods are called from one thread.

    Args:
        key, epoch: whose it is; a newer epoch elsewhere ends this one.
        state: the stream's memory; owned by the session until it is closed.
        first_id: smallest id that may come; None takes whatever comes first.
        received: answers with smaller ids have arrived before: they are not sent again.
    """

    def __init__(
        self,
        key: SessionKey,
        hello: Hello,
        limits: SessionLimits,
        state: StreamState,
        *,
        now: float,
        epoch: int = 1,
        resume_at: int = 0,
        received: int = 0,
    ) -> None:
        self.key, self.hello, self.limits, self.epoch = key, hello, limits, epoch
        self.stream: StreamState = state
        self.life = SessionState.CREATED
        self.totals = Totals()
        self.resume_at, self.received = resume_at, received
        self.resumed = epoch > 1
        self.hand_offs = epoch - 1
        self.durable_below = resume_at
        budget_ms = hello.policy.ms if isinstance(hello.policy, Deadline) else hello.latency_ms
        least = hello.least_steps
        if least is None:
            least = 4 if budget_ms is None else 0
        self.ladder = QualityLadder(None if budget_ms is None else budget_ms / 1000, least=least)
        self.latency_s = 0.0  # of the last answer
        self.step_s = 0.0
        self.opened = self.last_frame = now
        self.in_step: Incoming | None = None
        self.stepped_below = resume_at  # every frame with a smaller id has been restored or dropped
        self._next_id: int | None = None
        self._came = 0  # frames that counted against the window
        self._freed = 0  # of these, acknowledged
        self._waiting: deque[Incoming] = deque()
        self._unread: deque[tuple[int, int]] = deque()  # id and receipt of answers that are not acknowledged
        self._unread_since = now
        self._read = (0, 0)
        self._marked_cut = False  # by the client, for the next frame that arrives
        self._passed_cut = False  # by a dropped frame, for the next one that waits
        self._first_answer = True

    # The life of the stream

    def move(self, to: SessionState) -> None:
        """Go to another state of life.

        Raises:
            ActorsError: the move is not in `LEGAL_MOVES`.
        """
        if to not in LEGAL_MOVES[self.life]:
            raise ActorsError(
                f"A session cannot go from {self.life} to {to}; legal: {', '.join(sorted(LEGAL_MOVES[self.life]))}.",
                code="session-move",
                remedy="This is a defect; please report it.",
            )
        self.life = to

    @property
    def is_over(self) -> bool:
        """Closed or failed."""
        return not LEGAL_MOVES[self.life]

    def check_times(self, now: float, *, in_decoder: int = 0) -> None:
        """Raise TimedOut if the stream is idle, too old, or does not read its answers.

        Args:
            in_decoder: frames of which a decoder has not made a picture yet: they wait for others, not for us.
        """
        limits = self.limits
        if self._unread and now - self._unread_since > limits.unread_timeout_s:
            raise _timed_out(f"No answer was acknowledged for {limits.unread_timeout_s:g} s", "unread-answers")
        if self.outstanding <= in_decoder and now - self.last_frame > limits.idle_timeout_s:
            raise _timed_out(f"No frame came for {limits.idle_timeout_s:g} s", "session-idle")
        if now - self.opened > limits.max_life_s:
            raise _timed_out(f"The stream is open for {limits.max_life_s:g} s", "session-life")

    def wipe(self) -> None:
        """Forget everything that belongs to the client. The last call of a session's life."""
        for tensor in (self.stream.prev_output_3HW, self.stream.prev_input_3HW):
            if tensor is not None:
                tensor.zero_()
        self.stream.reset()
        self.stream.detector, self.stream.policy = {}, {}
        self._waiting.clear()

    # Credit

    @property
    def granted(self) -> int:
        """How many frames the client may have sent since the stream was opened here."""
        return self._freed + self.limits.window

    @property
    def outstanding(self) -> int:
        """Frames that came and are not acknowledged."""
        return self._came - self._freed

    def acknowledge(self, below: int, receipt: int, now: float) -> None:
        """Take the client's word that the answer with this receipt, and all before it, have arrived.

        Args:
            below: the answer's id plus one; 0 as long as there was none.

        Raises:
            BadMessage: there is no such answer.
        """
        if below == 0 or (below, receipt) == self._read:
            return
        freed = next((n for n, sent in enumerate(self._unread, 1) if sent == (below - 1, receipt)), 0)
        if not freed:
            raise BadMessage(
                f"An answer to frame {below - 1} is acknowledged with a receipt that it does not have.",
                code="bad-receipt",
                remedy="Acknowledge the id of the last answer received, plus one, with that answer's receipt.",
            )
        for _ in range(freed):
            self.received = max(self.received, self._unread.popleft()[0] + 1)
        self._read = (below, receipt)
        self._freed += freed
        self._unread_since = now

    # Frames in

    def arrive(self, header: FrameHeader, now: float) -> Incoming:
        """Take a frame that has come; returns it, with a `reason` if it will not be restored.

        Raises:
            RateExceeded: more frames than were granted.
            OutOfOrder: a repeated or older id in a lossless stream.
            BadMessage: a level that no frame can have had, or an id after which there is none.
        """
        if header.level not in LEVELS:  # a frame that is sent again gets the steps that its header says
            raise _impossible(f"level {header.level}", ", ".join(map(str, LEVELS)))
        if header.id >= LARGEST_ID:
            raise _impossible(f"id {header.id}", f"ids below {LARGEST_ID}")
        self._came += 1
        self.totals.frames_in += 1
        if self._came > self.granted:
            raise RateExceeded(
                f"Frame {header.id} exceeds what was granted: {self.granted} frames.",
                code="window-exceeded",
                limit=f"{self.limits.window} frames between sending and acknowledgement",
                remedy="Send only as many frames as the last header's `granted` says, and acknowledge answers.",
            )
        self.last_frame = now
        frame = Incoming(header.id, header.pts, header.flags & (Flag.KEY | Flag.CUT), now, level=header.level)
        if self._next_id is not None and header.id < self._next_id:
            if isinstance(self.hello.policy, Lossless):
                raise OutOfOrder(
                    f"Frame {header.id} came after frame {self._next_id - 1}.",
                    limit="ids that grow",
                    remedy="Send frames in the order of their ids, each once, or open the stream with another policy.",
                )
            repeated = header.id == self._next_id - 1
            frame.reason = DropReason.REPEATED if repeated else DropReason.OUT_OF_ORDER
            return frame
        # What the client had an answer to and left out when it resumed was never missing.
        if self._next_id is not None and header.id > max(self._next_id, self.received):
            frame.flags |= Flag.GAP
        if self._marked_cut:
            frame.flags |= Flag.CUT
            self._marked_cut = False
        self._next_id = header.id + 1
        frame.replayed = header.id < self.received
        frame.decode_only = header.id < self.resume_at or (frame.replayed and header.reason is not DropReason.NONE)
        return frame

    def mark_cut(self) -> None:
        """A new scene begins with the next frame that arrives."""
        self._marked_cut = True

    def wait(self, frame: Incoming) -> None:
        """Put a frame in its place behind those that wait."""
        if self._passed_cut:
            frame.flags |= Flag.CUT
            self._passed_cut = False
        self._waiting.append(frame)

    @property
    def waiting(self) -> int:
        """Frames that wait to be restored."""
        return len(self._waiting)

    # Frames out

    def due(self) -> float | None:
        """Return by when the next frame wants to be taken (smaller: more urgent); None if there is nothing to take."""
        if self.in_step is not None or not self._waiting:
            return None
        # The oldest, whichever is taken: the newest always looks as if it had just come, and its stream would starve.
        return self._waiting[0].arrived + (self.ladder.budget_s if self.ladder.budget_s is not None else 1.0)

    def following(self) -> Incoming | None:
        """Return the frame that will come after the one in the step, as it looks now, if it will want flow to that."""
        frame = None if self.in_step is None else self._candidate()
        wants = frame is not None and Flag.CUT not in frame.flags and self.ladder.level > 0
        return frame if wants else None

    def size(self) -> tuple[int, int] | None:
        """Return height and width of the frame that `take` would return now, or None."""
        frame = self._candidate()
        return None if frame is None or frame.rgb_HWC is None else frame.rgb_HWC.shape[:2]

    def _candidate(self) -> Incoming | None:
        pictures = [frame for frame in self._waiting if frame.reason is DropReason.NONE]
        if not pictures:
            return None
        if isinstance(self.hello.policy, Newest):
            replayed = [frame for frame in pictures if frame.replayed]
            return replayed[0] if replayed else pictures[-1]
        return pictures[0]

    def take(self, now: float, step_s: float) -> tuple[Incoming | None, int, list[Answer]]:
        """Return the frame to be restored next, its level, and answers for those before it that are dropped.

        The frame is in the stepper's hands then, until `stepped`. A level of 0 asks for a plain resize.

        Args:
            step_s: how long a step at the present level is expected to take.
        """
        answers: list[Answer] = []
        chosen = self._candidate()
        while self._waiting:
            frame = self._waiting.popleft()
            if frame.reason is not DropReason.NONE:
                self._pass_on_cut(frame)
                answers.append(self.drop(frame, frame.reason))
                continue
            if frame is not chosen:
                self._pass_on_cut(frame)
                answers.append(self.drop(frame, DropReason.NEWER))
                continue
            level = frame.level if frame.replayed else self.ladder.level
            policy = self.hello.policy
            if isinstance(policy, Deadline) and not frame.replayed and now + step_s - frame.arrived > policy.ms / 1000:
                self.ladder.too_late(now)
                level = 0
                if policy.late == "drop":
                    self._pass_on_cut(frame)
                    answers.append(self.drop(frame, DropReason.LATE))
                    chosen = self._candidate()
                    continue
            self.in_step = frame
            return frame, level, answers
        return None, 0, answers

    def _pass_on_cut(self, frame: Incoming) -> None:
        """A cut before a frame that is dropped is a cut before the next one."""
        if Flag.CUT in frame.flags:
            if self._waiting:
                self._waiting[0].flags |= Flag.CUT
            else:
                self._passed_cut = True

    def drop(self, frame: Incoming, reason: DropReason) -> Answer:
        """Return the answer to a frame that is not restored."""
        self.totals.dropped[reason.name.lower()] += 1
        if reason not in (DropReason.REPEATED, DropReason.OUT_OF_ORDER):
            self.stepped_below = max(self.stepped_below, frame.id + 1)
        return Answer(frame, reason, flags=Flag.DROPPED | frame.flags & Flag.GAP)

    def stepped(self, answer: Answer) -> Answer:
        """Take the outcome of the step of the frame that was taken."""
        assert self.in_step is answer.frame
        self.in_step = None
        self.stepped_below = answer.frame.id + 1
        if self.resumed and self._first_answer and not answer.frame.replayed:
            answer.flags |= Flag.RESUMED
        if not answer.frame.replayed:
            self._first_answer = False
        return answer

    def release(self, frame: Incoming) -> None:
        """Free the credit of a frame that gets no answer: it was sent again and the client has had its answer."""
        self._freed += 1
        if frame.decode_only and frame.id >= self.resume_at and Flag.CUT in frame.flags:
            self._passed_cut = True  # it was dropped then, and is now

    def header(self, answer: Answer, *, now: float, encode_us: int, key: bool) -> FrameHeader:
        """Return the header of an answer that is sent now."""
        frame = answer.frame
        receipt = secrets.randbits(32)
        if not self._unread:
            self._unread_since = now
        self._unread.append((frame.id, receipt))
        if Flag.DROPPED not in answer.flags:
            self.totals.frames_out += 1
            self.latency_s = now - frame.arrived
            self.ladder.observe(self.latency_s, now)
        return FrameHeader(
            id=frame.id,
            pts=frame.pts,
            flags=answer.flags | (Flag.KEY if key else NO_FLAGS),
            level=answer.level,
            reason=answer.reason,
            index=answer.index,
            receipt=receipt,
            acknowledged=self.durable_below,
            granted=self.granted,
            decode_us=round(1e6 * (frame.ready - frame.arrived)) if frame.ready else 0,
            queue_us=answer.queue_us,
            step_us=answer.step_us,
            encode_us=encode_us,
        )

    def stats(self) -> Stats:
        """Return the figures that the client may ask for."""
        return Stats(
            state=self.life,
            frames_in=self.totals.frames_in,
            frames_out=self.totals.frames_out,
            dropped=dict(self.totals.dropped),
            waiting=self.waiting,
            level=self.ladder.level,
            step_ms=round(1000 * self.step_s, 3),
            latency_ms=round(1000 * self.latency_s, 3),
            hand_offs=self.hand_offs,
        )


def window_for(max_message_bytes: int, largest: int = LARGEST_WINDOW) -> int:
    """Return how many frames of this size may be under way at once."""
    return max(SMALLEST_WINDOW, min(largest, WINDOW_BYTES // max_message_bytes))


def _impossible(what: str, limit: str) -> BadMessage:
    return BadMessage(
        f"A frame's header has the {what}, which cannot be.", limit=limit, remedy="See docs/reference/protocol.md."
    )


def _timed_out(what: str, code: str) -> TimedOut:
    return TimedOut(
        f"{what}: it is closed.",
        code=code,
        remedy="Open another stream when there are frames to send; read and acknowledge its answers.",
    )
