"""Telling interlaced from progressive pictures by what they show, where their flags say nothing."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.interlacing import Deinterlacer, FieldStatistics
from pipeline.video import VideoReader, probe
from tests.video_files import HEIGHT, WIDTH, make_video_files, picture


def moving(time: float) -> np.ndarray:
    """A textured scene that moves sideways by 5 pixels per unit of time."""
    y, x = np.mgrid[0:64, 0:96].astype(float)
    at = x + 5 * time
    grey = 120 + 60 * np.sin(at / 4) + 30 * np.sin(at / 2.3 + y / 3) + 20 * np.cos(y / 5)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, 2)


def woven(index: int) -> np.ndarray:
    rgb_HWC = moving(2 * index)
    rgb_HWC[1::2] = moving(2 * index + 1)[1::2]
    return rgb_HWC


def frame_of(rgb_HWC: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format="yuv420p")


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        (woven, True),
        (lambda index: moving(2 * index), False),
        (picture, False),
        (lambda index: moving(0), False),
        # Fine horizontal lines are no combs: they do not come from motion.
        (lambda index: np.where(np.arange(64)[:, None, None] % 2, 180, moving(0)).astype(np.uint8), False),
    ],
    ids=["woven", "progressive", "a small thing moves", "nothing moves", "striped"],
)
def test_unflagged_pictures_are_judged_by_their_motion(scene: Callable[[int], np.ndarray], expected: bool) -> None:
    statistics = FieldStatistics()
    for index in range(12):
        statistics.add(frame_of(scene(index)))
    assert statistics.interlaced() is expected


def test_without_pictures_nothing_is_known() -> None:
    assert FieldStatistics().interlaced() is None


def test_the_filter_gives_every_picture_its_own_time_stamp() -> None:
    deinterlacer = Deinterlacer(every=True)
    stamps = [0, 1001, 2002, 4004, 9000]
    out: list[av.VideoFrame] = []
    for index, stamp in enumerate(stamps):
        frame = frame_of(woven(index))
        frame.pts, frame.time_base = stamp, Fraction(1, 30000)
        out += deinterlacer.push(frame, Fraction(1, 30000))
        assert len(out) == index  # one picture late, for it needs the next field
    out += deinterlacer.flush()
    assert [frame.pts for frame in out] == stamps
    assert {frame.time_base for frame in out} == {Fraction(1, 30000)}


def telecined(path: Path, film_frames: int, start: int) -> list[np.ndarray]:
    """A clip of film spread over fields, two and three in turn, top field first; returns the film's pictures."""
    film = [np.roll(picture(index % 20), 2 * index, axis=1) for index in range(film_frames)]
    fields = [index for index in range(film_frames) for _ in range(3 if index % 2 else 2)]
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=Fraction(30000, 1001), options={"crf": "1", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 30000)
        for number, (top, bottom) in enumerate(zip(fields[::2], fields[1::2], strict=False)):
            rgb_HWC = film[top].copy()
            rgb_HWC[1::2] = film[bottom][1::2]
            frame = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = start + 1001 * number, Fraction(1, 30000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return film


def test_pulldown_is_undone_into_the_film_that_it_was(tmp_path: Path) -> None:
    film = telecined(tmp_path / "telecined.mp4", 60, start=4321)
    source = probe(tmp_path / "telecined.mp4")
    with VideoReader(tmp_path / "telecined.mp4", deinterlace="pulldown") as reader:
        frames = list(reader)
    assert source.frames == 75 and len(frames) == 60 and not reader.damage
    assert reader.info.average_rate == Fraction(24000, 1001) and reader.info.frames == 60
    step = float(1 / (reader.info.average_rate * source.time_base))
    for index, frame in enumerate(frames):
        assert abs(frame.pts - frames[0].pts - step * index) <= 1 and abs(frame.duration - step) <= 1
        errors = [float(np.abs(frame.rgb_HWC.astype(int) - one).mean()) for one in film]
        # At the start and the end of the clip a field has no partner.
        if 2 <= index < 58:
            assert int(np.argmin(errors)) == index, (index, int(np.argmin(errors)))
            assert errors[index] < 4
    assert frames[0].pts == source.start_pts
    with VideoReader(
        tmp_path / "telecined.mp4", deinterlace="pulldown", start_pts=frames[21].pts, stop_pts=frames[30].pts
    ) as part:
        for one, other in zip(frames[21:30], part, strict=True):
            assert one.pts == other.pts and (one.rgb_HWC == other.rgb_HWC).all()


def telecined_mpeg2(path: Path, film_frames: int) -> list[np.ndarray]:
    """The same with woven fields in interlaced MPEG-2, as broadcasts have it; returns the film's pictures."""
    film = [np.roll(picture(index % 20), 2 * index, axis=1) for index in range(film_frames)]
    fields = [index for index in range(film_frames) for _ in range(3 if index % 2 else 2)]
    options = {"flags": "+ildct+ilme", "b": "20000000", "qmax": "3", "bf": "2", "g": "12"}
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("mpeg2video", rate=Fraction(30000, 1001), options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number, (top, bottom) in enumerate(zip(fields[::2], fields[1::2], strict=False)):
            rgb_HWC = film[top].copy()
            rgb_HWC[1::2] = film[bottom][1::2]
            frame = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format="yuv420p")
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return film


def flagged_film(path: Path, film_frames: int) -> list[np.ndarray]:
    """Film in MPEG-2 as discs have it: each picture once, with flags that let a player repeat fields (3, 2, 3, 2)."""
    film = [np.roll(picture(index % 20), 2 * index, axis=1) for index in range(film_frames)]
    encoder: Any = av.CodecContext.create("mpeg2video", "w")
    encoder.width, encoder.height, encoder.pix_fmt = WIDTH, HEIGHT, "yuv420p"
    encoder.time_base, encoder.framerate = Fraction(1001, 30000), Fraction(30000, 1001)
    encoder.options = {"b": "20000000", "qmax": "3", "bf": "0", "g": "12"}
    packets = []
    for index, rgb_HWC in enumerate(film):
        frame = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24").reformat(format="yuv420p")
        frame.pts = index
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    at = 60
    with av.open(str(path), "w") as output:
        stream: Any = output.add_mux_stream("mpeg2video", width=WIDTH, height=HEIGHT, time_base=Fraction(1, 60000))
        for index, packet in enumerate(packets):
            data = bytearray(bytes(packet))
            first_top, repeats = index % 4 in (0, 3), index % 2 == 0
            extension = data.find(b"\0\0\1\xb5")
            while extension >= 0:
                if data[extension + 4] >> 4 == 1:  # sequence extension: not progressive as a whole
                    data[extension + 5] &= ~8
                elif data[extension + 4] >> 4 == 8:  # picture coding extension
                    data[extension + 7] = data[extension + 7] & 0x7C | first_top << 7 | repeats << 1 | 1
                    data[extension + 8] |= 0x80
                extension = data.find(b"\0\0\1\xb5", extension + 4)
            sent: Any = av.Packet(bytes(data))
            sent.stream, sent.time_base, sent.is_keyframe = stream, Fraction(1, 60000), packet.is_keyframe
            sent.pts = sent.dts = 1001 * at
            sent.duration = 1001 * (3 if repeats else 2)
            at += 3 if repeats else 2
            output.mux(sent)
    return film


@pytest.mark.parametrize("name", ["a.ts", "a.mkv", "a.mpg"])
@pytest.mark.parametrize("make", [telecined_mpeg2, flagged_film])
def test_telecined_mpeg2_becomes_its_film(tmp_path: Path, name: str, make: Callable[[Path, int], list[Any]]) -> None:
    film = make(tmp_path / name, 60)
    source = probe(tmp_path / name)
    assert source.average_rate == Fraction(30000, 1001)
    with VideoReader(tmp_path / name, deinterlace="pulldown") as reader:
        frames = list(reader)
    assert len(frames) == 60 and not reader.damage and reader.info.average_rate == Fraction(24000, 1001)
    step = float(1 / (reader.info.average_rate * source.time_base))
    assert abs(frames[0].pts - source.start_pts) <= 1
    for index, frame in enumerate(frames):
        assert abs(frame.pts - frames[0].pts - step * index) <= 1.5, index
        if 2 <= index < 58:  # at both ends a field may have no partner
            errors = [float(np.abs(frame.rgb_HWC.astype(int) - one).mean()) for one in film]
            assert int(np.argmin(errors)) == index and errors[index] < 4, (index, min(errors))
    for first, end in ((0, 7), (13, 29), (41, 60)):
        stop = frames[end].pts if end < 60 else None
        with VideoReader(tmp_path / name, deinterlace="pulldown", start_pts=frames[first].pts, stop_pts=stop) as part:
            for one, other in zip(frames[first:end], part, strict=True):
                assert one.pts == other.pts and (one.rgb_HWC == other.rgb_HWC).all()


def test_flagged_film_is_film_without_being_asked(tmp_path: Path) -> None:
    film = flagged_film(tmp_path / "a.ts", 40)
    with VideoReader(tmp_path / "a.ts") as reader:
        frames = list(reader)
    assert len(frames) == len(film) and not reader.deinterlaces and not reader.damage
    ticks = [frame.pts - frames[0].pts for frame in frames[:5]]
    assert all(abs(tick - 1501.5 * fields) <= 1 for tick, fields in zip(ticks, (0, 3, 5, 8, 10), strict=True))


def test_a_deinterlaced_picture_is_seen_as_long_as_its_source(tmp_path: Path) -> None:
    path = make_video_files(tmp_path)["mpeg2_interlaced_ts"]
    with VideoReader(path, deinterlace="off") as woven_pictures, VideoReader(path, deinterlace="on") as pictures:
        for before, after in zip(woven_pictures, pictures, strict=True):
            assert (before.pts, before.duration) == (after.pts, after.duration)
