"""Sequences of inference requests as live streams: who has which open, in what order they run, when they end.

A sequence is named by its caller, its model and its `sequence_id`; nobody reaches another's. Its requests run one after
the other in the order in which they arrive, as Triton's sequence batcher does it; those that do not fit into its queue
are refused. `sequence_start` on an open sequence begins it anew. A sequence that nobody uses ends.

A request whose frames have been taken is seen to its end although its caller has gone, so that the sequence and its
caller agree on what it has seen. Knows no transport and no tensors.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final, NamedTuple

from actors.oip import Clip, bad
from actors.oip_parameters import CallParameters
from infra.client import LiveStream
from infra.live_answer import LiveAnswer
from infra.protocol import DropReason, Hello
from infra.refusals import AdmissionRefused, FrameTooLarge, RateExceeded, Refusal, TimedOut

logger = logging.getLogger(__name__)

_REMEMBERED: Final = 4096
_FAREWELL_S: Final = 5.0
_RETRY_AFTER_S: Final = 1.0


class SequenceKey(NamedTuple):
    """What a sequence is found by. `caller`: a digest of the credentials, so that nobody names another's."""

    caller: bytes
    model: str
    id: str


class SequenceRefused(Refusal):
    """The sequence is not open: it was never started, has ended, has failed, or is somebody else's."""

    http_status: ClassVar[int] = 400
    default_code: ClassVar[str] = "sequence-unknown"


class DeadlineExceeded(Refusal):
    """The answer did not come within the time that the request gave."""

    http_status: ClassVar[int] = 504
    default_code: ClassVar[str] = "deadline-exceeded"


@dataclass(frozen=True, slots=True)
class Restored:
    """What became of a request's frames.

    Attributes:
        answers: one for each frame, in their order. hello: how the stream began.
        model_sha256: of the model that restored them.
    """

    answers: list[LiveAnswer]
    hello: Hello
    model_sha256: str


@dataclass(frozen=True, slots=True)
class SequenceLimits:
    """Times in seconds.

    Attributes:
        most: open at a time. queue: requests of one that wait.
        idle_s: without a request for so long, a sequence ends.
    """

    most: int
    queue: int
    idle_s: float


@dataclass(slots=True, eq=False)
class _Sequence:
    last_used: float
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    stream: LiveStream | None = None
    hello: Hello | None = None
    parameters: CallParameters | None = None
    frames: int = 0  # that the stream has been given
    over: bool = False


OpenStream = Callable[[Hello], LiveStream]


async def restore(stream: LiveStream, hello: Hello, clip: Clip, *, cut: bool = False) -> Restored:
    """Send a clip through an open stream and return its answers.

    Raises:
        BadMessage: a file is no picture; the frames after it were restored all the same.
        Refusal: the stream has failed.
    """

    async def send() -> None:
        for number, (frame, (width, height)) in enumerate(zip(clip.frames, clip.sizes, strict=True)):
            stream.resize(width, height)
            await stream.send(frame, cut=cut and number == 0)  # type: ignore[arg-type]  # views are joined like bytes

    if len(clip) == 1:
        await send()
        answers = [await anext(stream)]
    else:
        sending = asyncio.create_task(send())
        try:
            answers = [await anext(stream) for _ in clip.frames]
            await sending
        finally:
            sending.cancel()
    for number, answer in enumerate(answers):
        if answer.dropped is DropReason.UNDECODABLE:
            raise bad(f"Frame {number} cannot be decoded.", "Send whole pictures.", code="undecodable")
        if answer.dropped is not None:
            raise bad(f"Frame {number} was not restored: {answer.dropped.name.lower()}.", "Send it again.")
    return Restored(answers, hello, stream.welcome.model_sha256)


async def finish(stream: LiveStream) -> None:
    """Close a stream in good order, so that the service forgets it at once; never raises but for a cancellation."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_FAREWELL_S):
            await stream.close()
            async for _ in stream:
                pass
    with contextlib.suppress(Exception):
        await stream.__aexit__(None, None, None)


class Sequences:
    """See the module. Lives in one event loop.

    Attributes:
        ended: how many have ended, by how: `ended`, `restarted`, `expired`, `failed`, `stopped`.
        draining: no more are started.
    """

    def __init__(self, limits: SequenceLimits, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.ended: dict[str, int] = {}
        self.draining = False
        self._open: dict[SequenceKey, _Sequence] = {}
        self._gone: OrderedDict[SequenceKey, str] = OrderedDict()  # those that are over, and how, for a good message
        self._clock = clock
        self._tasks: set[asyncio.Task[object]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def start(self) -> None:
        """Begin to look for sequences that nobody uses."""
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """End every sequence, after the requests that have their turn."""
        self.draining = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        await asyncio.gather(*(self._stop_one(key, one) for key, one in list(self._open.items())))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def run(
        self, key: SequenceKey, clip: Clip, parameters: CallParameters, hello: Hello | None, open_stream: OpenStream
    ) -> Restored:
        """Run one request of a sequence, when its turn comes.

        Args:
            clip: may be without frames where the request only ends its sequence.
            hello: how the sequence begins if this request starts it; None where it has no frames.

        Raises:
            SequenceRefused: it is not open. AdmissionRefused: too many are. RateExceeded: too many requests wait.
            DeadlineExceeded: its turn, or its answer, did not come in time; the message says whether it was taken.
            BadMessage, FrameTooLarge: this request does not fit to the sequence, which goes on.
        """
        deadline = None if parameters.timeout_s is None else self._clock() + parameters.timeout_s
        while True:
            sequence = self._find(key, parameters)
            await self._wait_for_turn(sequence, deadline)
            if not sequence.over:
                break
            sequence.turn.release()  # it ended meanwhile: others that wait find out in their turn
        taking = asyncio.create_task(self._take(key, sequence, clip, parameters, hello, open_stream))
        self._tasks.add(taking)
        taking.add_done_callback(self._tasks.discard)
        taking.add_done_callback(look_at)
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self._clock())):
                return await asyncio.shield(taking)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The answer did not come within {parameters.timeout_s:g} s. The sequence has the frames.",
                remedy="Go on with the frames after them.",
            ) from None

    # Inside

    def _find(self, key: SequenceKey, parameters: CallParameters) -> _Sequence:
        sequence = self._open.get(key)
        if sequence is None:
            if not parameters.sequence_start:
                raise self._not_open(key)
            if self.draining:
                raise AdmissionRefused(
                    "This server is being stopped.",
                    code="draining",
                    remedy="Start the sequence at another one.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            if len(self._open) >= self.limits.most:
                raise AdmissionRefused(
                    f"{len(self._open)} sequences are open.",
                    code="sequences-full",
                    limit=f"{self.limits.most} sequences",
                    remedy="End sequences with sequence_end, or try again later.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            sequence = self._open[key] = _Sequence(self._clock())
            self._gone.pop(key, None)
        elif sequence.waiting >= self.limits.queue:
            raise RateExceeded(
                f"{sequence.waiting} requests of the sequence {key.id} wait for their turn.",
                code="sequence-queue-full",
                limit=f"{self.limits.queue} requests",
                remedy="Wait for answers before sending more.",
                retry_after_s=_RETRY_AFTER_S,
            )
        return sequence

    def _not_open(self, key: SequenceKey) -> SequenceRefused:
        how = self._gone.get(key)
        if how is None:
            return SequenceRefused(
                f"There is no open sequence {key.id}.",
                code="sequence-unknown",
                remedy="Set sequence_start with the first request of a sequence.",
            )
        why = f"It was not used for {self.limits.idle_s:g} s." if how == "expired" else f"It has {how}."
        return SequenceRefused(
            f"The sequence {key.id} is not open any more. {why}",
            code=f"sequence-{how}",
            remedy="Start it anew with sequence_start; its first frame is restored without memory of those before.",
        )

    async def _wait_for_turn(self, sequence: _Sequence, deadline: float | None) -> None:
        sequence.waiting += 1
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - self._clock())):
                await sequence.turn.acquire()
        except TimeoutError:
            raise DeadlineExceeded(
                "The request waited too long for its turn. The sequence does not have its frames.",
                code="deadline-in-queue",
                remedy="Send it again, or give it more time.",
            ) from None
        finally:
            sequence.waiting -= 1
            self._forget_if_unused(sequence)

    def _forget_if_unused(self, sequence: _Sequence) -> None:
        """A start that never got its turn must not leave an empty sequence behind."""
        if sequence.stream is None and not sequence.turn.locked() and not sequence.waiting and not sequence.over:
            for key in [key for key, one in self._open.items() if one is sequence]:
                del self._open[key]

    async def _take(
        self,
        key: SequenceKey,
        sequence: _Sequence,
        clip: Clip,
        parameters: CallParameters,
        hello: Hello | None,
        open_stream: OpenStream,
    ) -> Restored:
        try:
            if parameters.sequence_start:
                await self._begin(key, sequence, parameters, hello, open_stream)
            stream, first, said = sequence.stream, sequence.hello, sequence.parameters
            if stream is None or first is None or said is None:  # its start was refused while this one waited
                raise self._not_open(key)
            _require_fit(clip, parameters, sequence, first, said)
            if len(clip):
                sequence.frames += len(clip)
                restored = await self._restore(key, sequence, stream, first, clip, cut=parameters.cut)
            else:
                restored = Restored([], first, stream.welcome.model_sha256)
            if parameters.sequence_end:
                self._over(key, sequence, "ended")
                await finish(stream)
            return restored
        finally:
            sequence.last_used = self._clock()
            if sequence.stream is None and not sequence.over:
                self._over(key, sequence, None)
            sequence.turn.release()

    async def _begin(
        self,
        key: SequenceKey,
        sequence: _Sequence,
        parameters: CallParameters,
        hello: Hello | None,
        open_stream: OpenStream,
    ) -> None:
        if hello is None:
            raise bad("A sequence is started without a frame.", "Send its first frame.", code="sequence-empty")
        if parameters.frame_index:
            raise bad("The first frame of a sequence has the index 0.", "Leave frame_index out.", code="out-of-order")
        older, sequence.stream = sequence.stream, None
        if older is not None:
            self._count("restarted")
            await finish(older)
        stream = open_stream(hello)
        await stream.__aenter__()
        sequence.stream, sequence.hello, sequence.parameters, sequence.frames = stream, hello, parameters, 0

    async def _restore(
        self, key: SequenceKey, sequence: _Sequence, stream: LiveStream, hello: Hello, clip: Clip, *, cut: bool
    ) -> Restored:
        try:
            return await restore(stream, hello, clip, cut=cut)
        except Refusal as refusal:
            if refusal.code in ("undecodable", "bad-request"):
                raise
            expired = isinstance(refusal, TimedOut)
            self._over(key, sequence, "expired" if expired else "failed")
            await finish(stream)
            if expired:
                raise self._not_open(key) from refusal
            raise
        except StopAsyncIteration:
            self._over(key, sequence, "failed")
            raise self._not_open(key) from None

    def _over(self, key: SequenceKey, sequence: _Sequence, how: str | None) -> None:
        """Take a sequence from the table; None: it never began."""
        sequence.over, sequence.stream = True, None
        if self._open.get(key) is sequence:
            del self._open[key]
        if how is None:
            return
        self._count(how)
        self._gone[key] = how
        self._gone.move_to_end(key)
        if len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)

    def _count(self, how: str) -> None:
        self.ended[how] = self.ended.get(how, 0) + 1

    async def _sweep(self) -> None:
        pause_s = max(0.05, min(1.0, self.limits.idle_s / 4))
        while True:
            await asyncio.sleep(pause_s)
            now = self._clock()
            for key, sequence in list(self._open.items()):
                busy = sequence.turn.locked() or sequence.waiting
                if not busy and now - sequence.last_used > self.limits.idle_s:
                    stream = sequence.stream
                    self._over(key, sequence, "expired")
                    logger.info("sequence %s of model %s was not used and is ended", key.id, key.model)
                    if stream is not None:
                        self._background(finish(stream))

    def _background(self, work: object) -> None:
        task: asyncio.Task[object] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _stop_one(self, key: SequenceKey, sequence: _Sequence) -> None:
        async with sequence.turn:
            stream = sequence.stream
            if not sequence.over:
                self._over(key, sequence, "stopped")
                if stream is not None:
                    await finish(stream)


def _require_fit(
    clip: Clip, parameters: CallParameters, sequence: _Sequence, hello: Hello, said: CallParameters
) -> None:
    """Refuse what the stream would refuse by ending: the sequence goes on without this request."""
    parameters.require_same_stream(said)
    if not len(clip):
        if not parameters.sequence_end:
            raise bad("The request has no frame.", "Send a frame, or set sequence_end.")
        return
    if parameters.frame_index is not None and parameters.frame_index != sequence.frames:
        raise bad(
            f"The request begins with frame {parameters.frame_index}; the sequence expects frame {sequence.frames}.",
            "Send the frames of a sequence in their order, each once.",
            code="out-of-order",
        )
    if clip.codec != hello.codec_in:
        raise bad(
            f"The frames are {clip.codec}; the sequence began with {hello.codec_in}.",
            "Send the frames of a sequence in one codec.",
            code="mixed-codecs",
        )
    for width, height in clip.sizes:
        if width * height > hello.width * hello.height:
            raise FrameTooLarge(
                f"A frame of {width}x{height} is larger than the first of its sequence.",
                limit=f"{hello.width * hello.height} pixels",
                remedy="Start another sequence with a frame of the largest size.",
            )


def look_at(done: asyncio.Task[Restored]) -> None:
    """Take notice of how a task ended whose caller may have gone: asyncio would complain that nobody did."""
    if not done.cancelled():
        done.exception()
