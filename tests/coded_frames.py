"""Pictures for the tests of live codecs, and H.264 streams of them with any options of the encoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.colour import from_rgb
from pipeline.video import VideoReader

Frame = NDArray[np.uint8]
WALK = Path(__file__).parent / "data" / "walk_lr.mp4"
BARS = (
    (191, 191, 191),
    (191, 191, 0),
    (0, 191, 191),
    (0, 191, 0),
    (191, 0, 191),
    (191, 0, 0),
    (0, 0, 191),
    (16, 16, 16),
)


@cache
def walk(count: int) -> list[Frame]:
    """The first pictures of a real clip, 320x180."""
    with VideoReader(WALK) as reader:
        frames = [frame.rgb_HWC for frame in itertools.islice(reader, count)]
    return [cv2.resize(frame, (320, 180), interpolation=cv2.INTER_CUBIC) for frame in frames]


def colour_bars(width: int = 320, height: int = 176) -> Frame:
    """Eight saturated bars, each a multiple of 8 wide where the width is one of 64."""
    columns = np.arange(width) * len(BARS) // width
    return np.broadcast_to(np.array(BARS, np.uint8)[columns], (height, width, 3)).copy()


def bar_colours(rgb_HWC: Frame) -> NDArray[np.float64]:
    """The mean colour of the middle of each bar, away from its edges."""
    height, width = rgb_HWC.shape[:2]
    step = width // len(BARS)
    middles = [
        rgb_HWC[height // 4 : -height // 4, at * step + step // 3 : (at + 1) * step - step // 3] for at in range(8)
    ]
    return np.array([middle.reshape(-1, 3).mean(0) for middle in middles])


def psnr(a_HWC: Frame, b_HWC: Frame) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures."""
    error = np.mean((a_HWC.astype(np.float64) - b_HWC.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def access_units(
    frames: Sequence[Frame],
    *,
    pix_fmt: str = "yuv420p",
    matrix: int = 1,
    colour_range: int = 1,
    tagged: bool = True,
    x264: str = "",
    **options: str,
) -> list[bytes]:
    """The pictures as H.264, in the order of decoding; `x264` are parameters that libav has no option for."""
    height, width = frames[0].shape[:2]
    encoder: Any = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, pix_fmt
    encoder.framerate, encoder.time_base = Fraction(25), Fraction(1, 25)
    encoder.thread_count = 1
    if tagged:
        encoder.colorspace, encoder.color_range = matrix, colour_range
        encoder.color_primaries = encoder.color_trc = 1
    encoder.options = {"preset": "veryfast", "crf": "12", **({"x264-params": x264} if x264 else {}), **options}
    packets = []
    for index, rgb_HWC in enumerate(frames):
        picture = from_rgb(rgb_HWC, pix_fmt, matrix, colour_range)
        picture.pts, picture.time_base = index, Fraction(1, 25)
        packets += encoder.encode(picture)
    return [bytes(packet) for packet in [*packets, *encoder.encode(None)]]


def unit_kinds(access_unit: bytes | memoryview) -> list[int]:
    """The types of the NAL units in an access unit (ITU-T H.264, table 7-1)."""
    return [part[0] & 0x1F for part in bytes(access_unit).split(b"\x00\x00\x01")[1:] if part]


def parameter_set(width: int, height: int, references: int, frame_num_bits: int) -> bytes:
    """A sequence parameter set (ITU-T H.264, 7.3.2.1.1) of the baseline profile, as short as can be."""
    columns, rows = -(-width // 16), -(-height // 16)
    cropping = ["1", _code(0), _code((columns * 16 - width) // 2), _code(0), _code((rows * 16 - height) // 2)]
    parts = [
        _code(0),
        _code(frame_num_bits - 4),
        _code(2),
        _code(references),
        "0",
        _code(columns - 1),
        _code(rows - 1),
        "11",
    ]
    bits = "".join([*parts, *cropping, "0", "1"])
    body = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    return b"\0\0\1\x67\x42\0\x3c" + body.replace(b"\0\0", b"\0\0\3")


def _code(value: int) -> str:
    """Exp-Golomb (ITU-T H.264, 9.1)."""
    binary = f"{value + 1:b}"
    return "0" * (len(binary) - 1) + binary
