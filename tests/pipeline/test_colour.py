"""Colour conversion against the closed form of ITU-T H.273, both ways, for every matrix, range and depth."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest
from av.filter import Graph

from pipeline.colour import (
    RANGE_FULL,
    RANGE_LIMITED,
    ColourTags,
    assumed_matrix,
    bit_depth_of,
    effective_matrix,
    effective_range,
    from_rgb,
    to_rgb,
    with_side_data,
)

# Kr and Kb of H.273 table 4.
WEIGHTS = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}  # fmt: skip  # noqa: E501
PATCHES = [(1, 1, 1), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0.5), (0.8, 0.6, 0.2), (0.1, 0.45, 0.9)]


def yuv_of(rgb: tuple[float, ...], matrix: int, full: bool, bits: int) -> np.ndarray:
    """Unrounded code values of a colour (H.273 8.3)."""
    kr, kb = WEIGHTS[matrix]
    y = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    u, v = (rgb[2] - y) / (2 * (1 - kb)), (rgb[0] - y) / (2 * (1 - kr))
    top, scale = 2**bits - 1, 2 ** (bits - 8)
    if full:
        return np.array([y * top, u * top + 2 ** (bits - 1), v * top + 2 ** (bits - 1)])
    return np.array([219 * scale * y + 16 * scale, 224 * scale * u + 128 * scale, 224 * scale * v + 128 * scale])


def rgb_of(yuv: np.ndarray, matrix: int, full: bool, bits: int) -> np.ndarray:
    """RGB (0..1) of rounded code values."""
    kr, kb = WEIGHTS[matrix]
    top, scale = 2**bits - 1, 2 ** (bits - 8)
    if full:
        y, u, v = yuv[0] / top, (yuv[1] - 2 ** (bits - 1)) / top, (yuv[2] - 2 ** (bits - 1)) / top
    else:
        y, u, v = (yuv - np.array([16, 128, 128]) * scale) / (np.array([219, 224, 224]) * scale)
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.clip([r, (y - kr * r - kb * b) / (1 - kr - kb), b], 0, 1)


def flat_frame(yuv: np.ndarray, pix_fmt: str) -> av.VideoFrame:
    frame = av.VideoFrame(48, 32, pix_fmt)
    kind = np.uint16 if bit_depth_of(pix_fmt) > 8 else np.uint8
    for plane, value in zip(frame.planes, yuv, strict=True):
        plane.update(np.full((plane.height, plane.line_size // kind().itemsize), value, kind).tobytes())
    return frame


def codes_of(frame: av.VideoFrame) -> np.ndarray:
    """The middle code value of each plane."""
    kind = np.uint16 if bit_depth_of(frame.format.name) > 8 else np.uint8
    values = []
    for plane in frame.planes:
        lines = np.frombuffer(plane, kind).reshape(plane.height, -1)
        values.append(lines[plane.height // 2, plane.width // 2])
    return np.array(values, dtype=float)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv444p10le", "yuv422p12le"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", sorted(WEIGHTS))
def test_decoding_is_within_half_a_level_of_the_closed_form(matrix: int, full: bool, pix_fmt: str) -> None:
    bits = bit_depth_of(pix_fmt)
    tags = ColourTags(matrix=matrix, range=RANGE_FULL if full else RANGE_LIMITED)
    for patch in PATCHES:
        codes = np.clip(np.round(yuv_of(patch, matrix, full, bits)), 0, 2**bits - 1)
        rgb_HWC = to_rgb(flat_frame(codes, pix_fmt), tags, width=48, height=32)
        assert rgb_HWC.dtype == (np.uint8 if bits == 8 else np.uint16) and rgb_HWC.shape == (32, 48, 3)
        got = rgb_HWC / np.iinfo(rgb_HWC.dtype).max * (2**bits - 1)
        assert np.abs(got - rgb_of(codes, matrix, full, bits) * (2**bits - 1)).max() <= 0.6


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le"])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", sorted(WEIGHTS))
def test_the_round_trip_gives_back_the_code_values(matrix: int, full: bool, pix_fmt: str) -> None:
    bits = bit_depth_of(pix_fmt)
    colour_range = RANGE_FULL if full else RANGE_LIMITED
    tags = ColourTags(matrix=matrix, range=colour_range)
    for patch in PATCHES:
        codes = np.clip(np.round(yuv_of(patch, matrix, full, bits)), 0, 2**bits - 1)
        rgb_HWC = to_rgb(flat_frame(codes, pix_fmt), tags, width=48, height=32)
        again = codes_of(from_rgb(rgb_HWC, pix_fmt, matrix, colour_range))
        assert np.abs(again - codes).max() <= (1 if not full else 2), (patch, codes, again)


@pytest.mark.parametrize("matrix", [1, 6])
def test_deep_pictures_become_eight_bit_code_values(matrix: int) -> None:
    for patch in PATCHES:
        rgb_HWC = np.empty((32, 48, 3), np.uint16)
        rgb_HWC[:] = np.round(np.array(patch) * 65535)
        codes = codes_of(from_rgb(rgb_HWC, "yuv420p", matrix, RANGE_LIMITED))
        assert np.abs(codes - yuv_of(patch, matrix, False, 8)).max() <= 1


def test_deep_rgb_uses_the_full_scale() -> None:
    frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 65535, np.uint16), format="rgb48le")
    assert to_rgb(frame, ColourTags(), width=48, height=32).min() == 65535
    ten_bits = flat_frame(np.array([512, 512, 512]), "gbrp10le")
    assert abs(int(to_rgb(ten_bits, ColourTags(), width=48, height=32)[0, 0, 0]) - round(512 * 65535 / 1023)) <= 32


@pytest.mark.parametrize(
    ("size", "matrix"), [((720, 576), 6), ((720, 480), 6), ((1280, 720), 1), ((1920, 1080), 1), ((1024, 600), 1)]
)
def test_untagged_pictures_follow_the_size_rule_and_tags_beat_it(size: tuple[int, int], matrix: int) -> None:
    assert assumed_matrix(*size) == matrix
    assert effective_matrix(ColourTags(), *size) == matrix
    assert effective_matrix(ColourTags(matrix=9), *size) == 9


def test_untagged_ranges() -> None:
    assert effective_range(ColourTags(), "yuv420p") == RANGE_LIMITED
    assert effective_range(ColourTags(), "yuvj420p") == RANGE_FULL
    assert effective_range(ColourTags(), "rgb24") == RANGE_FULL
    assert effective_range(ColourTags(range=2), "yuv420p10le") == RANGE_FULL


def _marked(frame: av.VideoFrame, chroma_location: str) -> av.VideoFrame:
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    marker, sink = graph.add("setparams", f"chroma_location={chroma_location}"), graph.add("buffersink")
    source.link_to(marker)
    marker.link_to(sink)
    graph.configure()
    frame.pts = 0
    graph.push(frame)
    marked: av.VideoFrame = graph.pull()  # type: ignore[assignment]
    return marked


@pytest.mark.parametrize("place", ["left", "center", "topleft"])
def test_chroma_lies_where_it_is_said_to_lie(place: str) -> None:
    y, x = np.mgrid[0:64, 0:64]
    rgb_HWC = np.stack([20 + 3 * y, np.zeros_like(y), 20 + 3 * x], -1).astype(np.uint8)
    errors = {}
    for other in ("left", "center", "topleft"):
        picture = from_rgb(rgb_HWC, "yuv420p", 1, RANGE_LIMITED, chroma_location=place)
        tags = ColourTags(matrix=1, range=RANGE_LIMITED, chroma_location=other)
        back_HWC = to_rgb(_marked(picture, other), tags, width=64, height=64).astype(float)
        errors[other] = np.abs(back_HWC - rgb_HWC)[6:-6, 6:-6].mean()
    assert min(errors, key=errors.__getitem__) == place, errors
    assert errors[place] < 0.4


def test_chroma_of_which_nothing_is_said_lies_left() -> None:
    y, x = np.mgrid[0:64, 0:64]
    rgb_HWC = np.stack([20 + 3 * y, np.zeros_like(y), 20 + 3 * x], -1).astype(np.uint8)
    picture = from_rgb(rgb_HWC, "yuv420p", 1, RANGE_LIMITED)
    told = to_rgb(_marked(picture, "left"), ColourTags(1, range=1, chroma_location="left"), width=64, height=64)
    untold = to_rgb(_marked(picture, "unspecified"), ColourTags(1, range=1), width=64, height=64)
    assert (told == untold).all()
    assert np.abs(untold.astype(float) - rgb_HWC)[6:-6, 6:-6].mean() < 0.4


def lines_of(plane: av.video.plane.VideoPlane, pix_fmt: str) -> bytes:
    """A plane's samples without what pads its lines."""
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return lines[: plane.height, : plane.width * (1 + (bit_depth_of(pix_fmt) > 8))].tobytes()


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv422p10le", "yuv444p"])
def test_side_data_is_added_and_the_picture_stays(pix_fmt: str) -> None:
    rng = np.random.default_rng(0)
    picture = from_rgb(rng.integers(0, 255, (35, 53, 3), dtype=np.uint8), pix_fmt, 1, RANGE_LIMITED)
    carrier = with_side_data(picture, [("a53_cc", b"\xfc\x94\x20")])
    assert [(item.type.name, bytes(item)) for item in carrier.side_data] == [("A53_CC", b"\xfc\x94\x20")]
    assert (carrier.width, carrier.height, carrier.format.name) == (53, 35, pix_fmt)
    for ours, theirs in zip(picture.planes, carrier.planes, strict=True):
        assert lines_of(ours, pix_fmt) == lines_of(theirs, pix_fmt)
