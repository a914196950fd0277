from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from actors.errors import ActorsError
from actors.output import check_output, encoder_options, output_size
from pipeline.video import UnsupportedOutput, VideoInfo, probe
from tests.video_files import make_video_files

OPTIONS = {"codec": None, "crf": None, "preset": "medium", "pix_fmt": "auto", "scale": 4, "height": None}


@pytest.fixture(scope="module")
def info(tmp_path_factory: pytest.TempPathFactory) -> VideoInfo:
    """A source of 96x64."""
    return probe(make_video_files(tmp_path_factory.mktemp("videos"))["mjpeg_avi"])


@pytest.mark.parametrize(
    ("scale", "height", "expected"),
    [
        (4, None, (384, 256)),
        (3, None, (288, 192)),
        (2, None, (192, 128)),
        (4, 100, (150, 100)),
        (4, 33, (50, 33)),
        (4, 1080, (1620, 1080)),
    ],
)
def test_the_size_follows_scale_or_height(
    info: VideoInfo, scale: int, height: int | None, expected: tuple[int, int]
) -> None:
    assert output_size(info, scale, height) == expected


def test_the_height_of_a_turned_clip_is_the_one_seen(info: VideoInfo) -> None:
    turned = dataclasses.replace(info, rotation_deg=-90)
    assert output_size(turned, 4, 240) == (240, 160)
    assert output_size(turned, 2, None) == (192, 128)


def test_options_that_were_not_asked_for_keep_their_defaults() -> None:
    options = encoder_options({**OPTIONS, "codec": "hevc"})
    assert (options.codec, options.preset, options.pix_fmt, options.crf) == ("hevc", "medium", "auto", None)
    with pytest.raises(ActorsError, match="crf 99"):
        encoder_options({**OPTIONS, "crf": 99})


def test_impossible_outputs_are_found_without_writing(info: VideoInfo, tmp_path: Path) -> None:
    check_output(info, "out.mkv", OPTIONS)
    check_output(info, "frames", {**OPTIONS, "codec": "prores"})
    with pytest.raises(UnsupportedOutput, match="prores"):
        check_output(info, "out.mp4", {**OPTIONS, "codec": "prores"})
    with pytest.raises(UnsupportedOutput, match="odd"):
        check_output(info, "out.mp4", {**OPTIONS, "codec": "h264", "height": 33})
    for name in ("out.mp4", "out.m4v", "out.MOV"):
        check_output(info, name, {**OPTIONS, "fragmented": True})
    for name in ("out.mkv", "out.ts", "frames"):
        with pytest.raises(UnsupportedOutput, match="only MP4 and MOV") as caught:
            check_output(info, name, {**OPTIONS, "fragmented": True})
        assert "--fragmented" in str(caught.value)
