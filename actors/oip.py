"""Open Inference Protocol v2, whatever its transport: a request's tensors as frames of a stream, answers as tensors.

What Upriver's models take and give:

| tensor | datatype and shape | |
|---|---|---|
| `frame` (in) | UINT8 [H,W,3] or [N,H,W,3]; or BYTES [1] or [N] | pixels (RGB); or JPEG, PNG, WebP files of one kind |
| `video_uri` (in) | BYTES [1] | address of a short video, instead of `frame` |
| `frame` (out) | as it came: UINT8 with H and W scaled, or BYTES | restored pixels; or files, see `output_codec` |
| `index` (out) | INT64 [N] | number of the frame in its sequence |
| `level` (out) | INT32 [N] | denoising steps that it got |
| `reset` (out) | BOOL [N] | it was restored without memory: first frame, cut, another size |

Knows no transport, no session, and not the `kserve` package. Sizes are read from headers; nothing is decoded here.
Source: the Open Inference Protocol, and Triton's extensions for sequences, binary data, statistics and repositories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import numpy as np

from actors.errors import Undecodable
from actors.picture_header import PictureFormat, read_picture
from infra.live_answer import LiveAnswer
from infra.protocol import LARGEST_SIDE, SMALLEST_SIDE, Flag
from infra.refusals import BadMessage, FrameTooLarge

if TYPE_CHECKING:
    from infra.protocol import Hello

FRAME: Final = "frame"
VIDEO_URI: Final = "video_uri"
INPUTS: Final = (
    {"name": FRAME, "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
    {"name": VIDEO_URI, "datatype": "BYTES", "shape": [1]},
)
OUTPUTS: Final = (
    {"name": FRAME, "datatype": "UINT8", "shape": [-1, -1, -1, 3]},
    {"name": "index", "datatype": "INT64", "shape": [-1]},
    {"name": "level", "datatype": "INT32", "shape": [-1]},
    {"name": "reset", "datatype": "BOOL", "shape": [-1]},
)
OUTPUT_NAMES: Final = tuple(str(each["name"]) for each in OUTPUTS)
VERSION: Final = "1"
MOST_JSON_NUMBERS: Final = 8_000_000  # of an answer; each is an object of its own while it is written

Payload: TypeAlias = bytes | memoryview
Codec: TypeAlias = Literal["raw", "jpeg", "png", "webp"]
_SIGNATURES: Final[tuple[tuple[bytes, PictureFormat], ...]] = (
    (b"\xff\xd8", "jpeg"),
    (b"\x89PNG", "png"),
    (b"RIFF", "webp"),
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a request or an answer.

    Attributes:
        data: row by row as little-endian bytes; for BYTES one element each.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Payload | list[bytes]


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames that follow each other, all in one codec.

    Attributes:
        frames: as they travel in a live stream: packed pixels (raw), or picture files.
        sizes: width and height of each.
        single: the request was for one frame, so the answer has no dimension for their number.
    """

    codec: Codec
    frames: tuple[Payload, ...]
    sizes: tuple[tuple[int, int], ...]
    single: bool = False

    def __len__(self) -> int:
        return len(self.frames)


NO_FRAMES: Final = Clip("raw", (), ())


@dataclass(frozen=True, slots=True)
class ClipLimits:
    """What one request may hold."""

    max_frames: int
    max_result_bytes: int


def bad(message: str, remedy: str, *, code: str = "bad-request", limit: str = "") -> BadMessage:
    """Return a refusal of something in a request that cannot be."""
    return BadMessage(message, code=code, remedy=remedy, limit=limit)


def clip_of(inputs: Sequence[Tensor], limits: ClipLimits) -> Clip | str:
    """Return the frames in a request, or the address of the video that it names; `NO_FRAMES` where it has no input.

    Raises:
        BadMessage: other tensors, datatypes or shapes than there are, or no picture. FrameTooLarge: too much.
    """
    names = [tensor.name for tensor in inputs]
    unknown = sorted({name for name in names if name not in (FRAME, VIDEO_URI)})
    if unknown:
        raise bad(
            f"There is no input {unknown[0][:60]!r}.", f"Send {FRAME!r} or {VIDEO_URI!r}; see the model's metadata."
        )
    if len(names) > 1:
        raise bad(f"The request has {len(names)} inputs.", f"Send one: {FRAME!r}, or {VIDEO_URI!r}.")
    if not inputs:
        return NO_FRAMES
    (tensor,) = inputs
    if tensor.name == VIDEO_URI:
        return _address(tensor)
    if tensor.datatype == "BYTES":
        return _files(tensor, limits)
    if tensor.datatype == "UINT8":
        return _pixels(tensor, limits)
    raise bad(
        f"The input {FRAME!r} has the datatype {tensor.datatype[:20]!r}.",
        "Send UINT8 pixels, or BYTES that hold JPEG, PNG or WebP files.",
        code="bad-datatype",
    )


def _pixels(tensor: Tensor, limits: ClipLimits) -> Clip:
    shape = tensor.shape
    if len(shape) not in (3, 4) or shape[-1] != 3 or min(shape) < 1:
        raise bad(
            f"The input {FRAME!r} has the shape {list(shape)}.",
            "Send [H,W,3], or [N,H,W,3] for N frames that follow each other.",
            code="bad-shape",
        )
    count, (height, width) = (shape[0] if len(shape) == 4 else 1), shape[-3:-1]
    _require_few(count, limits)
    _require_sides(width, height)
    data = memoryview(cast("Payload", tensor.data)).cast("B")
    size = height * width * 3
    if len(data) != count * size:
        raise bad(
            f"The input {FRAME!r} has {len(data)} bytes; its shape {list(shape)} needs {count * size}.",
            "Send as many bytes as the shape says.",
            code="bad-shape",
        )
    frames = tuple(data[number * size : (number + 1) * size] for number in range(count))
    return Clip("raw", frames, ((width, height),) * count, single=len(shape) == 3)


def _files(tensor: Tensor, limits: ClipLimits) -> Clip:
    files = cast("list[bytes]", tensor.data)
    if math.prod(tensor.shape) != len(files) or not 0 <= len(tensor.shape) <= 2 or not files:
        raise bad(
            f"The input {FRAME!r} has the shape {list(tensor.shape)} and {len(files)} elements.",
            "Send one file for each frame, in the shape [N].",
            code="bad-shape",
        )
    _require_few(len(files), limits)
    kinds = {_kind(file, number) for number, file in enumerate(files)}
    if len(kinds) > 1:
        raise bad(
            f"The files are of several kinds: {', '.join(sorted(kinds))}.",
            "Send files of one kind in a request, and in a sequence.",
            code="mixed-codecs",
        )
    (kind,) = kinds
    sizes = []
    for number, file in enumerate(files):
        try:
            picture = read_picture(kind, memoryview(file))
        except Undecodable as error:
            raise _no_picture(number, str(error)) from None
        _require_sides(picture.width, picture.height)
        sizes.append((picture.width, picture.height))
    return Clip(kind, tuple(files), tuple(sizes))


def _kind(file: bytes, number: int) -> PictureFormat:
    for signature, kind in _SIGNATURES:
        if file[: len(signature)] == signature:
            return kind
    raise _no_picture(number, "It begins as none of them.")


def _no_picture(number: int, why: str) -> BadMessage:
    return bad(f"Frame {number} is no JPEG, PNG or WebP picture: {why}", "Send whole files.", code="undecodable")


def _address(tensor: Tensor) -> str:
    if tensor.datatype != "BYTES" or not isinstance(tensor.data, list) or len(tensor.data) != 1:
        raise bad(
            f"The input {VIDEO_URI!r} is {tensor.datatype[:20]} {list(tensor.shape)}.",
            "Send one address as BYTES [1].",
            code="bad-shape",
        )
    try:
        return tensor.data[0].decode()
    except UnicodeDecodeError:
        raise bad(f"The input {VIDEO_URI!r} is no text.", "Send one address as UTF-8.") from None


def _require_few(count: int, limits: ClipLimits) -> None:
    if count > limits.max_frames:
        raise too_many_frames(limits.max_frames)


def too_many_frames(limit: int) -> FrameTooLarge:
    """Return the refusal of a clip that is too long."""
    return FrameTooLarge(
        f"The request has more than {limit} frames.",
        code="too-many-frames",
        limit=f"{limit} frames",
        remedy="Send them in several requests of one sequence: the frames of the second are restored from the first's.",
    )


def _require_sides(width: int, height: int) -> None:
    if min(width, height) < SMALLEST_SIDE or max(width, height) > LARGEST_SIDE:
        raise FrameTooLarge(
            f"Frames of {width}x{height} cannot be restored.",
            code="frame-sides",
            limit=f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels a side",
            remedy="Send frames of another size.",
        )


def require_result_fits(clip: Clip, result_sizes: Sequence[tuple[int, int]], limits: ClipLimits) -> None:
    """Do nothing where the pixels of the answer are few enough to be held, whatever codec they travel in.

    Raises:
        FrameTooLarge: they are not.
    """
    needed = sum(width * height * 3 for width, height in result_sizes)
    if needed > limits.max_result_bytes:
        raise FrameTooLarge(
            f"The answer to {len(clip)} frames would have {needed} bytes of pixels.",
            code="result-too-large",
            limit=f"{limits.max_result_bytes} bytes",
            remedy="Send fewer frames in a request, as a sequence, or ask for a smaller scale.",
        )


def require_json_fits(codec: str, result_sizes: Sequence[tuple[int, int]]) -> None:
    """Do nothing where the frames of an answer can be written as JSON.

    Raises:
        BadMessage: they are files. FrameTooLarge: they have too many numbers.
    """
    if codec != "raw":
        raise files_as_json()
    needed = sum(width * height * 3 for width, height in result_sizes)
    if needed > MOST_JSON_NUMBERS:
        raise FrameTooLarge(
            f"The answer would have {needed} numbers as JSON.",
            code="json-too-large",
            limit=f"{MOST_JSON_NUMBERS} numbers",
            remedy="Ask for binary_data, or for binary_data_output.",
        )


def files_as_json() -> BadMessage:
    """Return the refusal to write picture files as JSON."""
    return bad(
        f"The output {FRAME!r} holds files, which JSON cannot carry.",
        "Ask for binary_data, or for binary_data_output.",
        code="json-bytes",
    )


def outputs_of(answers: Sequence[LiveAnswer], hello: Hello, *, single: bool) -> list[Tensor]:
    """Return the tensors of an answer, all that there are."""
    count = len(answers)
    tensors = []
    if hello.codec_out != "raw":
        tensors.append(Tensor(FRAME, "BYTES", (count,), [answer.payload for answer in answers]))
    elif len({(answer.width, answer.height) for answer in answers}) == 1:
        height, width = answers[0].height, answers[0].width
        pixels = answers[0].payload if count == 1 else b"".join(answer.payload for answer in answers)
        shape = (height, width, 3) if single else (count, height, width, 3)
        tensors.append(Tensor(FRAME, "UINT8", shape, pixels))
    else:
        assert not count, "frames of a clip in pixels have one size"
    for name, kind, datatype, value in (
        ("index", np.int64, "INT64", lambda answer: answer.header.index),
        ("level", np.int32, "INT32", lambda answer: answer.header.level),
        ("reset", np.bool_, "BOOL", lambda answer: Flag.RESET in answer.header.flags),
    ):
        column = np.array([value(answer) for answer in answers], dtype=kind)
        tensors.append(Tensor(name, datatype, (count,), column.tobytes()))
    return tensors


def array_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a numeric tensor as an array, without copying it."""
    kind = {"UINT8": np.uint8, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}[tensor.datatype]
    return np.frombuffer(cast("Payload", tensor.data), kind).reshape(tensor.shape)


def require_outputs(names: Sequence[str]) -> None:
    """Do nothing where all these outputs exist.

    Raises:
        BadMessage: one does not.
    """
    for name in names:
        if name not in OUTPUT_NAMES:
            raise bad(f"There is no output {name[:60]!r}.", f"Ask for some of {', '.join(OUTPUT_NAMES)}.")
