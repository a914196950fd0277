"""H.264 as a live codec: one access unit (Annex B byte stream) in each message, decoded and encoded without delay.

Decoding. A picture comes out with the access unit that made it and has its id. Streams with B frames come out in the
order of presentation, each picture with the id of the access unit that made it, as many messages late as the stream
reorders. After anything missing or damaged nothing comes out before the next key frame (or the recovery point of a
stream that refreshes itself), because all pictures until then would be predicted from what is not there. H.264 has no
checksums: damage that still parses is shown. Interlaced frames are not deinterlaced; single fields are no pictures.

Encoding. libx264 without lookahead, B frames and frame threads; parameter sets before every key frame; a key frame at
first, on demand and every ten seconds. The matrix is BT.709 for large and BT.601 for small pictures, as players assume,
and written down, with limited range. Odd sizes have no 4:2:0 and become 4:4:4, which browsers may not show.

It knows no transport. Shape legend: H height, W width, C = 3 channels in the order R, G, B.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Final

import av
import numpy as np
from av.codec.context import Flags, ThreadType
from av.filter import Graph
from av.video.frame import PictureType
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from actors.errors import Undecodable
from actors.frame_codec import DecodedFrame, EncodedFrame, FrameDecoder, FrameEncoder
from actors.h264_syntax import MAX_DPB_MACROBLOCKS, AccessUnit, Inspector
from infra.protocol import Codec
from infra.refusals import FrameTooLarge
from pipeline.colour import (
    MATRIX_BT601_525,
    RANGE_FULL,
    RANGE_LIMITED,
    ColourTags,
    assumed_matrix,
    effective_matrix,
    effective_range,
    is_rgb_format,
)

# A picture that has not come out when so many access units have followed will not come: H.264 reorders at most 16.
_MOST_REORDERED: Final = 32
_KEY_FRAME_S: Final = 10.0
_ASSUMED_RATE: Final = 30.0
# A fifth smaller than `superfast` at the same quality, for two fifths more time.
_PRESET: Final = "veryfast"
# As exact as `pipeline.colour` where it counts and two to three times as fast. Without the flags for chroma libswscale
# repeats chroma samples instead of interpolating them: 10 dB less.
_TO_RGB: Final = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_TO_YUV: Final = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP
_SWSCALE_BT601: Final = 5  # libswscale's own number; PyAV passes H.273's on for all other matrices


class H264Decoder(FrameDecoder):
    """Access units of one stream; see the module."""

    def __init__(self, codec: Codec, width: int, height: int, *, max_pixels: int) -> None:
        super().__init__(codec, width, height, max_pixels=max_pixels)
        self._inspector = Inspector()
        self._ids: dict[int, int] = {}  # stamp inside libav -> id of the message; ids do not fit its signed numbers
        self._next_stamp = 0
        self._lost: list[int] = []
        self._waits_for_key = True
        self._parameters = b""
        self._reformatter = VideoReformatter()
        self._context: Any = self._open()

    def lost(self) -> list[int]:
        """See `FrameDecoder.lost`."""
        lost, self._lost = self._lost, []
        return lost

    def flush(self) -> list[DecodedFrame]:
        """See `FrameDecoder.flush`."""
        frames: list[DecodedFrame] = []
        if self._context is not None and self._context.is_open:
            try:
                frames = self._finished(self._context.decode(None))
            except (av.FFmpegError, EOFError):
                frames = []
            self._forget()
        return frames

    def close(self) -> None:
        """See `FrameDecoder.close`."""
        self._context = None
        self._ids.clear()

    def _decode(self, payload: memoryview, id: int) -> list[DecodedFrame]:
        data = bytes(payload)
        unit = self._inspect(data)
        earlier: list[DecodedFrame] = []
        if unit.parameters and unit.parameters != self._parameters:
            # Other parameters, perhaps another encoder: libav would keep the largest delay that it has ever seen.
            earlier = self.flush()
            self._context, self._parameters = self._open(), unit.parameters
        frames = earlier + self._decode_unit(data, unit, id)
        if id in self._lost and not frames:
            self._lost.remove(id)
            raise _undecodable(unit.slices)
        return frames

    def _decode_unit(self, data: bytes, unit: AccessUnit, id: int) -> list[DecodedFrame]:
        """Return what comes out; `id` is then pending, or among the lost, or in what comes out."""
        waited = self._waits_for_key
        stamp, self._next_stamp = self._next_stamp, self._next_stamp + 1
        self._ids[stamp] = id
        packet = av.Packet(data)
        packet.pts = packet.dts = stamp
        try:
            frames = self._finished(self._context.decode(packet))
        except (av.FFmpegError, EOFError):
            frames = []
            if unit.slices:
                self._forget()
        if unit.key and id not in self._lost:
            self._waits_for_key = False
        if not frames and stamp in self._ids:
            if not unit.slices or (waited and not unit.key):
                self._lost.append(self._ids.pop(stamp))
            elif not self._context.reorder_depth:
                self._forget()
        self._give_up(stamp - _MOST_REORDERED)
        return frames

    def _inspect(self, data: bytes) -> AccessUnit:
        """Look at an access unit before libav does.

        Raises:
            Undecodable, FrameTooLarge: see `FrameDecoder.decode`.
        """
        try:
            unit = self._inspector.inspect(data)
            for sequence in unit.sequences:
                self.check_size(sequence.width, sequence.height)
                if sequence.macroblocks * max(1, sequence.references) > MAX_DPB_MACROBLOCKS:
                    raise FrameTooLarge(
                        f"A stream of {sequence.width}x{sequence.height} asks for {sequence.references} reference "
                        "pictures; level 6.2 has not so many.",
                        limit=str(MAX_DPB_MACROBLOCKS),
                        remedy="Encode with fewer reference pictures.",
                    )
        except (Undecodable, FrameTooLarge):
            self._forget()
            raise
        if unit.gap:
            self._forget()
        return unit

    def _open(self) -> Any:
        context: Any = av.CodecContext.create("h264", "r")
        context.thread_count, context.thread_type = 1, ThreadType.SLICE
        context.flags |= Flags.low_delay
        # Exact limits are compared before; this one holds where libav reads a header otherwise than we do.
        context.options = {"max_pixels": str(2 * self.max_pixels + (1 << 16))}
        return context

    def _finished(self, pictures: list[Any]) -> list[DecodedFrame]:
        """Convert what libav gives out; from the first damaged picture on all are lost, until the next key frame."""
        frames: list[DecodedFrame] = []
        damaged = False
        for picture in pictures:
            id = self._ids.pop(picture.pts, None)
            if id is None:
                continue
            rgb_HWC = None if damaged or picture.is_corrupt else self._to_rgb(picture)
            if rgb_HWC is None:
                damaged = True
                self._lost.append(id)
            else:
                frames.append(DecodedFrame(id, rgb_HWC))
                self._waits_for_key = False
        if damaged:
            self._forget()
        return frames

    def _to_rgb(self, picture: Any) -> NDArray[np.uint8] | None:
        """The picture by its own tags; None where libswscale has no conversion for what they say."""
        self.check_size(picture.width, picture.height)
        pix_fmt = picture.format.name
        tags = ColourTags(matrix=int(picture.colorspace), range=int(picture.color_range))
        matrix = effective_matrix(tags, picture.width, picture.height)
        try:
            converted: Any = self._reformatter.reformat(
                picture,
                format="rgb24",
                src_colorspace=None if is_rgb_format(pix_fmt) else _swscale_matrix(matrix),
                src_color_range=effective_range(tags, pix_fmt),
                dst_color_range=RANGE_FULL,
                interpolation=_TO_RGB,
                threads=1,
            )
        except (av.FFmpegError, ValueError):
            return None
        rgb_HWC: NDArray[np.uint8] = converted.to_ndarray()
        return rgb_HWC

    def _forget(self) -> None:
        """Begin again with the next key frame; what was accepted and has not come out will not come."""
        self._lost.extend(self._ids.values())
        self._ids.clear()
        self._waits_for_key = True
        if self._context.is_open:
            self._context.flush_buffers()

    def _give_up(self, stamp: int) -> None:
        """Count as lost what was accepted before `stamp` and has not come out."""
        for old in [known for known in self._ids if known < stamp]:
            self._lost.append(self._ids.pop(old))


class H264Encoder(FrameEncoder):
    """Access units of one stream; see the module.

    Args:
        quality: 1 to 100, mapped to x264's constant rate factor as 51 - 0.41 x quality: 100 is 10 (no difference can be
            seen), 90 is 14, 75 is 20, 50 is 30.5.
        fps: of the stream; only rate control and the spacing of key frames depend on it.
    """

    codec: Codec = "h264"

    def __init__(self, *, quality: int, fps: float | None) -> None:
        self._crf = 51 - 0.41 * quality
        self._rate = Fraction(fps or _ASSUMED_RATE).limit_denominator(1001)
        self._size = (0, 0)
        self._context: Any = None
        self._chroma_placer: Any = None
        self._reformatter = VideoReformatter()
        self._stamp = 0

    def close(self) -> None:
        """See `FrameEncoder.close`."""
        self._context, self._chroma_placer, self._size = None, None, (0, 0)

    def _encode(self, rgb_HWC: NDArray[np.uint8], id: int, *, force_key: bool) -> list[EncodedFrame]:
        height, width = rgb_HWC.shape[:2]
        if (width, height) != self._size:
            self._open(width, height)
        picture = self._to_yuv(rgb_HWC)
        picture.pts, picture.time_base = self._stamp, 1 / self._rate
        picture.pict_type = PictureType.I if force_key else PictureType.NONE
        self._stamp += 1
        return [EncodedFrame(id, bytes(packet), packet.is_keyframe) for packet in self._context.encode(picture)]

    def _open(self, width: int, height: int) -> None:
        self._size, self._stamp = (width, height), 0
        self._matrix = assumed_matrix(width, height)
        self._pix_fmt = "yuv420p" if width % 2 == 0 and height % 2 == 0 else "yuv444p"
        self._chroma_placer = _chroma_placer(width, height)
        context: Any = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width, height, self._pix_fmt
        context.framerate, context.time_base = self._rate, 1 / self._rate
        context.gop_size = max(1, round(_KEY_FRAME_S * self._rate))
        context.max_b_frames = 0
        context.thread_count, context.thread_type = _threads(height), ThreadType.SLICE
        # The primaries are those of sRGB and BT.709: whatever the matrix, the pictures come from and go to screens.
        context.colorspace, context.color_range = self._matrix, RANGE_LIMITED
        context.color_primaries = context.color_trc = 1
        context.options = {
            "preset": _PRESET,
            "tune": "zerolatency",
            "crf": f"{self._crf:.2f}",
        }
        self._context = context

    def _to_yuv(self, rgb_HWC: NDArray[np.uint8]) -> Any:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HWC), format="rgb24")
        picture.pts = 0
        picture.color_range = RANGE_FULL
        self._chroma_placer.push(picture)
        return self._reformatter.reformat(
            self._chroma_placer.pull(),
            format=self._pix_fmt,
            dst_colorspace=_swscale_matrix(self._matrix),
            src_color_range=RANGE_FULL,
            dst_color_range=RANGE_LIMITED,
            interpolation=_TO_YUV,
            threads=1,
        )


def _swscale_matrix(matrix: int) -> int:
    return _SWSCALE_BT601 if matrix == MATRIX_BT601_525 else matrix


def _threads(height: int) -> int:
    """Slices that are encoded side by side. They gain little in small pictures, and other streams need the cores."""
    return 1 if height <= 1080 else 4


def _chroma_placer(width: int, height: int) -> Any:
    """A filter that marks pictures with the position of the chroma they are to get: left, as decoders assume."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 25))
    marker = graph.add("setparams", "chroma_location=left")
    sink = graph.add("buffersink")
    source.link_to(marker)
    marker.link_to(sink)
    graph.configure()
    return graph


def _undecodable(slices: int) -> Undecodable:
    if not slices:
        return Undecodable(
            "A frame is no H.264 access unit that can be decoded: there is no picture in it.",
            remedy="Send parameter sets and other information together with the picture that follows them.",
        )
    return Undecodable(
        "An H.264 frame is damaged, or needs pictures that did not come or were damaged.",
        code="frame-needs-key",
        remedy="Send a key frame.",
    )
