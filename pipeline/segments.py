"""Segments: closed pieces of encoded video, each begun by a fresh encoder, to be joined by `assembly` without encoding.

A segment is a small fragmented MP4 or MOV file of the picture alone. The same pictures give the same bytes, whatever
happened before. Its times count from zero, because MP4 has none below; where it belongs is in its tag `first_pts`.
"""

from __future__ import annotations

import hashlib
import io
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.bitstream import BitStreamFilterContext

from pipeline.encoder_options import EncoderOptions, container_for, resolve_codec
from pipeline.picture_encoder import PictureEncoder, PictureOrder, PngEncoder
from pipeline.video_container import Limits, open_input
from pipeline.video_errors import EncodeError, UnreadableVideo
from pipeline.video_output import BIT_EXACT
from pipeline.video_probe import VideoInfo
from pipeline.video_reader import VideoFrame

_FIRST_PTS = "first_pts"
# A fragment is held in memory until it is complete.
_FRAGMENT_US = 1_000_000
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)
# MP4 has no name for it; QuickTime has none for FFV1, AV1 and VP9.
_IN_MOV = {"prores"}


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """A finished segment. Time stamps are those of its first and last picture, in the source's time base.

    `warnings` says what was found in these pictures that cannot be carried; what is known before is in the report of
    the assembly.
    """

    path: Path
    frames: int
    first_pts: int
    last_pts: int
    size_bytes: int
    sha256: str
    warnings: tuple[str, ...]


def segment_suffix(options: EncoderOptions, info: VideoInfo, dst_suffix: str) -> str:
    """Return the suffix of segments for a destination with this suffix ("" for a folder of PNG pictures).

    Raises:
        UnsupportedOutput: no result has such a suffix.
    """
    if not dst_suffix:
        return ".mov"
    return ".mov" if resolve_codec(options, info, container_for(dst_suffix)) in _IN_MOV else ".mp4"


class SegmentWriter:
    """Encode consecutive pictures into the segment `path`, which must not exist.

    Args:
        path: its suffix is that of `segment_suffix`.
        info: the probed source.
        width, height: of the pictures, in pixels.
        options: see `EncoderOptions`.
        container_suffix: of the destination, as in `segment_suffix`: the encoder is set up for it.

    Raises:
        UnsupportedOutput: container, codec, format and size do not go together.
        EncodeError: from `write` and `close`.
    """

    def __init__(
        self,
        path: Path,
        info: VideoInfo,
        *,
        width: int,
        height: int,
        options: EncoderOptions,
        container_suffix: str,
    ) -> None:
        self.path = path
        self._order = PictureOrder(width, height)
        self._encoder = segment_encoder(info, container_suffix, width=width, height=height, options=options)
        self._partial = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
        self._output: av.container.OutputContainer | None = None
        self._first_dts: int | None = None
        # The packet that was encoded last waits, because it alone says how long the picture shown last is seen.
        self._waiting: Any = None
        self._last_duration = 0

    def write(self, frame: VideoFrame) -> None:
        """Add one picture; its `pts` must be above the last one's.

        Raises:
            EncodeError: wrong size, time stamps out of order, or the encoder or the muxer refused it.
        """
        self._order.check(frame)
        self._last_duration = frame.duration
        if self._output is None:
            self._output = _open(self._partial, self._encoder, frame.pts)
        packets = self._encoder.encode(frame)
        try:
            self._mux(packets)
        except (av.FFmpegError, ValueError) as error:
            raise EncodeError(
                f"Picture {self._order.frames - 1} of the segment could not be written ({error}).",
                remedy="Check the free space.",
            ) from error

    def close(self) -> SegmentReport:
        """Finish the segment and move it to its name.

        Raises:
            EncodeError: no picture was written, or the end could not be written; nothing is left then.
        """
        if self._output is None:
            raise EncodeError("No picture was written to the segment.", remedy="Check that the source has pictures.")
        try:
            rest = self._encoder.flush()
            if self._first_dts is None:
                _recount(rest)
            self._mux(rest)
            self._waiting.duration = self._last_duration
            self._output.mux(self._waiting)
            self._output.close()
            with self._partial.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size_bytes = self._partial.stat().st_size
            self._partial.rename(self.path)
        except (av.FFmpegError, ValueError, OSError) as error:
            self.abort()
            raise EncodeError(
                f"{self.path.name} could not be finished ({error}).", remedy="Check the free space."
            ) from error
        self._output = None
        order = self._order
        return SegmentReport(
            self.path, order.frames, order.first_pts, order.last_pts, size_bytes, sha256, tuple(self._encoder.found)
        )

    def abort(self) -> None:
        """Remove a segment that is not closed; safe to call at any time and more than once."""
        output, self._output = self._output, None
        if output is not None:
            try:
                output.close()
            except (av.FFmpegError, ValueError, OSError):
                pass  # the file goes away anyway, and the first error is the one to show
        self._partial.unlink(missing_ok=True)

    def _mux(self, packets: Iterable[Any]) -> None:
        assert self._output is not None
        for packet in packets:
            if self._first_dts is None:
                self._first_dts = packet.dts
            packet.pts, packet.dts = packet.pts - self._first_dts, packet.dts - self._first_dts
            if self._waiting is not None:
                self._output.mux(self._waiting)
            self._waiting = packet


def _recount(packets: Sequence[Any]) -> None:
    """Give the packets of a whole segment, in decoding order, the latest decoding times that suit them.

    An encoder that gets fewer pictures than it holds back may invent them (x265 does, and not the same each time).
    """
    stamps = sorted(packet.pts for packet in packets)
    lead = max(stamp - packet.pts for stamp, packet in zip(stamps, packets, strict=True))
    for stamp, packet in zip(stamps, packets, strict=True):
        packet.dts = stamp - lead


def segment_encoder(
    info: VideoInfo, container_suffix: str, *, width: int, height: int, options: EncoderOptions
) -> PictureEncoder | PngEncoder:
    """The encoder of every segment for a destination with this suffix."""
    if not container_suffix:
        return PngEncoder(info, width=width, height=height)
    return PictureEncoder(info, container_for(container_suffix), width=width, height=height, options=options)


def _open(file: Any, encoder: PictureEncoder | PngEncoder, first_pts: int) -> av.container.OutputContainer:
    mov = isinstance(encoder, PngEncoder) or encoder.settings.codec in _IN_MOV
    output = av.open(
        str(file) if isinstance(file, Path) else file,
        mode="w",
        format="mov" if mov else "mp4",
        container_options={
            "movflags": "empty_moov+default_base_moof+use_metadata_tags+skip_trailer",
            "frag_duration": str(_FRAGMENT_US),
        },
    )
    output.flags |= BIT_EXACT
    output.metadata[_FIRST_PTS] = str(first_pts)
    encoder.add_stream(output)
    output.start_encoding()
    return output


class Segment:
    """A segment that is read: a context manager around the open file.

    Attributes:
        first_pts: of its first picture, in the source's time base.
        extradata: what the encoder told the decoder in advance, as the container holds it.

    Raises:
        UnreadableVideo: no segment.
    """

    def __init__(self, path: Path, time_base: Fraction) -> None:
        self.path = path
        self._time_base = time_base
        self._opened = open_input(path, _ANY_SIZE, _NO_DECODER)
        self._container = self._opened.container
        try:
            self.first_pts = int(self._container.metadata[_FIRST_PTS])
            (self._stream,) = self._container.streams.video
        except (KeyError, ValueError) as error:
            self._opened.close()
            raise UnreadableVideo(f"{path.name} is no segment.", remedy=_REMEDY) from error
        self.extradata = bytes(self._stream.codec_context.extradata or b"")

    def __enter__(self) -> Segment:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def packets(self, *, start_codes: bool = False) -> Iterator[Any]:
        """Packets in decoding order, timed in the source's time base.

        The last one's duration is that of the picture that is shown last.

        Args:
            start_codes: H.264 and H.265 with start codes and with their parameters in the stream, as MPEG-TS has them.

        Raises:
            UnreadableVideo: damaged, or cut off.
        """
        origin: int | None = None
        name = _START_CODES_BY.get(self._stream.codec_context.name) if start_codes else None
        rewrite = BitStreamFilterContext(name, self._stream) if name else None
        try:
            for demuxed in self._container.demux(self._stream):
                if not demuxed.size:
                    continue
                if demuxed.is_corrupt:
                    raise UnreadableVideo(f"{self.path.name} is cut off.", remedy=_REMEDY)
                (packet,) = rewrite.filter(demuxed) if rewrite else (demuxed,)
                pts, dts, duration = (self._ticks(value) for value in (packet.pts, packet.dts, packet.duration))
                if origin is None:
                    if not packet.is_keyframe:
                        raise UnreadableVideo(f"{self.path.name} does not begin with a key frame.", remedy=_REMEDY)
                    origin = pts - self.first_pts
                packet.time_base = self._time_base
                packet.pts, packet.dts, packet.duration = pts - origin, dts - origin, duration
                yield packet
        except (av.FFmpegError, EOFError) as error:
            raise UnreadableVideo(f"{self.path.name} is damaged ({error}).", remedy=_REMEDY) from error

    def _ticks(self, value: int | None) -> int:
        """A time of the container in the source's time base; both are exact."""
        assert self._stream.time_base is not None
        ticks = (value or 0) * self._stream.time_base / self._time_base
        if ticks.denominator != 1:
            raise UnreadableVideo(f"{self.path.name} has another time base than the source.", remedy=_REMEDY)
        return ticks.numerator


def expected_extradata(encoder: PictureEncoder | PngEncoder) -> bytes:
    """What `Segment.extradata` is for segments of this encoder, as it is on this machine."""
    header = io.BytesIO()
    _open(header, encoder, 0).close()
    header.seek(0)
    with av.open(header, format="mov", container_options=_NO_DECODER) as container:
        return bytes(container.streams.video[0].codec_context.extradata or b"")


_START_CODES_BY = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}
_REMEDY = "Remove it with its record; the job makes it again."
# No codec has this name: libav reads the header and opens no decoder to find out more.
_NO_DECODER = {"codec_whitelist": "none"}
