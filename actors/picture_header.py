"""What a JPEG, PNG or WebP file says of itself, read without a decoder, and the file without what no decoder needs.

The size is known before anything is allocated for it. Only what makes the picture is handed on: metadata (EXIF, XMP,
ICC profiles, text, thumbnails, second pictures), and with it the parsers and decompressors that metadata would wake, is
left out. Animations are refused: a frame of a stream is one picture. So is what no live source sends: interlaced PNG,
arithmetic and lossless JPEG.

Sources: ITU-T T.81 annex B (JPEG), W3C PNG third edition sections 5 and 11, RFC 9649 (WebP), RFC 6386 section 9.1
(VP8).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Final, Literal, NoReturn

from actors.errors import Undecodable

PictureFormat = Literal["jpeg", "png", "webp"]

# Generous for real files; each entry costs a turn of a loop, so that a megabyte of empty ones must not be walked.
_MAX_JPEG_SEGMENTS: Final = 1024
_MAX_WEBP_CHUNKS: Final = 64
_MAX_CHUNKS: Final = 256
_BYTES_PER_CHUNK: Final = 512
# A progressive picture is gone over once for every scan, and a scan can be ten bytes. Encoders write about ten.
_MAX_JPEG_SCANS: Final = 32

_SOF_MARKERS: Final = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_HUFFMAN_DCT: Final = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; the rest is not in use
_STANDALONE: Final = frozenset({0x00, 0x01, *range(0xD0, 0xDA)})
# JFIF and Adobe segments say which colour space the components are in; all other APPn and comments are metadata.
_JPEG_METADATA: Final = frozenset({*range(0xE1, 0xF0), 0xFE} - {0xEE})
_PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_PNG_PICTURE: Final = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_ANIMATION: Final = frozenset({b"acTL", b"fcTL", b"fdAT"})
_PNG_COMPONENTS: Final = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of each colour type
_INFLATED_AT_ONCE: Final = 1 << 20
_WEBP_ANIMATED, _WEBP_ALPHA = 0x02, 0x10


@dataclass(frozen=True, slots=True)
class BarePicture:
    """A picture file reduced to its picture, and the size that its header declares."""

    width: int
    height: int
    data: bytes


def read_picture(format: PictureFormat, payload: memoryview) -> BarePicture:
    """Return the size and the bare file.

    Raises:
        Undecodable: not this format, incomplete, an animation, or built to be expensive.
    """
    return {"jpeg": _jpeg, "png": _png, "webp": _webp}[format](bytes(payload))


def _jpeg(data: bytes) -> BarePicture:
    if data[:2] != b"\xff\xd8":
        _refuse("jpeg", "does not begin as one")
    kept, at, size = [data[:2]], 2, None
    for _ in range(_MAX_JPEG_SEGMENTS):
        if at + 4 > len(data):
            _refuse("jpeg", "ends inside its header")
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF or marker in _STANDALONE:
            _refuse("jpeg", "has a damaged header")
        if marker == 0xFF:  # a fill byte (B.1.1.2)
            at += 1
            continue
        if end < at + 4 or end > len(data):
            _refuse("jpeg", "ends inside its header")
        if marker == 0xDA:
            break
        if marker in _SOF_MARKERS:
            if size is not None or marker not in _HUFFMAN_DCT or end < at + 10:
                _refuse("jpeg", "is of a kind that is not in use")
            size = int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        if marker not in _JPEG_METADATA:
            kept.append(data[at:end])
        at = end
    else:
        _refuse("jpeg", f"has more than {_MAX_JPEG_SEGMENTS} segments")
    if size is None:
        _refuse("jpeg", "declares no size")
    if data.count(b"\xff\xda", at) > _MAX_JPEG_SCANS:
        _refuse("jpeg", f"has more than {_MAX_JPEG_SCANS} scans")
    last = data.rfind(b"\xff\xd9", at)
    if last < 0:
        _refuse("jpeg", "has no end")
    return BarePicture(*size, b"".join((*kept, data[at : last + 2])))


def _png(data: bytes) -> BarePicture:
    if data[:8] != _PNG_SIGNATURE:
        _refuse("png", "does not begin as one")
    view, kept, at = memoryview(data), [memoryview(_PNG_SIGNATURE)], 8
    for number in range(_MAX_CHUNKS + len(data) // _BYTES_PER_CHUNK):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            _refuse("png", "ends too early")
        if (kind == b"IHDR") != (number == 0) or (number == 0 and end != at + 25):
            _refuse("png", "has a damaged header")
        if kind in _PNG_ANIMATION:
            _refuse("png", "is an animation")
        if kind in _PNG_PICTURE:
            if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                _refuse("png", "is damaged")
            kept.append(view[at:end])
        elif not kind[0] & 0x20:
            _refuse("png", "has a critical chunk of unknown kind")
        if kind == b"IEND":
            break
        at = end
    else:
        _refuse("png", "is cut into too many chunks")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[25] not in _PNG_COMPONENTS or data[28]:
        _refuse("png", "is of a kind that is not in use")
    return BarePicture(width, height, b"".join(kept))


def check_png_pixels(bare: BarePicture) -> None:
    """Make sure that a PNG has all its pixels; Pillow takes the end of its data for the end of the picture.

    To be called when the size has been compared with the limits: time and memory are bounded by it.

    Raises:
        Undecodable: pixels are missing, or the data are no deflate stream.
    """
    view, at, chunks = memoryview(bare.data), 8, []
    while at < len(view):
        end = at + 12 + int.from_bytes(view[at : at + 4], "big")
        if bytes(view[at + 4 : at + 8]) == b"IDAT":
            chunks.append(view[at + 8 : end - 4])
        at = end
    bits = bare.data[24] * _PNG_COMPONENTS[bare.data[25]]
    missing = bare.height * (1 + (bare.width * bits + 7) // 8)
    stream, rest = zlib.decompressobj(), b"".join(chunks)
    try:
        while missing > 0 and rest and not stream.eof:
            missing -= len(stream.decompress(rest, min(missing, _INFLATED_AT_ONCE)))
            rest = stream.unconsumed_tail
    except zlib.error:
        _refuse("png", "is damaged")
    if missing > 0:
        _refuse("png", "has fewer pixels than it declares")


def _webp(data: bytes) -> BarePicture:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        _refuse("webp", "does not begin as one")
    stop, at = 8 + int.from_bytes(data[4:8], "little"), 12
    if stop > len(data):
        _refuse("webp", "ends too early")
    canvas: tuple[int, int] | None = None
    alpha = picture = b""
    size = (0, 0)
    for _ in range(_MAX_WEBP_CHUNKS):
        if at >= stop:
            break
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body, end = at + 8, at + 8 + length + length % 2
        # The padding of the last chunk is forgotten by some encoders.
        if body + length > stop:
            _refuse("webp", "ends too early")
        if kind == b"VP8X" and length >= 10:
            if data[body] & _WEBP_ANIMATED:
                _refuse("webp", "is an animation")
            canvas = _le24(data, body + 4) + 1, _le24(data, body + 7) + 1
        elif kind in (b"ANIM", b"ANMF"):
            _refuse("webp", "is an animation")
        elif kind == b"ALPH":
            alpha = _chunk(kind, data[body : body + length])
        elif kind in (b"VP8 ", b"VP8L"):
            if picture:
                _refuse("webp", "holds two pictures")
            size = _vp8_size(data, body, length) if kind == b"VP8 " else _vp8l_size(data, body, length)
            picture = _chunk(kind, data[body : body + length])
        at = end
    if not picture or (canvas is not None and canvas != size):
        _refuse("webp", "has a damaged header")
    if alpha:
        sides = (size[0] - 1).to_bytes(3, "little") + (size[1] - 1).to_bytes(3, "little")
        picture = _chunk(b"VP8X", bytes([_WEBP_ALPHA, 0, 0, 0]) + sides) + alpha + picture
    return BarePicture(*size, _chunk(b"RIFF", b"WEBP" + picture))


def _vp8_size(data: bytes, body: int, length: int) -> tuple[int, int]:
    if length < 10 or data[body] & 1 or data[body + 3 : body + 6] != b"\x9d\x01\x2a":
        _refuse("webp", "has a damaged header")
    width, height = data[body + 6 : body + 8], data[body + 8 : body + 10]
    return int.from_bytes(width, "little") & 0x3FFF, int.from_bytes(height, "little") & 0x3FFF


def _vp8l_size(data: bytes, body: int, length: int) -> tuple[int, int]:
    if length < 5 or data[body] != 0x2F:
        _refuse("webp", "has a damaged header")
    bits = int.from_bytes(data[body + 1 : body + 5], "little")
    return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1


def _le24(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 3], "little")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2)


def _refuse(format: PictureFormat, why: str) -> NoReturn:
    raise Undecodable(
        f"A frame is no {format.upper()} picture that can be shown: it {why}.",
        remedy=f"Send one whole {format.upper()} file in each message.",
    )
