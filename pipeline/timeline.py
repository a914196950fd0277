"""When every picture of a video is shown, as its packets say; nothing is decoded.

From it follow the clock that tracks of several files share, the places where they may be cut, and their rate.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av

from pipeline.video_container import Limits, VideoSource, main_video_stream, open_input, source_name
from pipeline.video_errors import EncodeError
from pipeline.video_probe import VideoInfo

_ENCODER_DELAY = 2  # pictures that x264 decodes ahead at most
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)


@dataclass(frozen=True, slots=True)
class Timeline:
    """When the pictures of a file are shown and which ones its own decoder can start at, known without decoding any.

    Attributes:
        shown: time stamps in the order of showing. keys: those of key pictures.
        is_closed: no picture that follows a key picture is shown before it.
        last_duration: of the picture that is shown last.
        delay: how many pictures are decoded before one that is shown earlier, at most.
        peak_rate: the most pictures that are shown within any one second, or the average if that is about as high.
        start_s: when the first picture is shown on the clock that all tracks share.
    """

    time_base: Fraction
    shown: array[int]
    keys: tuple[int, ...]
    is_closed: bool
    last_duration: int
    delay: int
    peak_rate: Fraction
    start_s: int

    @property
    def end(self) -> int:
        """When the last picture is over."""
        return self.shown[-1] + self.last_duration

    def seconds(self, ticks: int) -> Fraction:
        """A duration or a time in seconds."""
        return ticks * self.time_base

    def duration(self, pts: int) -> int:
        """How long the picture at `pts` is shown."""
        following = bisect_right(self.shown, pts)
        return self.shown[following] - pts if following < len(self.shown) else self.last_duration

    def clock(self, pts: int) -> int:
        """A time on the clock that all tracks share, still in units of this time base."""
        return pts - self.shown[0] + round(self.start_s / self.time_base)


def read_timeline(source: VideoSource, info: VideoInfo) -> Timeline:
    """Read the time stamps of every picture of a file; 16 bytes of memory a picture.

    Raises:
        EncodeError: it has none. VideoNotFound, UnreadableVideo, NoVideoStream: see `video_errors`.
    """
    coded, keys, is_closed = array("q"), array("q"), True
    last_duration = 0
    with open_input(source, _ANY_SIZE) as container:
        stream = main_video_stream(container, source_name(source))
        last: int | None = None
        for packet in packets_of(container, stream):
            if packet.pts is None:
                continue
            if packet.is_keyframe:
                keys.append(packet.pts)
            is_closed = is_closed and bool(keys) and packet.pts >= keys[-1]
            if last is None or packet.pts > last:
                last, last_duration = packet.pts, packet.duration or 0
            coded.append(packet.pts)
    if not coded:
        raise EncodeError(f"{source_name(source)} has no pictures with time stamps.", remedy="Restore it again.")
    shown = array("q", sorted(coded))
    delay = max(number - bisect_left(shown, pts) for number, pts in enumerate(coded))
    lead = shown[min(max(delay, _ENCODER_DELAY), len(shown) - 1)] - shown[0]
    step = max(1, round(1 / (info.average_rate * info.time_base)))
    return Timeline(
        time_base=info.time_base,
        shown=shown,
        keys=tuple(keys),
        is_closed=is_closed,
        last_duration=last_duration or step,
        delay=delay,
        peak_rate=_peak_rate(shown, last_duration or step, info.time_base),
        # Decoding begins before the first picture is shown, MP4 has no times below zero, and not every player follows
        # an edit list. So the clock starts earlier; by whole seconds, which are exact in every time base.
        start_s=1 + math.ceil(lead * info.time_base),
    )


def _peak_rate(shown: array[int], last_duration: int, time_base: Fraction) -> Fraction:
    average = len(shown) / ((shown[-1] + last_duration - shown[0]) * time_base)
    window = 1 / time_base
    most = max(bisect_left(shown, pts + window) - number for number, pts in enumerate(shown))
    return average if most <= math.ceil(average) + 1 else Fraction(most)


def packets_of(container: av.container.InputContainer, stream: Any, *, flush: bool = False) -> Iterator[Any]:
    """Packets of one stream with content; `flush`: also the empty one at the end, which empties a decoder."""
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    for packet in container.demux(stream):
        if packet.size or flush:
            yield packet
