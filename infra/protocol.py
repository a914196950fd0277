"""The wire format of live streams, used by client and endpoint alike: control messages, and the header of a frame.

A stream is one WebSocket or one gRPC call. Text messages are JSON objects with a ``type``; binary messages are frames:
64 bytes of header, then the picture in the stream's codec. docs/reference/protocol.md shows both byte by byte.

Knows no transport, no session and no model.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from infra.refusals import BadMessage, Refusal

VERSION: Final = 1
SUBPROTOCOL: Final = "upriver.live.v1"  # offered in Sec-WebSocket-Protocol (RFC 6455, section 1.9), optional
MAGIC: Final = b"UR"
WEBSOCKET_MESSAGE_LIMIT: Final = 16 * 1024 * 1024  # of Ray Serve's ingress; larger frames go by gRPC
CONTROL_MESSAGE_LIMIT: Final = 16 * 1024
HELLO_TIMEOUT_S: Final = 5.0
SMALLEST_SIDE: Final = 16
LARGEST_SIDE: Final = 8192

# magic, version, kind, flags, level, reason | id | pts | index, receipt | acknowledged | granted | 4 timings
_HEADER: Final = struct.Struct("!2sBBHBBQqIIQQIIII")
HEADER_BYTES: Final = _HEADER.size
assert HEADER_BYTES == 64
_U64: Final = 2**64 - 1
_U32: Final = 2**32 - 1
_KIND_FRAME: Final = 1

Codec: TypeAlias = Literal["jpeg", "webp", "png", "raw", "h264"]


class Flag(enum.IntFlag):
    """What a header says in its bits; those marked (in) are the client's, (out) the server's."""

    KEY = 1 << 0  # (in, out) h264: this access unit can be decoded without those before it
    CUT = 1 << 1  # (in) a new scene begins with this frame: forget the one before it
    RESET = 1 << 2  # (out) the stream's memory was empty at this frame: its first, a cut, another size, a lost state
    DROPPED = 1 << 3  # (out) no picture follows; `reason` says why the frame was not restored
    GAP = 1 << 4  # (out) ids were missing before this frame
    RESUMED = 1 << 5  # (out) first frame that another replica answered


NO_FLAGS: Final = Flag(0)
_KNOWN_FLAGS: Final = sum(Flag)


class DropReason(enum.IntEnum):
    """Why a frame was not restored."""

    NONE = 0
    NEWER = 1  # policy newest: a newer frame was there
    LATE = 2  # policy deadline: it would have been late
    REPEATED = 3  # its id was seen before
    OUT_OF_ORDER = 4  # a later id was seen before
    RATE = 5  # more pixels per second than the tenant may send
    UNDECODABLE = 6  # it is no picture of the stream's codec
    RECEIVED = 7  # sent again after a resumption, and the client has had it


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The 64 bytes in front of every picture.

    Attributes:
        id: number of the frame, chosen by the client, growing by one from frame to frame.
        pts: presentation time in the client's own units; comes back as it was sent.
        flags: see `Flag`.
        reason: (out) see `DropReason`. (in) of an h264 frame that is sent again for the decoder's sake alone: why it
            was dropped.
        level: (out) denoising steps that the frame got; 0 is a plain resize. (in) of a frame that is sent again
            because its replica died: the level of the answer that the client already has.
        index: (out) number of the frame in the restored stream, which counts no dropped frames.
        receipt: (out) a random number. (in) that of the answer before `acknowledged`: what proves that it has been
            read. So nobody can make the service buffer more than a window.
        acknowledged: (in) all answers with a smaller id have arrived; (out) all frames with a smaller id are durable:
            the client need not keep them.
        granted: (out) how many frames the client may have sent since the stream was opened.
        decode_us, queue_us, step_us, encode_us: (out) how long the frame's stations took, in microseconds.
    """

    id: int
    pts: int = 0
    flags: Flag = NO_FLAGS
    level: int = 0
    reason: DropReason = DropReason.NONE
    index: int = 0
    receipt: int = 0
    acknowledged: int = 0
    granted: int = 0
    decode_us: int = 0
    queue_us: int = 0
    step_us: int = 0
    encode_us: int = 0

    def pack(self, payload: bytes | bytearray | memoryview = b"") -> bytes:
        """Return the message: header and picture."""
        timings = (min(max(us, 0), _U32) for us in (self.decode_us, self.queue_us, self.step_us, self.encode_us))
        header = _HEADER.pack(
            MAGIC,
            VERSION,
            _KIND_FRAME,
            self.flags,
            self.level,
            self.reason,
            self.id,
            self.pts,
            self.index & _U32,
            self.receipt,
            self.acknowledged,
            self.granted,
            *timings,
        )
        return b"".join((header, payload))

    @classmethod
    def unpack(cls, message: bytes | memoryview) -> tuple[FrameHeader, memoryview]:
        """Return header and picture of a binary message; the picture is a view, not a copy.

        Raises:
            BadMessage: not a frame of this version of the protocol.
        """
        if len(message) < HEADER_BYTES:
            raise _bad(f"A binary message has {len(message)} bytes; a frame's header alone has {HEADER_BYTES}.")
        fields = _HEADER.unpack_from(message)
        magic, version, kind, flags, level, reason = fields[:6]
        if magic != MAGIC or kind != _KIND_FRAME:
            raise _bad("A binary message does not begin with a frame's header.")
        if version != VERSION:
            raise _bad(f"A frame's header has version {version}; this side speaks version {VERSION}.")
        if flags & ~_KNOWN_FLAGS:
            raise _bad(f"A frame's header has unknown flags: {flags:#06x}.")
        try:
            reason = DropReason(reason)
        except ValueError:
            raise _bad(f"A frame's header has the unknown reason {reason}.") from None
        id_, pts, *rest = fields[6:]
        return cls(id_, pts, Flag(flags), level, reason, *rest), memoryview(message)[HEADER_BYTES:]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _FromService(_Message):
    model_config = ConfigDict(extra="ignore")  # newer services may say more


class Lossless(_Message):
    """No frame is dropped: the client waits."""

    kind: Literal["lossless"] = "lossless"


class Newest(_Message):
    """Of frames that wait, the newest is restored next and the older ones are dropped."""

    kind: Literal["newest"] = "newest"


class Deadline(_Message):
    """A frame that would be answered later than `ms` after it came is dropped, or answered by its plain resize."""

    kind: Literal["deadline"] = "deadline"
    ms: float = Field(gt=0, le=60_000)
    late: Literal["drop", "resize"] = "drop"


Policy: TypeAlias = Annotated[Lossless | Newest | Deadline, Field(discriminator="kind")]


class Credentials(_Message):
    """Who opens the stream: a key, or a JSON web token. Browsers cannot set headers, so they travel in the hello."""

    api_key: SecretStr | None = Field(default=None, max_length=512)
    token: SecretStr | None = Field(default=None, max_length=8192)


class Resume(_Message):
    """A stream that goes on after its connection was lost or its replica went away.

    Attributes:
        session, token: from the `Welcome`.
        received: all answers with a smaller id have arrived.
    """

    session: str = Field(min_length=1, max_length=64)
    token: SecretStr = Field(min_length=1, max_length=128)
    received: int = Field(ge=0, le=_U64)


class Hello(_Message):
    """The first message of a stream, from the client. docs/reference/protocol.md describes each field."""

    type: Literal["hello"] = "hello"
    protocol: Literal[1] = 1
    width: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    height: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    fps: float | None = Field(default=None, gt=0, le=1000)
    model: str | None = Field(default=None, max_length=200)
    scale: Literal[2, 3, 4] = 4
    out_height: int | None = Field(default=None, ge=SMALLEST_SIDE, le=2 * LARGEST_SIDE)
    codec_in: Codec = "jpeg"
    codec_out: Codec = "jpeg"
    quality: int = Field(default=90, ge=1, le=100)
    policy: Policy = Lossless()
    latency_ms: float | None = Field(default=None, gt=0, le=60_000)
    least_steps: Literal[0, 1, 2, 4] | None = None
    adaptive: bool = False
    cuts: bool = True
    seed: int = Field(default=0, ge=0, lt=2**63)
    credentials: Credentials = Credentials()
    resume: Resume | None = None


class Welcome(_FromService):
    """The answer to a hello.

    Attributes:
        session, resume_token: name and secret with which the stream can be resumed.
        epoch: how often it was opened; an older connection of the same stream is closed.
        resume_at: id of the first frame that the client has to send (again).
        granted: how many frames the client may send, counted from here on; every header raises it.
        max_message_bytes: the largest frame accepted, header included.
        model_sha256: of the model that restores.
        resumable: whether the stream can go on elsewhere when its replica goes away.
    """

    type: Literal["welcome"] = "welcome"
    protocol: Literal[1] = 1
    session: str
    resume_token: str
    epoch: int
    resume_at: int
    granted: int
    max_message_bytes: int
    model: str
    model_sha256: str
    width: int
    height: int
    out_width: int
    out_height: int
    idle_timeout_s: float
    max_life_s: float
    resumable: bool


class Reset(_Message):
    """From the client: a cut; the next frame is restored without memory of those before it."""

    type: Literal["reset"] = "reset"


class Resize(_Message):
    """From the client: the frames that follow have this size; needed only where the codec does not say it (raw)."""

    type: Literal["size"] = "size"
    width: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)
    height: int = Field(ge=SMALLEST_SIDE, le=LARGEST_SIDE)


class AskStats(_Message):
    """From the client: tell the session's figures."""

    type: Literal["stats"] = "stats"


class Delivered(_Message):
    """From the client: all answers with a smaller id have arrived. For clients that send frames seldom."""

    type: Literal["delivered"] = "delivered"
    below: int = Field(ge=0, le=_U64)
    receipt: int = Field(ge=0, le=_U32)


class Close(_Message):
    """From the client: no more frames; those under way are answered, then the stream is closed."""

    type: Literal["close"] = "close"


Control: TypeAlias = Annotated[Reset | Resize | AskStats | Delivered | Close, Field(discriminator="type")]
_CONTROL: Final[TypeAdapter[Reset | Resize | AskStats | Delivered | Close]] = TypeAdapter(Control)


class Stats(_FromService):
    """The server's figures of a session; times in milliseconds."""

    type: Literal["stats"] = "stats"
    state: str
    frames_in: int
    frames_out: int
    dropped: dict[str, int]
    waiting: int
    level: int
    step_ms: float
    latency_ms: float
    hand_offs: int


class Durable(_FromService):
    """From the server: all frames with a smaller id are durable; sent when no header is there to carry it."""

    type: Literal["durable"] = "durable"
    below: int


class Granted(_FromService):
    """From the server: as many frames may have been sent; sent when no header is there to carry it."""

    type: Literal["granted"] = "granted"
    frames: int


class Drain(_FromService):
    """From the server, before it closes with 1012: go on elsewhere, with the frame `resume_at`."""

    type: Literal["drain"] = "drain"
    session: str
    resume_at: int


class Closed(_FromService):
    """The server's last words after a `Close`."""

    type: Literal["closed"] = "closed"
    frames_in: int
    frames_out: int


def output_size(hello: Hello, width: int, height: int) -> tuple[int, int]:
    """Return width and height of the restored picture of a frame of this size."""
    if hello.out_height is None:
        return width * hello.scale, height * hello.scale
    return max(2, 2 * round(width * hello.out_height / height / 2)), hello.out_height


def parse_hello(text: str | bytes) -> Hello:
    """Return the hello in a text message.

    Raises:
        BadMessage: anything else; the message names the field and what is wrong with it, never its value.
    """
    return _validate(Hello, _load(text))


def parse_control(text: str | bytes) -> Reset | Resize | AskStats | Delivered | Close:
    """Return a client's control message.

    Raises:
        BadMessage: anything else.
    """
    message = _load(text)
    try:
        return _CONTROL.validate_python(message)
    except ValidationError as error:
        raise _explain(error) from None


def parse_answer(text: str | bytes) -> dict[str, Any]:
    """Return a server's text message as it is, for the client to look at its `type`; newer servers may add types.

    Raises:
        BadMessage: no JSON object with a type.
    """
    return _load(text)


def dump(message: BaseModel) -> str:
    """Return a message as text. Secrets are written out: this is what travels."""
    return json.dumps(message.model_dump(mode="python"), default=_reveal, separators=(",", ":"))


def dump_refusal(refusal: Refusal) -> str:
    """Return a refusal as text."""
    return json.dumps(refusal.to_message(), separators=(",", ":"))


def _reveal(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    raise TypeError(type(value).__name__)


def _load(text: str | bytes) -> dict[str, Any]:
    if len(text) > CONTROL_MESSAGE_LIMIT:
        raise _bad(f"A text message has {len(text)} characters; the limit is {CONTROL_MESSAGE_LIMIT}.")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad("A text message is not JSON.") from None
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        raise _bad("A text message is not a JSON object with a `type`.")
    return message


def _validate(kind: type[Hello], message: dict[str, Any]) -> Hello:
    if message.get("type") != "hello":
        raise _bad("The first message of a stream must be a hello.")
    try:
        return kind.model_validate(message)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> BadMessage:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "type"
    return _bad(f"The field {place} of a message is not possible: {first['msg']}.")


def _bad(message: str) -> BadMessage:
    return BadMessage(message, remedy="See docs/reference/protocol.md.")
