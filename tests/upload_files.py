"""The test clip in the containers that people upload, with its sound, as long as a test needs it."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

CLIP = Path(__file__).with_name("data") / "walk_lr.mp4"  # 160x120, 60 pictures, 2 s, AAC
RATE = 30

# name -> (file, container options); what is not H.264 with AAC is encoded anew.
CONTAINERS: dict[str, tuple[str, dict[str, str]]] = {
    "ts": ("clip.ts", {}),
    "fragmented": (
        "fragmented.mp4",
        {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "500000"},
    ),
    "faststart": ("faststart.mp4", {"movflags": "faststart"}),
    "moov_last": ("moov_last.mp4", {}),
    "mkv": ("clip.mkv", {}),
    "webm": ("clip.webm", {}),
    "avi": ("clip.avi", {}),
    "flv": ("clip.flv", {}),
}
STREAMED = ("ts", "fragmented", "faststart", "mkv", "webm", "flv")
_PERIOD_S = 2.1  # a little more than the clip, because its sound and its first decoding time reach beyond it
_ENCODERS = {"webm": ("libvpx-vp9", "libopus"), "avi": ("mpeg4", "libmp3lame")}


def make_upload(folder: Path, kind: str, *, rounds: int = 1) -> Path:
    """Write the clip `rounds` times one after the other into the container `kind`."""
    name, options = CONTAINERS[kind]
    path = folder / f"{rounds}-{name}"
    if path.exists():
        return path
    with av.open(str(path), "w", container_options=options) as output:
        if kind in _ENCODERS:
            _encoded(output, *_ENCODERS[kind], rounds)
        else:
            _copied(output, rounds)
    return path


def make_silent(path: Path, *, rounds: int) -> Path:
    """Write a clip whose container announces sound that never comes."""
    with av.open(str(path), "w") as output:
        _copied(output, rounds, sound=False)
    return path


def make_apart(path: Path, *, rounds: int) -> Path:
    """Write an MP4 with its index in front, then all pictures, then all sound."""
    options = {"movflags": "faststart", "max_interleave_delta": "1"}
    with av.open(str(path), "w", container_options=options) as output:
        _copied(output, rounds, apart=True)
    return path


def _copied(output: Any, rounds: int, *, sound: bool = True, apart: bool = False) -> None:
    with av.open(str(CLIP)) as source:
        copies = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
    kinds = [("video",), ("audio",)] if apart else [("video", "audio") if sound else ("video",)]
    for wanted in kinds:
        _copy(output, copies, rounds, wanted)


def _copy(output: Any, copies: dict[int, Any], rounds: int, wanted: tuple[str, ...]) -> None:
    for number in range(rounds):
        with av.open(str(CLIP)) as source:
            for packet in source.demux():
                if packet.dts is None or packet.stream.type not in wanted:
                    continue
                later = round(_PERIOD_S * number / packet.time_base)
                packet.pts, packet.dts = packet.pts + later, packet.dts + later
                packet.stream = copies[packet.stream.index]
                output.mux(packet)


def _encoded(output: Any, picture: str, sound: str, rounds: int) -> None:
    settings = {"crf": "20", "b": "0", "cpu-used": "8"} if picture == "libvpx-vp9" else {"b": "2000000", "bf": "0"}
    video = output.add_stream(picture, rate=RATE, options=settings)
    video.width, video.height, video.pix_fmt = 160, 120, "yuv420p"
    audio = output.add_stream(sound, rate=48000)
    audio.codec_context.layout = "stereo"
    resampler = av.AudioResampler(
        format=audio.codec_context.format, layout="stereo", rate=48000, frame_size=audio.codec_context.frame_size
    )
    samples = 0
    for frame in _decoded(rounds):
        if isinstance(frame, av.AudioFrame):
            frame.pts = None
            for piece in resampler.resample(frame):
                piece.pts, piece.time_base = samples, Fraction(1, 48000)
                samples += piece.samples
                output.mux(audio.encode(piece))
        else:
            output.mux(video.encode(frame))
    output.mux(video.encode(None))
    output.mux(audio.encode(None))


def _decoded(rounds: int) -> Iterator[Any]:
    count = 0
    for _ in range(rounds):
        with av.open(str(CLIP)) as source:
            for frame in source.decode(source.streams.video[0], source.streams.audio[0]):
                if isinstance(frame, av.VideoFrame):
                    frame.pts, frame.time_base = count, Fraction(1, RATE)
                    count += 1
                yield frame
