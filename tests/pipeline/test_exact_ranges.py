"""A range read by jumping gives the very pictures of a sequential read, whatever codec, container and key frames."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.video import VideoFrame, VideoReader, probe
from pipeline.video_reader import Deinterlace
from tests.video_files import make_bad_files, picture, woven

FRAMES = 60
_OPEN = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:scenecut=0", "preset": "veryfast"}
_CLOSED = {"x264-params": "keyint=12:min-keyint=12:bframes=3:b-pyramid=normal:scenecut=0", "preset": "veryfast"}
_REFRESH = {"x264-params": "intra-refresh=1:keyint=20", "preset": "veryfast"}
_HEVC = {"x265-params": "open-gop=1:keyint=12:min-keyint=12:bframes=4:scenecut=0:log-level=none:pools=1"}
_VP9 = {"crf": "30", "b": "0", "cpu-used": "8", "g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}
_MPEG = {"b": "2000000", "bf": "2", "g": "12"}
_FIELDS = {**_MPEG, "flags": "+ildct+ilme"}
# MPEG's clock has 33 bits of 1/90000 s.
_BEFORE_WRAP = 2**33 // 3600 - 30
_VARIABLE = [1000 * at + (at * at * 37) % 700 for at in range(FRAMES)]
KINDS: dict[str, tuple[str, str, dict[str, str], dict[str, Any]]] = {
    "h264 with open groups, MP4": ("a.mp4", "libx264", _OPEN, {}),
    "h264 with open groups, Matroska": ("b.mkv", "libx264", _OPEN, {}),
    "h264 with open groups, MPEG-TS that starts late": ("c.ts", "libx264", _OPEN, {"start": 5000}),
    "h264 in fragments": ("d.mp4", "libx264", _OPEN, {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "h264 of a variable rate": ("e.mp4", "libx264", _OPEN, {"stamps": _VARIABLE, "time_base": Fraction(1, 30000)}),
    "h264 without key frames": ("f.mkv", "libx264", _REFRESH, {}),
    "h264 that starts below zero": ("g.mp4", "libx264", _OPEN, {"start": -8, "shown": FRAMES - 8}),
    "bare h264": ("h.h264", "libx264", _OPEN, {}),
    "h265 with open groups": ("i.mkv", "libx265", _HEVC, {}),
    "vp9 with hidden pictures": ("j.webm", "libvpx-vp9", _VP9, {}),
    "mpeg2, MPEG-TS": ("k.ts", "mpeg2video", _MPEG, {}),
    "mpeg2 fields, program stream": ("l.mpg", "mpeg2video", _FIELDS, {"fields": True}),
    "mpeg2 fields, MXF": ("m.mxf", "mpeg2video", _FIELDS, {"fields": True}),
    "h264 with reordered pictures, AVI": ("q.avi", "libx264", _CLOSED, {}),
    "h264 with open groups, AVI": ("r.avi", "libx264", _OPEN, {}),
    "h264 in decoding order, AVI": ("s.avi", "libx264", {"bf": "0", "g": "12", "preset": "veryfast"}, {}),
    "h264 with open groups, FLV": ("t.flv", "libx264", _OPEN, {}),
    "h264 that starts late, MOV": ("u.mov", "libx264", _OPEN, {"start": 77}),
    "h264 of a variable rate, Matroska": (
        "v.mkv",
        "libx264",
        _OPEN,
        {"stamps": _VARIABLE, "time_base": Fraction(1, 30000)},
    ),
    "h265 with open groups, MP4": ("w.mp4", "libx265", _HEVC, {}),
    "h265 with open groups, MPEG-TS": ("x.ts", "libx265", _HEVC, {}),
    "mpeg2 with open groups, program stream": ("y.mpg", "mpeg2video", _MPEG, {}),
    "h264, a clock that starts again, MPEG-TS": ("z.ts", "libx264", _OPEN, {"start": _BEFORE_WRAP}),
    "mpeg2, a clock that starts again, MPEG-TS": ("aa.ts", "mpeg2video", _MPEG, {"start": _BEFORE_WRAP}),
    "mpeg2, a clock that starts again, program stream": ("ab.mpg", "mpeg2video", _MPEG, {"start": _BEFORE_WRAP}),
    "mpeg4, AVI": ("n.avi", "mpeg4", _MPEG, {}),
    "wmv, ASF": ("o.asf", "wmv2", {"b": "2000000", "g": "12"}, {}),
    "prores": ("p.mov", "prores_ks", {}, {"pix_fmt": "yuv422p10le"}),
}


def write(path: Path, codec: str, options: dict[str, str], **how: Any) -> Path:
    with av.open(str(path), "w", container_options=how.get("container", {})) as output:
        stream: Any = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, how.get("pix_fmt", "yuv420p")
        stream.codec_context.thread_count = 1
        if "time_base" in how:
            stream.codec_context.time_base = how["time_base"]
        for index in range(FRAMES):
            noise_HWC = np.random.default_rng(index).integers(-12, 12, (64, 96, 3))
            scene_HWC = woven(index) if how.get("fields") else picture(index)
            rgb_HWC = np.clip(scene_HWC + noise_HWC, 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = how["stamps"][index] if "stamps" in how else index + how.get("start", 0)
            if "time_base" in how:
                frame.time_base = how["time_base"]
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranges")


def seen(frames: Iterator[VideoFrame]) -> list[tuple[int, int, bool, str]]:
    return [(one.pts, one.duration, one.key_frame, hashlib.sha256(one.rgb_HWC.tobytes()).hexdigest()) for one in frames]


def check_ranges(path: Path, deinterlace: Deinterlace = "off", *, ranges: int = 4, **options: Any) -> VideoReader:
    info = probe(path)
    with VideoReader(path, info=info, deinterlace=deinterlace, threads=1) as whole:
        frames = seen(iter(whole))
    count = len(frames)
    chance = random.Random(f"{path.name}")
    cuts = [(0, 5), (count - 3, count), *(tuple(sorted(chance.sample(range(count + 1), 2))) for _ in range(ranges))]
    for first, end in cuts:
        stop = frames[end][0] if end < count else None
        with VideoReader(
            path, info=info, deinterlace=deinterlace, threads=2, start_pts=frames[first][0], stop_pts=stop, **options
        ) as part:
            assert seen(iter(part)) == frames[first:end], (path.name, first, end)
    return whole


@pytest.mark.parametrize("kind", KINDS)
def test_any_range_is_what_a_sequential_read_gives(folder: Path, kind: str) -> None:
    name, codec, options, how = KINDS[kind]
    whole = check_ranges(write(folder / name, codec, options, **how), ranges=8)
    assert whole.frames_read == how.get("shown", FRAMES) and not whole.damage


def test_pictures_of_avi_are_stamped_in_the_order_in_which_they_are_shown(folder: Path) -> None:
    for options in (_CLOSED, _OPEN):
        with VideoReader(write(folder / "order.avi", "libx264", options), threads=2) as reader:
            frames = list(reader)
        assert [frame.pts for frame in frames] == list(range(1, FRAMES + 1)) and not reader.stamps_repaired
        for index, frame in enumerate(frames[:25]):  # then the scene has nothing more that moves
            errors = [np.abs(frame.rgb_HWC.astype(int) - picture(other)).mean() for other in range(FRAMES)]
            assert int(np.argmin(errors)) == index


def packed(source: Path, result: Path) -> Path:
    """Copy MPEG-4 into AVI as DivX did: a picture that is shown earlier lies in one packet with the one before it."""
    with av.open(str(source)) as before, av.open(str(result), "w") as after:
        copy = after.add_stream_from_template(before.streams.video[0])
        pictures = [packet for packet in before.demux(before.streams.video[0]) if packet.size]
        contents: list[tuple[bytes, bool]] = []
        for packet in pictures:
            data = bytes(packet)
            kind = data[data.index(b"\0\0\1\xb6") + 4] >> 6
            if kind == 2:
                contents[-1] = contents[-1][0] + data, contents[-1][1]
                contents.append((b"\0\0\1\xb6\x57\xff", False))  # says only that nothing is coded
            else:
                name = b"\0\0\1\xb2DivX503b1393p" if packet.is_keyframe else b""
                at = data.index(b"\0\0\1\xb6")
                contents.append((data[:at] + name + data[at:], packet.is_keyframe))
        for number, (data, key) in enumerate(contents):
            sent: Any = av.Packet(data)
            sent.stream, sent.time_base, sent.is_keyframe = copy, Fraction(1, 25), key
            sent.pts = sent.dts = number
            sent.duration = 1
            after.mux(sent)
    return result


def test_two_pictures_in_one_packet_of_avi_are_shown_one_after_the_other(folder: Path) -> None:
    source = write(folder / "asp.mkv", "mpeg4", {**_MPEG, "bf": "1"})
    path = packed(source, folder / "packed.avi")
    reader = check_ranges(path, ranges=8)
    assert reader.frames_read == FRAMES and not reader.damage and not reader.stamps_repaired
    with VideoReader(source) as whole, VideoReader(path) as same:
        for one, other in zip(whole, same, strict=True):
            assert (one.rgb_HWC == other.rgb_HWC).all()
    with VideoReader(path) as again:
        stamps = [frame.pts for frame in again]
    assert {after - before for before, after in itertools.pairwise(stamps)} == {40}


def test_a_stamp_that_a_program_stream_lacks_is_filled_in_and_is_no_place_to_jump_to(folder: Path) -> None:
    path = write(folder / "y.mpg", "mpeg2video", _MPEG)
    with VideoReader(path, threads=1) as reader:
        frames = list(reader)
    # If libav learns to find them all, this test needs another file.
    assert reader.stamps_repaired and not reader.damage
    assert [frame.pts - frames[0].pts for frame in frames] == [3600 * index for index in range(FRAMES)]
    for first in range(1, FRAMES):
        with VideoReader(path, threads=1, start_pts=frames[first].pts, stop_pts=frames[first].pts + 1) as part:
            assert seen(iter(part)) == seen(iter(frames[first : first + 1])), first


@pytest.mark.parametrize("name", ["a.mp4", "u.mov", "w.mp4"])
@pytest.mark.parametrize("skipped", [3, 7, 20])
def test_pictures_that_an_edit_list_leaves_out_are_not_missed(folder: Path, name: str, skipped: int) -> None:
    """The edit begins inside a group, so that pictures are decoded which are not shown."""
    _, codec, options, how = next(kind for kind in KINDS.values() if kind[0] == name)
    path = write(folder / name, codec, options, **{**how, "start": 0})
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 12
    begin = struct.unpack_from(">i", data, entry + 4)[0]
    with av.open(str(path)) as container:
        tick_s = container.streams.video[0].time_base or Fraction(1)
    with VideoReader(path) as whole:
        shown = seen(iter(whole))[skipped:]
    struct.pack_into(">i", data, entry + 4, begin + int(Fraction(skipped, 25) / tick_s))
    edited = folder / f"edited{path.suffix}"
    edited.write_bytes(data)
    reader = check_ranges(edited)
    assert reader.frames_read == FRAMES - skipped and not reader.damage
    with VideoReader(edited) as again:
        assert [one[3] for one in seen(iter(again))] == [one[3] for one in shown]


@pytest.mark.parametrize("name", ["b.mkv", "k.ts", "l.mpg", "m.mxf"])
def test_the_deinterlacer_sees_both_neighbours_of_a_range(folder: Path, name: str) -> None:
    _, codec, options, how = next(kind for kind in KINDS.values() if kind[0] == name)
    check_ranges(write(folder / name, codec, options, **how), "on")


def test_an_index_that_is_missing_is_not_needed(folder: Path, tmp_path: Path) -> None:
    avi = write(tmp_path / "whole.avi", "mpeg4", _MPEG).read_bytes()
    (tmp_path / "no_index.avi").write_bytes(avi[: avi.rindex(b"idx1")])
    (tmp_path / "cut.avi").write_bytes(avi[: len(avi) * 2 // 3])
    check_ranges(tmp_path / "no_index.avi")
    check_ranges(tmp_path / "cut.avi")
    source = write(tmp_path / "cues.mkv", "libx264", _OPEN)

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    pipe = Pipe()
    with av.open(str(source)) as before, av.open(pipe, "w", format="matroska") as after:
        copy = after.add_stream_from_template(before.streams.video[0])
        for packet in before.demux(before.streams.video[0]):
            if packet.size:
                packet.stream = copy
                after.mux(packet)
    (tmp_path / "no_cues.mkv").write_bytes(pipe.getvalue())
    check_ranges(tmp_path / "no_cues.mkv")


def test_a_file_that_is_damaged_or_has_no_right_stamps_says_so_and_is_read_without_jumps(tmp_path: Path) -> None:
    bare = check_ranges(write(tmp_path / "a.h264", "libx264", _OPEN), seek=False)
    assert bare.stamps_repaired
    holed = make_bad_files(tmp_path / "bad")["holed"]
    assert check_ranges(holed, seek=False).damage
    assert not check_ranges(write(tmp_path / "a.mp4", "libx264", _OPEN)).stamps_repaired


def test_a_jump_reads_little_and_damage_elsewhere_is_not_reported(folder: Path) -> None:
    path = write(folder / "b.mkv", "libx264", _OPEN)
    info = probe(path)
    decoded = 0

    class Counting(VideoReader):
        def _stamp(self, frame: av.VideoFrame) -> None:
            nonlocal decoded
            decoded += 1
            super()._stamp(frame)

    # At a picture, and right after one: where a task goes on that was interrupted.
    for at in (2000, 1961):
        decoded = 0
        with Counting(path, info=info, start_pts=at, stop_pts=2080) as part:
            assert [frame.pts for frame in part] == [2000, 2040]
        assert decoded <= 12 + 4
    holed = make_bad_files(folder / "bad")["holed"]
    with VideoReader(holed) as whole:
        stamps = [frame.pts for frame in whole]
    with VideoReader(holed, start_pts=stamps[0], stop_pts=stamps[5]) as start:
        assert len(list(start)) == 5
    assert whole.damage and not start.damage
