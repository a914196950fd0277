"""`verify`: silent about a faithful result in every container, and not silent about any single thing spoiled."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from jobs.verify import VerifyReport, verify
from pipeline.video import NoVideoStream, UnreadableVideo
from tests.video_files import FRAMES, enlarge, make_bad_files, make_video_files

SAME_CONTAINER = {
    "h264_vfr_mp4": 1, "anamorphic_mp4": 1, "hevc_10bit_hdr_mkv": 1, "mpeg2_interlaced_ts": 1, "multi_mkv": 4,
    "rotated_mp4": 0, "odd_mp4": 0, "vp9_opus_webm": 1, "av1_mkv": 0, "ffv1_mkv": 1, "prores_mov": 1,
    "full_range_mp4": 0, "captions_mp4": 0, "offset_ts": 1, "png_folder": 0, "jpeg_folder": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def multi(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A faithful result of the file with the most streams."""
    result = tmp_path_factory.mktemp("results") / "multi.mkv"
    enlarge(files["multi_mkv"], result)
    return result


def named(report: VerifyReport) -> set[str]:
    return {difference.what for difference in report.unwanted}


@pytest.mark.parametrize("name", SAME_CONTAINER)
def test_a_faithful_result_verifies(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = files[name]
    result = tmp_path / source.name
    enlarge(source, result)
    report = verify(source, result, scale=4)
    assert report.ok, report.unwanted
    assert report.frames_source == report.frames_result == (5 if source.is_dir() else FRAMES)
    assert report.identical_streams == SAME_CONTAINER[name]
    assert report.offset_s == 0 and report.largest_time_error_s == 0
    assert named(verify(source, result, scale=2)) == {"size"}
    assert verify(source, result).ok and named(verify(source, result, height=100)) == {"size"}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".ts"])
@pytest.mark.parametrize("name", ["h264_vfr_mp4", "multi_mkv", "mpeg2_interlaced_ts", "mjpeg_avi", "offset_ts"])
def test_what_another_container_cannot_hold_is_wanted_and_the_rest_is_equal(
    files: dict[str, Path], tmp_path: Path, name: str, suffix: str
) -> None:
    result = tmp_path / f"out{suffix}"
    report, _ = enlarge(files[name], result)
    verified = verify(files[name], result, scale=4)
    assert verified.ok, verified.unwanted
    assert verified.largest_time_error_s <= 0.001
    # MPEG-TS alone cannot say that sound starts before zero, and then everything starts later.
    assert abs(verified.offset_s) <= 0.0005 or any("later" in warning for warning in report.warnings if suffix == ".ts")
    lost = [item for item in verified.differences if item.what == "stream"]
    assert all(any(item.source.split(",")[0] in warning for warning in report.warnings) for item in lost)


def test_sound_and_subtitles_are_byte_identical_across_containers(files: dict[str, Path], tmp_path: Path) -> None:
    """AAC changes its framing on the way from MPEG-TS to MP4 and back, but not its content."""
    there, back = tmp_path / "there.mp4", tmp_path / "back.ts"
    enlarge(files["offset_ts"], there)
    enlarge(there, back)
    for result in (there, back):
        assert verify(files["offset_ts"], result).identical_streams == 1


def remux(source: Path, result: Path, change: Callable[[av.Packet], list[av.Packet]], **options: Any) -> None:
    """Copy a file packet by packet; `change` may drop or alter packets, `options` leave streams or tags out."""
    with av.open(str(source)) as old, av.open(str(result), "w") as new:
        kept = [stream for stream in old.streams if stream.index not in options.get("without", ())]
        copies = {}
        for stream in kept:
            copy = new.add_stream_from_template(stream, opaque=True) if stream.type != "attachment" else None
            if copy is None:
                attachment: Any = stream
                copy = new.add_attachment("font.ttf", "application/x-truetype-font", attachment.data)
            copy.metadata.update(stream.metadata if stream.index not in options.get("untagged", ()) else {})
            copy.disposition = stream.disposition if stream.index not in options.get("plain", ()) else 0
            copies[stream.index] = copy
        new.metadata.update(options.get("tags", old.metadata))
        if options.get("chapters", True):
            new.set_chapters(old.chapters())
        for packet in old.demux([stream for stream in kept if stream.type != "attachment"]):
            if packet.size:
                for piece in change(packet):
                    piece.stream = copies[packet.stream.index]
                    new.mux(piece)


def same(packet: av.Packet) -> list[av.Packet]:
    return [packet]


def altered(packet: av.Packet) -> list[av.Packet]:
    """The 5th packet of the second sound track with one bit changed."""
    if packet.stream.index != 2 or packet.pts is None or not 120 <= packet.pts < 152:
        return [packet]
    data = bytearray(bytes(packet))
    data[-1] ^= 1
    changed = av.Packet(bytes(data))
    changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
    changed.duration, changed.is_keyframe = packet.duration, packet.is_keyframe
    return [changed]


def later(stream: int, milliseconds: int) -> Callable[[av.Packet], list[av.Packet]]:
    def change(packet: av.Packet) -> list[av.Packet]:
        if packet.stream.index == stream and packet.pts is not None and packet.dts is not None:
            packet.pts, packet.dts = packet.pts + milliseconds, packet.dts + milliseconds
        return [packet]

    return change


def without_last_picture(packet: av.Packet) -> list[av.Packet]:
    return [] if packet.stream.index == 0 and packet.pts == 600 else [packet]


@pytest.mark.parametrize(
    ("change", "options", "expected"),
    [
        (same, {}, set()),
        (altered, {}, {"packets"}),
        (later(1, 3), {}, {"synchronisation"}),
        (later(0, 3), {}, {"synchronisation"}),
        (without_last_picture, {}, {"frames"}),
        (same, {"without": (2,)}, {"stream"}),
        (same, {"without": (4,)}, {"stream"}),
        (same, {"untagged": (2,)}, {"tag language", "tag title"}),
        (same, {"plain": (3,)}, {"disposition"}),
        (same, {"tags": {"title": "Another"}}, {"tag title", "tag director"}),
        (same, {"chapters": False}, {"chapters"}),
    ],
)
def test_each_thing_that_is_spoiled_is_named(
    files: dict[str, Path], multi: Path, tmp_path: Path, change: Any, options: dict[str, Any], expected: set[str]
) -> None:
    spoiled = tmp_path / "spoiled.mkv"
    remux(multi, spoiled, change, **options)
    assert named(verify(files["multi_mkv"], spoiled, scale=4)) == expected


def test_wrong_aspect_rotation_and_colour_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    results = {}
    for name in ("anamorphic_mp4", "rotated_mp4", "full_range_mp4"):
        results[name] = tmp_path / f"{name}.mp4"
        enlarge(files[name], results[name], copy=False)
    found = named(verify(files["rotated_mp4"], results["anamorphic_mp4"]))
    assert {"sample aspect ratio", "rotation", "colour matrix", "colour primaries", "colour transfer"} <= found
    assert "colour range" in named(verify(files["rotated_mp4"], results["full_range_mp4"]))
    assert named(verify(files["anamorphic_mp4"], results["anamorphic_mp4"])) == {"stream"}


def test_lost_captions_and_hdr_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    for name, expected in (
        ("captions_mp4", {"closed captions"}),
        ("hevc_10bit_hdr_mkv", {"HDR10 mastering display", "HDR10 content light level", "stream"}),
    ):
        bare = tmp_path / f"{name}.mkv"
        with av.open(str(files[name])) as source, av.open(str(bare), "w") as output:
            old = source.streams.video[0]
            new: Any = output.add_stream("libx265", rate=25, options={"x265-params": "log-level=none:pools=1"})
            new.width, new.height, new.pix_fmt = 384, 256, old.pix_fmt
            context = old.codec_context
            new.codec_context.colorspace, new.codec_context.color_range = context.colorspace, context.color_range
            new.codec_context.color_primaries = context.color_primaries
            new.codec_context.color_trc = context.color_trc
            new.codec_context.time_base = Fraction(1, 25)
            for index, frame in enumerate(source.decode(old)):
                plain = av.VideoFrame.from_ndarray(frame.reformat(384, 256).to_ndarray(), format=old.pix_fmt)
                plain.pts = index
                output.mux(new.encode(plain))
            output.mux(new.encode(None))
        assert named(verify(files[name], bare)) - {"colour range"} == expected


def test_a_damaged_source_is_no_fault_of_the_result_but_a_damaged_result_is(tmp_path: Path) -> None:
    bad = make_bad_files(tmp_path / "bad")
    result = tmp_path / "result.mp4"
    _, damage = enlarge(bad["truncated"], result)
    report = verify(bad["truncated"], result)
    assert damage and report.frames_result == report.frames_source
    assert named(report) <= {"packets"}
    whole = tmp_path / "whole.mp4"
    enlarge(bad["truncated"].with_name("whole.mp4"), whole)
    spoiled = bytearray(whole.read_bytes())
    middle = len(spoiled) // 2
    spoiled[middle - 4000 : middle + 4000] = bytes(8000)
    whole.write_bytes(spoiled)
    assert "result damage" in named(verify(bad["truncated"].with_name("whole.mp4"), whole))


def test_files_that_cannot_be_read(files: dict[str, Path], tmp_path: Path) -> None:
    bad = make_bad_files(tmp_path)
    with pytest.raises(UnreadableVideo):
        verify(files["h264_vfr_mp4"], bad["text"])
    with pytest.raises(NoVideoStream):
        verify(bad["audio_only"], files["h264_vfr_mp4"])


def test_a_report_becomes_plain_values(files: dict[str, Path], multi: Path) -> None:
    import json

    values = json.loads(json.dumps(verify(files["multi_mkv"], multi).as_dict()))
    assert values["ok"] is True and values["frames_result"] == FRAMES
    assert values["differences"][0]["wanted"] is True
