"""Encodes the same short segments with one codec and prints a hash of each: to be run again and again by tests.

python -m tests.repeated_encoding CODEC WIDTHxHEIGHT:PICTURES...
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from pipeline.colour import ColourTags
from pipeline.segments import SegmentWriter, segment_suffix
from pipeline.video import EncoderOptions, VideoFrame, VideoInfo
from tests.video_files import picture

_SUFFIX = {"ffv1": ".mkv", "prores": ".mov"}


def scene(kind: str, index: int, width: int, height: int) -> np.ndarray:
    """A picture of noise, or of the test scene with a little noise, which leaves the encoder something to find."""
    noise = np.random.default_rng(index)
    if kind == "noise":
        return noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    grain_HWC = noise.integers(-6, 7, (height, width, 3))
    return np.clip(picture(index, width, height) + grain_HWC, 0, 255).astype(np.uint8)


def segment_hash(codec: str, kind: str, width: int, height: int, frames: int) -> str:
    """The SHA-256 of one segment of these pictures."""
    info = VideoInfo(
        path=Path("source"), container="", width=width, height=height, rotation_deg=0,
        sample_aspect_ratio=Fraction(1), pix_fmt="yuv420p", bit_depth=8, codec="", average_rate=Fraction(25),
        time_base=Fraction(1, 25), frames=frames, duration_s=None, interlaced=False, colour=ColourTags(), streams=(),
    )  # fmt: skip
    options = EncoderOptions(codec=codec, preset="medium" if width < 200 else "veryfast")  # type: ignore[arg-type]
    suffix = _SUFFIX.get(codec, ".mp4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"segment{segment_suffix(options, info, suffix)}")
        writer = SegmentWriter(path, info, width=width, height=height, options=options, container_suffix=suffix)
        frame = VideoFrame(scene(kind, 0, width, height), 0, Fraction(1, 25), 1, 0, True)
        for index in range(frames):
            writer.write(replace(frame, rgb_HWC=scene(kind, index, width, height), pts=index, index=index))
        return writer.close().sha256


if __name__ == "__main__":
    for case in sys.argv[2:]:
        size, _, count = case.partition(":")
        width_px, height_px = map(int, size.split("x"))
        for kind in ("noise", "scene"):
            print(case, kind, segment_hash(sys.argv[1], kind, width_px, height_px, int(count)))
