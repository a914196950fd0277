"""Does a file end before it should: what its container says of its own size, against the bytes that are there.

Durations are no evidence: sound may be longer than the picture, a live recording has none, and rates vary. A file that
says nothing of its size (live WebM, bare streams), or that is cut exactly between two packets of a container without a
declared size, passes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from typing import BinaryIO

from pipeline.video_container import ReceivedVideo, VideoSource, is_remote

# Boxes and chunks that are looked at; a file in more fragments is left alone, because each may cost a request.
_MAX_BOXES = 512
_TAIL_BYTES = 1 << 18
# Some writers of AVI count the 8 bytes of the first header, too.
_RIFF_SLACK = 8
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_TS_PACKETS = ((188, 0), (192, 4), (204, 0))


def early_end(source: VideoSource, container: str) -> str | None:
    """Return a sentence if a video file is shorter than its container says; None if it is whole, or if nobody knows.

    Args:
        container: libav's name of its format, as in `VideoInfo.container`.

    Raises:
        OSError: it cannot be opened; or whatever the handle of a remote video raises.
    """
    check = _CHECKS.get(container.partition(",")[0])
    if check is None:
        return None
    if isinstance(source, ReceivedVideo) and source.comes_once:
        return None
    with source.open() if is_remote(source) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        try:
            needed = check(file, size)
        except (struct.error, IndexError):
            return None  # not built as its kind is; decoding tells more
    if needed is None or needed <= size:
        return None
    return f"the file ends early: {size} bytes are there, at least {needed} belong to it"


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _matroska(file: BinaryIO, size: int) -> int | None:
    head = _at(file, 0, 4096)
    if head[:4] != b"\x1a\x45\xdf\xa3":
        return None
    length, at = _ebml_length(head, 4)
    segment = at + (length or 0)
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return None
    length, start = _ebml_length(head, segment + 4)
    return None if length is None else start + length


def _ebml_length(data: bytes, at: int) -> tuple[int | None, int]:
    """A length of EBML and where what it counts begins; None is "unknown", as in live streams."""
    width = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << (7 * width)) - 1)
    return (None if value == (1 << (7 * width)) - 1 else value), at + width


def _mov(file: BinaryIO, size: int) -> int | None:
    at = 0
    for _ in range(_MAX_BOXES):
        if at >= size:
            return at
        head = _at(file, at, 16)
        if len(head) < 8:
            return at + 8 if at and any(head) else None
        length, kind = struct.unpack_from(">I4s", head)
        if length == 1:
            (length,) = struct.unpack_from(">Q", head, 8)
        if length < 8 or not all(32 <= byte < 127 for byte in kind):
            return None  # "to the end of the file", or no box at all
        at += length
    return None


def _avi(file: BinaryIO, size: int) -> int | None:
    at = 0
    for _ in range(_MAX_BOXES):
        head = _at(file, at, 8)
        if len(head) < 8:
            return None
        kind, length = struct.unpack("<4sI", head)
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):
            return None
        end = at + 8 + length
        if end - size > _RIFF_SLACK:
            return end
        at = end + (end & 1)
    return None


def _mpegts(file: BinaryIO, size: int) -> int | None:
    head = _at(file, 0, 4096)
    for packet, before in _TS_PACKETS:
        for first in range(packet):
            marks = head[first::packet]
            if len(marks) > 3 and all(byte == 0x47 for byte in marks):
                start = first - before
                rest = (size - start) % packet
                begins = size - rest + before
                # What comes after the last whole packet may be anything; only a packet is the end of a recording.
                if rest <= before or _at(file, begins, 1) != b"\x47":
                    return None
                return size - rest + packet
    return None


def _mpegps(file: BinaryIO, size: int) -> int | None:
    base = max(0, size - _TAIL_BYTES)
    tail = _at(file, base, _TAIL_BYTES)
    at = tail.rfind(b"\0\0\1\xba")
    if at < 0:
        return None
    while at + 4 <= len(tail):
        if tail[at : at + 3] != b"\0\0\1" or tail[at + 3] <= 0xB9:
            return None  # padding, the end code, or no packet
        if tail[at + 3] == 0xBA:
            at += 14 + (tail[at + 13] & 7) if tail[at + 4] >> 6 == 1 else 12  # MPEG-2, MPEG-1
        else:
            at += 6 + struct.unpack_from(">H", tail, at + 4)[0]
    return base + at


def _flv(file: BinaryIO, size: int) -> int | None:
    (header,) = struct.unpack(">I", _at(file, 5, 4))
    first = header + 4
    if _flv_tag(file, first) != struct.unpack(">I", _at(file, first + (_flv_tag(file, first) or 0), 4))[0]:
        return None  # a writer that does not repeat the sizes of its tags
    (last,) = struct.unpack(">I", _at(file, size - 4, 4))
    begins = size - 4 - last
    if begins >= first and _flv_tag(file, begins) == last:
        return None
    return size + 1


def _flv_tag(file: BinaryIO, at: int) -> int | None:
    """The size of the tag that begins here, with its head; None if none does."""
    head = _at(file, at, 4)
    return 11 + int.from_bytes(head[1:], "big") if len(head) == 4 and head[0] & 0x1F in (8, 9, 18) else None


def _asf(file: BinaryIO, size: int) -> int | None:
    head = _at(file, 0, 1 << 16)
    at = head.find(_ASF_FILE_PROPERTIES)
    if at < 0:
        return None
    (declared,) = struct.unpack_from("<Q", head, at + 40)
    (flags,) = struct.unpack_from("<I", head, at + 88)
    return None if flags & 1 else declared  # a broadcast knows no size


def _mxf(file: BinaryIO, size: int) -> int | None:
    head = _at(file, 0, 64)
    if head[:13] != bytes.fromhex("060e2b34020501010d01020101"):
        return None
    at = 17 + (head[16] & 0x7F if head[16] & 0x80 else 0)
    (footer,) = struct.unpack_from(">Q", head, at + 24)
    return footer + 17 if footer else None


def _ogg(file: BinaryIO, size: int) -> int | None:
    base = max(0, size - _TAIL_BYTES)
    tail = _at(file, base, _TAIL_BYTES)
    at = tail.rfind(b"OggS")
    if at < 0:
        return None
    segments = tail[at + 26] if at + 26 < len(tail) else 255
    return base + at + 27 + segments + sum(tail[at + 27 : at + 27 + segments])


_CHECKS: dict[str, Callable[[BinaryIO, int], int | None]] = {
    "matroska": _matroska,
    "mov": _mov,
    "avi": _avi,
    "mpegts": _mpegts,
    "mpeg": _mpegps,
    "flv": _flv,
    "asf": _asf,
    "mxf": _mxf,
    "ogg": _ogg,
}
