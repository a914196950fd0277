"""HLS playlists (RFC 8216) over fragmented MP4 files: each rendition is one file, its segments are ranges of it.

Plain text in, plain text out; knows neither files nor codecs. Times are exact fractions of a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# Byte ranges need 4, a header beside them 5, a header in a playlist with other than key pictures alone 6.
_VERSION = 7


@dataclass(frozen=True, slots=True)
class MediaSegment:
    """One segment: how long it is shown, and where it lies in its rendition's file."""

    duration_s: Fraction
    start_byte: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Rendition:
    """One file of one track, cut into segments; `header_bytes` at its beginning are what every segment needs.

    `codec` is as in RFC 6381.
    """

    file: str
    playlist: str
    codec: str
    header_bytes: int
    segments: tuple[MediaSegment, ...]

    @property
    def duration_s(self) -> Fraction:
        """How long it is."""
        return sum((one.duration_s for one in self.segments), Fraction(0))

    @property
    def target_s(self) -> int:
        """The least whole number of seconds that no segment exceeds."""
        return max(1, math.ceil(max(one.duration_s for one in self.segments)))

    @property
    def average_bit_rate(self) -> int:
        """Bits a second over all segments."""
        return _rate(sum(one.size_bytes for one in self.segments), self.duration_s)

    @property
    def peak_bit_rate(self) -> int:
        """The largest rate of any neighbouring segments that last from half to one and a half of the target.

        So it is defined in RFC 8216, section 4.1; a rendition that is shorter has the average.
        """
        peak = 0
        for first in range(len(self.segments)):
            duration_s, size = Fraction(0), 0
            for one in self.segments[first:]:
                duration_s, size = duration_s + one.duration_s, size + one.size_bytes
                if 2 * duration_s > 3 * self.target_s:
                    break
                if 2 * duration_s >= self.target_s:
                    peak = max(peak, _rate(size, duration_s))
        return max(peak, self.average_bit_rate)


@dataclass(frozen=True, slots=True)
class Variant:
    """A rendition of the picture as the master playlist offers it. `video_range` is SDR, PQ or HLG."""

    rendition: Rendition
    width: int
    height: int
    frame_rate: Fraction
    video_range: str = "SDR"


@dataclass(frozen=True, slots=True)
class AudioTrack:
    """A rendition of the sound. `language` is a code or "", `name` what a viewer chooses by."""

    rendition: Rendition
    name: str
    language: str
    channels: int
    is_default: bool


def media_playlist(rendition: Rendition) -> str:
    """Return the playlist of one rendition."""
    lines = [
        "#EXTM3U",
        f"#EXT-X-VERSION:{_VERSION}",
        f"#EXT-X-TARGETDURATION:{rendition.target_s}",
        "#EXT-X-MEDIA-SEQUENCE:0",
        "#EXT-X-PLAYLIST-TYPE:VOD",
        "#EXT-X-INDEPENDENT-SEGMENTS",
        f'#EXT-X-MAP:URI="{rendition.file}",BYTERANGE="{rendition.header_bytes}@0"',
    ]
    for one in rendition.segments:
        lines += [
            f"#EXTINF:{float(one.duration_s):.6f},",
            f"#EXT-X-BYTERANGE:{one.size_bytes}@{one.start_byte}",
            rendition.file,
        ]
    return "\n".join([*lines, "#EXT-X-ENDLIST", ""])


def master_playlist(variants: Sequence[Variant], tracks: Sequence[AudioTrack]) -> str:
    """Return the playlist that a player opens: every variant with every audio track."""
    lines = ["#EXTM3U", f"#EXT-X-VERSION:{_VERSION}", "#EXT-X-INDEPENDENT-SEGMENTS"]
    for track in tracks:
        language = f'LANGUAGE="{_quotable(track.language)}",' if track.language else ""
        lines.append(
            f'#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="audio",NAME="{_quotable(track.name)}",{language}'
            f"DEFAULT={'YES' if track.is_default else 'NO'},AUTOSELECT=YES,"
            f'CHANNELS="{track.channels}",URI="{track.rendition.playlist}"'
        )
    # Whichever track is chosen, no more is needed than this.
    peak = max((track.rendition.peak_bit_rate for track in tracks), default=0)
    average = max((track.rendition.average_bit_rate for track in tracks), default=0)
    sound = sorted({track.rendition.codec for track in tracks})
    for variant in variants:
        rendition = variant.rendition
        lines.append(
            f"#EXT-X-STREAM-INF:BANDWIDTH={rendition.peak_bit_rate + peak},"
            f"AVERAGE-BANDWIDTH={rendition.average_bit_rate + average},"
            f'CODECS="{",".join([rendition.codec, *sound])}",RESOLUTION={variant.width}x{variant.height},'
            f"FRAME-RATE={float(variant.frame_rate):.3f},VIDEO-RANGE={variant.video_range}"
            + (',AUDIO="audio"' if tracks else "")
        )
        lines.append(rendition.playlist)
    return "\n".join([*lines, ""])


def _rate(size_bytes: int, duration_s: Fraction) -> int:
    return math.ceil(8 * size_bytes / duration_s)


def _quotable(text: str) -> str:
    """Quoted strings have neither quotation marks nor line ends (RFC 8216, section 4.2)."""
    return " ".join(text.replace('"', "'").split())
