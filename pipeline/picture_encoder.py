"""The encoder of one result: how it is set up for a source, what it is told with each picture, what it cannot carry.

It knows no files: a writer gives it an output to add its stream to, and gets packets back. A whole file, a segment of
one, and the file that is joined from segments have the same encoder, set up by the same lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import av

from pipeline.colour import (
    MATRIX_BT709,
    MATRIX_RGB,
    RANGE_FULL,
    RANGE_UNSPECIFIED,
    effective_matrix,
    from_rgb,
    is_rgb_format,
    with_side_data,
)
from pipeline.encoder_options import EncoderOptions, EncoderSettings, resolve
from pipeline.image_sequence import encode_png
from pipeline.video_errors import EncodeError
from pipeline.video_probe import VideoInfo
from pipeline.video_reader import VideoFrame

_MAX_ENCODER_RATE = 240
_CODEC_BIT_EXACT = 1 << 23  # AV_CODEC_FLAG_BITEXACT


class PictureOrder:
    """Checks that pictures of one size come in the order in which they are shown; counts them.

    Attributes:
        frames: pictures so far. first_pts, last_pts: of them, in the source's time base.
    """

    def __init__(self, width: int, height: int) -> None:
        self.frames = 0
        self.first_pts = 0
        self.last_pts = 0
        self._size = (width, height)

    def check(self, frame: VideoFrame) -> None:
        """Take note of the next picture.

        Raises:
            EncodeError: wrong size, or a time stamp that is not above the last one.
        """
        height, width = frame.rgb_HWC.shape[:2]
        if (width, height) != self._size:
            raise EncodeError(
                f"A picture of {width}x{height} was given to a writer of {self._size[0]}x{self._size[1]}.",
                remedy="Resize it first.",
            )
        if self.frames and frame.pts <= self.last_pts:
            raise EncodeError(
                f"Picture {self.frames} has the time stamp {frame.pts}, the one before {self.last_pts}.",
                remedy="Write pictures in the order in which they are shown.",
            )
        if not self.frames:
            self.first_pts = frame.pts
        self.last_pts = frame.pts
        self.frames += 1


class PictureEncoder:
    """One encoder for pictures of one size.

    Args:
        source: the probed source; gives time base, colour, aspect and orientation.
        muxer: libav's name of the format that the result will be in, even when the packets wait elsewhere first.
        width, height: of the pictures, in pixels.
        options: see `EncoderOptions`.

    Attributes:
        settings: what libav is told.
        warnings: what the result cannot hold of the source, in words.
        found: what turned out while encoding, in words.

    Raises:
        UnsupportedOutput: container, codec, format and size do not go together.
    """

    def __init__(self, source: VideoInfo, muxer: str, *, width: int, height: int, options: EncoderOptions) -> None:
        self.settings: EncoderSettings = resolve(options, source, muxer, width, height)
        self.warnings = [*self.settings.warnings, *uncarried(source, self.settings.codec, muxer)]
        self.found: list[str] = []
        self._source = source
        self._options = options
        self._size = (width, height)
        self._matrix = effective_matrix(source.colour, width, height)
        self._matrix_tag = source.colour.matrix
        if is_rgb_format(source.pix_fmt) or self._matrix_tag == MATRIX_RGB:
            # RGB has no matrix; the one that was chosen for it must be written down.
            self._matrix = self._matrix_tag = MATRIX_BT709
            self.warnings.append("the source is RGB; it was converted to YUV with the BT.709 matrix")
        self._durations: dict[int, int] = {}
        self._stream: Any = None

    @property
    def remedy(self) -> str | None:
        """What to do if the encoder itself cannot be had; None: it comes with the program."""
        if self._options.encoder == "software":
            return None
        return "This machine may have no NVIDIA GPU that encodes this: use --encoder software."

    def add_stream(self, output: av.container.OutputContainer, extra: Mapping[str, str] | None = None) -> Any:
        """Add the video stream to `output`; the encoder is opened when the output's header is written.

        Args:
            extra: further options of the encoder; set by callers, never by users.
        """
        source, settings = self._source, self.settings
        rate = source.average_rate if 0 < source.average_rate <= _MAX_ENCODER_RATE else Fraction(25)
        stream: Any = output.add_stream(settings.encoder, rate=rate, options={**settings.options, **(extra or {})})
        context = stream.codec_context
        context.width, context.height = self._size
        context.pix_fmt = settings.pix_fmt
        context.time_base = source.time_base
        stream.time_base = source.time_base
        context.sample_aspect_ratio = source.sample_aspect_ratio
        tags = source.colour
        context.colorspace, context.color_primaries = self._matrix_tag, tags.primaries
        context.color_trc = tags.transfer
        context.color_range = (
            settings.colour_range
            if tags.range != RANGE_UNSPECIFIED or settings.colour_range == RANGE_FULL
            else RANGE_UNSPECIFIED
        )
        if self._options.bit_exact:
            context.flags |= _CODEC_BIT_EXACT
        if source.display_matrix is not None:
            stream.set_display_matrix(source.display_matrix)
        self._stream = stream
        return stream

    def encode(self, frame: VideoFrame) -> list[Any]:
        """Encode one picture; returns the packets that are finished, with the durations of their pictures.

        Raises:
            EncodeError: the encoder refused it.
        """
        picture = from_rgb(
            frame.rgb_HWC,
            self.settings.pix_fmt,
            self._matrix,
            self.settings.colour_range,
            threads=self._options.threads,
        )
        picture = self._dressed(picture, frame)
        picture.pts, picture.time_base = frame.pts, frame.time_base
        self._durations[frame.pts] = frame.duration
        try:
            return self._timed(self._stream.encode(picture))
        except (av.FFmpegError, ValueError) as error:
            raise EncodeError(
                f"The picture at {float(frame.pts * frame.time_base):.3f} s could not be encoded ({error}).",
                remedy=self.remedy or "Try another codec or container.",
            ) from error

    def flush(self) -> list[Any]:
        """The packets of the pictures that the encoder still holds."""
        return self._timed(self._stream.encode(None))

    def _timed(self, packets: list[Any]) -> list[Any]:
        for packet in packets:
            if packet.pts in self._durations:
                packet.duration = self._durations.pop(packet.pts)
        return packets

    def _dressed(self, picture: av.VideoFrame, frame: VideoFrame) -> av.VideoFrame:
        """The picture with the tags and the side data that its encoder takes from pictures."""
        tags = self._source.colour
        kept = [item for item in frame.side_data if item[0] == "a53_cc" and self.settings.codec in ("h264", "hevc")]
        if len(kept) < len(frame.side_data) and not self.found:
            self.found.append(f"closed captions inside the picture stream: {self.settings.codec} cannot carry them")
        if kept:
            picture = with_side_data(picture, kept)
        picture.colorspace, picture.color_primaries, picture.color_trc = self._matrix_tag, tags.primaries, tags.transfer
        return picture


class PngEncoder:
    """Each picture a packet that is a PNG file: what a folder of pictures is made of while it waits in a segment."""

    def __init__(self, source: VideoInfo, *, width: int, height: int) -> None:
        self.found: list[str] = []
        self._time_base = source.time_base
        self._size = (width, height)
        self._stream: Any = None

    def add_stream(self, output: av.container.OutputContainer) -> Any:
        """Add a stream of PNG pictures to `output`."""
        width, height = self._size
        self._stream = output.add_mux_stream("png", width=width, height=height, time_base=self._time_base)
        return self._stream

    def encode(self, frame: VideoFrame) -> list[Any]:
        """Return the picture as one packet, 8 or 16 bits per component as it is."""
        packet: Any = av.Packet(encode_png(frame.rgb_HWC))
        packet.stream, packet.time_base = self._stream, frame.time_base
        packet.pts = packet.dts = frame.pts
        packet.duration, packet.is_keyframe = frame.duration, True
        return [packet]

    def flush(self) -> list[Any]:
        """Nothing waits."""
        return []


_NAMED_LOSSES = {
    "DYNAMIC_HDR_PLUS": "HDR10+ dynamic metadata",
    "DYNAMIC_HDR_VIVID": "HDR Vivid dynamic metadata",
    "AFD": "active format description",
    "STEREO3D": "stereo 3D layout",
    "SPHERICAL": "spherical projection",
    "ICC_PROFILE": "ICC profile",
    "AMBIENT_VIEWING_ENVIRONMENT": "ambient viewing environment",
    "S12M_TIMECODE": "time codes inside the pictures",
    "GOP_TIMECODE": "time codes inside the pictures",
}


# What is seen of Dolby Vision without its metadata, by the compatibility that the source states.
_DOLBY_VISION_BASES = {1: "HDR10", 2: "SDR", 4: "HLG", 6: "HDR10"}


def _dolby_vision(source: VideoInfo) -> list[str]:
    """What is lost of Dolby Vision, which is written by no encoder here."""
    if source.dolby_vision is None:
        carried = {"DOVI_METADATA", "DOVI_RPU_BUFFER"} & source.side_data
        return ["Dolby Vision: its metadata is not carried, the result is the picture without it"] if carried else []
    profile, compatibility = source.dolby_vision
    base = _DOLBY_VISION_BASES.get(compatibility, "HDR10" if profile == 7 else "")
    if not base:
        lost = "its metadata is not carried, and the colours are wrong without it: convert it to HDR10 or SDR first"
    else:
        lost = f"its metadata is not carried, the result is the {base} picture without it"
    if profile in (4, 7):
        lost += "; its enhancement layer is left out"
    return [f"Dolby Vision profile {profile}{f'.{compatibility}' if profile > 7 else ''}: {lost}"]


def uncarried(source: VideoInfo, codec: str, muxer: str) -> list[str]:
    """What the pictures of a source carry and a result of this codec and format will not, in words.

    Args:
        muxer: as in `PictureEncoder`; "" for a folder of PNG pictures.
    """
    if source.rotation_deg and muxer == "mpegts":
        lost_with_container = ["rotation: mpegts has none"]
    elif source.sample_aspect_ratio != 1 and muxer in ("matroska", "webm") and codec not in ("h264", "hevc"):
        lost_with_container = [f"sample aspect ratio: not stored for {codec} in {muxer}; H.264, H.265 or MP4 keep it"]
    else:
        lost_with_container = []
    lost = {words for name, words in _NAMED_LOSSES.items() if name in source.side_data}
    if codec not in ("h264", "hevc", "av1"):
        if source.mastering:
            lost.add("HDR10 mastering display")
        if source.content_light:
            lost.add("HDR10 content light level")
    if any(component.is_alpha for component in av.VideoFormat(source.pix_fmt).components):
        lost.add("transparency")
    return [
        *_dolby_vision(source),
        *lost_with_container,
        *(f"{words}: not carried into {codec}" for words in sorted(lost)),
    ]
