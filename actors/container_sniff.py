"""Which container a video is in, by its first bytes, before libav sees any of them.

Only what is named here is accepted, and it is opened with that one demuxer: libav never guesses, so that nothing which
names other files (playlists, concat scripts, session descriptions) can reach a demuxer that would open them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from infra.refusals import BadMessage

SNIFFED_BYTES: Final = 1 << 16  # after so many a decision is made
LARGEST_INDEX_BYTES: Final = 4 << 20  # of an MP4 that is read as it comes
_ACCEPTED: Final = "MPEG-TS, MP4, QuickTime, Matroska, WebM, FLV, AVI, MPEG-PS, Ogg, ASF, MXF"
_TS_PACKETS: Final = ((188, 0), (192, 4), (204, 0))  # (size, bytes before the mark)
_TS_MARK: Final = 0x47
_TS_MARKS: Final = 5
# In front of the index or the data of an MP4 (ISO 14496-12; the last two are QuickTime's).
_BOXES_BEFORE: Final = frozenset(
    {b"ftyp", b"styp", b"sidx", b"free", b"skip", b"uuid", b"pdin", b"meta", b"emsg", b"prft", b"wide", b"pnot"}
)
# (first bytes, where, demuxer, can be read as it comes)
_MAGIC: Final = (
    (b"\x1a\x45\xdf\xa3", 0, "matroska", True),
    (b"FLV\x01", 0, "flv", True),
    (b"\x00\x00\x01\xba", 0, "mpeg", False),
    (b"OggS\x00", 0, "ogg", False),
    (bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"), 0, "asf", False),
    (bytes.fromhex("060e2b34020501010d0102"), 0, "mxf", False),
    (b"AVI ", 8, "avi", False),
)
_LONGEST_MAGIC: Final = 16


@dataclass(frozen=True, slots=True)
class Container:
    """What a video is in.

    Attributes:
        demuxer: libav's name of it.
        streamable: it can be read from its beginning to its end without going back.
        why_not: where it cannot, the reason in words.
    """

    demuxer: str
    streamable: bool
    why_not: str = ""


def sniff(head: bytes, *, whole: bool = False) -> Container | None:
    """Return the container that begins with `head`; None if more bytes are needed to tell.

    Args:
        whole: there are no more.

    Raises:
        BadMessage: none that is accepted.
    """
    decide = whole or len(head) >= SNIFFED_BYTES
    for magic, at, demuxer, streamable in _MAGIC:
        if head[at : at + len(magic)] == magic and (demuxer != "avi" or head[:4] == b"RIFF"):
            why_not = "" if streamable else f"{demuxer.upper()} keeps what is needed to read it at its end"
            return Container(demuxer, streamable, why_not)
    if len(head) < _LONGEST_MAGIC and not decide:
        return None
    if head[4:8] in _BOXES_BEFORE or head[4:8] in (b"moov", b"mdat"):
        return _mov(head, decide)
    if _is_mpegts(head):
        return Container("mpegts", streamable=True)
    if not decide and len(head) < _TS_MARKS * 204:
        return None
    raise BadMessage(
        "The body is no video in a container that is accepted.",
        code="upload-kind",
        limit=_ACCEPTED,
        remedy="Send the video itself, not a playlist or a page; ffmpeg -c copy changes the container without loss.",
    )


def _mov(head: bytes, decide: bool) -> Container | None:
    """MP4 and QuickTime: does the index (`moov`) come before the data?"""
    at = 0
    while at + 16 <= len(head):
        size, kind = int.from_bytes(head[at : at + 4], "big"), head[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(head[at + 8 : at + 16], "big")
        if kind == b"moov":
            if at + size > LARGEST_INDEX_BYTES:
                return Container("mov", False, f"its index has {size} bytes")
            return Container("mov", streamable=True)
        if kind not in _BOXES_BEFORE or size < 8:
            return Container("mov", False, "its index comes after its data")
        at += size
    if at > SNIFFED_BYTES or decide:
        return Container("mov", False, "its index is far from its beginning")
    return None


def _is_mpegts(head: bytes) -> bool:
    for size, before in _TS_PACKETS:
        for start in range(size):
            marks = head[start + before :: size][:_TS_MARKS]
            if len(marks) == _TS_MARKS and all(mark == _TS_MARK for mark in marks):
                return True
    return False
