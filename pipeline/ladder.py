"""The HLS ladder of a finished video: the same film at several heights, for players that choose by their connection.

A rung is H.264 in an MP4 of its own, each sound track an AAC of its own; playlists point into these files by byte
ranges. All rungs have key pictures at the same times, and a segment begins at some of them. A rung of the video's own
height is a copy of its packets where a player can use them. The video is decoded once, in constant memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av

from pipeline.colour import HDR_TRANSFERS, RANGE_FULL, effective_range
from pipeline.encoder_options import Preset
from pipeline.fragments import read_fragments
from pipeline.passthrough import BIBLIOGRAPHIC
from pipeline.playlists import (
    AudioTrack,
    MediaSegment,
    Rendition,
    Variant,
    master_playlist,
    media_playlist,
)
from pipeline.renditions import EncodedPicture, copy_picture, upright
from pipeline.sound_track import Sound, write_sound
from pipeline.timeline import Timeline, read_timeline
from pipeline.video_container import Limits, VideoSource
from pipeline.video_errors import EncodeError
from pipeline.video_probe import StreamInfo, VideoInfo, probe
from pipeline.video_reader import VideoReader

MASTER = "master.m3u8"
_SEGMENT_S = 6
_GOP_S = 2
_LONGEST_GOP_S = 12  # of a video whose packets are copied: a segment is at least as long
_ANY_SIZE = Limits(min_side=1, max_side=1 << 20, max_pixels=1 << 29)
_TWO_LETTERS = {
    "ara": "ar", "bul": "bg", "cat": "ca", "ces": "cs", "dan": "da", "deu": "de", "ell": "el", "eng": "en",
    "est": "et", "fas": "fa", "fin": "fi", "fra": "fr", "heb": "he", "hin": "hi", "hrv": "hr", "hun": "hu",
    "ind": "id", "isl": "is", "ita": "it", "jpn": "ja", "kor": "ko", "lav": "lv", "lit": "lt", "nld": "nl",
    "nor": "no", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru", "slk": "sk", "slv": "sl", "spa": "es",
    "srp": "sr", "swe": "sv", "tha": "th", "tur": "tr", "ukr": "uk", "vie": "vi", "zho": "zh",
}  # fmt: skip
_TERMINOLOGICAL = {old: new for new, old in BIBLIOGRAPHIC.items()}


@dataclass(frozen=True, slots=True)
class Rung:
    """One size of the ladder, as seen; `is_copy`: the video's own packets."""

    width: int
    height: int
    is_copy: bool

    @property
    def name(self) -> str:
        """Such as `720p`."""
        return f"{self.height}p"


def write_ladder(
    folder: Path, source: VideoSource, heights: Sequence[int], *, preset: Preset = "medium", threads: int = 2
) -> tuple[str, ...]:
    """Write the ladder of a video into an empty folder; returns what it could not be, in words.

    Args:
        folder: there, and empty. A player opens `master.m3u8` in it.
        source: the finished video.
        heights: even heights as seen, in pixels. Those above the video's are left out.
        preset, threads: of the encoder.

    Raises:
        EncodeError: it cannot be written; the folder is left as it is then.
        VideoNotFound, UnreadableVideo, NoVideoStream: see `video_errors`.
    """
    info = probe(source, limits=_ANY_SIZE)
    timeline = read_timeline(source, info)
    rungs, warnings = plan_rungs(info, timeline, heights)
    keys = timeline.keys if any(rung.is_copy for rung in rungs) else _regular_keys(timeline)
    try:
        _write_pictures(folder, source, info, timeline, rungs, keys, preset, threads)
        variants = [_variant(folder, rung, info, timeline, keys) for rung in rungs]
        tracks = _write_sounds(folder, source, info, timeline, warnings)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise EncodeError(
            f"The HLS ladder could not be written ({error}).", remedy="Check the free space, or leave --hls out."
        ) from error
    for rendition in [*(one.rendition for one in variants), *(one.rendition for one in tracks)]:
        (folder / rendition.playlist).write_text(media_playlist(rendition), encoding="utf-8")
    (folder / MASTER).write_text(master_playlist(variants, tracks), encoding="utf-8")
    return tuple(warnings)


def plan_rungs(info: VideoInfo, timeline: Timeline, heights: Sequence[int]) -> tuple[list[Rung], list[str]]:
    """Return the rungs, highest first, and what is not as it was asked for, in words."""
    width, height = _seen_size(info)
    wanted = sorted(set(heights), reverse=True)
    warnings = [f"HLS: no rung of {one} lines, the result has {height}" for one in wanted if one > height]
    fitting = [one for one in wanted if one <= height]
    if not fitting:
        fitting = [height - height % 2]
        warnings.append(f"HLS: every rung that was asked for is larger than the result; there is one of {fitting[0]}")
    rungs = []
    for one in fitting:
        is_copy = one == height and can_copy(info, timeline)
        rungs.append(Rung(max(2, 2 * round(width * one / height / 2)), one, is_copy))
    if info.colour.transfer in HDR_TRANSFERS:
        warnings.append(f"HLS: {HDR_TRANSFERS[info.colour.transfer]} in 8 bits shows bands; the result has all bits")
    if any(stream.kind == "subtitle" for stream in info.streams):
        warnings.append("HLS: subtitles are in the result only")
    return rungs, warnings


def can_copy(info: VideoInfo, timeline: Timeline) -> bool:
    """Return whether every player can use the video's own packets as a rung, and change to and from it."""
    plays = info.codec == "h264" and info.pix_fmt == "yuv420p" and not info.interlaced
    seen_as_coded = info.sample_aspect_ratio == 1 and not upright(info)
    starts = [*timeline.keys, timeline.end]
    gaps = [timeline.seconds(after - before) for before, after in pairwise(starts)]
    return (
        plays
        and seen_as_coded
        and effective_range(info.colour, info.pix_fmt) != RANGE_FULL
        and timeline.is_closed
        and timeline.keys[0] == timeline.shown[0]
        and max(gaps) <= _LONGEST_GOP_S
    )


def _seen_size(info: VideoInfo) -> tuple[int, int]:
    """Width and height with square pixels, upright; the height is as coded where nothing turns it."""
    width, height = round(info.width * info.sample_aspect_ratio), info.height
    return (height, width) if any(name == "transpose" for name, _ in upright(info)) else (width, height)


def _regular_keys(timeline: Timeline) -> tuple[int, ...]:
    keys: list[int] = []
    for pts in timeline.shown:
        if not keys or timeline.seconds(pts - keys[-1]) >= _GOP_S:
            keys.append(pts)
    return tuple(keys)


def _write_pictures(
    folder: Path,
    source: VideoSource,
    info: VideoInfo,
    timeline: Timeline,
    rungs: Sequence[Rung],
    keys: Sequence[int],
    preset: Preset,
    threads: int,
) -> None:
    for rung in rungs:
        if rung.is_copy:
            copy_picture(folder / f"{rung.name}.mp4", source, timeline)
    encoded = [rung for rung in rungs if not rung.is_copy]
    if not encoded:
        return
    with ExitStack() as stack:
        reader = stack.enter_context(VideoReader(source, limits=_ANY_SIZE, info=info, deinterlace="off"))
        outputs = [
            stack.enter_context(
                EncodedPicture(
                    folder / f"{rung.name}.mp4", info, timeline, width=rung.width, height=rung.height,
                    keys=frozenset(keys), preset=preset, threads=threads,
                )
            )
            for rung in encoded
        ]  # fmt: skip
        for picture in reader.pictures():
            for output in outputs:
                output.write(picture)


def _variant(folder: Path, rung: Rung, info: VideoInfo, timeline: Timeline, keys: Sequence[int]) -> Variant:
    path = folder / f"{rung.name}.mp4"
    found = read_fragments(path)
    if len(found.fragments) != len(keys):
        raise ValueError(f"{path.name} has {len(found.fragments)} fragments for {len(keys)} key pictures")
    times = [timeline.seconds(pts) for pts in (*keys, timeline.end)]
    sizes = [one.size_bytes for one in found.fragments]
    segments = _segments(times, found.fragments[0].start_byte, sizes)
    rendition = Rendition(path.name, f"{rung.name}.m3u8", found.avc_codec, found.header_bytes, segments)
    video_range = HDR_TRANSFERS.get(info.colour.transfer, "SDR")
    return Variant(rendition, rung.width, rung.height, timeline.peak_rate, video_range)


def _segments(times_s: Sequence[Fraction], start_byte: int, sizes: Sequence[int]) -> tuple[MediaSegment, ...]:
    """Fragments, which begin at `times_s`, joined until they last a segment; the last time is the end."""
    segments = []
    first, size = 0, 0
    for number, one in enumerate(sizes, 1):
        size += one
        if number == len(sizes) or times_s[number] - times_s[first] >= _SEGMENT_S:
            segments.append(MediaSegment(times_s[number] - times_s[first], start_byte, size))
            start_byte, first, size = start_byte + size, number, 0
    return tuple(segments)


def _write_sounds(
    folder: Path, source: VideoSource, info: VideoInfo, timeline: Timeline, warnings: list[str]
) -> list[AudioTrack]:
    streams = [stream for stream in info.streams if stream.kind == "audio"]
    tracks: list[AudioTrack] = []
    default = next((stream.index for stream in streams if stream.disposition & 1), None)
    for stream in streams:
        path = folder / f"audio-{len(tracks) + 1}.m4a"
        try:
            sound = write_sound(path, source, stream.index, timeline, _SEGMENT_S)
        except EncodeError as error:
            path.unlink(missing_ok=True)
            warnings.append(f"HLS: {stream.describe()} was left out: {error.message}")
            continue
        is_default = stream.index == default or (default is None and not tracks)
        tracks.append(_track(path, sound, stream, tracks, is_default))
    return tracks


def _track(path: Path, sound: Sound, stream: StreamInfo, before: Sequence[AudioTrack], is_default: bool) -> AudioTrack:
    found = read_fragments(path)
    rate = sound.sample_rate
    times = [Fraction(one.start_ticks, rate) for one in found.fragments] + [sound.end_s]
    segments = tuple(
        MediaSegment(end - start, one.start_byte, one.size_bytes)
        for one, start, end in zip(found.fragments, times, times[1:], strict=False)
    )
    rendition = Rendition(path.name, f"{path.stem}.m3u8", sound.codec, found.header_bytes, segments)
    code = (stream.language or "").lower()
    code = _TERMINOLOGICAL.get(code, code)
    name = stream.metadata.get("title") or (code if code not in ("", "und") else f"Track {len(before) + 1}")
    while name in {track.name for track in before}:
        name += f" ({len(before) + 1})"
    language = "" if code == "und" else _TWO_LETTERS.get(code, code)
    return AudioTrack(rendition, name, language, sound.channels, is_default)
