"""One replica's live service: models, sessions, admission, hand-over. Knows no transport and no Ray.

`serve` takes a channel from its hello to its end; `drain` hands every stream over. The endpoint puts WebSocket, gRPC
and Ray Serve around it.
"""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from pydantic import BaseModel, ConfigDict, Field

from actors.admission import Admission
from actors.frame_codec import check_result, largest_message_bytes
from actors.hardware import usable_cores
from actors.live_channel import Channel, say_and_close
from actors.live_connection import Charge, LiveConnection
from actors.live_figures import Board, MetricsDesk
from actors.session import Session, SessionKey, SessionLimits, SessionState, window_for
from actors.state_book import LocalStates, OwnedStates, Snapshot, StateStore, Takeover
from actors.stepper import Stepper
from infra import protocol
from infra.protocol import (
    HEADER_BYTES,
    HELLO_TIMEOUT_S,
    LARGEST_SIDE,
    SMALLEST_SIDE,
    Hello,
    Welcome,
    output_size,
)
from infra.refusals import AdmissionRefused, BadMessage, FrameTooLarge, Refusal, ServiceFailure, StateLost, TimedOut
from infra.structured_logs import add_log_context
from infra.telemetry import Telemetry
from pipeline.errors import StateError
from pipeline.state import StreamState

if TYPE_CHECKING:
    from actors.live_engine import LiveEngine
    from infra.live_settings import LiveSettings

logger = logging.getLogger(__name__)

_ABOUT_MODEL: Final = "model_sha256"
_LARGEST_GAIN: Final = 16  # results have at most the pixels that the model makes of the largest frame


class LiveConfig(BaseModel):
    """What a replica needs to know to serve streams; sizes in pixels and bytes, times in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    most_sessions: int = Field(default=32, ge=1, le=4096)
    most_load: float = Field(default=0.9, gt=0, le=10)
    most_hellos: int = Field(default=64, ge=1, le=4096)
    max_pixels: int = Field(default=1920 * 1080, ge=256)
    least_side: int = Field(default=SMALLEST_SIDE, ge=SMALLEST_SIDE)
    greatest_side: int = Field(default=LARGEST_SIDE, ge=SMALLEST_SIDE)
    window: int = Field(default=16, ge=2, le=256)
    idle_timeout_s: float = Field(default=60.0, gt=0)
    max_life_s: float = Field(default=24 * 3600.0, gt=0)
    unread_timeout_s: float = Field(default=30.0, gt=0)
    hello_timeout_s: float = Field(default=HELLO_TIMEOUT_S, gt=0, le=60)
    state_interval_s: float = Field(default=1.0, gt=0)
    state_bytes: int = Field(default=4 << 30, ge=1 << 20)
    ladder: bool = True

    @classmethod
    def from_settings(cls, settings: LiveSettings) -> Self:
        """Return what the service's settings say of a replica."""
        return cls(
            most_sessions=settings.sessions,
            max_pixels=settings.greatest_side**2,
            least_side=settings.least_side,
            greatest_side=settings.greatest_side,
            window=settings.window,
            idle_timeout_s=settings.idle_timeout_s,
            max_life_s=settings.max_life_s,
            hello_timeout_s=settings.hello_timeout_s,
            state_interval_s=settings.state_interval_s,
            ladder=settings.ladder,
        )


def _free(amount: int, now: float) -> float:
    return 0.0


@dataclass(frozen=True, slots=True)
class Guest:
    """Whom a stream belongs to.

    Attributes:
        tenant: its name.
        charges: take the bytes and the pixels of a frame, and the time; return after how many seconds to try again;
            0: charged.
        leave: gives back what the stream took of the tenant's limits.
        may_stay: whether the tenant's credentials still hold; may block.
    """

    tenant: str
    charges: tuple[Charge, Charge] = (_free, _free)
    leave: Callable[[], None] = lambda: None
    may_stay: Callable[[], bool] = lambda: True


Gate = Callable[[Hello, Channel], Awaitable[Guest]]


async def open_gate(hello: Hello, channel: Channel) -> Guest:
    """Let everybody in, as one tenant without limits."""
    return Guest("local")


class LiveServer:
    """See the module. Everything but codecs and steps runs in one event loop.

    Args:
        engines: loaded and warm, by name; the first one is the default.
        gate: who may come in; raises `Unauthorized` or another refusal.
        telemetry: what it reports to. board: where its metrics meet those of other replicas.
    """

    def __init__(
        self,
        config: LiveConfig,
        engines: dict[str, LiveEngine],
        *,
        states: StateStore | None = None,
        gate: Gate = open_gate,
        clock: Callable[[], float] = time.monotonic,
        telemetry: Telemetry | None = None,
        board: Board | None = None,
    ) -> None:
        self.config = config
        self.engines = engines
        self.telemetry = telemetry or Telemetry()
        self.stepper = Stepper(clock=clock, telemetry=self.telemetry)
        self.connections: dict[SessionKey, LiveConnection] = {}
        self.refused: dict[str, int] = {}
        self.draining = False
        self._states = states or LocalStates()
        self._gate, self._clock = gate, clock
        self.desk = MetricsDesk(self, self._states, board, clock=clock)
        self._admission = Admission(config.most_sessions, config.most_load)
        self._codecs = ThreadPoolExecutor(usable_cores(), thread_name_prefix="upriver-codec")
        self._hellos = 0

    def start(self) -> None:
        """Begin; in the event loop that will serve."""
        self.stepper.start()

    async def stop(self) -> None:
        """Hand every stream over, then end."""
        await self.drain()
        await self.stepper.stop()
        if self.telemetry.tracer is not None:
            await asyncio.to_thread(self.telemetry.tracer.close)
        self._codecs.shutdown(wait=False)

    async def drain(self) -> None:
        """Take no more streams, and hand over those that are there."""
        self.draining = True
        await asyncio.gather(*(connection.drain() for connection in list(self.connections.values())))

    async def serve(self, channel: Channel) -> None:
        """Serve one stream from its hello to its end."""
        guest: Guest | None = None
        try:
            hello = await self._hello(channel)
            self._require_open()
            guest = await self._gate(hello, channel)
            connection, welcome = await self._open(hello, guest, channel)
        except Refusal as refusal:
            if guest is not None:
                guest.leave()
            await self._refuse(channel, refusal)
            return
        except Exception:
            logger.exception("a stream could not be opened")
            if guest is not None:
                guest.leave()
            await self._refuse(channel, ServiceFailure("The stream could not be opened.", remedy="Try again."))
            return
        key = connection.session.key
        add_log_context(tenant=key.tenant, session=key.session)
        try:
            await connection.run(protocol.dump(welcome))
        finally:
            if self.connections.get(key) is connection:
                del self.connections[key]
            guest.leave()

    async def _hello(self, channel: Channel) -> Hello:
        if self._hellos >= self.config.most_hellos:
            raise AdmissionRefused(
                f"{self._hellos} clients have connected and not said hello.",
                code="hellos-full",
                limit=f"{self.config.most_hellos} connections without a hello",
                remedy="Try again.",
                retry_after_s=1.0,
            )
        self._hellos += 1
        try:
            async with asyncio.timeout(self.config.hello_timeout_s):
                message = await channel.receive()
        except TimeoutError:
            raise TimedOut(
                f"No hello came within {self.config.hello_timeout_s:g} s.",
                code="hello-late",
                limit=f"{self.config.hello_timeout_s:g} s",
                remedy="Send the hello as soon as the stream is open.",
            ) from None
        finally:
            self._hellos -= 1
        if not isinstance(message, str):
            raise BadMessage("The first message of a stream must be a hello.", remedy="Send a JSON text message.")
        return protocol.parse_hello(message)

    def _require_open(self) -> None:
        if self.draining:
            raise AdmissionRefused(
                "This replica is going away.", code="draining", remedy="Connect again.", retry_after_s=0.1
            )

    async def _open(self, hello: Hello, guest: Guest, channel: Channel) -> tuple[LiveConnection, Welcome]:
        config = self.config
        self._require_size(hello, channel)
        takeover: Takeover | None = None
        if hello.resume is not None:
            key = SessionKey(guest.tenant, hello.resume.session)
            takeover = await self._states.take_over(key, hello.resume.token.get_secret_value(), hello.resume.received)
            engine = self._engine_of(str(takeover.about.get(_ABOUT_MODEL)), key)
            self._end_older(key, takeover.epoch)
            self._require_open()
        else:
            key = SessionKey(guest.tenant, secrets.token_hex(8))
            engine = self.engine_named(hello.model)
        limit = HEADER_BYTES + largest_message_bytes(hello.codec_in, hello.width, hello.height)
        limits = SessionLimits(
            window=window_for(limit, config.window),
            idle_timeout_s=config.idle_timeout_s,
            max_life_s=config.max_life_s,
            unread_timeout_s=config.unread_timeout_s,
        )
        session = Session(
            key,
            hello,
            limits,
            self._state(engine, hello, takeover),
            now=self._clock(),
            epoch=takeover.epoch if takeover else 1,
            resume_at=takeover.snapshot.below if takeover else 0,
            received=hello.resume.received if hello.resume else 0,
        )
        if not config.ladder:
            session.ladder.budget_s = None
        self._require_room(session, engine)
        token = hello.resume.token.get_secret_value() if hello.resume else ""
        about = {_ABOUT_MODEL: engine.model_sha256}
        if takeover is None:
            token = await self._states.open(key, about, Snapshot(0, b""))
            try:  # others may have come in meanwhile, or the replica has to go
                self._require_open()
                self._require_room(session, engine)
            except Refusal:
                await self._states.close(key, session.epoch)
                raise
        connection = LiveConnection(
            session,
            engine,
            channel,
            stepper=self.stepper,
            states=OwnedStates(self._states, token, about),
            codecs=self._codecs,
            charges=guest.charges,
            may_stay=guest.may_stay,
            check_result=self._result_check(hello, channel),
            max_message_bytes=min(limit, channel.message_limit),
            state_interval_s=config.state_interval_s,
            clock=self._clock,
            telemetry=self.telemetry,
        )
        if takeover is not None:
            self.telemetry.metrics.handed_off("resumed")
        self.connections[key] = connection
        session.move(SessionState.WARMING)
        width, height = output_size(hello, hello.width, hello.height)
        welcome = Welcome(
            session=key.session,
            resume_token=token,
            epoch=session.epoch,
            resume_at=session.resume_at,
            granted=session.granted,
            max_message_bytes=min(limit, channel.message_limit),
            model=engine.name,
            model_sha256=engine.model_sha256,
            width=hello.width,
            height=hello.height,
            out_width=width,
            out_height=height,
            idle_timeout_s=config.idle_timeout_s,
            max_life_s=config.max_life_s,
            resumable=True,
        )
        return connection, welcome

    def _require_room(self, session: Session, engine: LiveEngine) -> None:
        others = [(one.session, one.engine) for one in self.connections.values()]
        self._admission.require_room(others, session, engine)

    def _end_older(self, key: SessionKey, epoch: int) -> None:
        """A client that resumes here a stream that still has a connection here has lost that connection."""
        older = self.connections.get(key)
        if older is None:
            return
        lost = StateLost(
            f"The stream {key.session} goes on in another connection.", remedy="Use that one, or open a new stream."
        )
        if older.session.epoch > epoch:
            raise lost
        del self.connections[key]
        older.fail(lost)  # not waited for: its state is not needed any more, and its socket may be stuck

    def engine_named(self, name: str | None) -> LiveEngine:
        """Return a model; the default one for None.

        Raises:
            BadMessage: there is none of this name.
        """
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise BadMessage(
                f"There is no model {name!r} here.",
                code="model-unknown",
                limit=", ".join(self.engines),
                remedy="Ask for one of GET /v1/models, or for none.",
            )
        return self.engines[name]

    def _engine_of(self, model_sha256: str, key: SessionKey) -> LiveEngine:
        # A model that is offered no more is there as long as streams have it.
        for engine in (*self.engines.values(), *(one.engine for one in self.connections.values())):
            if engine.model_sha256 == model_sha256:
                return engine
        raise StateLost(
            f"The stream {key.session} was restored by the model {model_sha256[:12]}, which is not here.",
            code="model-changed",
            remedy="Open a new stream: its first frame is restored without memory of those before.",
        )

    def _state(self, engine: LiveEngine, hello: Hello, takeover: Takeover | None) -> StreamState:
        if takeover is None or not takeover.snapshot.state:
            return engine.pipe.start(seed=hello.seed)
        try:
            return StreamState.load(
                io.BytesIO(takeover.snapshot.state), engine.pipe.device, model_sha256=engine.model_sha256
            )
        except StateError as error:  # written by a newer version, of which this replica is the one before
            raise StateLost(
                f"The state of the stream cannot be read here: {error.message}",
                code="state-unreadable",
                remedy="Open a new stream: its first frame is restored without memory of those before.",
            ) from error

    def _require_size(self, hello: Hello, channel: Channel) -> None:
        config, sides = self.config, (hello.width, hello.height)
        if min(sides) < config.least_side or max(sides) > config.greatest_side:
            raise FrameTooLarge(
                f"Frames of {hello.width}x{hello.height} are not served here.",
                code="frame-sides",
                limit=f"{config.least_side} to {config.greatest_side} pixels a side",
                remedy="Send frames of another size.",
            )
        pixels = hello.width * hello.height
        if pixels > self.config.max_pixels:
            raise FrameTooLarge(
                f"Frames of {hello.width}x{hello.height} have {pixels} pixels.",
                limit=f"{self.config.max_pixels} pixels",
                remedy="Send smaller frames.",
            )
        size = HEADER_BYTES + largest_message_bytes("raw", hello.width, hello.height)
        if hello.codec_in == "raw" and size > channel.message_limit:
            raise FrameTooLarge(
                f"Raw frames of {hello.width}x{hello.height} have {size} bytes and cannot be sent here.",
                limit=f"{channel.message_limit} bytes a message",
                remedy="Use gRPC, or another codec.",
            )
        self._result_check(hello, channel)(*output_size(hello, hello.width, hello.height))

    def _result_check(self, hello: Hello, channel: Channel) -> Callable[[int, int], None]:
        most = _LARGEST_GAIN * self.config.max_pixels
        return partial(check_result, hello.codec_out, max_pixels=most, max_message_bytes=channel.message_limit)

    async def _refuse(self, channel: Channel, refusal: Refusal) -> None:
        self.refused[refusal.code] = self.refused.get(refusal.code, 0) + 1
        self.telemetry.metrics.refused(type(refusal).__name__, refusal.code)
        if isinstance(refusal, StateLost):
            self.telemetry.metrics.handed_off("lost")
        await say_and_close(channel, protocol.dump_refusal(refusal), refusal.close_code, refusal.code)
