"""Where the fragments of an MP4 lie in its file: what a playlist needs to point into it.

Only boxes (ISO 14496-12) are read, never samples; a file of any length in constant memory but for one entry a fragment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.video_errors import UnreadableVideo

_LARGEST_BOX_READ = 64 << 20  # of those that are read whole: moov and moof


@dataclass(frozen=True, slots=True)
class Fragment:
    """One `moof` with its `mdat`: `start_byte` and `size_bytes` in the file, `start_ticks` its first decoding time."""

    start_byte: int
    size_bytes: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class FragmentedFile:
    """A fragmented MP4 with one track: the length of its header, in bytes from the beginning, and its fragments."""

    header_bytes: int
    header: bytes
    fragments: tuple[Fragment, ...]

    @property
    def avc_codec(self) -> str:
        """The track's codec as playlists name it (RFC 6381): `avc1.` with profile, constraints and level."""
        at = self.header.find(b"avcC")
        if at < 0:
            raise UnreadableVideo("The file has no H.264 in it.", remedy="Make it again.")
        return "avc1." + self.header[at + 5 : at + 8].hex().upper()


def read_fragments(path: Path) -> FragmentedFile:
    """Read where header and fragments of a file with one track are.

    Raises:
        UnreadableVideo: it is no fragmented MP4, or it is cut off.
    """
    header_end, header = 0, b""
    fragments: list[Fragment] = []
    with path.open("rb") as file:
        for kind, start, size in _boxes(file, path):
            if kind in (b"ftyp", b"moov"):
                header += _content(file, start, size, path)
                header_end = start + size
            elif kind == b"moof":
                found = _content(file, start, size, path)
                fragments.append(Fragment(start, size, _decode_time(found, path)))
            elif kind == b"mdat" and fragments:
                last = fragments[-1]
                fragments[-1] = Fragment(last.start_byte, start + size - last.start_byte, last.start_ticks)
    if not header_end or not fragments:
        raise _damaged(path)
    return FragmentedFile(header_end, header, tuple(fragments))


def _boxes(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, size) of all boxes of the outermost level."""
    end = file.seek(0, 2)
    at = 0
    while at < end:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            raise _damaged(path)
        size, kind = struct.unpack_from(">I4s", head)
        if size == 1:
            (size,) = struct.unpack_from(">Q", head, 8)
        if size < 8 or at + size > end:
            raise _damaged(path)
        yield kind, at, size
        at += size


def _content(file: BinaryIO, start: int, size: int, path: Path) -> bytes:
    if size > _LARGEST_BOX_READ:
        raise _damaged(path)
    file.seek(start)
    return file.read(size)


def _decode_time(moof: bytes, path: Path) -> int:
    at = moof.find(b"tfdt")
    if at < 0:
        raise _damaged(path)
    # Version 1 has 64 bits.
    return int.from_bytes(moof[at + 8 : at + (16 if moof[at + 4] else 12)], "big")


def _damaged(path: Path) -> UnreadableVideo:
    return UnreadableVideo(f"{path.name} is no whole fragmented MP4.", remedy="Make it again.")
