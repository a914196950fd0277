"""Small video files of many kinds, made with PyAV when a test run needs them; none is stored in the repository.

`make_video_files(folder)` gives whole files by name, `make_bad_files(folder)` files that must be refused or that are
damaged. Pictures are 96x64 and move, sounds are tones: enough for every codec to have something to do.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.packet import PacketSideData, packet_sidedata_type_from_literal

from pipeline.video import EncoderOptions, VideoReader, VideoWriter, WriteReport, probe

WIDTH, HEIGHT, FRAMES = 96, 64, 16
CAPTION = bytes([0xFC, 0x94, 0x20, 0xFC, 0xC8, 0xE9])
_RATE = 48000


def picture(index: int, width: int = WIDTH, height: int = HEIGHT, *, time: float | None = None) -> np.ndarray:
    """Picture `index` of the test scene: a coloured slope, a moving bright square, a little texture (uint8 HWC)."""
    at = float(index) if time is None else time
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    rgb_HWC = np.stack([40 + x, 200 - 1.5 * y, 60 + 0.6 * (x + y)], -1)
    rgb_HWC += 12 * np.sin(x / 3.0)[..., None] * np.cos(y / 4.0)[..., None]
    left, top = 8 + 3.0 * at, 12 + at
    inside = (np.abs(x - left - 8) < 8) & (np.abs(y - top - 8) < 8)
    rgb_HWC[inside] = (235, 220, 40)
    return np.clip(rgb_HWC, 0, 255).astype(np.uint8)


def make_video_files(folder: Path) -> dict[str, Path]:
    """Write every kind of good source into `folder`; returns them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "h264_vfr_mp4": _h264_vfr(folder / "h264_vfr.mp4"),
        "anamorphic_mp4": _anamorphic(folder / "anamorphic.mp4"),
        "hevc_10bit_hdr_mkv": _hevc_hdr(folder / "hevc_10bit_hdr.mkv"),
        "mpeg2_interlaced_ts": _interlaced(folder / "mpeg2_interlaced.ts", "mp2"),
        "multi_mkv": _multi(folder / "multi.mkv"),
        "rotated_mp4": _rotated(folder / "rotated.mp4"),
        "odd_mp4": _simple(folder / "odd.mp4", "libx264", "yuv444p", size=(97, 65), crf=1),
        "vp9_opus_webm": _simple(folder / "vp9_opus.webm", "libvpx-vp9", "yuv420p", audio="libopus"),
        "av1_mkv": _simple(
            folder / "av1.mkv", "libsvtav1", "yuv420p", options={"preset": "12", "svtav1-params": "lp=1"}
        ),
        "ffv1_mkv": _simple(folder / "ffv1.mkv", "ffv1", "yuv422p", audio="flac"),
        "prores_mov": _prores(folder / "prores.mov"),
        "mjpeg_avi": _simple(folder / "mjpeg.avi", "mjpeg", "yuvj420p", audio="pcm_s16le", colour_range=2),
        "full_range_mp4": _simple(folder / "full_range.mp4", "libx264", "yuv420p", colour=(1, 1, 1), colour_range=2),
        "captions_mp4": _captions(folder / "captions.mp4"),
        "offset_ts": _simple(folder / "offset.ts", "libx264", "yuv420p", audio="aac", start=5 * 25),
        "png_folder": _pictures(folder / "png_folder", "png", "rgb24"),
        "jpeg_folder": _pictures(folder / "jpeg_folder", "mjpeg", "yuvj444p"),
    }
    return files


def make_bad_files(folder: Path) -> dict[str, Path]:
    """Write files that are damaged or no video at all into `folder`; returns them by name."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = _simple(folder / "whole.mp4", "libx264", "yuv420p", audio="aac", frames=48, front=True)
    data = whole.read_bytes()
    start = data.index(b"mdat") + 4
    holed = bytearray(data)
    middle = start + (len(data) - start) // 2
    holed[middle - 1500 : middle + 1500] = bytes(3000)
    header = bytearray(data)
    header[4:start] = bytes((7 * i) % 251 for i in range(start - 4))
    wide = bytearray(_simple(folder / "huge.avi", "ffv1", "yuv420p", frames=2).read_bytes())
    form = wide.index(b"strf") + 8
    wide[form + 4 : form + 12] = struct.pack("<ii", 20000, 20000)
    contents = {
        "empty": ("empty.mp4", b""),
        "text": ("text.mp4", b"This is a letter, not a film.\n" * 40),
        "truncated": ("truncated.mp4", data[: start + (len(data) - start) * 6 // 10]),
        "holed": ("holed.mp4", bytes(holed)),
        "corrupt_header": ("corrupt_header.mp4", bytes(header)),
        "no_index": ("no_index.mp4", _simple(folder / "late.mp4", "libx264", "yuv420p").read_bytes()[:2000]),
        "nothing_decodes": ("nothing_decodes.mp4", data[:start] + bytes(len(data) - start)),
        "huge": ("huge.avi", bytes(wide)),
        "playlist": ("playlist.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nwhole.mp4\n#EXT-X-ENDLIST\n"),
        "concat": ("concat.mp4", b"ffconcat version 1.0\nfile whole.mp4\n"),
    }
    files = {}
    for name, (file, content) in contents.items():
        (folder / file).write_bytes(content)
        files[name] = folder / file
    files["audio_only"] = _audio_only(folder / "audio_only.m4a")
    files["tiny"] = _simple(folder / "tiny.mp4", "libx264", "yuv420p", size=(8, 8), frames=4)
    files["empty_folder"] = folder / "empty_folder"
    files["empty_folder"].mkdir(exist_ok=True)
    (folder / "late.mp4").unlink()
    return files


def write_exactly(path: Path, pictures: Sequence[np.ndarray], rate: int = 25) -> Path:
    """Write pictures (H,W,3) so that they are decoded as they are, with a key picture in every four; returns `path`."""
    with av.open(path, "w") as output:
        stream = output.add_stream("libx264rgb", rate=rate, options={"qp": "0", "g": "4"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "rgb24"
        for number, picture_HWC in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture_HWC)
            frame.pts, frame.time_base = number, Fraction(1, rate)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def with_side_data(frame: av.VideoFrame, name: str, data: bytes) -> av.VideoFrame:
    """The same picture carrying one piece of side data: a raw decoder moves it from the packet to the frame."""
    decoder: Any = av.CodecContext.create("rawvideo", "r")
    decoder.width, decoder.height, decoder.pix_fmt = frame.width, frame.height, frame.format.name
    packet = av.Packet(frame.to_ndarray().tobytes())
    extra: Any = PacketSideData(packet_sidedata_type_from_literal(name), len(data))  # type: ignore[call-arg, arg-type]
    extra.update(data)
    packet.set_sidedata(extra)
    (carrier,) = decoder.decode(packet)
    return carrier


def enlarge(
    source: Path, result: Path, *, options: EncoderOptions | None = None, copy: bool = True, overwrite: bool = False
) -> tuple[WriteReport, list[str]]:
    """Read, make four times as large by repeating pixels, and write; returns the report and the damage met."""
    info = probe(source)
    options = options or EncoderOptions(preset="ultrafast", threads=1)
    with (
        VideoReader(source, info=info, threads=1) as reader,
        VideoWriter(
            result,
            info,
            width=info.width * 4,
            height=info.height * 4,
            options=options,
            source_path=source if copy else None,
            overwrite=overwrite,
        ) as writer,
    ):
        for frame in reader:
            writer.write(replace(frame, rgb_HWC=frame.rgb_HWC.repeat(4, 0).repeat(4, 1)))
        return writer.close(), reader.damage


def _frames(
    count: int,
    size: tuple[int, int],
    pix_fmt: str,
    stamps: Sequence[int] | None = None,
    start: int = 0,
    matrix: int = 5,
    full: bool = False,
) -> Iterator[av.VideoFrame]:
    for index in range(count):
        frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24").reformat(
            format=pix_fmt,
            dst_colorspace=matrix,
            src_color_range=2,
            dst_color_range=2 if full or pix_fmt.startswith(("yuvj", "rgb")) else 1,
        )
        frame.pts = start + (stamps[index] if stamps else index)
        yield frame


def _video_stream(
    output: Any, codec: str, pix_fmt: str, size: tuple[int, int], options: dict[str, str] | None, rate: Any = 25
) -> Any:
    stream = output.add_stream(codec, rate=rate, options=options or {})
    stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
    stream.codec_context.thread_count = 1
    return stream


def _audio_stream(output: Any, codec: str, language: str | None = None) -> Any:
    stream = output.add_stream(codec, rate=_RATE)
    stream.codec_context.layout = "stereo"
    if language:
        stream.metadata["language"] = language
    return stream


def _sound(output: Any, stream: Any, duration_s: float, pitch_hz: float = 440.0, start_s: float = 0.0) -> None:
    """Encode a tone; the codec's own sample format is made by the resampler."""
    resampler = av.AudioResampler(
        format=stream.codec_context.format,
        layout="stereo",
        rate=_RATE,
        frame_size=stream.codec_context.frame_size or 1024,
    )
    total = int(duration_s * _RATE)
    for at in range(0, total, 1024):
        samples = np.arange(at, min(at + 1024, total)) / _RATE
        tone = (0.3 * np.sin(2 * np.pi * pitch_hz * samples) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(np.repeat(tone, 2)[None], format="s16", layout="stereo")
        frame.sample_rate, frame.pts = _RATE, at + round(start_s * _RATE)
        for piece in resampler.resample(frame):
            output.mux(stream.encode(piece))
    for piece in resampler.resample(None):
        output.mux(stream.encode(piece))
    output.mux(stream.encode(None))


def _simple(
    path: Path,
    codec: str,
    pix_fmt: str,
    *,
    audio: str | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    frames: int = FRAMES,
    start: int = 0,
    crf: int | None = None,
    options: dict[str, str] | None = None,
    colour: tuple[int, int, int] | None = None,
    colour_range: int | None = None,
    front: bool = False,
) -> Path:
    settings = dict(options or {})
    if crf is not None:
        settings["crf"] = str(crf)
    if codec == "libvpx-vp9":
        settings |= {"crf": "20", "b": "0", "cpu-used": "8"}
    with av.open(str(path), "w", container_options={"movflags": "faststart"} if front else {}) as output:
        video = _video_stream(output, codec, pix_fmt, size, settings)
        if colour:
            _tag(video, colour, 1)
        if colour_range:
            video.codec_context.color_range = colour_range
        sound = _audio_stream(output, audio) if audio else None
        for frame in _frames(
            frames, size, pix_fmt, start=start, matrix=colour[0] if colour else 5, full=colour_range == 2
        ):
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        if sound is not None:
            _sound(output, sound, frames / 25, start_s=start / 25)
    return path


def _tag(stream: Any, colour: tuple[int, int, int], colour_range: int) -> None:
    context = stream.codec_context
    context.colorspace, context.color_primaries, context.color_trc = colour
    context.color_range = colour_range


def _h264_vfr(path: Path) -> Path:
    stamps = [0, 1001, 2002, 4004, 5005, 9009, 10010, 11011, 12500, 14000, 14700, 20000, 21001, 22002, 23003, 30030]
    with av.open(str(path), "w", container_options={"movflags": "use_metadata_tags"}) as output:
        output.metadata.update(title="A variable rate", comment="für Prüfungen", upriver_note="kept")
        video = _video_stream(output, "libx264", "yuv420p", (WIDTH, HEIGHT), {"crf": "16"}, rate=Fraction(30000, 1001))
        video.codec_context.time_base = Fraction(1, 30000)
        _tag(video, (1, 1, 1), 1)
        video.metadata["language"] = "eng"
        sound = _audio_stream(output, "aac", "eng")
        for frame in _frames(FRAMES, (WIDTH, HEIGHT), "yuv420p", stamps, matrix=1):
            frame.time_base = Fraction(1, 30000)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        _sound(output, sound, 1.0)
    return path


def _anamorphic(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        video = _video_stream(output, "libx264", "yuv420p", (WIDTH, HEIGHT), {"crf": "16", "bf": "0"})
        video.codec_context.sample_aspect_ratio = Fraction(64, 45)
        _tag(video, (5, 5, 6), 1)
        sound = _audio_stream(output, "aac")
        for frame in _frames(FRAMES, (WIDTH, HEIGHT), "yuv420p"):
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        _sound(output, sound, FRAMES / 25)
    return path


def _hevc_hdr(path: Path) -> Path:
    hdr = (
        "log-level=none:pools=1:frame-threads=1:hdr10=1:repeat-headers=1:max-cll=1000,400:"
        "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
    )
    with av.open(str(path), "w") as output:
        video = _video_stream(
            output, "libx265", "yuv420p10le", (WIDTH, HEIGHT), {"x265-params": hdr, "crf": "16", "preset": "fast"}
        )
        _tag(video, (9, 9, 16), 1)
        sound = _audio_stream(output, "libopus")
        for frame in _frames(FRAMES, (WIDTH, HEIGHT), "yuv420p10le", matrix=9):
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        _sound(output, sound, FRAMES / 25)
    return path


def woven(index: int) -> np.ndarray:
    """An interlaced picture, bottom field first as the encoder marks it: the odd lines show the earlier moment."""
    rgb_HWC = picture(index, time=index + 0.5)
    rgb_HWC[1::2] = picture(index)[1::2]
    return rgb_HWC


def _interlaced(path: Path, audio: str) -> Path:
    with av.open(str(path), "w") as output:
        options = {"flags": "+ildct+ilme", "b": "3000000"}
        video = _video_stream(output, "mpeg2video", "yuv420p", (WIDTH, HEIGHT), options)
        video.codec_context.sample_aspect_ratio = Fraction(16, 15)
        video.codec_context.max_b_frames = 2
        _tag(video, (5, 5, 5), 1)
        sound = _audio_stream(output, audio)
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(woven(index), format="rgb24").reformat(format="yuv420p")
            frame.pts = index
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        _sound(output, sound, FRAMES / 25)
    return path


def _multi(path: Path) -> Path:
    """Two sound tracks, two subtitle tracks, chapters, an attached font, a cover and tags."""
    with av.open(str(path), "w") as output:
        output.metadata.update(title="Many streams", DIRECTOR="Nobody")
        video = _video_stream(output, "libx264", "yuv420p", (WIDTH, HEIGHT), {"crf": "18"})
        video.metadata["title"] = "the picture"
        first, second = _audio_stream(output, "aac", "eng"), _audio_stream(output, "ac3", "deu")
        second.metadata["title"] = "Kommentar"
        second.disposition = av.stream.Disposition.comment
        srt = output.add_mux_stream("subrip")
        srt.metadata.update(language="eng", title="forced ones")
        srt.disposition = av.stream.Disposition.forced
        srt.time_base = Fraction(1, 1000)
        output.set_chapters(
            [
                {"id": 1, "start": 0, "end": 300, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}},
                {"id": 2, "start": 300, "end": 640, "time_base": Fraction(1, 1000), "metadata": {"title": "Zwei"}},
            ]
        )
        output.add_attachment("font.ttf", "application/x-truetype-font", bytes(range(256)) * 8)
        for index, frame in enumerate(_frames(FRAMES, (WIDTH, HEIGHT), "yuv420p")):
            output.mux(video.encode(frame))
            if index in (2, 9):
                line = av.Packet(f"line {index}".encode())
                line.stream, line.time_base = srt, Fraction(1, 1000)
                line.pts = line.dts = index * 40
                line.duration = 200
                output.mux(line)
        output.mux(video.encode(None))
        _sound(output, first, FRAMES / 25)
        _sound(output, second, FRAMES / 25, 880.0)
    return path


def _rotated(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        video = _video_stream(output, "libx264", "yuv420p", (WIDTH, HEIGHT), {"crf": "18"})
        video.set_display_rotation(90)
        for frame in _frames(FRAMES, (WIDTH, HEIGHT), "yuv420p"):
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    return path


def _prores(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        video = _video_stream(output, "prores_ks", "yuv422p10le", (WIDTH, HEIGHT), {"profile": "3"}, rate=24)
        video.metadata["timecode"] = "01:02:03:04"
        _tag(video, (1, 1, 1), 1)
        sound = _audio_stream(output, "pcm_s16le")
        for frame in _frames(FRAMES, (WIDTH, HEIGHT), "yuv422p10le", matrix=1):
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        _sound(output, sound, FRAMES / 24)
    return path


def _captions(path: Path) -> Path:
    with av.open(str(path), "w") as output:
        video = _video_stream(output, "libx264", "yuv420p", (WIDTH, HEIGHT), {"crf": "18"})
        for frame in _frames(FRAMES, (WIDTH, HEIGHT), "yuv420p"):
            carrier = with_side_data(frame, "a53_cc", CAPTION)
            carrier.pts = frame.pts
            output.mux(video.encode(carrier))
        output.mux(video.encode(None))
    return path


def _pictures(folder: Path, codec: str, pix_fmt: str) -> Path:
    folder.mkdir(exist_ok=True)
    for frame in _frames(5, (WIDTH, HEIGHT), pix_fmt):
        encoder: Any = av.CodecContext.create(codec, "w")
        encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = WIDTH, HEIGHT, pix_fmt, Fraction(1, 25)
        encoder.color_range = 2
        number = frame.pts or 0
        frame.pts = 0
        data = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
        (folder / f"frame{number * 3}.{'png' if codec == 'png' else 'jpg'}").write_bytes(data)
    return folder


def _audio_only(path: Path) -> Path:
    with av.open(str(path), "w", format="mp4") as output:
        _sound(output, _audio_stream(output, "aac"), 0.5)
    return path
