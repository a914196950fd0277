"""One client's connection: messages in, frames through decoder, session, stepper and encoder, messages out.

Four coroutines: one reads, one decodes, one encodes and writes, one looks at the clock and saves the state. The session
decides; this moves. Codecs run in a pool of threads. Knows no transport: WebSocket and gRPC are channels.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Final, TypeVar, assert_never, cast

from actors.errors import describe_failure
from actors.frame_codec import FrameDecoder, FrameEncoder, Undecodable, open_decoder, open_encoder
from actors.live_channel import Channel, say_and_close
from actors.live_report import StreamReport
from actors.pictures import resize
from actors.session import Answer, Incoming, Session, SessionState
from actors.state_book import StateSink
from actors.state_saver import StateSaver
from actors.stepper import Seat, Stepper
from infra import protocol
from infra.protocol import DropReason, Flag, FrameHeader, Lossless
from infra.refusals import (
    NORMAL_CLOSURE,
    SERVICE_RESTART,
    BadMessage,
    FrameTooLarge,
    RateExceeded,
    Refusal,
    ServiceFailure,
    StateLost,
    Unauthorized,
)
from infra.telemetry import Telemetry
from pipeline.frames import tensor_to_frame

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from actors.live_engine import LiveEngine

logger = logging.getLogger(__name__)

_WATCH_S: Final = 0.25
_FLUSH_S: Final = 5.0
_CREDENTIALS_S: Final = 2.0
_FIRST: Final = asyncio.FIRST_COMPLETED
_T = TypeVar("_T")
Charge = Callable[[int, float], float]


class _ClientGone(Exception):
    """The connection is lost; the stream may be resumed."""


class _Drained(Exception):
    """The replica goes away."""


class LiveConnection:
    """See the module; `run` is the whole life of a stream on this replica.

    Args:
        charges: take the bytes and the pixels of a frame that came, return after how many seconds to try again; 0:
            charged.
        may_stay: whether the credentials still hold; may block.
        check_result: raises FrameTooLarge if results of this width and height are not made here.
        state_interval_s: between two snapshots of the state.
    """

    def __init__(
        self,
        session: Session,
        engine: LiveEngine,
        channel: Channel,
        *,
        stepper: Stepper,
        states: StateSink,
        codecs: Executor,
        charges: tuple[Charge, Charge],
        may_stay: Callable[[], bool],
        check_result: Callable[[int, int], None],
        max_message_bytes: int,
        state_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.session, self.engine = session, engine
        self._channel, self._stepper, self._states, self._codecs = channel, stepper, states, codecs
        self._charges, self._may_stay, self._clock = charges, may_stay, clock
        self._check_result, self._max_message_bytes = check_result, max_message_bytes
        hello = session.hello
        self._decoder: FrameDecoder = open_decoder(
            hello.codec_in, hello.width, hello.height, max_pixels=hello.width * hello.height
        )
        self._encoder: FrameEncoder = open_encoder(hello.codec_out, quality=hello.quality, fps=hello.fps)
        self._outbox: asyncio.Queue[Answer | str | protocol.AskStats] = asyncio.Queue()
        self._intake: asyncio.Queue[tuple[Incoming, memoryview] | protocol.Resize | protocol.Close] = asyncio.Queue()
        self._undecoded: dict[int, Incoming] = {}  # in their order; a picture waits for those that came before it
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stats_asked = False
        self._unsent = 0  # answers in the outbox or at the encoder
        self._told_granted = session.granted
        self._told_durable = session.durable_below
        self._moved = asyncio.Event()  # something was sent, or freed without an answer
        self._ended = asyncio.Event()
        self.report = StreamReport(telemetry or Telemetry(), session, engine.name, channel.headers, clock)
        self._saver = StateSaver(
            session, states, codecs, self.report, self.fail, interval_s=state_interval_s, now=clock()
        )
        self._writer: asyncio.Task[None] | None = None

    async def run(self, welcome: str) -> None:
        """Serve the stream until it ends, in whatever way; never raises but for a cancellation.

        Args:
            welcome: the first message to the client.
        """
        session = self.session
        self._outbox.put_nowait(welcome)
        seat = Seat(session, self.engine, self._answer, self.fail)
        self._stepper.seats[str(session.key)] = seat
        parts = (self._write(), self._read(), self._prepare(), self._watch())
        tasks = [asyncio.create_task(one) for one in parts]
        self._writer = tasks[0]
        try:
            await asyncio.wait([*tasks, self._failed], return_when=_FIRST)
            outcome = self._failed if self._failed.done() else next(task for task in tasks if task.done())
            await self._end(outcome.exception() if not outcome.cancelled() else _Drained())
        finally:
            try:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                if self._stepper.seats.get(str(session.key)) is seat:
                    del self._stepper.seats[str(session.key)]
                await self._release()
            finally:  # also where this is cancelled: others wait for it
                if self._failed.done():
                    self._failed.exception()  # nobody else may have asked
                self._ended.set()

    async def drain(self) -> None:
        """Hand the stream over: finish the frame in hand, save the state, tell the client where to go on."""
        if not self._failed.done():
            self._failed.set_exception(_Drained())
        await self._ended.wait()

    # How it ends

    async def _end(self, error: BaseException | None) -> None:
        session = self.session
        if error is None:  # closed by the client, everything answered
            self.report.ended("closed")
            session.move(SessionState.CLOSED)
            await self._forget()
            totals = session.totals
            last = protocol.Closed(frames_in=totals.frames_in, frames_out=totals.frames_out)
            await say_and_close(self._channel, protocol.dump(last), NORMAL_CLOSURE, "closed")
        elif isinstance(error, _Drained):
            await self._hand_over()
        elif isinstance(error, _ClientGone):
            self.report.ended("lost")
            await self._step_out()
            await self._saver.save_last()
            session.move(SessionState.CLOSED)
        else:
            await self._refuse(error)

    async def _hand_over(self) -> None:
        session = self.session
        self.report.ended("handed_over")
        session.move(SessionState.DRAINING)
        await self._step_out()
        with contextlib.suppress(TimeoutError):  # a client that does not read gets the rest elsewhere, or never
            async with asyncio.timeout(_FLUSH_S):
                await self._flush()
        await self._saver.save_last()
        drain = protocol.Drain(session=session.key.session, resume_at=session.stepped_below)
        await say_and_close(self._channel, protocol.dump(drain), SERVICE_RESTART, "drain")
        session.move(SessionState.CLOSED)

    async def _refuse(self, error: BaseException) -> None:
        session = self.session
        if not isinstance(error, Refusal):
            failure = describe_failure(error)
            logger.error("stream %s failed", session.key, exc_info=error)
            error = ServiceFailure(
                f"A frame could not be restored: {failure['message']}", code=failure["code"], remedy=failure["remedy"]
            )
        session.move(SessionState.FAILED)
        if not isinstance(error, StateLost):  # another replica goes on with it: not ours to close
            await self._forget()
        self.report.ended("refused", error)
        logger.info("stream %s is refused: %s", session.key, error.code)
        await say_and_close(self._channel, protocol.dump_refusal(error), error.close_code, error.code)

    async def _forget(self) -> None:
        """Have the stream's states wiped out; if that fails, they expire."""
        await self._saver.stop()
        try:
            await self._states.close(self.session.key, self.session.epoch)
        except Exception as error:
            logger.warning("stream %s: its states are kept until they expire: %s", self.session.key, error)

    async def _step_out(self) -> None:
        """Take no more frames, and wait for the one in hand."""
        self._stepper.seats.pop(str(self.session.key), None)
        while self.session.in_step is not None:
            await self._stepper.idle()
            await asyncio.sleep(0)

    async def _flush(self) -> None:
        assert self._writer is not None
        while self._unsent and not self._writer.done():
            self._moved.clear()
            await asyncio.wait([self._writer, moved := asyncio.ensure_future(self._moved.wait())], return_when=_FIRST)
            moved.cancel()

    async def _release(self) -> None:
        await self._saver.stop()
        for codec in (self._decoder, self._encoder):
            try:
                await self._in_pool(codec.close)
            except Exception:
                logger.exception("stream %s: a codec could not be closed", self.session.key)
        if not self.session.is_over:
            self.session.move(SessionState.CLOSED)
        self.session.wipe()

    def fail(self, error: BaseException) -> None:
        """End the stream here, for this reason unless there is one already."""
        if not self._failed.done():
            self._failed.set_exception(error)

    # Messages in

    async def _read(self) -> None:
        """Take messages as fast as they come: a client that sends more than it may is noticed at once."""
        while True:
            message = await self._channel.receive()
            if message is None:
                raise _ClientGone
            if isinstance(message, str):
                self._control(message)
                continue
            if len(message) > self._max_message_bytes:
                raise FrameTooLarge(
                    f"A frame's message has {len(message)} bytes.",
                    limit=f"{self._max_message_bytes} bytes for frames of the size in the hello",
                    remedy="Say the largest size of the stream's frames in its hello, or compress them more.",
                )
            self._arrive(message)

    def _control(self, text: str) -> None:
        message = protocol.parse_control(text)
        match message:
            case protocol.Reset():
                self.session.mark_cut()
            case protocol.Resize() | protocol.Close():
                if isinstance(message, protocol.Resize):
                    self._require_agreed(message.width, message.height)
                self._require_few()
                self._intake.put_nowait(message)
            case protocol.AskStats():
                if not self._stats_asked:  # one answer for all questions until it is sent: nothing piles up
                    self._stats_asked = True
                    self._outbox.put_nowait(message)
            case protocol.Delivered():
                self._acknowledge(message.below, message.receipt)
            case _:
                assert_never(message)

    def _require_few(self) -> None:
        """Frames that wait to be decoded are bounded by their window; so are the messages between them."""
        most = 2 * self.session.limits.window + 2
        if self._intake.qsize() >= most:
            raise RateExceeded(
                f"{most} messages wait for the decoder.",
                code="controls-exceeded",
                limit=f"{most} messages",
                remedy="Send at most one size with each frame, and one close.",
            )

    def _require_agreed(self, width: int, height: int) -> None:
        agreed = self.session.hello.width * self.session.hello.height
        if width * height > agreed:
            raise FrameTooLarge(
                f"Frames of {width}x{height} are larger than the {agreed} pixels in the stream's hello.",
                limit=f"{agreed} pixels",
                remedy="Say the largest size of the stream's frames in its hello.",
            )

    def _arrive(self, message: bytes) -> None:
        session = self.session
        header, payload = FrameHeader.unpack(message)
        self.report.received(len(message))
        self._acknowledge(header.acknowledged, header.receipt)
        frame = session.arrive(header, self._clock())
        self.report.arrived(frame)
        if frame.reason is not DropReason.NONE:
            self._answer(session.drop(frame, frame.reason))
            return
        self._intake.put_nowait((frame, payload))

    async def _prepare(self) -> None:
        """Charge and decode what came, in its order; ends after a `Close`, when everything has been answered."""
        while True:
            item = await self._intake.get()
            if isinstance(item, protocol.Resize):
                self._decoder.resize(item.width, item.height)
            elif isinstance(item, protocol.Close):
                await self._finish_all()
                return
            else:
                frame, payload = item
                await self._charge_for(frame, len(payload))
                if frame.reason is DropReason.NONE or self.session.hello.codec_in == "h264":
                    await self._decode(frame, payload)
                else:
                    self._take_place(frame)

    async def _charge_for(self, frame: Incoming, size_bytes: int) -> None:
        hello = self.session.hello
        if frame.replayed:
            return
        for charge, amount in zip(self._charges, (size_bytes, hello.width * hello.height), strict=True):
            while (early_s := charge(amount, self._clock())) > 0:
                if not isinstance(hello.policy, Lossless):
                    frame.reason = DropReason.RATE
                    return
                await asyncio.sleep(early_s)

    async def _finish_all(self) -> None:
        for decoded in await self._in_pool(self._decoder.flush):
            self._decoded(decoded.id, decoded.rgb_HWC)
        self._no_picture([*self._decoder.lost(), *self._undecoded])
        self._settle()
        while self.session.waiting or self.session.in_step is not None or self._unsent:
            self._moved.clear()
            self._stepper.wake()
            await self._moved.wait()

    async def _decode(self, frame: Incoming, payload: memoryview) -> None:
        self._undecoded[frame.id] = frame
        if frame.trace is not None:
            frame.trace.stage("receive", self._clock())
        try:
            pictures = await self._in_pool(self._decoder.decode, payload, frame.id, Flag.KEY in frame.flags)
        except Undecodable as error:
            logger.debug("stream %s, frame %d: %s", self.session.key, frame.id, error)
            self._no_picture([*self._decoder.lost(), frame.id])
        else:
            for picture in pictures:
                self._decoded(picture.id, picture.rgb_HWC)
            self._no_picture(self._decoder.lost())
        self._settle()

    def _decoded(self, id_: int, rgb_HWC: NDArray[np.uint8]) -> None:
        frame = self._undecoded.get(id_)
        if frame is None or frame.reason is not DropReason.NONE:
            return
        height, width = rgb_HWC.shape[:2]
        self._check_result(*protocol.output_size(self.session.hello, width, height))
        frame.rgb_HWC, frame.ready = rgb_HWC, self._clock()
        if frame.trace is not None:
            frame.trace.stage("decode", frame.ready)

    def _no_picture(self, ids: list[int]) -> None:
        for frame in [self._undecoded[id_] for id_ in ids if id_ in self._undecoded]:
            if frame.rgb_HWC is None and frame.reason is DropReason.NONE:
                frame.reason = DropReason.UNDECODABLE

    def _settle(self) -> None:
        """Let the frames of which the decoder holds nothing any more take their places, in the order of their ids."""
        for frame in list(self._undecoded.values()):
            if frame.rgb_HWC is None and frame.reason is DropReason.NONE:
                break
            del self._undecoded[frame.id]
            self._take_place(frame)
        if any(frame.rgb_HWC is not None for frame in self._undecoded.values()):
            raise BadMessage(
                f"The picture of frame {next(iter(self._undecoded))} is shown after that of a later frame.",
                code="frames-reordered",
                remedy="Encode without B frames: live streams are restored in the order in which they are sent.",
            )

    def _take_place(self, frame: Incoming) -> None:
        if frame.decode_only:
            self.report.replayed()
            self.session.release(frame)  # only the decoder needed it
            self._tell_granted()
            return
        self.session.wait(frame)
        self._stepper.arrived(self.session)

    # Messages out

    def _answer(self, answer: Answer) -> None:
        self._saver.between_steps(self._clock())
        if answer.frame.replayed:
            self.report.replayed()
            self.session.release(answer.frame)
            self._tell_granted()
            self._moved.set()
            return
        self._unsent += 1
        self._outbox.put_nowait(answer)

    async def _write(self) -> None:
        while True:
            item = await self._outbox.get()
            if isinstance(item, protocol.AskStats):
                self._stats_asked = False
                item = protocol.dump(self.session.stats())
            if isinstance(item, str):
                await self._channel.send(item)
                continue
            began = self._clock()
            payload, key = await self._in_pool(self._encode, item) if item.reason is DropReason.NONE else (b"", False)
            now = self._clock()
            header = self.session.header(item, now=now, encode_us=round(1e6 * (now - began)), key=key)
            self._told_granted, self._told_durable = header.granted, header.acknowledged
            item.output = None
            message = header.pack(payload)
            await self._channel.send(message)
            self.report.sent(item, header, len(message), began=began, encoded=now)
            self._unsent -= 1
            self._moved.set()
            if self.session.life is SessionState.WARMING:
                self.session.move(SessionState.LIVE)

    def _encode(self, answer: Answer) -> tuple[bytes | memoryview, bool]:
        rgb_HWC = answer.frame.rgb_HWC
        assert rgb_HWC is not None
        width, height = protocol.output_size(self.session.hello, rgb_HWC.shape[1], rgb_HWC.shape[0])
        if answer.output is None:
            picture = resize(rgb_HWC, width, height, "cubic")
        else:
            restored = cast("NDArray[np.uint8]", tensor_to_frame(answer.output, rgb_HWC.dtype))
            picture = resize(restored, width, height)
        answer.frame.rgb_HWC = None
        fresh = bool(answer.flags & (Flag.RESET | Flag.RESUMED))
        encoded = self._encoder.encode(cast("NDArray[np.uint8]", picture), answer.frame.id, force_key=fresh)
        (only,) = encoded  # the encoders of live streams hold nothing back
        return only.payload, only.key

    def _acknowledge(self, below: int, receipt: int) -> None:
        session = self.session
        session.acknowledge(below, receipt, self._clock())
        self._saver.count_durable()
        self._tell_granted()

    def _tell_granted(self) -> None:
        """Tell of new credit by a message of its own if no answer will do it soon."""
        session = self.session
        quiet = not self._unsent and not session.waiting and session.in_step is None
        if session.granted > self._told_granted and quiet:
            self._told_granted = session.granted
            self._outbox.put_nowait(protocol.dump(protocol.Granted(frames=session.granted)))

    # Time, and the state

    async def _watch(self) -> None:
        session = self.session
        checked = self._clock()
        while True:
            await asyncio.sleep(_WATCH_S)
            now = self._clock()
            if now - checked >= _CREDENTIALS_S:
                checked = now
                await self._require_credentials()
            session.check_times(now, in_decoder=len(self._undecoded))
            self._tell_granted()
            self._saver.count_durable()
            if session.durable_below > self._told_durable:
                self._told_durable = session.durable_below
                await self._outbox.put(protocol.dump(protocol.Durable(below=session.durable_below)))
            self._saver.look(now)

    async def _require_credentials(self) -> None:
        if not await asyncio.to_thread(self._may_stay):
            raise Unauthorized(
                "The stream's credentials are no longer good.",
                code="credentials-ended",
                remedy="Open another stream with a valid key or token.",
            )

    async def _in_pool(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._codecs, work, *arguments)
