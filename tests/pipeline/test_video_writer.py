"""Writing: what is refused, what is left behind after a failure, what the encoders are told, what is named as lost."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.encoder_options import resolve
from pipeline.video import (
    DestinationError,
    EncodeError,
    EncoderOptions,
    UnsupportedOutput,
    VideoReader,
    VideoWriter,
    probe,
)
from tests.video_files import FRAMES, HEIGHT, WIDTH, enlarge, make_video_files

FAST = EncoderOptions(preset="ultrafast", threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_video_files(tmp_path_factory.mktemp("videos"))


def writer(files: dict[str, Path], dst: Path, name: str = "h264_vfr_mp4", **options: object) -> VideoWriter:
    info = probe(files[name])
    size = {"width": info.width, "height": info.height}
    return VideoWriter(dst, info, **{**size, "options": FAST, "source_path": files[name], **options})  # type: ignore[arg-type]


def test_nothing_has_the_name_before_the_end_and_nothing_else_stays(files: dict[str, Path], tmp_path: Path) -> None:
    dst = tmp_path / "out.mp4"
    with VideoReader(files["h264_vfr_mp4"]) as reader, writer(files, dst) as out:
        for frame in reader:
            out.write(frame)
            assert not dst.exists()
        report = out.close()
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert (report.path, report.frames, report.warnings) == (dst, FRAMES, ())


def test_an_error_or_an_abort_leaves_nothing(files: dict[str, Path], tmp_path: Path) -> None:
    frame = next(iter(VideoReader(files["h264_vfr_mp4"])))
    for name in ("out.mp4", "out.mkv", "pictures"):
        with pytest.raises(RuntimeError, match="elsewhere"), writer(files, tmp_path / name) as out:
            out.write(frame)
            raise RuntimeError("an error elsewhere")
        assert os.listdir(tmp_path) == []
    out = writer(files, tmp_path / "out.mp4")
    with pytest.raises(EncodeError, match="No picture"):
        out.close()
    out.abort()
    assert os.listdir(tmp_path) == []


def test_a_failing_overwrite_keeps_the_old_file(files: dict[str, Path], tmp_path: Path) -> None:
    dst = tmp_path / "out.mp4"
    dst.write_bytes(b"the old one")
    frame = next(iter(VideoReader(files["h264_vfr_mp4"])))
    with pytest.raises(EncodeError), writer(files, dst, overwrite=True) as out:
        out.write(frame)
        out.write(replace(frame, rgb_HWC=frame.rgb_HWC[:-2]))
    assert dst.read_bytes() == b"the old one" and os.listdir(tmp_path) == ["out.mp4"]
    enlarge(files["h264_vfr_mp4"], dst, overwrite=True)
    assert probe(dst).width == 4 * WIDTH


def test_destinations_that_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    taken = tmp_path / "taken.mp4"
    taken.write_bytes(b"x")
    with pytest.raises(DestinationError, match="exists already"):
        writer(files, taken)
    with pytest.raises(DestinationError, match="source itself"):
        writer(files, files["h264_vfr_mp4"], overwrite=True)
    with pytest.raises(DestinationError, match="does not exist"):
        writer(files, tmp_path / "no" / "out.mp4")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").write_bytes(b"x")
    with pytest.raises(DestinationError, match="exists already"):
        writer(files, full)
    assert sorted(os.listdir(tmp_path)) == ["full", "taken.mp4"]


@pytest.mark.parametrize(
    ("name", "options", "size", "words"),
    [
        ("out.avi", {}, None, "not written as .avi"),
        ("out.mp4", {"codec": "ffv1"}, None, "do not hold ffv1"),
        ("out.webm", {"codec": "h264"}, None, "do not hold h264"),
        ("out.mp4", {}, (97, 65), "even sizes"),
        ("out.mkv", {"codec": "av1", "pix_fmt": "yuv444p"}, None, "does not encode yuv444p"),
        ("out.mkv", {"crf": 60}, None, "crf 60 is above"),
        ("out.mkv", {"crf": 60, "encoder": "nvenc"}, None, "crf 60 is above"),
        ("out.webm", {"encoder": "nvenc"}, None, "NVENC does not encode vp9"),
        ("out.mkv", {"encoder": "nvenc", "pix_fmt": "yuv422p"}, None, "does not encode yuv422p"),
    ],
)
def test_choices_that_contradict_each_other(
    files: dict[str, Path],
    tmp_path: Path,
    name: str,
    options: dict[str, object],
    size: tuple[int, int] | None,
    words: str,
) -> None:
    width, height = size or (WIDTH, HEIGHT)
    with pytest.raises(UnsupportedOutput, match=words) as caught:
        writer(files, tmp_path / name, width=width, height=height, options=EncoderOptions(**options))  # type: ignore[arg-type]
    assert caught.value.remedy and os.listdir(tmp_path) == []


def test_encoder_options_are_a_closed_set() -> None:
    for wrong in (
        {"codec": "mpeg4"},
        {"crf": -1},
        {"preset": "placebo"},
        {"pix_fmt": "rgb24"},
        {"encoder": "vaapi"},
        {"x264_params": "qp=0"},
    ):
        with pytest.raises(ValidationError):
            EncoderOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "encoder", "layout"),
    [
        ("h264", "yuv420p", "h264_nvenc", "yuv420p"),
        ("hevc", "yuv420p10", "hevc_nvenc", "p010le"),
        ("av1", "yuv420p10", "av1_nvenc", "p010le"),
    ],
)
def test_nvenc_is_told_what_it_knows(
    files: dict[str, Path], codec: str, pix_fmt: str, encoder: str, layout: str
) -> None:
    options = EncoderOptions(codec=codec, pix_fmt=pix_fmt, encoder="nvenc", preset="slow", crf=20)  # type: ignore[arg-type]
    settings = resolve(options, probe(files["h264_vfr_mp4"]), "matroska", 64, 48)
    assert (settings.encoder, settings.pix_fmt) == (encoder, layout)
    assert settings.options["cq"] == "20" and settings.options["bf"] == "0" and settings.options["preset"] == "p6"
    assert layout in {one.name for one in av.Codec(encoder, "w").video_formats or ()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_nvenc_says_what_to_do(files: dict[str, Path], tmp_path: Path) -> None:
    frame = next(iter(VideoReader(files["h264_vfr_mp4"])))
    options = EncoderOptions(codec="h264", encoder="nvenc")
    with pytest.raises(EncodeError) as told, writer(files, tmp_path / "out.mp4", options=options) as out:
        out.write(frame)
    assert "--encoder software" in told.value.remedy


@pytest.mark.gpu
def test_a_gpu_encodes_every_picture(files: dict[str, Path], tmp_path: Path) -> None:
    enlarge(files["h264_vfr_mp4"], tmp_path / "out.mp4", options=EncoderOptions(codec="h264", encoder="nvenc"))
    with VideoReader(files["h264_vfr_mp4"]) as before, VideoReader(tmp_path / "out.mp4") as after:
        assert [frame.pts for frame in before] == [frame.pts for frame in after]


def test_time_stamps_must_increase(files: dict[str, Path], tmp_path: Path) -> None:
    frame = next(iter(VideoReader(files["h264_vfr_mp4"])))
    with pytest.raises(EncodeError, match="time stamp"), writer(files, tmp_path / "out.mp4") as out:
        out.write(frame)
        out.write(frame)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".webm"])
def test_the_same_pictures_give_the_same_bytes(files: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    options = EncoderOptions(preset="ultrafast", threads=2, bit_exact=True)
    outputs = []
    for run in range(2):
        dst = tmp_path / f"{run}{suffix}"
        enlarge(files["h264_vfr_mp4"], dst, options=options)
        outputs.append(dst.read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("codec", "suffix", "coded"),
    [("h264", ".mp4", "h264"), ("hevc", ".mkv", "hevc"), ("av1", ".mp4", "av1"), ("vp9", ".webm", "vp9"),
     ("ffv1", ".mkv", "ffv1"), ("prores", ".mov", "prores")],
)  # fmt: skip
def test_every_codec_writes_the_picture_that_it_was_given(
    files: dict[str, Path], tmp_path: Path, codec: str, suffix: str, coded: str
) -> None:
    dst = tmp_path / f"out{suffix}"
    enlarge(files["rotated_mp4"], dst, options=EncoderOptions(codec=codec, preset="ultrafast", threads=1))  # type: ignore[arg-type]
    assert probe(dst).codec == coded
    with VideoReader(files["rotated_mp4"]) as source, VideoReader(dst) as result:
        pairs = list(zip(source, result, strict=True))
    assert len(pairs) == FRAMES
    for before, after in pairs[::5]:
        top = np.iinfo(after.rgb_HWC.dtype).max
        shown = after.rgb_HWC.reshape(HEIGHT, 4, WIDTH, 4, 3).mean((1, 3)) / top * 255
        assert np.abs(shown - before.rgb_HWC).mean() < 2.5
        # No shift of colour, which a wrong matrix or range would be.
        assert np.abs(shown.mean((0, 1)) - before.rgb_HWC.mean((0, 1))).max() < 1


def test_sd_colour_stays_bt601_and_untagged_colour_stays_untagged(files: dict[str, Path], tmp_path: Path) -> None:
    """The result is HD, where players assume BT.709: BT.601 must be tagged and used, "untagged" must follow players."""
    for name in ("anamorphic_mp4", "rotated_mp4"):
        dst = tmp_path / f"{name}.mkv"
        info = probe(files[name])
        with (
            VideoReader(files[name]) as reader,
            VideoWriter(
                dst, info, width=1440, height=960, options=EncoderOptions(codec="ffv1"), source_path=None
            ) as out,
        ):
            frame = next(iter(reader))
            first = frame.rgb_HWC
            out.write(replace(frame, rgb_HWC=first.repeat(15, 0).repeat(15, 1)))
        result = probe(dst)
        assert result.colour.matrix == info.colour.matrix
        with VideoReader(dst) as again:
            shown = next(iter(again)).rgb_HWC.reshape(64, 15, 96, 15, 3).mean((1, 3))
        assert np.abs(shown.mean((0, 1)) - first.mean((0, 1))).max() < 0.7


def test_folders_of_pictures_hold_8_and_16_bits_without_loss(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("rotated_mp4", "prores_mov"):
        dst = tmp_path / name
        report, _ = enlarge(files[name], dst)
        with VideoReader(files[name]) as source, VideoReader(dst) as result:
            for before, after in zip(source, result, strict=True):
                assert (after.rgb_HWC[::4, ::4] == before.rgb_HWC).all()
                assert after.rgb_HWC.dtype == before.rgb_HWC.dtype
        assert len(list(dst.glob("*.png"))) == FRAMES
        assert any("time stamps" in warning for warning in report.warnings)


def test_what_a_container_cannot_hold_is_named(files: dict[str, Path], tmp_path: Path) -> None:
    report, _ = enlarge(files["multi_mkv"], tmp_path / "a.mp4")
    text = " | ".join(report.warnings)
    assert "subrip" in text and "attachment" in text and len(probe(tmp_path / "a.mp4").chapters) == 2
    report, _ = enlarge(files["multi_mkv"], tmp_path / "a.ts")
    text = " | ".join(report.warnings)
    assert "2 chapters" in text and "subrip" in text and "tags of the file" in text
    report, _ = enlarge(files["captions_mp4"], tmp_path / "a.webm")
    assert any("closed captions" in warning for warning in report.warnings)
    report, _ = enlarge(files["rotated_mp4"], tmp_path / "b.ts")
    assert any("rotation" in warning for warning in report.warnings)
    report, _ = enlarge(files["hevc_10bit_hdr_mkv"], tmp_path / "b.webm")
    text = " | ".join(report.warnings)
    assert "mastering display" in text and "content light" in text and "reduced to 8" in text


def test_packets_are_interleaved_by_time(files: dict[str, Path], tmp_path: Path) -> None:
    dst = tmp_path / "out.mkv"
    enlarge(files["multi_mkv"], dst)
    with av.open(str(dst)) as container:
        times = [float(p.dts * p.time_base) for p in container.demux() if p.dts is not None and p.size]
    assert all(b > a - 0.2 for a, b in pairwise(times))
