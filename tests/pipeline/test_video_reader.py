"""Reading: pictures, time stamps, deinterlacing, parts of a file, damage, memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.video import UnreadableVideo, VideoFrame, VideoReader
from tests.video_files import CAPTION, FRAMES, make_bad_files, make_video_files, picture

VFR_STAMPS = [0, 1001, 2002, 4004, 5005, 9009, 10010, 11011, 12500, 14000, 14700, 20000, 21001, 22002, 23003, 30030]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_bad_files(tmp_path_factory.mktemp("bad"))


def read(path: Path, **options: object) -> tuple[list[VideoFrame], list[str]]:
    with VideoReader(path, threads=1, **options) as reader:  # type: ignore[arg-type]
        return list(reader), reader.damage


def psnr_db(a_HWC: np.ndarray, b_HWC: np.ndarray) -> float:
    mse = float(np.mean((a_HWC.astype(float) - b_HWC.astype(float)) ** 2))
    return 10 * np.log10(255**2 / max(mse, 1e-9))


def test_variable_rate_time_stamps_and_order(files: dict[str, Path]) -> None:
    frames, damage = read(files["h264_vfr_mp4"])
    assert [frame.pts for frame in frames] == VFR_STAMPS
    assert [frame.index for frame in frames] == list(range(FRAMES))
    assert {frame.time_base for frame in frames} == {Fraction(1, 30000)}
    assert frames[0].key_frame and not damage


@pytest.mark.parametrize(
    "name",
    ["h264_vfr_mp4", "anamorphic_mp4", "hevc_10bit_hdr_mkv", "odd_mp4", "vp9_opus_webm", "av1_mkv", "ffv1_mkv",
     "prores_mov", "mjpeg_avi", "full_range_mp4", "offset_ts", "multi_mkv", "captions_mp4", "rotated_mp4"],
)  # fmt: skip
def test_every_codec_gives_the_right_pictures_in_the_right_colours(files: dict[str, Path], name: str) -> None:
    frames, damage = read(files[name])
    assert len(frames) == FRAMES and not damage
    deep = name in ("hevc_10bit_hdr_mkv", "prores_mov")
    for index in (0, 7, FRAMES - 1):
        rgb_HWC = frames[index].rgb_HWC
        assert rgb_HWC.dtype == (np.uint16 if deep else np.uint8)
        shown = rgb_HWC / np.iinfo(rgb_HWC.dtype).max * 255
        expected = picture(index, shown.shape[1], shown.shape[0])
        assert psnr_db(shown, expected) > 24
        # A wrong matrix or range would shift whole colours.
        assert np.abs((shown - expected).mean((0, 1))).max() < 1.5


def test_folders_are_read_in_natural_order(files: dict[str, Path]) -> None:
    for name in ("png_folder", "jpeg_folder"):
        frames, damage = read(files[name])
        assert [frame.pts for frame in frames] == list(range(5)) and not damage
        for index, frame in enumerate(frames):
            assert psnr_db(frame.rgb_HWC, picture(index)) > (90 if name == "png_folder" else 28)


def comb(rgb_HWC: np.ndarray) -> float:
    """How much more neighbouring lines differ than lines of one field."""
    green_HW = rgb_HWC[..., 1].astype(float)
    return float(np.abs(np.diff(green_HW, axis=0)).mean() / np.abs(green_HW[2:] - green_HW[:-2]).mean())


def test_interlaced_pictures_are_woven_apart_unless_told_otherwise(files: dict[str, Path]) -> None:
    woven, _ = read(files["mpeg2_interlaced_ts"], deinterlace="off")
    clean, damage = read(files["mpeg2_interlaced_ts"])
    assert [frame.pts for frame in clean] == [frame.pts for frame in woven] and not damage
    assert len(clean) == FRAMES
    for before, after, index in zip(woven[2:-2], clean[2:-2], range(2, FRAMES - 2), strict=True):
        assert comb(after.rgb_HWC) < 0.9 * comb(before.rgb_HWC)
        assert psnr_db(after.rgb_HWC, picture(index)) > psnr_db(before.rgb_HWC, picture(index))


def test_a_progressive_video_is_filtered_only_when_asked(files: dict[str, Path]) -> None:
    plain, _ = read(files["ffv1_mkv"])
    with VideoReader(files["ffv1_mkv"]) as automatic, VideoReader(files["ffv1_mkv"], deinterlace="on") as forced:
        assert not automatic.deinterlaces and forced.deinterlaces
        filtered = list(forced)
    assert len(filtered) == len(plain)
    assert any((a.rgb_HWC != b.rgb_HWC).any() for a, b in zip(plain, filtered, strict=True))


def test_a_part_of_a_file_holds_the_same_pictures_as_the_whole(files: dict[str, Path]) -> None:
    for name in ("h264_vfr_mp4", "mpeg2_interlaced_ts", "offset_ts"):
        whole, _ = read(files[name])
        part, _ = read(files[name], start_pts=whole[5].pts, stop_pts=whole[11].pts, first_index=5)
        assert [(frame.pts, frame.index) for frame in part] == [(frame.pts, frame.index) for frame in whole[5:11]]
        assert all((a.rgb_HWC == b.rgb_HWC).all() for a, b in zip(part, whole[5:11], strict=True))


def test_captions_stay_with_their_pictures(files: dict[str, Path]) -> None:
    frames, _ = read(files["captions_mp4"])
    assert [frame.side_data for frame in frames] == [(("a53_cc", CAPTION),)] * FRAMES


def test_a_truncated_file_gives_what_is_there_and_says_so(bad: dict[str, Path]) -> None:
    whole, none = read(bad["truncated"].with_name("whole.mp4"))
    frames, damage = read(bad["truncated"])
    assert not none and len(whole) == 48
    assert 15 < len(frames) < 45
    assert f"{len(frames)} of 48 pictures" in damage[-1]
    assert all((a.rgb_HWC == b.rgb_HWC).all() for a, b in zip(frames[:15], whole, strict=False))


def test_a_hole_in_the_middle_costs_only_its_pictures(bad: dict[str, Path]) -> None:
    frames, damage = read(bad["holed"])
    assert 30 < len(frames) < 48
    assert any("cannot be decoded at" in note for note in damage) and len(damage) <= 21
    stamps = [frame.pts for frame in frames]
    assert stamps == sorted(set(stamps)) and stamps[0] == 0


def test_one_damaged_picture_of_a_folder_is_left_out(files: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(files["png_folder"], folder)
    (folder / "frame6.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (folder / "notes.txt").write_text("not a picture")
    frames, damage = read(folder)
    assert [frame.pts for frame in frames] == [0, 1, 3, 4] and [frame.index for frame in frames] == [0, 1, 2, 3]
    assert len(damage) == 1 and "frame6.png" in damage[0]


def test_a_folder_without_one_good_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableVideo, match="none of its pictures"):
        VideoReader(tmp_path)


def test_reading_is_lazy(files: dict[str, Path]) -> None:
    with VideoReader(files["h264_vfr_mp4"]) as reader:
        frames: Iterator[VideoFrame] = iter(reader)
        next(frames)
        assert reader.frames_read == 1
