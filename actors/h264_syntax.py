"""The little of H.264's syntax that has to be known before an access unit is decoded (ITU-T H.264, Annex B, 7.3).

- The size of the pictures, from the sequence parameter set: a decoder allocates for it as soon as it is read.
- Whether a reference picture is missing, from `frame_num`: a decoder fills the gap with what is similar, silently.

`Inspector` follows one stream; it decodes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

from actors.errors import Undecodable

NAL_SLICE, NAL_PARTITION_A, NAL_IDR, NAL_SPS, NAL_PPS = 1, 2, 5, 7, 8
_START_CODE: Final = re.compile(rb"\x00\x00\x01")
# The largest picture has 512 rows of macroblocks, and encoders cut no finer; the rest is a handful of units.
_MAX_UNITS: Final = 1024
_MAX_PARAMETER_BYTES: Final = 2048
_SLICE_HEADER_BYTES: Final = 32
# 7.4.2.1.1: profiles whose parameter sets say more of chroma and scaling.
_HIGH_PROFILES: Final = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
# Table A-1, level 6.2: macroblocks of all reference pictures together. It bounds what a decoder keeps.
MAX_DPB_MACROBLOCKS: Final = 696_320


@dataclass(frozen=True, slots=True)
class SequenceParameters:
    """What is needed of a sequence parameter set; `width` and `height` are of the shown, cropped picture."""

    id: int
    width: int
    height: int
    macroblocks: int
    references: int
    frame_num_bits: int
    separate_planes: bool
    gaps_allowed: bool


@dataclass(frozen=True, slots=True)
class AccessUnit:
    """What one message says of itself.

    Attributes:
        sequences: every sequence parameter set in it; `parameters` are their bytes, to see whether they changed.
        slices: number of its coded slices; without one there is no picture.
        key: it begins anew (an IDR picture).
        gap: a picture that it may be predicted from never came.
    """

    sequences: tuple[SequenceParameters, ...]
    parameters: bytes
    slices: int
    key: bool
    gap: bool


class Inspector:
    """Looks at the access units of one stream, in the order in which they come."""

    def __init__(self) -> None:
        self._sequences: dict[int, SequenceParameters] = {}
        self._pictures: dict[int, int] = {}  # picture parameter set -> sequence parameter set
        self._previous: int | None = None  # frame_num of the last reference picture

    def inspect(self, payload: bytes) -> AccessUnit:
        """Return what `payload` says of itself and remember what later ones build on.

        Raises:
            Undecodable: it is no byte stream of NAL units, or a parameter set in it cannot be what it says.
        """
        sequences: list[SequenceParameters] = []
        parameters = b""
        slices, key, frame_num, reference = 0, False, None, False
        sequence: SequenceParameters | None = None
        for unit in _units(payload):
            kind, importance = unit[0] & 0x1F, unit[0] >> 5 & 3
            if kind == NAL_SPS:
                sequences.append(_sequence(unit))
                self._sequences[sequences[-1].id] = sequences[-1]
                parameters += unit.rstrip(b"\0")
            elif kind == NAL_PPS:
                bits = _Bits(unit[1:])
                picture_id, sequence_id = bits.ue(255), bits.ue(31)
                self._pictures[picture_id] = sequence_id
            elif kind in (NAL_SLICE, NAL_PARTITION_A, NAL_IDR):
                slices += 1
                key = key or kind == NAL_IDR
                if slices == 1:
                    bits = _Bits(unit[1:_SLICE_HEADER_BYTES])
                    bits.skip_ue(1 << 20)
                    bits.skip_ue(9)
                    sequence = self._sequences.get(self._pictures.get(bits.ue(255), -1))
                    if sequence is not None:
                        bits.u(2 if sequence.separate_planes else 0)
                        frame_num, reference = bits.u(sequence.frame_num_bits), importance > 0
        gap = not key and sequence is not None and frame_num is not None and self._is_gap(sequence, frame_num)
        if frame_num is not None and (reference or key):
            self._previous = frame_num
        return AccessUnit(tuple(sequences), parameters, slices, key, gap)

    def _is_gap(self, sequence: SequenceParameters, frame_num: int) -> bool:
        """7.4.3, frame_num: it is that of the reference picture before, or the next."""
        if self._previous is None or sequence.gaps_allowed:
            return False
        return frame_num not in (self._previous, (self._previous + 1) % (1 << sequence.frame_num_bits))


def _units(payload: bytes) -> Iterator[bytes]:
    """The NAL units of a byte stream (B.1), without start codes; parameter sets and slices come whole or cut short."""
    if payload.count(b"\x00\x00\x01") > _MAX_UNITS:
        _refuse(f"has more than {_MAX_UNITS} NAL units")
    starts = [match.end() for match in _START_CODE.finditer(payload)]
    if not starts or payload[: starts[0] - 3].strip(b"\0"):
        _refuse("does not begin with a start code (Annex B)")
    for start, stop in zip(starts, [*(start - 3 for start in starts[1:]), len(payload)], strict=True):
        if start < stop:
            yield payload[start : min(stop, start + _MAX_PARAMETER_BYTES)]


def _sequence(unit: bytes) -> SequenceParameters:
    """7.3.2.1.1, up to the cropping rectangle."""
    profile, bits = unit[1] if len(unit) > 1 else 0, _Bits(unit[4:])
    id = bits.ue(31)
    chroma, separate_planes = 1, False
    if profile in _HIGH_PROFILES:
        chroma = bits.ue(3)
        separate_planes = chroma == 3 and bits.flag()
        bits.skip_ue(6)
        bits.skip_ue(6)
        bits.u(1)
        if bits.flag():
            for index in range(12 if chroma == 3 else 8):
                if bits.flag():
                    _skip_scaling_list(bits, 16 if index < 6 else 64)
    frame_num_bits = 4 + bits.ue(12)
    order_count = bits.ue(2)
    if order_count == 0:
        bits.skip_ue(12)
    elif order_count == 1:
        bits.u(1)
        for _ in range(2):
            bits.se()
        for _ in range(bits.ue(255)):
            bits.se()
    references, gaps_allowed = bits.ue(16), bits.flag()
    columns, map_rows = bits.ue(1 << 16) + 1, bits.ue(1 << 16) + 1
    frames_only = bits.flag()
    bits.u(1 if frames_only else 2)
    rows = map_rows * (1 if frames_only else 2)
    left = right = top = bottom = 0
    if bits.flag():
        left, right, top, bottom = (bits.ue(1 << 16) for _ in range(4))
    # Table 6-1: the rectangle counts in chroma samples, and in both fields.
    unit_x = 2 if chroma in (1, 2) else 1
    unit_y = (2 if chroma == 1 else 1) * (1 if frames_only else 2)
    width, height = columns * 16 - unit_x * (left + right), rows * 16 - unit_y * (top + bottom)
    if width <= 0 or height <= 0:
        _refuse("has a parameter set that crops everything")
    return SequenceParameters(
        id, width, height, columns * rows, references, frame_num_bits, separate_planes, gaps_allowed
    )


def _skip_scaling_list(bits: _Bits, length: int) -> None:
    """7.3.2.1.1.1."""
    last = following = 8
    for _ in range(length):
        if following:
            following = (last + bits.se()) % 256
        last = following or last


class _Bits:
    """Reads a NAL unit's payload bit by bit, its emulation prevention bytes (7.4.1) taken out."""

    def __init__(self, unit: bytes) -> None:
        payload = unit.replace(b"\x00\x00\x03", b"\x00\x00")
        self._value = int.from_bytes(payload, "big")
        self._left = len(payload) * 8

    def u(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            _refuse("has a parameter set or slice that ends too early")
        return self._value >> self._left & ((1 << count) - 1)

    def flag(self) -> bool:
        return self.u(1) == 1

    def ue(self, largest: int) -> int:
        """9.1, unsigned Exp-Golomb code."""
        zeros = 0
        while not self.u(1):
            zeros += 1
            if zeros > 31:
                _refuse("has a number that is not possible")
        value = (1 << zeros) - 1 + self.u(zeros)
        if value > largest:
            _refuse("has a number that is not possible")
        return value

    def skip_ue(self, largest: int) -> None:
        self.ue(largest)

    def se(self) -> int:
        """9.1.1, signed."""
        code = self.ue(1 << 31)
        return (code + 1) // 2 if code % 2 else -(code // 2)


def _refuse(why: str) -> NoReturn:
    raise Undecodable(
        f"A frame is no H.264 access unit that can be decoded: it {why}.",
        remedy="Send one access unit as an Annex B byte stream in each message.",
    )
