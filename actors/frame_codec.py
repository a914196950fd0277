"""Frames of a live stream from bytes and to bytes: one decoder and one encoder for each stream, whatever the codec.

`open_decoder` and `open_encoder` are all that the endpoint uses. Every codec keeps these promises:

- Sizes are read from the header and compared with the limits before anything is allocated or decoded.
- Only the stream's own codec is tried. A frame that is something else, damaged or incomplete is `Undecodable`: it costs
  that frame, not the stream, and what a decoder made up in place of missing data is never passed off as a picture.
- One frame in, its frame out at once. Only H.264 streams with B frames, which nobody should send live, take longer.
- Colours are RGB as coded: ICC profiles and gamma tags are ignored. Orientation tags (EXIF) are ignored too: a stream
  has one size, and its client knows how its camera is mounted. Transparent pictures are laid over black.

It knows no transport and no session. Shape legend: H height, W width, C = 3 channels in the order R, G, B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actors.errors import Undecodable
from infra.protocol import HEADER_BYTES, LARGEST_SIDE, SMALLEST_SIDE, Codec
from infra.refusals import FrameTooLarge

# What libjpeg, WebP's 14 bits, libpng and libx264 allow. H.264 decoders of browsers and phones stop at a half or a
# quarter of that.
LARGEST_ENCODED_SIDE: Final[dict[Codec, int]] = {
    "jpeg": 65_500,
    "webp": 16_383,
    "png": 1_000_000,
    "raw": 1_000_000,
    "h264": 16_384,
}
_HEADER_ROOM: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class DecodedFrame:
    """A picture of the stream: `rgb_HWC` is uint8 and may be read-only; `id` is that of the message it came with."""

    id: int
    rgb_HWC: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """A picture in the stream's codec; `key` says that it can be decoded without those before it."""

    id: int
    payload: bytes | memoryview
    key: bool


class FrameDecoder(ABC):
    """Frames of one stream from bytes; not for use by two threads at once.

    Args:
        codec: of the stream.
        width, height: agreed for the stream; see `resize`.
        max_pixels: that a picture may have whatever is agreed.

    Raises:
        FrameTooLarge: the agreed size is beyond `max_pixels`, or beyond the largest side of the protocol.
    """

    def __init__(self, codec: Codec, width: int, height: int, *, max_pixels: int) -> None:
        self.codec = codec
        self.max_pixels = max_pixels
        self.width, self.height = self._agreed(width, height)

    def decode(self, payload: memoryview, id: int, key: bool) -> list[DecodedFrame]:
        """Return the pictures that are finished with this message: normally its own and no other.

        Args:
            payload: what follows the header of the message. With codec `raw` the picture is a view of it.
            id: of the message.
            key: what the header says; a hint, on which nothing depends that a client could break.

        Raises:
            Undecodable: there is no picture in it, or not a whole one; later messages may be decoded.
            FrameTooLarge: its bytes or its pixels are more than agreed. Nothing was decoded.
        """
        if not len(payload):
            raise Undecodable("A frame has no bytes.", remedy=f"Send one {self.codec} picture in each message.")
        largest = largest_message_bytes(self.codec, self.width, self.height)
        if self.codec != "raw" and len(payload) > largest:
            raise FrameTooLarge(
                f"A frame has {len(payload)} bytes; {self.width}x{self.height} may have {largest}.",
                limit=str(largest),
                remedy="Compress it more, or agree on a larger size.",
            )
        return self._decode(payload, id)

    def lost(self) -> list[int]:
        """Return, once, ids of earlier messages that were accepted but of which no picture will come.

        Never anything but with H.264 streams that have B frames: there a picture may turn out to be damaged when the
        messages after it have been accepted.
        """
        return []

    def resize(self, width: int, height: int) -> None:
        """Agree on another size: with codec `raw` that of what follows, otherwise the most pixels of what follows.

        A codec that says its size itself may send smaller pictures, and change their shape, without asking.

        Raises:
            FrameTooLarge: as on opening; the old size stays.
        """
        self.width, self.height = self._agreed(width, height)

    def flush(self) -> list[DecodedFrame]:
        """Return what the decoder still holds; it can be used on, from the next key frame."""
        return []

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release memory; safe to call again. Nothing may be decoded afterwards."""

    @abstractmethod
    def _decode(self, payload: memoryview, id: int) -> list[DecodedFrame]: ...

    def check_size(self, width: int, height: int) -> None:
        """Compare the size in a picture's header with what is agreed.

        Raises:
            FrameTooLarge: more pixels than agreed, or a side beyond the protocol's.
            Undecodable: a side is below what can be restored.
        """
        agreed = self.width * self.height
        if width * height > agreed or max(width, height) > LARGEST_SIDE:
            raise FrameTooLarge(
                f"A picture has {width}x{height} pixels; {self.width}x{self.height} are agreed, "
                f"and no side may be above {LARGEST_SIDE}.",
                limit=f"{self.width}x{self.height}",
                remedy="Send a size message first, or open the stream with the largest size.",
            )
        if min(width, height) < SMALLEST_SIDE:
            raise Undecodable(
                f"A picture has {width}x{height} pixels; no side may be below {SMALLEST_SIDE}.",
                code="frame-too-small",
                remedy="Enlarge it first.",
            )

    def _agreed(self, width: int, height: int) -> tuple[int, int]:
        if width * height > self.max_pixels or max(width, height) > LARGEST_SIDE:
            raise FrameTooLarge(
                f"{width}x{height} pixels are asked for; the limit is {self.max_pixels} in all, {LARGEST_SIDE} a side.",
                limit=str(self.max_pixels),
                remedy="Send smaller pictures.",
            )
        return width, height


class FrameEncoder(ABC):
    """Frames of one stream to bytes; not for use by two threads at once."""

    codec: Codec

    def encode(self, rgb_HWC: NDArray[np.uint8], id: int, *, force_key: bool) -> list[EncodedFrame]:
        """Return the picture in the stream's codec, at once; one of another size than the last is a key frame.

        Args:
            rgb_HWC: uint8. With codec `raw` the result is a view of it, if its rows are contiguous.
            id: comes back with the result.
            force_key: make it a key frame; those that are not H.264 always are.

        Raises:
            FrameTooLarge: the codec has no pictures of this size, see `LARGEST_ENCODED_SIDE`.
        """
        side, largest = max(rgb_HWC.shape[:2]), LARGEST_ENCODED_SIDE[self.codec]
        if side > largest:
            raise FrameTooLarge(
                f"A result has a side of {side} pixels; {self.codec} has at most {largest}.",
                limit=str(largest),
                remedy="Ask for a smaller result or for another codec.",
            )
        return self._encode(rgb_HWC, id, force_key=force_key)

    def flush(self) -> list[EncodedFrame]:
        """Return what the encoder still holds; nothing, because none of them waits for later pictures."""
        return []

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Release memory; safe to call again."""

    @abstractmethod
    def _encode(self, rgb_HWC: NDArray[np.uint8], id: int, *, force_key: bool) -> list[EncodedFrame]: ...


def open_decoder(codec: Codec, width: int, height: int, *, max_pixels: int) -> FrameDecoder:
    """Return the decoder of a stream; see `FrameDecoder` for arguments and errors."""
    if codec == "raw":
        return RawDecoder(codec, width, height, max_pixels=max_pixels)
    if codec == "h264":
        from actors.h264_codec import H264Decoder

        return H264Decoder(codec, width, height, max_pixels=max_pixels)
    from actors.picture_codec import PictureDecoder

    return PictureDecoder(codec, width, height, max_pixels=max_pixels)


def open_encoder(codec: Codec, *, quality: int, fps: float | None) -> FrameEncoder:
    """Return the encoder of a stream.

    Args:
        quality: 1 (smallest) to 100. JPEG and WebP take it as it is, H.264 as described in `h264_codec`; PNG and raw
            pictures are always exact.
        fps: of the stream, for the spacing of H.264's key frames; None where the client does not know.
    """
    if codec == "raw":
        return RawEncoder()
    if codec == "h264":
        from actors.h264_codec import H264Encoder

        return H264Encoder(quality=quality, fps=fps)
    from actors.picture_codec import PictureEncoder

    return PictureEncoder(codec, quality=quality)


def largest_message_bytes(codec: Codec, width: int, height: int) -> int:
    """Return the most bytes that a frame of this size may have, its header not counted.

    Exact for `raw`. A compressed picture may be a little larger than its 8-bit pixels, which holds what a lossless
    codec makes of noise, and at least 64 kB, which leaves room for metadata around small pictures.
    """
    pixels = width * height * 3
    return pixels if codec == "raw" else pixels + pixels // 64 + _HEADER_ROOM


def check_result(codec: Codec, width: int, height: int, *, max_pixels: int, max_message_bytes: int) -> None:
    """Compare the size of a result with what can be made and returned, before anything of it is.

    Args:
        max_message_bytes: of the transport; it has a say where the size of the picture in bytes is known.

    Raises:
        FrameTooLarge: it is beyond one of the limits.
    """
    side = LARGEST_ENCODED_SIDE[codec]
    message_bytes = HEADER_BYTES + (width * height * 3 if codec == "raw" else 0)
    for value, most, unit in (
        (max(width, height), side, f"pixels a side in {codec}"),
        (width * height, max_pixels, "pixels"),
        (message_bytes, max_message_bytes, "bytes a message"),
    ):
        if value > most:
            raise FrameTooLarge(
                f"Results of {width}x{height} in {codec} cannot be returned here: {value} {unit}.",
                limit=f"{most} {unit}",
                remedy="Ask for a smaller result or another codec; gRPC carries larger messages.",
            )


class RawDecoder(FrameDecoder):
    """Pixels as they are: H x W x 3 bytes, row by row."""

    def _decode(self, payload: memoryview, id: int) -> list[DecodedFrame]:
        expected = self.width * self.height * 3
        if len(payload) != expected:
            raise Undecodable(
                f"A raw frame has {len(payload)} bytes; {self.width}x{self.height} RGB has {expected}.",
                remedy="Send height x width x 3 bytes, and a size message before the size changes.",
            )
        return [DecodedFrame(id, np.frombuffer(payload, np.uint8).reshape(self.height, self.width, 3))]


class RawEncoder(FrameEncoder):
    """Pixels as they are."""

    codec: Codec = "raw"

    def _encode(self, rgb_HWC: NDArray[np.uint8], id: int, *, force_key: bool) -> list[EncodedFrame]:
        return [EncodedFrame(id, np.ascontiguousarray(rgb_HWC).data.cast("B"), True)]
