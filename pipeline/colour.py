"""Colour: what a file says about its code values, and exact conversion between those and RGB.

- `ColourTags` holds the four H.273 code points and the chroma position of a stream.
- `to_rgb` / `from_rgb` convert one picture with libswscale, told explicitly which matrix and range to use.
- 8-bit sources become uint8, deeper ones uint16 in full scale (a 10-bit value v becomes v * 65535 / 1023).

It does not convert between primaries or transfer functions: pictures stay in the source's colour space.
Shape legend: H height, W width, C = 3 channels in the order R, G, B.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import av
import numpy as np
from av.filter import Graph
from av.packet import PacketSideData, packet_sidedata_type_from_literal
from av.video.reformatter import Interpolation

# ITU-T H.273 table 4 (matrix coefficients); FFmpeg's AVCOL_SPC_* are the same numbers.
MATRIX_RGB, MATRIX_BT709, MATRIX_UNSPECIFIED, MATRIX_BT601_525 = 0, 1, 2, 6
MATRIX_NAMES = {
    0: "rgb", 1: "bt709", 2: "unspecified", 4: "fcc", 5: "bt601-625", 6: "bt601-525", 7: "smpte240m", 8: "ycgco",
    9: "bt2020-ncl", 10: "bt2020-cl", 14: "ictcp",
}  # fmt: skip
# What libswscale has coefficients for. The rest is close to none of them and is named in a warning by the callers.
CONVERTIBLE_MATRICES = frozenset({0, 1, 2, 4, 5, 6, 7, 9})
RANGE_UNSPECIFIED, RANGE_LIMITED, RANGE_FULL = 0, 1, 2
UNSPECIFIED = 2
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}

# Without the FULL_CHR and ACCURATE flags libswscale is several levels off and smears chroma by half a pixel.
EXACT = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.BITEXACT
)
# MPEG-2, H.264 and what followed put chroma there unless they say otherwise; libswscale would take the centre.
UNTOLD_CHROMA_LOCATION = "left"
_FULL_SCALE = 65535
# libswscale's 16-bit RGB white is not 65535: it carries the source's bits shifted left, and limited range is widened
# with the 8-bit gain. Measured against closed-form conversion, see tests/pipeline/test_colour.py.
_DEEP_WHITE = 65283


@dataclass(frozen=True, slots=True)
class ColourTags:
    """How a stream's code values are to be understood (ITU-T H.273 code points; 2 and range 0 mean unspecified).

    `chroma_location` is FFmpeg's name ("left", "center", "topleft", ...) or None when the stream does not say.
    """

    matrix: int = MATRIX_UNSPECIFIED
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    range: int = RANGE_UNSPECIFIED
    chroma_location: str | None = None

    def describe(self) -> str:
        """One short line for logs and tables, such as `bt709, limited range`."""
        ranges = {0: "unspecified range", 1: "limited range", 2: "full range"}
        return f"{MATRIX_NAMES.get(self.matrix, f'matrix {self.matrix}')}, {ranges.get(self.range, 'unknown range')}"


def assumed_matrix(width: int, height: int) -> int:
    """The matrix that players take for untagged YUV: BT.709 from 1280 columns or above 576 lines, BT.601 below."""
    return MATRIX_BT709 if width >= 1280 or height > 576 else MATRIX_BT601_525


def effective_matrix(tags: ColourTags, width: int, height: int) -> int:
    """The matrix to convert with: the tag where it names YUV coefficients that are known, else the size rule."""
    if tags.matrix in CONVERTIBLE_MATRICES and tags.matrix not in (MATRIX_RGB, MATRIX_UNSPECIFIED):
        return tags.matrix
    if tags.matrix == 10:
        return 9  # constant luminance: the non-constant coefficients are the nearest that can be inverted
    return assumed_matrix(width, height)


def effective_range(tags: ColourTags, pix_fmt: str) -> int:
    """Limited or full: the tag, else full for RGB, grey and the `yuvj` formats and limited for other YUV."""
    if pix_fmt.startswith("yuvj"):
        return RANGE_FULL
    if tags.range != RANGE_UNSPECIFIED:
        return tags.range
    return RANGE_LIMITED if pix_fmt.startswith(("yuv", "nv", "p0", "gray")) else RANGE_FULL


def bit_depth_of(pix_fmt: str) -> int:
    """Bits per component of an FFmpeg pixel format name; 8 where it is packed below that (pal8, rgb565)."""
    return max(8, *(component.bits for component in av.VideoFormat(pix_fmt).components))


def is_rgb_format(pix_fmt: str) -> bool:
    """Whether the format stores R, G and B (palettes included), so that no matrix applies."""
    layout = av.VideoFormat(pix_fmt)
    return layout.is_rgb or layout.has_palette


def is_subsampled(pix_fmt: str) -> bool:
    """Whether the format has fewer chroma than luma samples, so that their position matters."""
    layout = av.VideoFormat(pix_fmt)
    return not is_rgb_format(pix_fmt) and (layout.chroma_width(16), layout.chroma_height(16)) != (16, 16)


def to_rgb(frame: av.VideoFrame, tags: ColourTags, *, width: int, height: int, threads: int = 1) -> np.ndarray:
    """Convert a decoded frame to RGB by the tags of its stream.

    Args:
        frame: any planar or packed picture; its own chroma position is honoured where the tags have one.
        tags: the stream's tags; an unspecified matrix follows `assumed_matrix(width, height)`.
        width, height: the size to deliver; differs from the frame's only where a stream changes size on the way.
        threads: slices that libswscale converts in parallel; the values do not depend on it.

    Returns:
        rgb_HWC: uint8 for 8-bit sources, uint16 in full scale (0..65535) for deeper ones; contiguous, writeable.
    """
    pix_fmt = frame.format.name
    deep = bit_depth_of(pix_fmt) > 8
    rgb = is_rgb_format(pix_fmt)
    full = effective_range(tags, pix_fmt) == RANGE_FULL
    matrix = effective_matrix(tags, frame.width, frame.height)
    if tags.chroma_location is None and is_subsampled(pix_fmt):
        frame = _placed(frame, UNTOLD_CHROMA_LOCATION)
    converted = frame.reformat(
        width=width,
        height=height,
        format="rgb48le" if deep else "rgb24",
        src_colorspace=None if rgb else matrix,
        src_color_range=RANGE_FULL if full else RANGE_LIMITED,
        dst_color_range=RANGE_FULL,
        interpolation=EXACT,
        threads=threads,
    )
    array_HWC = converted.to_ndarray()
    if deep:
        array_HWC = _levels(_white_of_decode(pix_fmt, full, rgb), _FULL_SCALE)[array_HWC]
    return np.ascontiguousarray(array_HWC)


def from_rgb(
    rgb_HWC: np.ndarray,
    pix_fmt: str,
    matrix: int,
    colour_range: int,
    *,
    threads: int = 1,
    chroma_location: str | None = None,
) -> av.VideoFrame:
    """Convert RGB to the encoder's pixel format; the inverse of `to_rgb` within one level on flat colours.

    Args:
        rgb_HWC: uint8, or uint16 in full scale.
        pix_fmt: FFmpeg name of the wanted format.
        matrix: H.273 code point to convert with (see `effective_matrix`); ignored for RGB formats.
        colour_range: `RANGE_LIMITED` or `RANGE_FULL`.
        threads: as in `to_rgb`.
        chroma_location: where subsampled chroma is to lie; None is "left".

    Returns:
        A frame without time stamps; its tags are set by the encoder.
    """
    rgb_out = is_rgb_format(pix_fmt)
    deep_out = bit_depth_of(pix_fmt) > 8
    if rgb_HWC.dtype == np.uint16 and not deep_out:
        # 16-bit input makes libswscale truncate instead of round: round here, where it is exact.
        rgb_HWC = _levels(_FULL_SCALE, 255)[rgb_HWC].astype(np.uint8)
    deep_in = rgb_HWC.dtype == np.uint16
    if deep_in and not rgb_out:
        rgb_HWC = _levels(_FULL_SCALE, _DEEP_WHITE)[rgb_HWC]
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb_HWC), format="rgb48le" if deep_in else "rgb24")
    if is_subsampled(pix_fmt):
        frame = _placed(frame, chroma_location or UNTOLD_CHROMA_LOCATION)
    frame.color_range = RANGE_FULL
    return frame.reformat(
        format=pix_fmt,
        dst_colorspace=None if rgb_out else matrix,
        src_color_range=RANGE_FULL,
        dst_color_range=RANGE_FULL if rgb_out else colour_range,
        interpolation=EXACT,
        threads=threads,
    )


def with_side_data(frame: av.VideoFrame, items: Iterable[tuple[str, bytes]]) -> av.VideoFrame:
    """The same picture carrying side data such as closed captions.

    PyAV cannot attach any to a frame, but to a packet; the raw video decoder hands it on to the frame it makes.

    Args:
        frame: a planar picture.
        items: (libav's packet side data name such as "a53_cc", its bytes).
    """
    decoder: Any = av.CodecContext.create("rawvideo", "r")
    decoder.width, decoder.height, decoder.pix_fmt = frame.width, frame.height, frame.format.name
    packet = av.Packet(b"".join(_plane_bytes(plane, frame.format.name) for plane in frame.planes))
    for name, data in items:
        extra: Any = PacketSideData(packet_sidedata_type_from_literal(name), len(data))  # type: ignore[call-arg, arg-type]
        extra.update(data)
        packet.set_sidedata(extra)
    (carrier,) = decoder.decode(packet)
    return carrier


def _plane_bytes(plane: Any, pix_fmt: str) -> bytes:
    """A plane without the padding at the end of its lines."""
    row_bytes = plane.width * (2 if bit_depth_of(pix_fmt) > 8 else 1)
    lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
    return lines[: plane.height, :row_bytes].tobytes()


def _placed(frame: av.VideoFrame, chroma_location: str) -> av.VideoFrame:
    """The same picture marked with the position of its chroma, or of the chroma it is to get; libswscale reads it."""
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    marker = graph.add("setparams", f"chroma_location={chroma_location}")
    sink = graph.add("buffersink")
    source.link_to(marker)
    marker.link_to(sink)
    graph.configure()
    pts, frame.pts = frame.pts, 0
    graph.push(frame)
    frame.pts = pts
    marked: Any = graph.pull()
    return marked


def _white_of_decode(pix_fmt: str, full: bool, rgb: bool) -> int:
    """The 16-bit value that libswscale gives for nominal white of a deep source format."""
    bits = bit_depth_of(pix_fmt)
    if rgb and bits == 16:
        return _FULL_SCALE
    if full or rgb:
        return ((1 << bits) - 1) << (16 - bits)
    return _DEEP_WHITE


@lru_cache(maxsize=16)
def _levels(white_in: int, white_out: int) -> np.ndarray:
    """Table of 65536 rounded values that maps 0..white_in to 0..white_out and saturates above."""
    values = np.arange(_FULL_SCALE + 1, dtype=np.float64) * (white_out / white_in)
    table: np.ndarray = np.minimum(np.round(values), white_out).astype(np.uint16)
    return table
