"""Films with cuts for the tests of whole jobs: small, with as many shots as asked for, progressive or interlaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 96, 64


def scene(number: int, moment: int, *, width: int = WIDTH, height: int = HEIGHT) -> NDArray[np.uint8]:
    """A frame of scene `number`: a pattern of its own colours that moves by a pixel a frame."""
    chosen = np.random.default_rng(number)
    lowest = 140 * (number % 2)  # dark and bright scenes in turn: every cut is a hard one
    cells = chosen.integers(lowest, lowest + 116, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    whole = cells.repeat(8, 0).repeat(8, 1)
    return np.ascontiguousarray(np.roll(whole, moment, axis=1)[:height, :width])


def make_film(path: Path, shots: Sequence[int], *, interlaced: bool = False, sound: bool = False) -> Path:
    """Write a film with one scene per shot; `shots` are their lengths in frames, at 25 frames a second."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg2video" if interlaced else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.bit_rate = 2_000_000
        if interlaced:
            stream.options = {"flags": "+ildct+ilme", "top": "1", "g": "6"}
        else:
            stream.options = {"preset": "ultrafast", "crf": "12", "g": "10"}
        tone = output.add_stream("aac", rate=48000, layout="mono") if sound else None
        index = 0
        for number, frames in enumerate(shots):
            for moment in range(frames):
                if interlaced:  # two fields, half a frame apart
                    even, odd = scene(number, 2 * moment), scene(number, 2 * moment + 1)
                    rgb_HWC = even.copy()
                    rgb_HWC[1::2] = odd[1::2]
                else:
                    rgb_HWC = scene(number, moment)
                frame = av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 25)
                output.mux(stream.encode(frame))
                index += 1
        output.mux(stream.encode(None))
        if tone is not None:
            seconds = index / 25
            wave = (8000 * np.sin(np.arange(int(48000 * seconds)) * 0.05)).astype(np.int16)
            for start in range(0, len(wave) - 1023, 1024):
                piece = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="s16", layout="mono")
                piece.sample_rate, piece.pts = 48000, start
                output.mux(tone.encode(piece))
            output.mux(tone.encode(None))
    return path


def frame_hashes(path: Path) -> list[str]:
    """One hash per decoded picture, with its time in milliseconds: what two results must have in common."""
    with av.open(str(path)) as container:
        return [
            f"{round(1000 * float(frame.pts * frame.time_base))} "
            f"{hashlib.sha256(frame.to_ndarray().tobytes()).hexdigest()}"
            for frame in container.decode(video=0)
        ]


def restore_in_one_go(source: Path, result: Path, model: Path, cuts: list[int]) -> Path:
    """Restore a film without losing anything: a reader, the engine, a writer, and a fresh start at each cut."""
    from pipeline.stream_diffvsr import StreamDiffVSRPipeline
    from pipeline.video import EncoderOptions, VideoReader, VideoWriter, probe

    pipe = StreamDiffVSRPipeline.from_pretrained(model)
    info, state = probe(source), pipe.start(seed=0)
    options = EncoderOptions(codec="ffv1", pix_fmt="yuv444p")
    with (
        VideoReader(source, threads=1) as reader,
        VideoWriter(result, info, width=info.width * 4, height=info.height * 4, options=options) as writer,
    ):
        for frame in reader:
            if frame.index in cuts:
                state.reset()
            (restored,) = pipe([frame.rgb_HWC], state, steps=1)
            writer.write(replace(frame, rgb_HWC=restored))
    return result
