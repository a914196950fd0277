"""What is accepted by its first bytes, what is not, and what can be read as it comes."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.container_sniff import LARGEST_INDEX_BYTES, SNIFFED_BYTES, Container, sniff
from infra.refusals import BadMessage
from pipeline.video_container import DEMUXERS
from tests.video_files import make_video_files

HLS = b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:10,\nhttp://169.254.169.254/latest\n#EXT-X-ENDLIST\n"


def box(kind: bytes, content: bytes = b"", *, size: int | None = None) -> bytes:
    return struct.pack(">I4s", 8 + len(content) if size is None else size, kind) + content


FTYP = box(b"ftyp", b"isom\0\0\2\0isom")


@pytest.mark.parametrize(
    ("head", "demuxer", "streamable"),
    [
        (FTYP + box(b"moov", size=500), "mov", True),
        (FTYP + box(b"free", bytes(100)) + box(b"uuid", bytes(30)) + box(b"moov", size=500), "mov", True),
        (box(b"moov", size=500), "mov", True),
        (FTYP + box(b"mdat", size=10**6), "mov", False),
        (FTYP + struct.pack(">I4sQ", 1, b"mdat", 10**10), "mov", False),
        (box(b"wide") + box(b"mdat", size=10**6), "mov", False),
        (FTYP + box(b"moov", size=LARGEST_INDEX_BYTES), "mov", False),
        (FTYP + box(b"free", size=SNIFFED_BYTES), "mov", False),
        (box(b"styp", bytes(8)) + box(b"moof", size=500), "mov", False),
        (b"\x1a\x45\xdf\xa3" + bytes(20), "matroska", True),
        (b"FLV\x01\x05" + bytes(20), "flv", True),
        (b"RIFF\0\0\0\0AVI LIST", "avi", False),
        (b"\0\0\1\xba" + bytes(20), "mpeg", False),
        (b"OggS\0\2" + bytes(20), "ogg", False),
        ((b"G" + bytes(187)) * 6, "mpegts", True),
        (bytes(77) + (b"G" + bytes(187)) * 6, "mpegts", True),
        ((bytes(4) + b"G" + bytes(187)) * 6, "mpegts", True),
    ],
)
def test_containers_are_told_by_their_first_bytes(head: bytes, demuxer: str, streamable: bool) -> None:
    found = sniff(head + bytes(64), whole=True)
    assert found is not None and (found.demuxer, found.streamable) == (demuxer, streamable)
    assert bool(found.why_not) is not streamable
    assert demuxer in DEMUXERS.split(",")
    # However few bytes come at a time, the answer is the same, or not there yet.
    for length in (0, 1, 7, 15, 16, 40, 200):
        early = sniff(head[:length])
        assert early is None or early == found, length


@pytest.mark.parametrize(
    "head",
    [
        b"",
        HLS,
        b"\n" + HLS,
        b"\xef\xbb\xbf" + HLS,
        b"ffconcat version 1.0\nfile 'http://10.0.0.1/'\n",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=x\r\nc=IN IP4 10.0.0.1\r\nm=video 5004 RTP/AVP 96\r\n",
        b";FFMETADATA1\ntitle=x\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        b"RIFF\0\0\0\0WAVEfmt " + bytes(40),
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"\xff\xd8\xff\xe0" + bytes(40),
        b"GIF89a" + bytes(2000),
        b"PK\3\4" + bytes(2000),
        b'AVISource("http://x")\n' * 20,
        b"OggS",
        bytes(70_000),
        b"G" * 100,
    ],
)
def test_everything_else_is_refused(head: bytes) -> None:
    with pytest.raises(BadMessage) as caught:
        sniff(head, whole=True)
    assert caught.value.code == "upload-kind" and "playlist" in caught.value.remedy


def test_real_files(tmp_path: Path) -> None:
    kinds = {".mp4": "mov", ".mov": "mov", ".mkv": "matroska", ".webm": "matroska", ".ts": "mpegts", ".avi": "avi"}
    for name, path in make_video_files(tmp_path).items():
        if path.is_file():
            head = path.read_bytes()[:SNIFFED_BYTES]
            found = sniff(head, whole=True)
            assert found is not None and found.demuxer == kinds[path.suffix], name


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", FTYP, b"RIFF", b"G" + bytes(187), HLS]))
def test_any_bytes_give_an_answer(rest: bytes, start: bytes) -> None:
    try:
        found = sniff(start + rest, whole=True)
    except BadMessage:
        return
    assert isinstance(found, Container) and found.demuxer in DEMUXERS.split(",")
