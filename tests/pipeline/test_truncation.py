"""A file that ends too early is noticed whatever its container, and a whole one is not suspected."""

from __future__ import annotations

import io
import random
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.truncation import early_end
from pipeline.video import VideoReader, probe
from tests.video_files import make_video_files, picture

FRAMES = 30
# Containers by how they tell.
MADE = {
    "a.mkv": ("libx264", "aac"),
    "a.webm": ("libvpx-vp9", "libopus"),
    "a.avi": ("mpeg4", "mp3"),
    "a.ts": ("mpeg2video", "mp2"),
    "a.m2ts": ("libx264", "ac3"),
    "a.mpg": ("mpeg2video", "mp2"),
    "a.flv": ("libx264", "aac"),
    "a.asf": ("wmv2", None),
    "a.mxf": ("mpeg2video", None),
    "a.ogg": ("ffv1", "flac"),
    "fragments.mp4": ("libx264", "aac"),
}


def film(path: Path, *, sound_s: float = FRAMES / 25) -> Path:
    codec, sound = MADE[path.name]
    if path.suffix == ".ogg":
        codec, sound = "", "libopus"
    options = {"movflags": "frag_keyframe+empty_moov"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=options) as output:
        video = output.add_stream(codec, rate=25, options={"g": "6"}) if codec else None
        tone = output.add_stream(sound, rate=48000) if sound else None
        if video is not None:
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        if tone is not None:
            tone.codec_context.layout = "stereo"
        for index in range(FRAMES if video is not None else 0):
            frame = av.VideoFrame.from_ndarray(picture(index), format="rgb24").reformat(format="yuv420p")
            frame.pts = index
            output.mux(video.encode(frame))
        if video is not None:
            output.mux(video.encode(None))
        if tone is not None:
            _sound(output, tone, sound_s)
    return path


def _sound(output: av.container.OutputContainer, tone: av.audio.stream.AudioStream, duration_s: float) -> None:
    context = tone.codec_context
    resampler = av.AudioResampler(context.format, "stereo", 48000, context.frame_size or 1024)
    samples = (np.sin(np.arange(int(48000 * duration_s)) / 20)[None].repeat(2, 0) * 0.3).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
    frame.sample_rate, frame.pts = 48000, 0
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        output.mux(tone.encode(piece))
    output.mux(tone.encode(None))


def container_of(path: Path) -> str:
    with av.open(str(path)) as container:
        return container.format.name


@pytest.mark.parametrize("name", MADE)
def test_a_cut_is_noticed_and_the_whole_file_is_not_suspected(tmp_path: Path, name: str) -> None:
    whole = film(tmp_path / name)
    container = container_of(whole)
    assert early_end(whole, container) is None
    data, chance = whole.read_bytes(), random.Random(name)
    missed = 0
    for _ in range(40):
        kept = chance.randrange(len(data) // 4, len(data) * 9 // 10)
        (tmp_path / "cut").write_bytes(data[:kept])
        told = early_end(tmp_path / "cut", container)
        assert told is None or f"ends early: {kept} bytes" in told
        missed += told is None
    # Where no size is declared, a cut right behind a packet looks like an end.
    assert missed <= (4 if whole.suffix in (".flv", ".mpg", ".ts", ".m2ts", ".ogg") else 0)


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.ts", "a.m2ts", "a.mpg", "a.flv", "fragments.mp4"])
def test_a_file_of_which_the_end_is_missing_is_read_with_a_word_about_it(tmp_path: Path, name: str) -> None:
    whole = film(tmp_path / name)
    cut = tmp_path / f"cut{whole.suffix}"
    # An odd place: not between two packets of any container.
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10 | 1])
    with VideoReader(whole) as before, VideoReader(cut) as after:
        assert len(list(before)) == FRAMES and not before.damage
        pictures = list(after)
    assert any("the file ends early" in note for note in after.damage), after.damage
    if name != "a.mpg":  # there the sound that is missing comes last
        assert 3 < len(pictures) < FRAMES
    with VideoReader(cut, stop_pts=pictures[2].pts) as part:
        assert list(part) and not any("ends early" in note for note in part.damage)


def test_no_whole_file_is_suspected(tmp_path: Path) -> None:
    for path in make_video_files(tmp_path / "files").values():
        if path.is_file():
            assert early_end(path, probe(path).container) is None, path.name
    # Sound that goes on after the picture, and what recorders leave behind the end.
    for name in ("a.mkv", "a.ts", "a.mpg", "a.avi", "a.flv"):
        with VideoReader(film(tmp_path / name, sound_s=3)) as reader:
            assert len(list(reader)) == FRAMES and not reader.damage, name
    for name in ("a.mkv", "a.ts", "a.mpg", "a.avi"):
        with (tmp_path / name).open("ab") as file:
            file.write(bytes(100))
        assert early_end(tmp_path / name, container_of(tmp_path / name)) is None, name


def test_a_live_stream_that_says_nothing_of_its_size_passes(tmp_path: Path) -> None:
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    for source, form in (("a.webm", "webm"), ("a.mkv", "matroska"), ("a.flv", "flv"), ("a.asf", "asf")):
        pipe = Pipe()
        with av.open(str(film(tmp_path / source))) as before, av.open(pipe, "w", format=form) as after:
            copy = after.add_stream_from_template(before.streams.video[0])
            for packet in before.demux(before.streams.video[0]):
                if packet.size:
                    packet.stream = copy
                    after.mux(packet)
        live = tmp_path / f"live.{source[2:]}"
        live.write_bytes(pipe.getvalue())
        with VideoReader(live) as reader:
            assert len(list(reader)) == FRAMES and not reader.damage, reader.damage


@pytest.mark.parametrize("container", ["matroska,webm", "mov,mp4", "avi", "mpegts", "mpeg", "flv", "asf", "mxf", "ogg"])
def test_anything_else_is_left_to_the_decoder(tmp_path: Path, container: str) -> None:
    for number, content in enumerate((b"", b"x", bytes(5000), np.random.default_rng(5).bytes(5000), b"G" * 5000)):
        (tmp_path / "file").write_bytes(content)
        told = early_end(tmp_path / "file", container)
        assert told is None or (container in ("mpegts", "mov,mp4") and number == 4)
