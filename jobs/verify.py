"""Compare a restored video with its source: does it say and hold everything that the source did, at the same times?

Both files are decoded from beginning to end (no picture is converted), so a result that verifies also plays. Every
difference is found; those that restoring is for, or that the result's container makes unavoidable, are marked wanted.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.colour import RANGE_FULL, effective_range, is_rgb_format
from pipeline.encoder_options import CONTAINERS
from pipeline.fingerprint import StreamFingerprint, fingerprint
from pipeline.passthrough import BIBLIOGRAPHIC
from pipeline.video_container import Limits, VideoSource
from pipeline.video_probe import VideoInfo, probe
from pipeline.video_reader import VideoReader

# Clocks of containers differ: 1 ms in Matroska. More than that is heard and seen in the end.
SYNC_TOLERANCE_S = 0.001
_CHAPTERS_NOT_IN = {"mpegts"}
_TIME_CODES_NOT_IN = {"mpegts"}
_FREE_TAGS_IN = {"matroska", "webm", "mp4", "mov"}
_STREAM_TAGS_IN = {"matroska", "webm"}
_DISPOSITIONS_IN = {"matroska", "webm"}
# Written by muxers about themselves and about the old encoding.
_OWN_TAGS = (
    "encoder", "major_brand", "minor_version", "compatible_brands", "handler_name", "vendor_id", "duration", "bps",
    "number_of_", "_statistics", "timecode", "service_",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which the files differ. `wanted` ones need no attention; `note` says why."""

    what: str
    source: str
    result: str
    wanted: bool
    note: str = ""


@dataclass(slots=True)
class VerifyReport:
    """The comparison of two files; `ok` when nothing differs that should not.

    `largest_time_error_s` is that of the pictures after `offset_s`, the common start offset, is taken away.
    """

    source: Path
    result: Path
    frames_source: int = 0
    frames_result: int = 0
    largest_time_error_s: float = 0.0
    offset_s: float = 0.0
    identical_streams: int = 0
    differences: list[Difference] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every difference is a wanted one."""
        return all(difference.wanted for difference in self.differences)

    @property
    def unwanted(self) -> list[Difference]:
        """The differences that need attention."""
        return [difference for difference in self.differences if not difference.wanted]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        values = asdict(self)
        return {**values, "source": str(self.source), "result": str(self.result), "ok": self.ok}

    def add(self, what: str, source: object, result: object, *, wanted: bool = False, note: str = "") -> None:
        """Note a difference."""
        self.differences.append(Difference(what, str(source), str(result), wanted, note))


@dataclass(slots=True)
class _Pictures:
    """Times and captions of all pictures of a file, and the damage met on the way."""

    times_s: array[float]
    captions: str
    captioned: int
    damage: list[str]


def verify(
    src: VideoSource,
    dst: str | os.PathLike[str],
    scale: int | None = None,
    height: int | None = None,
    *,
    limits: Limits | None = None,
) -> VerifyReport:
    """Compare `dst` with the source `src` that it was restored from.

    Args:
        src, dst: video files or folders of pictures.
        scale: the size that the result must have, as a multiple; None accepts any equal enlargement of both sides.
        height: the height as seen that the result must have; excludes `scale`.
        limits: for both files.

    Raises:
        VideoError: one of them cannot be read at all.
    """
    limits = limits or Limits()
    # A result is larger than its source by design: the limits are for what is restored.
    generous = Limits(min_side=1, max_side=limits.max_side * 8, max_pixels=limits.max_pixels * 16)
    source, result = probe(src, limits=limits), probe(dst, limits=generous)
    report = VerifyReport(source.path, Path(dst))
    muxer = CONTAINERS.get(report.result.suffix.lower(), result.container)
    _compare_size(report, source, result, scale, height)
    _compare_picture_format(report, source, result)
    pictures, restored = _pictures(src, source, limits), _pictures(dst, result, generous)
    _compare_pictures(report, pictures, restored, stamped=not result.is_sequence)
    if source.is_sequence or result.is_sequence:
        if not source.is_sequence:
            report.add("streams", f"{len(source.streams)}", "pictures only", wanted=True, note="a folder holds no more")
        return report
    _compare_side_data(report, source, result, pictures, restored, muxer)
    _compare_streams(report, fingerprint(src, for_muxer=muxer), fingerprint(dst), muxer)
    _compare_tags(report, source, result, muxer)
    _compare_chapters(report, source, result, muxer)
    return report


def _compare_size(
    report: VerifyReport, source: VideoInfo, result: VideoInfo, scale: int | None, height: int | None
) -> None:
    before, after = f"{source.width}x{source.height}", f"{result.width}x{result.height}"
    upright = bool(source.rotation_deg % 180)
    seen_height = result.width if upright else result.height
    across, down = result.width / source.width, result.height / source.height
    if scale is not None:
        fits, note = (result.width, result.height) == (source.width * scale, source.height * scale), f"{scale}x asked"
    elif height is not None:
        # The other side is rounded to an even number.
        fits = seen_height == height and abs(across - down) * max(source.width, source.height) <= 2
        note = f"height {height} asked"
    else:
        fits, note = across >= 1 and abs(across - down) * max(source.width, source.height) <= 2, f"{across:.3g}x"
    if before != after or not fits:
        report.add("size", before, after, wanted=fits, note=note if fits else f"expected {note}")


def _compare_picture_format(report: VerifyReport, source: VideoInfo, result: VideoInfo) -> None:
    if source.codec != result.codec or source.pix_fmt != result.pix_fmt:
        # Fewer bits are a loss, but the writer names it, and some codecs have no choice.
        report.add(
            "encoding", f"{source.codec}, {source.pix_fmt}", f"{result.codec}, {result.pix_fmt}", wanted=True,
            note="the picture is encoded anew",
        )  # fmt: skip
    if source.interlaced and not result.interlaced:
        report.add("fields", "interlaced", "progressive", wanted=True, note="deinterlaced")
    if result.is_sequence:
        return
    if source.sample_aspect_ratio != result.sample_aspect_ratio:
        report.add("sample aspect ratio", source.sample_aspect_ratio, result.sample_aspect_ratio)
    if source.rotation_deg != result.rotation_deg or source.display_matrix != result.display_matrix:
        report.add("rotation", f"{source.rotation_deg} degrees", f"{result.rotation_deg} degrees")
    _compare_colour(report, source, result)


def _compare_colour(report: VerifyReport, source: VideoInfo, result: VideoInfo) -> None:
    of_rgb = is_rgb_format(source.pix_fmt)
    for name in ("matrix", "primaries", "transfer"):
        before, after = getattr(source.colour, name), getattr(result.colour, name)
        if before != after:
            chosen = of_rgb and name == "matrix"
            report.add(f"colour {name}", before, after, wanted=chosen, note="RGB became YUV" if chosen else "")
    before, after = (effective_range(info.colour, info.pix_fmt) for info in (source, result))
    if before != after:
        unavoidable = of_rgb or (before == RANGE_FULL and result.codec == "prores")
        report.add("colour range", before, after, wanted=unavoidable, note="converted" if unavoidable else "")
    places = [info.colour.chroma_location or "left" for info in (source, result)]
    if places[0] != places[1] and "420" in source.pix_fmt and "420" in result.pix_fmt:
        report.add("chroma location", *places)


def _pictures(path: VideoSource, info: VideoInfo, limits: Limits) -> _Pictures:
    times_s, captions, captioned = array("d"), hashlib.sha256(), 0
    with VideoReader(path, limits=limits, info=info, deinterlace="off") as reader:
        for pts, caption in reader.stamps():
            times_s.append(float(pts * info.time_base))
            captions.update(caption)
            captioned += bool(caption)
        return _Pictures(times_s, captions.hexdigest(), captioned, list(reader.damage))


def _compare_pictures(report: VerifyReport, source: _Pictures, result: _Pictures, *, stamped: bool) -> None:
    report.frames_source, report.frames_result = len(source.times_s), len(result.times_s)
    for damage in source.damage:
        report.add(
            "source damage", damage, "restored as far as it decodes", wanted=True, note="reported when restoring"
        )
    for damage in result.damage:
        report.add("result damage", "", damage)
    if report.frames_source != report.frames_result:
        report.add("frames", report.frames_source, report.frames_result)
    if not (stamped and source.times_s and result.times_s):
        return
    report.offset_s = result.times_s[0] - source.times_s[0]
    errors = [abs(b - a - report.offset_s) for a, b in zip(source.times_s, result.times_s, strict=False)]
    report.largest_time_error_s = max(errors)
    if report.largest_time_error_s > SYNC_TOLERANCE_S:
        late = sum(error > SYNC_TOLERANCE_S for error in errors)
        report.add("time stamps", "", f"{late} of {len(errors)} differ, by up to {1000 * max(errors):.3f} ms")
    if abs(report.offset_s) > SYNC_TOLERANCE_S:
        # Whether that is harmless is known when the sound has been compared: all must have moved together.
        report.add(
            "start", f"{source.times_s[0]:.6f} s", f"{result.times_s[0]:.6f} s", wanted=True,
            note="everything starts later together: the container has no times below zero",
        )  # fmt: skip


def _compare_side_data(
    report: VerifyReport, source: VideoInfo, result: VideoInfo, before: _Pictures, after: _Pictures, muxer: str
) -> None:
    holds_hdr = result.codec in ("h264", "hevc", "av1")
    for name, old, new in (
        ("HDR10 mastering display", source.mastering, result.mastering),
        ("HDR10 content light level", source.content_light, result.content_light),
    ):
        if old != new:
            report.add(name, old, new, wanted=not holds_hdr, note="" if holds_hdr else f"{result.codec} has none")
    if before.captions != after.captions:
        possible = result.codec in ("h264", "hevc")
        report.add(
            "closed captions", f"on {before.captioned} pictures", f"on {after.captioned} pictures",
            wanted=not possible, note="" if possible else f"{result.codec} carries none",
        )  # fmt: skip
    if source.timecode != result.timecode:
        lost = muxer in _TIME_CODES_NOT_IN
        report.add("time code", source.timecode, result.timecode, wanted=lost, note=f"{muxer} has none" if lost else "")


def _compare_streams(
    report: VerifyReport, source: list[StreamFingerprint], result: list[StreamFingerprint], muxer: str
) -> None:
    left = list(result)
    for stream in source:
        reason = stream.refused_by.get(muxer)
        match = next((other for other in left if _alike(stream, other)), None)
        if match is None or reason:
            note = f"{muxer} cannot hold it ({reason})" if reason else ""
            report.add("stream", stream.describe(), "missing", wanted=bool(reason), note=note)
            continue
        left.remove(match)
        if (stream.packets, stream.sha256) != (match.packets, match.sha256):
            report.add(
                "packets", f"{stream.describe()}: {stream.packets} packets, {stream.sha256[:12]}",
                f"{match.packets} packets, {match.sha256[:12]}",
            )  # fmt: skip
        else:
            report.identical_streams += 1
        _compare_stream_times(report, stream, match)
        _compare_stream_tags(report, stream, match, muxer)
    for stream in left:
        report.add("stream", "none", stream.describe())


def _alike(stream: StreamFingerprint, other: StreamFingerprint) -> bool:
    """Same kind and codec; MP4 has one name for all layers of MPEG audio."""
    codecs = ["mpeg audio" if one.codec in ("mp1", "mp2", "mp3") else one.codec for one in (stream, other)]
    return stream.kind == other.kind and codecs[0] == codecs[1]


def _compare_stream_times(report: VerifyReport, source: StreamFingerprint, result: StreamFingerprint) -> None:
    errors = [abs(b - a - report.offset_s) for a, b in zip(source.times_s, result.times_s, strict=False)]
    worst = max(errors, default=0.0)
    # Both clocks may round by half a tick; a microsecond keeps binary fractions from deciding.
    if worst > SYNC_TOLERANCE_S + 1e-6:
        report.add("synchronisation", source.describe(), f"off by up to {1000 * worst:.3f} ms against the picture")


def _compare_stream_tags(
    report: VerifyReport, source: StreamFingerprint, result: StreamFingerprint, muxer: str
) -> None:
    old, new = _tags(source.metadata), _tags(result.metadata)
    for key, value in old.items():
        if new.get(key) != value:
            lost = muxer not in _STREAM_TAGS_IN and key != "language"
            note = f"{muxer} has no such tag" if lost else ""
            report.add(f"tag {key}", f"{source.describe()}: {value}", new.get(key), wanted=lost, note=note)
    if source.disposition != result.disposition:
        lost = muxer not in _DISPOSITIONS_IN
        report.add(
            "disposition", f"{source.describe()}: {source.disposition}", result.disposition, wanted=lost,
            note=f"{muxer} has no place for it" if lost else "",
        )  # fmt: skip


def _compare_tags(report: VerifyReport, source: VideoInfo, result: VideoInfo, muxer: str) -> None:
    old, new = _tags(source.metadata), _tags(result.metadata)
    for key, value in old.items():
        if new.get(key) != value:
            lost = muxer not in _FREE_TAGS_IN
            report.add(f"tag {key}", value, new.get(key), wanted=lost, note=f"{muxer} has no such tag" if lost else "")
    main_old, main_new = _tags(source.main_stream.metadata), _tags(result.main_stream.metadata)
    for key, value in main_old.items():
        if main_new.get(key) != value:
            lost = muxer not in _STREAM_TAGS_IN and (key != "language" or muxer == "mpegts")
            note = f"{muxer} has no such tag" if lost else ""
            report.add(f"tag {key} of the picture", value, main_new.get(key), wanted=lost, note=note)


def _tags(metadata: dict[str, str]) -> dict[str, str]:
    """Comparable tags: names in lower case (Matroska's are in capitals), no muxer's own, no "undetermined"."""
    return {
        key.lower(): BIBLIOGRAPHIC.get(value, value) if key.lower() == "language" else value
        for key, value in metadata.items()
        if not key.lower().startswith(_OWN_TAGS) and (key.lower(), value) != ("language", "und")
    }


def _compare_chapters(report: VerifyReport, source: VideoInfo, result: VideoInfo, muxer: str) -> None:
    old, new = list(_chapters(source)), list(_chapters(result))
    same = len(old) == len(new) and all(
        a[2] == b[2] and abs(a[0] - b[0]) <= SYNC_TOLERANCE_S and abs(a[1] - b[1]) <= SYNC_TOLERANCE_S
        for a, b in zip(old, new, strict=True)
    )
    if not same:
        lost = muxer in _CHAPTERS_NOT_IN
        report.add("chapters", old, new, wanted=lost, note=f"{muxer} has none" if lost else "")


def _chapters(info: VideoInfo) -> Iterator[tuple[float, float, str]]:
    for chapter in info.chapters:
        start, end = (float(chapter[edge] * chapter["time_base"]) for edge in ("start", "end"))
        yield start, end, chapter["metadata"].get("title", "")
