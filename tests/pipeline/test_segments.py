"""Segments: the same bytes each time, exact time stamps, and joined the file that a writer makes in one go."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import pytest

from jobs.verify import verify
from pipeline.assembly import assemble
from pipeline.segments import Segment, SegmentReport, SegmentWriter, segment_suffix
from pipeline.video import EncodeError, EncoderOptions, UnreadableVideo, VideoFrame, VideoReader, VideoWriter, probe
from pipeline.video_probe import VideoInfo
from tests.video_files import FRAMES, make_video_files

FAST = EncoderOptions(preset="veryfast", threads=2, bit_exact=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


def doubled(source: Path, info: VideoInfo) -> list[VideoFrame]:
    with VideoReader(source, info=info, threads=1) as reader:
        return [replace(frame, rgb_HWC=frame.rgb_HWC.repeat(2, 0).repeat(2, 1)) for frame in reader]


def segments_of(
    frames: Sequence[VideoFrame],
    info: VideoInfo,
    folder: Path,
    suffix: str,
    lengths: Sequence[int],
    options: EncoderOptions = FAST,
) -> list[SegmentReport]:
    """The frames as segments of these lengths, and the last length again as often as it takes."""
    folder.mkdir()
    reports: list[SegmentReport] = []
    at = 0
    while at < len(frames):
        count = lengths[min(len(reports), len(lengths) - 1)]
        path = folder / f"{len(reports):05d}{segment_suffix(options, info, suffix)}"
        size = {"width": 2 * info.width, "height": 2 * info.height}
        writer = SegmentWriter(path, info, **size, options=options, container_suffix=suffix)
        for frame in frames[at : at + count]:
            writer.write(frame)
        reports.append(writer.close())
        at += count
    return reports


def join(
    dst: Path, info: VideoInfo, reports: Sequence[SegmentReport], source: Path | None, **options: object
) -> tuple[str, ...]:
    report = assemble(
        dst,
        info,
        [one.path for one in reports],
        width=2 * info.width,
        height=2 * info.height,
        source=source,
        **{"options": FAST, **options},  # type: ignore[arg-type]
    )
    assert report.frames == sum(one.frames for one in reports)
    return report.warnings


def whole(dst: Path, info: VideoInfo, frames: Sequence[VideoFrame], source: Path, options: EncoderOptions) -> Path:
    with VideoWriter(
        dst, info, width=2 * info.width, height=2 * info.height, options=options, source_path=source
    ) as out:
        for frame in frames:
            out.write(frame)
    return dst


def packets(path: Path) -> list[tuple[int, int | None, int | None, bool]]:
    with av.open(str(path)) as container:
        return [(one.stream.index, one.pts, one.dts, one.is_keyframe) for one in container.demux() if one.size]


@pytest.mark.parametrize(
    ("name", "codec", "suffix"),
    [
        ("h264_vfr_mp4", "h264", ".mp4"),
        ("prores_mov", "h264", ".mkv"),
        ("h264_vfr_mp4", "hevc", ".mp4"),
        ("hevc_10bit_hdr_mkv", "hevc", ".mkv"),
        ("vp9_opus_webm", "vp9", ".webm"),
        ("hevc_10bit_hdr_mkv", "vp9", ".mp4"),
        ("av1_mkv", "av1", ".mkv"),
        ("hevc_10bit_hdr_mkv", "av1", ".mp4"),
        ("ffv1_mkv", "ffv1", ".mkv"),
        ("hevc_10bit_hdr_mkv", "ffv1", ".mkv"),
        ("prores_mov", "prores", ".mov"),
        ("prores_mov", None, ""),
        ("rotated_mp4", None, ""),
    ],
)
def test_the_same_frames_give_the_same_segments(
    files: dict[str, Path], tmp_path: Path, name: str, codec: str | None, suffix: str
) -> None:
    info = probe(files[name])
    frames = doubled(files[name], info)
    options = EncoderOptions(codec=codec, preset="veryfast", threads=2)  # type: ignore[arg-type]
    first = segments_of(frames, info, tmp_path / "a", suffix, [5, 1, 7], options)
    # The other order of making them: nothing of one is left in the next.
    again = segments_of(frames[5:6], info, tmp_path / "b", suffix, [1], options)
    later = segments_of(frames[6:], info, tmp_path / "c", suffix, [7], options)
    assert [one.sha256 for one in [*again, *later]] == [one.sha256 for one in first[1:]]
    assert [one.frames for one in first] == [5, 1, 7, 3] and first[0].size_bytes == first[0].path.stat().st_size
    assert os.listdir(tmp_path / "b") == [f"00000{first[0].path.suffix}"]
    for report, start in zip(first, (0, 5, 6, 13), strict=True):
        with Segment(report.path, info.time_base) as segment:
            stamps = sorted((one.pts, one.pts + one.duration) for one in segment.packets() if one.pts is not None)
        shown = frames[start : start + report.frames]
        assert [pts for pts, _ in stamps] == [frame.pts for frame in shown]
        assert (report.first_pts, report.last_pts) == (shown[0].pts, shown[-1].pts)


@pytest.mark.parametrize(
    ("name", "codec", "suffix"),
    [
        ("h264_vfr_mp4", None, ".mp4"),
        ("multi_mkv", None, ".mkv"),
        ("captions_mp4", None, ".mp4"),
        ("anamorphic_mp4", None, ".mov"),
        ("hevc_10bit_hdr_mkv", None, ".mkv"),
        ("vp9_opus_webm", "vp9", ".webm"),
        ("full_range_mp4", "ffv1", ".mkv"),
        ("prores_mov", "prores", ".mov"),
    ],
)
def test_one_segment_becomes_byte_for_byte_what_the_writer_writes(
    files: dict[str, Path], tmp_path: Path, name: str, codec: str | None, suffix: str
) -> None:
    info = probe(files[name])
    frames = doubled(files[name], info)
    options = FAST.model_copy(update={"codec": codec})
    (report,) = segments_of(frames, info, tmp_path / "segments", suffix, [FRAMES], options)
    join(tmp_path / f"joined{suffix}", info, [report], files[name], options=options)
    expected = whole(tmp_path / f"whole{suffix}", info, frames, files[name], options)
    assert (tmp_path / f"joined{suffix}").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("lengths", [[6, 5], [1, 1, 6]])
@pytest.mark.parametrize(
    ("name", "codec", "suffix"),
    [
        ("h264_vfr_mp4", None, ".mp4"),
        ("h264_vfr_mp4", "hevc", ".mkv"),
        ("multi_mkv", None, ".mkv"),
        ("multi_mkv", None, ".ts"),
        ("captions_mp4", None, ".mp4"),
        ("hevc_10bit_hdr_mkv", None, ".mkv"),
        ("h264_vfr_mp4", "av1", ".mp4"),
        ("anamorphic_mp4", None, ".mp4"),
        ("rotated_mp4", None, ".mov"),
        ("offset_ts", None, ".ts"),
        ("offset_ts", "hevc", ".ts"),
        ("mpeg2_interlaced_ts", None, ".mkv"),
        ("vp9_opus_webm", "vp9", ".webm"),
        ("ffv1_mkv", "ffv1", ".mkv"),
        ("prores_mov", "prores", ".mov"),
        ("odd_mp4", None, ".mp4"),
    ],
)
def test_joined_segments_verify_against_their_source(
    files: dict[str, Path], tmp_path: Path, name: str, codec: str | None, suffix: str, lengths: list[int]
) -> None:
    info = probe(files[name])
    frames = doubled(files[name], info)
    options = EncoderOptions(codec=codec, preset="medium", threads=1)  # type: ignore[arg-type]
    reports = segments_of(frames, info, tmp_path / "segments", suffix, lengths, options)
    dst = tmp_path / f"joined{suffix}"
    warnings = join(dst, info, reports, files[name], options=options, frames=len(frames))
    report = verify(files[name], dst, scale=2)
    assert report.ok, (report.unwanted, warnings)
    assert report.frames_result == FRAMES and report.largest_time_error_s <= 0.001
    here = packets(dst)
    for index in {one[0] for one in here}:
        times = [one[2] for one in here if one[0] == index and one[2] is not None]
        assert all(after > before for before, after in pairwise(times)), index
    keys = [one for one in here if one[0] == info.main_stream.index and one[3]]
    assert len(keys) >= len(reports)
    assert whole(tmp_path / f"whole{suffix}", info, frames, files[name], options)
    one_go = verify(files[name], tmp_path / f"whole{suffix}", scale=2)
    assert report.differences == one_go.differences


def test_a_folder_of_pictures_is_joined_without_loss(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("rotated_mp4", "prores_mov"):
        info = probe(files[name])
        frames = doubled(files[name], info)
        join(tmp_path / name, info, segments_of(frames, info, tmp_path / f"{name}.segments", "", [7]), None)
        with VideoReader(tmp_path / name) as result:
            for before, after in zip(frames, result, strict=True):
                assert before.rgb_HWC.dtype == after.rgb_HWC.dtype and (before.rgb_HWC == after.rgb_HWC).all()


@pytest.mark.parametrize(
    ("name", "codec", "suffix"),
    [
        ("h264_vfr_mp4", None, ".mp4"),
        ("anamorphic_mp4", None, ".mp4"),
        ("multi_mkv", None, ".mp4"),
        ("captions_mp4", None, ".m4v"),
        ("rotated_mp4", None, ".mov"),
        ("prores_mov", "prores", ".mov"),
        ("hevc_10bit_hdr_mkv", "hevc", ".mp4"),
        ("offset_ts", None, ".mp4"),
    ],
)
def test_mp4_is_ready_to_stream_or_in_fragments(
    files: dict[str, Path], tmp_path: Path, name: str, codec: str | None, suffix: str
) -> None:
    info = probe(files[name])
    options = FAST.model_copy(update={"codec": codec})
    frames = doubled(files[name], info)
    reports = segments_of(frames, info, tmp_path / "segments", suffix, [7], options)
    for fragmented in (False, True):
        dst = tmp_path / f"{fragmented}{suffix}"
        join(dst, info, reports, files[name], options=options, fragmented=fragmented)
        assert verify(files[name], dst, scale=2).ok
        data = dst.read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")
        kinds = top_boxes(data)
        assert kinds.count("moov") == 1 and ("moof" in kinds) == fragmented
    # In fragments it plays while it comes: what has come so far decodes, up to the last whole fragment.
    if codec != "prores":  # of which every picture is a key picture
        assert len(reports) == 3 and kinds.count("moof") >= 3
    cut = data[: data.rindex(b"moof") - 4]
    (tmp_path / f"cut{suffix}").write_bytes(cut)
    with VideoReader(tmp_path / f"cut{suffix}", deinterlace="off") as reader:
        assert 0 < len([pts for pts, _ in reader.stamps()]) < FRAMES


def top_boxes(data: bytes) -> list[str]:
    """The kinds of all boxes of the outermost level, in their order."""
    kinds, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        assert size >= 8
        kinds.append(data[at + 4 : at + 8].decode())
        at += size
    return kinds


def test_segments_that_do_not_fit_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    info = probe(files["h264_vfr_mp4"])
    frames = doubled(files["h264_vfr_mp4"], info)
    reports = segments_of(frames, info, tmp_path / "good", ".mp4", [6])
    other = segments_of(
        frames[6:12], info, tmp_path / "other", ".mp4", [6], FAST.model_copy(update={"preset": "medium"})
    )
    left_out, twice, swapped = [reports[0], reports[2]], [reports[0], *reports], [reports[1], reports[0], reports[2]]
    dst = tmp_path / "joined.mp4"
    with pytest.raises(EncodeError, match="hold 10 pictures, the film has 16"):
        join(dst, info, left_out, None, frames=FRAMES)
    for wrong in (twice, swapped):
        with pytest.raises(EncodeError, match="before the end of the segment before it"):
            join(dst, info, wrong, None)
    with pytest.raises(EncodeError, match="other settings"):
        join(dst, info, [reports[0], *other, reports[2]], None)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(reports[1].path.read_bytes()[:-200])
    for broken in (replace(reports[1], path=cut), replace(reports[1], path=files["anamorphic_mp4"])):
        with pytest.raises((UnreadableVideo, EncodeError)):
            join(dst, info, [reports[0], broken, reports[2]], None, frames=FRAMES)
    with pytest.raises(UnreadableVideo, match="no segment"):
        join(dst, info, [replace(reports[1], path=files["anamorphic_mp4"])], None)
    assert sorted(one for one in os.listdir(tmp_path)) == ["cut.mp4", "good", "other"]


def test_an_aborted_or_empty_segment_leaves_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    info = probe(files["h264_vfr_mp4"])
    frames = doubled(files["h264_vfr_mp4"], info)
    size = {"width": 2 * info.width, "height": 2 * info.height}
    writer = SegmentWriter(tmp_path / "a.mp4", info, **size, options=FAST, container_suffix=".mp4")
    with pytest.raises(EncodeError, match="No picture"):
        writer.close()
    writer.write(frames[0])
    with pytest.raises(EncodeError, match="time stamp"):
        writer.write(frames[0])
    writer.abort()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_times_below_zero_and_far_from_it_are_exact(files: dict[str, Path], tmp_path: Path) -> None:
    """Stamps of a clock that MP4 does not have, some of them negative, some beyond 32 bits."""
    info = replace(probe(files["anamorphic_mp4"]), time_base=Fraction(1001, 90090))
    for start in (-20 * 3600, 1 << 40):
        frames = [
            replace(frame, pts=start + 3600 * index, time_base=info.time_base, duration=3600)
            for index, frame in enumerate(doubled(files["anamorphic_mp4"], info))
        ]
        (report,) = segments_of(frames, info, tmp_path / str(start), ".mp4", [FRAMES])
        with Segment(report.path, info.time_base) as segment:
            assert sorted(one.pts or 0 for one in segment.packets()) == [frame.pts for frame in frames]


def test_segments_play_by_themselves(files: dict[str, Path], tmp_path: Path) -> None:
    info = probe(files["anamorphic_mp4"])
    frames = doubled(files["anamorphic_mp4"], info)
    reports = segments_of(frames, info, tmp_path / "segments", ".mp4", [7])
    with av.open(io.BytesIO(reports[1].path.read_bytes()), mode="r") as container:
        assert len(list(container.decode(video=0))) == 7
