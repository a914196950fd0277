"""What is known of a video before it is restored: size, time base, colour, interlacing, side data, every stream.

`probe` reads the header and decodes the first few pictures; it is cheap and holds no file open afterwards.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.colour import ColourTags, bit_depth_of
from pipeline.interlacing import FieldStatistics
from pipeline.video_container import (
    Limits,
    VideoSource,
    check_declared_sizes,
    check_size,
    chroma_location,
    decoder_bounds,
    dolby_vision,
    is_remote,
    main_video_stream,
    open_input,
    source_name,
)
from pipeline.video_errors import UnreadableVideo

# Enough for the interlace detector to be sure, few enough to stay cheap at 4K.
_FIRST_PICTURES = 12
# How far into a damaged file the first decodable picture is looked for.
_PACKETS_TO_TRY = 3000
_RPU_UNIT = 62
_RATE_SLACK = 0.05
_FALLBACK_RATE = Fraction(25)


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """One stream of a container. Times are in `time_base` units; `disposition` is FFmpeg's bit field."""

    index: int
    kind: str
    codec: str
    disposition: int
    metadata: dict[str, str]
    time_base: Fraction | None
    start_pts: int | None
    is_main: bool = False
    detail: str = ""

    @property
    def language(self) -> str | None:
        """ISO 639 code of the stream, if tagged."""
        return self.metadata.get("language")

    def describe(self) -> str:
        """Such as `stream 2 (audio, aac, deu)`."""
        parts = [self.kind, self.codec, self.language or ""]
        return f"stream {self.index} ({', '.join(part for part in parts if part)})"


@dataclass(frozen=True, slots=True)
class MasteringDisplay:
    """SMPTE ST 2086: chromaticities as (x, y) of red, green, blue and white; luminances in cd/m2."""

    red: tuple[Fraction, Fraction]
    green: tuple[Fraction, Fraction]
    blue: tuple[Fraction, Fraction]
    white: tuple[Fraction, Fraction]
    min_luminance: Fraction
    max_luminance: Fraction


@dataclass(frozen=True, slots=True)
class ContentLight:
    """CTA-861.3: maximum content and maximum frame-average light level in cd/m2."""

    max_content: int
    max_average: int


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """A probed source. `width` and `height` are as coded (before rotation and sample aspect ratio).

    `frames` is an estimate (None if nothing is known). `interlaced` is None when it cannot be told;
    `interlaced_flagged` says that the pictures themselves are marked so. `display_matrix` holds the nine integers of
    the container's orientation, `rotation_deg` its angle, counter-clockwise. `side_data` names what the first pictures
    carry ("A53_CC", "DYNAMIC_HDR_PLUS", ...). `dolby_vision` is (profile, compatibility) where the container says so.
    """

    path: Path
    container: str
    width: int
    height: int
    rotation_deg: int
    sample_aspect_ratio: Fraction
    pix_fmt: str
    bit_depth: int
    codec: str
    average_rate: Fraction
    time_base: Fraction
    frames: int | None
    duration_s: float | None
    interlaced: bool | None
    colour: ColourTags
    streams: tuple[StreamInfo, ...]
    interlaced_flagged: bool = False
    start_pts: int = 0
    display_matrix: tuple[int, ...] | None = None
    mastering: MasteringDisplay | None = None
    content_light: ContentLight | None = None
    side_data: frozenset[str] = frozenset()
    dolby_vision: tuple[int, int] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    chapters: tuple[dict[str, Any], ...] = ()
    is_sequence: bool = False

    @property
    def main_stream(self) -> StreamInfo:
        """The stream that is restored."""
        return next(stream for stream in self.streams if stream.is_main)

    @property
    def timecode(self) -> str | None:
        """The start time code (`hh:mm:ss:ff`), if the file has one."""
        for tags in (self.main_stream.metadata, self.metadata, *(stream.metadata for stream in self.streams)):
            found = next((value for key, value in tags.items() if key.lower() == "timecode"), None)
            if found:
                return found
        return None


def probe(path: VideoSource, *, limits: Limits | None = None) -> VideoInfo:
    """Describe a video file, local or remote, or a local folder of PNG or JPEG pictures.

    Raises:
        VideoNotFound, UnreadableVideo, NoVideoStream, FrameTooLarge, FrameTooSmall: see `video_errors`.
    """
    limits = limits or Limits()
    name = source_name(path)
    local = Path(name) if is_remote(path) else Path(path)
    if not is_remote(path) and local.is_dir():
        from pipeline.image_sequence import probe_sequence

        return probe_sequence(local, limits)
    check_declared_sizes(path, limits)
    with open_input(path, limits) as container:
        stream = main_video_stream(container, name)
        context = stream.codec_context
        if context.width and context.height:
            check_size(context.width, context.height, limits, name)
        context.options = decoder_bounds(limits)
        # Decoding overwrites the context's tags with those of the bit stream, which may say less than the container.
        declared = ColourTags(
            matrix=int(context.colorspace),
            primaries=int(context.color_primaries),
            transfer=int(context.color_trc),
            range=int(context.color_range),
            chroma_location=chroma_location(container, stream.index),
        )
        side_data: set[str] = set()
        pictures = _first_pictures(container, stream, side_data)
        first = next(pictures, None)
        if first is None:
            raise UnreadableVideo(
                f"{name}: no picture of its {context.name} stream can be decoded.",
                remedy="The file is damaged; recover it or use another copy.",
            )
        check_size(first.width, first.height, limits, name)
        fields = FieldStatistics()
        mastering, light, matrix = None, None, None
        for picture in _chain(first, pictures):
            fields.add(picture)
            items: Any = picture.side_data
            for item in items:
                side_data.add(item.type.name)
                if item.type.name == "MASTERING_DISPLAY_METADATA":
                    mastering = parse_mastering(bytes(item))
                elif item.type.name == "CONTENT_LIGHT_LEVEL":
                    light = ContentLight(*struct.unpack_from("=II", bytes(item)))
                elif item.type.name == "DISPLAYMATRIX":
                    matrix = struct.unpack("=9i", bytes(item)[:36])
        rate = _rate(stream)
        duration_s = _duration_s(container, stream)
        return VideoInfo(
            path=local,
            container=container.format.name,
            width=first.width,
            height=first.height,
            rotation_deg=first.rotation,
            sample_aspect_ratio=stream.sample_aspect_ratio or Fraction(1),
            pix_fmt=first.format.name,
            bit_depth=bit_depth_of(first.format.name),
            codec=context.codec.canonical_name,
            average_rate=rate,
            time_base=stream.time_base or Fraction(1, 90000),
            frames=stream.frames or (round(duration_s * rate) if duration_s else None),
            duration_s=duration_s,
            interlaced=fields.interlaced(),
            interlaced_flagged=fields.flagged > 0,
            colour=_colour_tags(first, declared),
            streams=tuple(_stream_info(item, main=item.index == stream.index) for item in container.streams),
            start_pts=first.pts if first.pts is not None else (stream.start_time or 0),
            display_matrix=matrix,
            mastering=mastering,
            content_light=light,
            side_data=frozenset(side_data),
            dolby_vision=dolby_vision(container, stream.index),
            metadata=dict(container.metadata),
            chapters=tuple(dict(chapter) for chapter in container.chapters()),
        )


def parse_mastering(raw: bytes) -> MasteringDisplay | None:
    """Read FFmpeg's AVMasteringDisplayMetadata: ten rationals and two flags; None unless both parts are set."""
    numbers = struct.unpack_from("=22i", raw)
    if not (numbers[20] and numbers[21]):
        return None
    ratios = [Fraction(numbers[i], numbers[i + 1] or 1) for i in range(0, 20, 2)]
    return MasteringDisplay(
        red=(ratios[0], ratios[1]),
        green=(ratios[2], ratios[3]),
        blue=(ratios[4], ratios[5]),
        white=(ratios[6], ratios[7]),
        min_luminance=ratios[8],
        max_luminance=ratios[9],
    )


def _first_pictures(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream, side_data: set[str]
) -> Iterator[av.VideoFrame]:
    """Up to `_FIRST_PICTURES` decoded frames, over damaged packets; names in `side_data` what no frame says."""
    given = 0
    hevc = stream.codec_context.name == "hevc"
    # Of an H.265 configuration record the 22nd byte says how long the lengths of units are; start codes have none.
    setup = bytes(stream.codec_context.extradata or b"")
    length_bytes = (setup[21] & 3) + 1 if len(setup) > 22 and setup[0] == 1 else 0
    try:
        for count, packet in enumerate(container.demux(stream)):
            if count > _PACKETS_TO_TRY:
                return
            if hevc and packet.size and _has_rpu(bytes(packet), length_bytes):
                side_data.add("DOVI_RPU_BUFFER")
            try:
                frames = packet.decode()
            except (av.FFmpegError, EOFError):
                continue
            for frame in frames:
                yield frame
                given += 1
                if given >= _FIRST_PICTURES:
                    return
    except (av.FFmpegError, EOFError):
        return


def _has_rpu(packet: bytes, length_bytes: int) -> bool:
    """Whether there is Dolby Vision metadata among the units of an H.265 picture; libav passes only some of it on."""
    if not length_bytes:
        return b"\0\0\1\x7c\x01" in packet
    at = 0
    while at + length_bytes < len(packet):
        if packet[at + length_bytes] >> 1 == _RPU_UNIT:
            return True
        at += length_bytes + int.from_bytes(packet[at : at + length_bytes], "big")
    return False


def _chain(first: av.VideoFrame, rest: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    yield first
    yield from rest


def _rate(stream: av.video.stream.VideoStream) -> Fraction:
    """Pictures a second: on average, or as MPEG's sequence header says if the average is an estimate close to it."""
    average = stream.average_rate or stream.guessed_rate or _FALLBACK_RATE
    declared = stream.codec_context.framerate
    if stream.codec_context.name in ("mpeg1video", "mpeg2video") and declared:
        return declared if abs(declared - average) < _RATE_SLACK * average else average
    return average


def _duration_s(container: av.container.InputContainer, stream: av.stream.Stream) -> float | None:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _colour_tags(first: Any, declared: ColourTags) -> ColourTags:
    """The picture's own tags where it has any (they come from the bit stream), else the container's."""

    def pick(of_picture: int, of_container: int, unset: int) -> int:
        return int(of_picture) if int(of_picture) != unset else of_container

    return ColourTags(
        matrix=pick(first.colorspace, declared.matrix, 2),
        primaries=pick(first.color_primaries, declared.primaries, 2),
        transfer=pick(first.color_trc, declared.transfer, 2),
        range=pick(first.color_range, declared.range, 0),
        chroma_location=declared.chroma_location,
    )


def _stream_info(stream: av.stream.Stream, *, main: bool) -> StreamInfo:
    context: Any = stream.codec_context
    detail = ""
    if stream.type == "audio" and context is not None:
        detail = f"{context.sample_rate} Hz, {context.layout.name}"
    elif stream.type == "video" and context is not None:
        detail = f"{context.width}x{context.height}"
    return StreamInfo(
        index=stream.index,
        kind=stream.type,
        codec=context.codec.canonical_name if context is not None else (stream.name or "unknown"),
        disposition=int(stream.disposition),
        metadata=dict(stream.metadata),
        time_base=stream.time_base,
        start_pts=stream.start_time,
        is_main=main,
        detail=detail,
    )
