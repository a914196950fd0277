"""Joining segments into the result, without encoding: what a writer would have made in one go.

The encoder is set up once more, only for what it says about its stream in the file's header; the pictures' packets
come from the segments. Decoding times are counted anew for the whole, because each segment's encoder counted its own.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av

from pipeline.encoder_options import EncoderOptions
from pipeline.picture_encoder import PictureEncoder
from pipeline.segments import Segment, expected_extradata, segment_encoder
from pipeline.video_container import VideoSource
from pipeline.video_errors import EncodeError
from pipeline.video_output import VideoOutput, WriteReport
from pipeline.video_probe import VideoInfo

_START_CODE = b"\0\0\0\1"


def assemble(
    dst: Path,
    info: VideoInfo,
    segments: Sequence[Path],
    *,
    width: int,
    height: int,
    options: EncoderOptions,
    source: VideoSource | None,
    fragmented: bool = False,
    frames: int | None = None,
) -> WriteReport:
    """Join segments, in the order of the film, into `dst`, with everything else that the source holds.

    Args:
        dst: a file, or a path without suffix for a folder of PNG pictures; must not exist.
        info: the probed source.
        segments: written by `SegmentWriter` for this source, size, destination and options.
        width, height, options: as they were given to `SegmentWriter`.
        source: where audio, subtitles and the rest are copied from; None writes the picture alone.
        fragmented: write MP4 and MOV in fragments, which can be played while they grow.
        frames: how many pictures there must be in all.

    Raises:
        UnreadableVideo: one of the segments is damaged or none.
        EncodeError: they do not fit together, or the file cannot be written; nothing is left behind.
    """
    output = VideoOutput(dst, info)
    encoder = segment_encoder(info, dst.suffix, width=width, height=height, options=options)
    try:
        timeline = _Timeline(info, segments, expected_extradata(encoder), frames)
        if isinstance(encoder, PictureEncoder):
            video = output.open_file(encoder, source, bit_exact=options.bit_exact, fragmented=fragmented)
            output.mux(_for_stream(timeline, video, encoder, output.muxer))
        else:
            output.open_folder(copies=source is not None)
            for index, packet in enumerate(timeline.packets()):
                (output.partial / f"{index:06d}.png").write_bytes(bytes(packet))
        output.finish(timeline.first_pts)
    except (av.FFmpegError, ValueError, OSError) as error:
        output.abort()
        raise EncodeError(
            f"{dst.name} could not be assembled ({error}).", remedy="Check the free space, or write .mkv."
        ) from error
    except BaseException:
        output.abort()
        raise
    return WriteReport(dst, timeline.frames, tuple(output.warnings))


class _Timeline:
    """The time stamps of all segments, checked; then their packets with times for the whole."""

    def __init__(self, info: VideoInfo, segments: Sequence[Path], extradata: bytes, frames: int | None) -> None:
        self._info = info
        self._segments = segments
        shown = array("q")  # time stamps in the order in which the pictures are shown
        delay = 0
        self._last_duration = 0
        for path in segments:
            with Segment(path, info.time_base) as segment:
                if segment.extradata != extradata:
                    raise EncodeError(
                        f"{path.name} was encoded with other settings or by another version of the encoder than this.",
                        remedy="Remove the segments with their records and run the job again, with one version.",
                    )
                coded = array("q")
                early = 0
                for packet in segment.packets():
                    assert packet.pts is not None and packet.dts is not None
                    coded.append(packet.pts)
                    early += packet.dts < segment.first_pts
                    self._last_duration = packet.duration or 0
            here = array("q", sorted(coded))
            place = {pts: number for number, pts in enumerate(here)}
            if len(place) < len(here) or (here and here[0] < segment.first_pts):
                raise EncodeError(f"{path.name} repeats a time stamp.", remedy="Remove it with its record.")
            if not here or (shown and here[0] <= shown[-1]):
                raise EncodeError(
                    f"{path.name} holds no pictures, or some from before the end of the segment before it.",
                    remedy="Give each segment once, in the order of the film.",
                )
            late = max(number - place[pts] for number, pts in enumerate(coded))
            delay = max(delay, early, late)
            shown.extend(here)
        if not shown or (frames is not None and len(shown) != frames):
            raise EncodeError(
                f"The segments hold {len(shown)} pictures, the film has {frames or 'some'}.",
                remedy="Run the job again: it makes the missing segments.",
            )
        self._shown, self._delay = shown, delay
        self.frames, self.first_pts = len(shown), shown[0]

    def packets(self, *, start_codes: bool = False) -> Iterator[Any]:
        """All packets in decoding order. A picture is decoded as many pictures early as the most reordered needs.

        Each is seen until the next one, the last as long as its segment says; see `Segment.packets` for `start_codes`.
        """
        number = 0
        for path in self._segments:
            with Segment(path, self._info.time_base) as segment:
                for packet in segment.packets(start_codes=start_codes):
                    following = bisect_right(self._shown, packet.pts)
                    more = following < self.frames
                    packet.duration = self._shown[following] - packet.pts if more else self._last_duration
                    packet.dts = self._dts(number)
                    number += 1
                    yield packet

    def _dts(self, number: int) -> int:
        """The decoding time of packet `number`; the first ones have as much lead as the first picture must wait."""
        shown, delay = self._shown, self._delay
        if number >= delay:
            return shown[number - delay]
        rate, time_base = self._info.average_rate, self._info.time_base
        step = max(1, round(1 / (rate * time_base)))
        if delay < len(shown):
            return shown[number] - (shown[delay] - shown[0])
        return shown[0] - (delay - number) * step


def _for_stream(timeline: _Timeline, stream: Any, encoder: PictureEncoder, muxer: str) -> Iterator[Any]:
    """The packets as the encoder would have given them to this muxer: H.264 and H.265 with start codes."""
    has_units = encoder.settings.codec in ("h264", "hevc")
    # MPEG-TS has no place for parameters but the stream itself; elsewhere the header holds them.
    inline = has_units and muxer == "mpegts"
    for packet in timeline.packets(start_codes=inline):
        if has_units and not inline:
            plain = av.Packet(_with_start_codes(bytes(packet)))
            plain.time_base, plain.is_keyframe = packet.time_base, packet.is_keyframe
            plain.pts, plain.dts, plain.duration = packet.pts, packet.dts, packet.duration
        else:
            plain = packet
        plain.stream = stream
        yield plain


def _with_start_codes(data: bytes) -> bytes:
    """NAL units behind their lengths (ISO 14496-15, four bytes) as NAL units behind start codes (H.264 annex B)."""
    parts, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        parts += [_START_CODE, data[at + 4 : end]]
        at = end
    return b"".join(parts)
