"""Python client of the live service: frames in, restored frames out, over hand-overs and lost connections.

    async with LiveStream("ws://host:8000", Hello(width=320, height=180), api_key=...) as stream:
        await stream.send(jpeg)               # waits for credit
        answer = await anext(stream)          # in order; `answer.picture()` decodes it

`infra.blocking_client` has the same without `async`. Pictures travel as they are given, in the codec of the hello. The
stream keeps what it has sent until the service says that the state after it is durable; when its replica goes away, it
goes on with another one from there: nothing is lost, repeated or reordered. Where the state is lost as well, the stream
begins anew with the first frame that has no answer, which is marked `Flag.RESET`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from pydantic import SecretStr

from infra import protocol
from infra.kept_frames import KeptFrame, KeptFrames, header_to_send
from infra.live_answer import LiveAnswer, encode_picture
from infra.live_wire import Connect, ConnectionLost, Wire, transport_for
from infra.protocol import NO_FLAGS, DropReason, Flag, FrameHeader, Hello, Resume, Welcome
from infra.refusals import AdmissionRefused, ServiceFailure, StateLost, refusal_from_message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
_OPEN_TIMEOUT_S: Final = 10.0
_LEAST_OPEN_S: Final = 1.0  # of an attempt, however little time is left
_MOST_FRUITLESS: Final = 3
_TELL_S: Final = 0.5  # an answer is acknowledged after so long if no frame carries it


class LiveStream:
    """See the module. An async context manager and an async iterator of `LiveAnswer`.

    Args:
        url: ``ws://`` or ``wss://`` of the service, with or without ``/v1/streams``; or ``grpc://`` or ``grpcs://``.
        hello: what the stream is; credentials are added from `api_key` or `token`.
        give_up_s: how long the service may be unreachable before the stream fails.
        open_s: the same before the stream is open, which is also how long it waits for room; None: `give_up_s`.
        connect: another transport: takes the address, returns a `Wire`.

    Attributes:
        welcome: the service's last answer to a hello.
        hand_overs, restarts: how often the stream went on elsewhere, and began anew because its state was lost.

    Raises:
        Refusal: the service refused; by `send` and by the iteration.
    """

    welcome: Welcome

    def __init__(
        self,
        url: str,
        hello: Hello,
        *,
        api_key: str | None = None,
        token: str | None = None,
        give_up_s: float = 30.0,
        open_s: float | None = None,
        connect: Connect | None = None,
    ) -> None:
        credentials = protocol.Credentials(
            api_key=SecretStr(api_key) if api_key else None, token=SecretStr(token) if token else None
        )
        given = hello.credentials if api_key is None and token is None else credentials
        self._url = url
        self._hello = hello.model_copy(update={"credentials": given})
        self._give_up_s, self._connect = give_up_s, connect or transport_for(url)
        self._open_s = give_up_s if open_s is None else open_s
        self.hand_overs = self.restarts = 0
        self.stats: protocol.Stats | None = None
        self._kept = KeptFrames(in_groups=hello.codec_in == "h264")
        self._fruitless = 0  # times that it began anew since the last answer
        self._answers: deque[LiveAnswer] = deque()
        self._changed = asyncio.Condition()
        self._size = self._wire_size = (hello.width, hello.height)
        self._next_id = 0
        self._unsent_from = 0  # ids from here on were not sent on this connection
        self._sent = self._granted = 0
        self._received = 0  # all answers with a smaller id are here
        self._connection = self._close_said_on = 0
        self._acknowledged = (0, 0)  # id below and receipt of the answer taken last from this connection
        self._told = 0  # answers of this connection that were taken since the last acknowledgement
        self._wire: Wire | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._error: BaseException | None = None
        self._closing = self._closed = False

    async def __aenter__(self) -> Self:
        await self._open(time.monotonic() + self._open_s, resume=False)
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._pump())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        async with self._changed:  # whoever still waits in `send` or for an answer
            self._closed = True
            self._changed.notify_all()
        if self._wire is not None:
            with contextlib.suppress(Exception):
                await self._wire.close()

    async def send(self, payload: bytes, *, pts: int | None = None, cut: bool = False, key: bool = False) -> int:
        """Send a frame in the stream's codec; returns its id. Waits while more than a window is under way.

        Credit comes back with the answers that are taken: a program that sends more than one frame before it takes an
        answer does so in two tasks.

        Args:
            pts: in units of your own; the id if None. It comes back with the answer.
            cut: a new scene begins with it.
            key: (h264) the access unit can be decoded without those before it.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._error or self._closed or self._backlog() < self._window)
            self._raise_if_over()
            id_ = self._next_id
            self._next_id += 1
            flags = (Flag.CUT if cut else NO_FLAGS) | (Flag.KEY if key else NO_FLAGS)
            self._kept.add(KeptFrame(FrameHeader(id_, id_ if pts is None else pts, flags), payload, self._size))
            self._changed.notify_all()
        return id_

    def resize(self, width: int, height: int) -> None:
        """The frames sent from now on have this size. Needed only for raw frames: other codecs say it themselves."""
        self._size = (width, height)

    async def send_picture(self, rgb_HWC: NDArray[np.uint8], *, pts: int | None = None, cut: bool = False) -> int:
        """Encode a picture by the stream's codec (not h264) and send it."""
        return await self.send(encode_picture(rgb_HWC, self._hello.codec_in, self._hello.quality), pts=pts, cut=cut)

    async def close(self) -> None:
        """Say that no more frames come. The iteration ends after the last answer."""
        async with self._changed:
            self._closing = True
            self._changed.notify_all()

    async def ask_stats(self) -> None:
        """Ask for the session's figures; they are in `stats` a moment later."""
        if self._wire is not None:
            await self._wire.send(protocol.dump(protocol.AskStats()))

    def __aiter__(self) -> AsyncIterator[LiveAnswer]:
        return self

    async def __anext__(self) -> LiveAnswer:
        async with self._changed:
            await self._changed.wait_for(lambda: self._answers or self._error or self._closed)
            if not self._answers:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            answer = self._answers.popleft()
            if answer.connection == self._connection:
                self._acknowledged = (answer.id + 1, answer.header.receipt)
                self._told += 1
                self._changed.notify_all()
        return answer

    # Inside

    @property
    def _window(self) -> int:
        return self.welcome.granted

    def _backlog(self) -> int:
        return self._kept.count_from(self._unsent_from)

    def _raise_if_over(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed or self._closing:
            raise ServiceFailure("The stream is closed.", code="stream-closed", remedy="Open another one.")

    async def _open(self, deadline: float, *, resume: bool) -> None:
        """Connect and exchange hellos, again and again until `deadline`."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                await self._greet(resume, min(_OPEN_TIMEOUT_S, max(_LEAST_OPEN_S, deadline - time.monotonic())))
                return
            except StateLost as refusal:
                if not resume:
                    raise
                self._begin_anew(refusal)
                resume = False
                continue
            except (AdmissionRefused, ServiceFailure) as refusal:
                wait_s, last = refusal.retry_after_s, refusal
                if wait_s is None and isinstance(refusal, AdmissionRefused):
                    raise
            except (OSError, ConnectionLost, TimeoutError) as error:
                wait_s = None
                last = ServiceFailure(
                    f"The service does not answer: {error or type(error).__name__}.",
                    code="unreachable",
                    remedy="Check the address, and that the service runs.",
                    retry_after_s=1.0,
                )
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            # Not all at once: after a replica's end, its clients come back together.
            wait_s = random.uniform(0.5, 1.0) * pause_s if wait_s is None else random.uniform(1.0, 1.5) * wait_s
            if time.monotonic() + wait_s > deadline:
                raise last
            await asyncio.sleep(wait_s)

    async def _greet(self, resume: bool, patience_s: float) -> None:
        wire: Wire = await asyncio.wait_for(self._connect(self._url), patience_s)
        try:
            hello = self._hello
            if resume:
                token = SecretStr(self.welcome.resume_token)
                what = Resume(session=self.welcome.session, token=token, received=self._received)
                hello = hello.model_copy(update={"resume": what})
            await wire.send(protocol.dump(hello))
            message = await asyncio.wait_for(wire.receive(), patience_s)
            if not isinstance(message, str):
                raise ConnectionLost("closed before the welcome")
            answer = protocol.parse_answer(message)
            if answer["type"] == "refused":
                raise refusal_from_message(answer)
            welcome = Welcome.model_validate(answer)
            first = self._kept.resend_from(welcome.resume_at) if resume else self._kept.begin_anew()
            if first < self._kept.begins_at:
                raise StateLost(
                    f"The service asks for frame {first}, which was too long ago.",
                    limit=f"frames from {self._kept.begins_at} on",
                    remedy="Open a new stream.",
                )
        except BaseException:
            with contextlib.suppress(Exception):
                await wire.close()
            raise
        self._wire, self.welcome = wire, welcome
        self._connection += 1
        self._sent, self._granted = 0, self.welcome.granted
        self._acknowledged, self._told = (0, 0), 0
        self._wire_size = (hello.width, hello.height)
        self._unsent_from = first

    def _begin_anew(self, why: StateLost) -> None:
        self._fruitless += 1
        if self._fruitless > _MOST_FRUITLESS:
            raise ServiceFailure(
                "The stream began anew several times without a single answer.",
                code="restarts",
                remedy="Look at the frame that the service fails at.",
            ) from why
        logger.warning("the stream begins anew: %s", why)
        self.restarts += 1

    async def _pump(self) -> None:
        """Send frames as credit allows, and acknowledgements that no frame carries."""
        try:
            while True:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._told or self._something_to_send())
                    try:
                        async with asyncio.timeout(_TELL_S):
                            await self._changed.wait_for(self._something_to_send)
                    except TimeoutError:
                        if not self._told or self._wire is None:
                            continue
                    wire = self._wire
                    messages = self._take_messages()
                assert wire is not None
                for message in messages:
                    try:
                        await wire.send(message)
                    except (OSError, ConnectionLost):
                        break  # the receiving side sees it, too, and connects again
        except Exception as error:
            await self._end(error)

    def _something_to_send(self) -> bool:
        if self._wire is None:
            return False
        return self._next_unsent() is not None or self._should_tell() or self._may_close()

    def _should_tell(self) -> bool:
        return self._told >= max(1, self._window // 2)

    def _next_unsent(self) -> int | None:
        if self._sent >= self._granted:
            return None
        return self._kept.first_from(self._unsent_from)

    def _may_close(self) -> bool:
        said = self._close_said_on == self._connection
        return self._closing and not self._closed and not said and self._backlog() == 0

    def _take_messages(self) -> list[str | bytes]:
        id_ = self._next_unsent()
        below, receipt = self._acknowledged
        if id_ is not None:
            kept = self._kept[id_]
            self._unsent_from = id_ + 1
            self._sent += 1
            self._told = 0
            kept.sent_at = kept.sent_at or time.monotonic()
            header = header_to_send(kept, acknowledged=below, receipt=receipt)
            self._changed.notify_all()
            messages: list[str | bytes] = [header.pack(kept.payload)]
            if kept.size != self._wire_size:
                self._wire_size = kept.size
                messages.insert(0, protocol.dump(protocol.Resize(width=kept.size[0], height=kept.size[1])))
            return messages
        if self._may_close() and not self._should_tell():
            self._close_said_on = self._connection  # answers are acknowledged after it as well
            return [protocol.dump(protocol.Close())]
        self._told = 0
        return [protocol.dump(protocol.Delivered(below=below, receipt=receipt))]

    async def _receive(self) -> None:
        try:
            while True:
                assert self._wire is not None
                message = await self._wire.receive()
                if message is None:
                    if await self._reconnect():
                        continue
                    return
                if isinstance(message, str):
                    if await self._told_by_text(protocol.parse_answer(message)):
                        return
                else:
                    await self._answered(message)
        except Exception as error:
            await self._end(error)

    async def _reconnect(self) -> bool:
        """Go on elsewhere; False if the stream was closed."""
        wire = self._wire
        async with self._changed:
            if self._closed:
                return False
            self._wire = None
        if wire is not None:
            with contextlib.suppress(Exception):
                await wire.close()
        restarts = self.restarts
        await self._open(time.monotonic() + self._give_up_s, resume=True)
        self.hand_overs += restarts == self.restarts
        async with self._changed:
            self._changed.notify_all()
        return True

    async def _told_by_text(self, message: dict[str, Any]) -> bool:
        """Take a control message; True if it was the last one."""
        kind = message["type"]
        if kind == "refused":
            refusal = refusal_from_message(message)
            if isinstance(refusal, StateLost | ServiceFailure):
                return False  # the connection is closed after it; then the stream goes on, or begins anew
            raise refusal
        async with self._changed:
            if kind == "granted":
                self._granted = max(self._granted, int(message["frames"]))
            elif kind == "durable":
                self._kept.forget_below(int(message["below"]))
            elif kind == "stats":
                self.stats = protocol.Stats.model_validate(message)
            elif kind == "closed":
                self._closed = True
            self._changed.notify_all()
        return kind == "closed"

    async def _answered(self, message: bytes) -> None:
        header, payload = FrameHeader.unpack(message)
        async with self._changed:
            self._granted = max(self._granted, header.granted)
            self._fruitless = 0
            kept = self._kept.get(header.id)
            stray = header.reason in (DropReason.REPEATED, DropReason.OUT_OF_ORDER)
            if header.id < self._received and not stray:
                # A stream that began anew with a key frame, for the decoder's sake: the client has had this one.
                self._acknowledged = (header.id + 1, header.receipt)
                self._told += 1
                self._changed.notify_all()
                return
            if not stray:
                self._received = header.id + 1
                self._kept.answered(header)
            self._kept.forget_below(header.acknowledged)
            sent_at = kept.sent_at if kept is not None else time.monotonic()
            width, height = protocol.output_size(self._hello, *(kept.size if kept is not None else self._size))
            answer = LiveAnswer(
                header,
                bytes(payload),
                self._hello.codec_out,
                width,
                height,
                time.monotonic() - sent_at,
                self._connection,
            )
            self._answers.append(answer)
            self._changed.notify_all()

    async def _end(self, error: BaseException) -> None:
        async with self._changed:
            self._error = error
            self._changed.notify_all()
