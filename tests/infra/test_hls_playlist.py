"""Playlists of other servers, read strictly: what they say, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest

from infra.errors import PlaylistError
from infra.hls_playlist import ByteRange, Key, MasterPlaylist, MediaPlaylist, parse_playlist
from pipeline import playlists

MEDIA = "#EXTM3U\n#EXT-X-TARGETDURATION:4\n"


def media(text: str, max_segments: int = 100) -> MediaPlaylist:
    found = parse_playlist(text.encode(), max_segments=max_segments)
    assert isinstance(found, MediaPlaylist)
    return found


def master(text: str) -> MasterPlaylist:
    found = parse_playlist(text.encode(), max_segments=100)
    assert isinstance(found, MasterPlaylist)
    return found


def test_our_own_playlists_are_read() -> None:
    segments = tuple(playlists.MediaSegment(Fraction(4), 700 + 1000 * k, 1000) for k in range(3))
    rendition = playlists.Rendition("v720.mp4", "v720.m3u8", "avc1.64001F", 700, segments)
    found = media(playlists.media_playlist(rendition))
    assert found.target_s == 4 and found.has_ended
    assert [one.byte_range for one in found.segments] == [ByteRange(700 + 1000 * k, 1700 + 1000 * k) for k in range(3)]
    assert {one.uri for one in found.segments} == {"v720.mp4"} and [one.number for one in found.segments] == [0, 1, 2]
    header = found.segments[0].header
    assert header is not None and (header.uri, header.byte_range) == ("v720.mp4", ByteRange(0, 700))
    sizes = [(640, 360), (1280, 720), (320, 180)]
    variants = [playlists.Variant(rendition, width, height, Fraction(25)) for width, height in sizes]
    both = master(playlists.master_playlist(variants, []))
    assert [one.height for one in both.variants] == [360, 720, 180]
    assert [both.best(limit).height for limit in (None, 1080, 719, 360, 100)] == [720, 720, 360, 360, 180]


def test_everything_that_is_said_of_a_segment() -> None:
    found = media(
        "#EXTM3U\r\n#EXT-X-VERSION:7\r\n# a comment\r\n#EXT-X-TARGETDURATION:6\r\n#EXT-X-MEDIA-SEQUENCE:41\r\n"
        "#EXT-X-PROGRAM-DATE-TIME:2026-01-01T00:00:00Z\r\n#EXT-X-CUE-OUT:30\r\n#EXT-UNKNOWN\r\n\r\n"
        "#EXTINF:5.5,a title, with\u00a0a comma\r\n#EXT-X-BYTERANGE:10@5\r\na.ts\r\n"
        "#EXTINF:6\r\n#EXT-X-BYTERANGE:20\r\na.ts\r\n"
        '#EXT-X-KEY:METHOD=AES-128,URI="k,1",IV=0x0A,KEYFORMAT="identity"\r\n#EXT-X-DISCONTINUITY\r\n#EXTINF:6,\r\nb.ts\r\n'
        '#EXT-X-KEY:METHOD=AES-128, URI="k2"\r\n#EXT-X-GAP\r\n#EXTINF:6,\r\nc.ts\r\n'
        "#EXT-X-KEY:METHOD=NONE\r\n#EXTINF:6,\r\nd.ts\r\n"
    )
    a, a2, b, c, d = found.segments
    assert (a.number, d.number, found.has_ended, a.duration_s) == (41, 45, False, 5.5)
    assert (a.byte_range, a2.byte_range, b.byte_range) == (ByteRange(5, 15), ByteRange(15, 35), None)
    assert (a.key, b.key, c.key, d.key) == (None, Key("k,1", b"\0" * 15 + b"\x0a"), Key("k2", None), None)
    assert [one.is_discontinuous for one in found.segments] == [False, False, True, False, False]
    assert [one.is_gap for one in found.segments] == [False, False, False, True, False]


def test_variants_of_sound_alone_are_passed_over() -> None:
    text = (
        '#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=900000,CODECS="mp4a.40.2"\nsound.m3u8\n'
        '#EXT-X-STREAM-INF:BANDWIDTH=500000,CODECS="avc1.64001f,mp4a.40.2"\nsmall.m3u8\n'
        '#EXT-X-I-FRAME-STREAM-INF:BANDWIDTH=9999999,URI="keys.m3u8"\n'
    )
    assert master(text).best().uri == "small.m3u8"
    with pytest.raises(PlaylistError) as caught:
        master(text.split("#EXT-X-STREAM-INF:BANDWIDTH=5")[0]).best()
    assert caught.value.code == "playlist-media"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "playlist-syntax"),
        ("<html>", "playlist-syntax"),
        ("\ufeff" + MEDIA, "playlist-syntax"),
        ("ffconcat version 1.0\nfile /etc/passwd\n", "playlist-syntax"),
        ("#EXTM3U\n#EXTINF:4,\na.ts\n", "playlist-syntax"),
        (MEDIA + "a.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:abc,\na.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:-1,\na.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:inf,\na.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:4,\na\0.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:4,\na\r.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:4,\n#EXT-X-BYTERANGE:10\na.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:4,\n#EXT-X-BYTERANGE:-1@5\na.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:4,\n#EXT-X-BYTERANGE:0@5\na.ts\n", "playlist-syntax"),
        (MEDIA + "#EXTINF:4,\na.ts\n#EXT-X-MEDIA-SEQUENCE:7\n", "playlist-syntax"),
        (MEDIA + "#EXT-X-MEDIA-SEQUENCE:-7\n", "playlist-syntax"),
        (MEDIA + "#EXT-X-MEDIA-SEQUENCE:" + "9" * 5000 + "\n", "playlist-syntax"),
        (MEDIA + '#EXT-X-MAP:BYTERANGE="1@0"\n', "playlist-syntax"),
        (MEDIA + '#EXT-X-MAP:URI="a\n', "playlist-syntax"),
        (MEDIA + '#EXT-X-MAP:URI="a",URI="b"\n', "playlist-syntax"),
        (MEDIA + "#EXT-X-KEY:METHOD=AES-128\n", "playlist-syntax"),
        (MEDIA + '#EXT-X-KEY:METHOD=AES-128,URI="k",IV=12\n', "playlist-syntax"),
        (MEDIA + '#EXT-X-KEY:METHOD=AES-128,URI="k"\n#EXT-X-MAP:URI="h"\n', "playlist-syntax"),
        (MEDIA + '#EXT-X-KEY:METHOD=SAMPLE-AES,URI="k"\n', "playlist-unsupported"),
        (MEDIA + '#EXT-X-KEY:METHOD=AES-128,URI="k",KEYFORMAT="com.apple"\n', "playlist-unsupported"),
        (MEDIA + "#EXT-X-KEY:URI=k\n", "playlist-unsupported"),
        (MEDIA + '#EXT-X-DEFINE:NAME="a",VALUE="b"\n', "playlist-unsupported"),
        (MEDIA + "#EXT-X-SKIP:SKIPPED-SEGMENTS=3\n", "playlist-unsupported"),
        (MEDIA + "#EXT-X-I-FRAMES-ONLY\n", "playlist-unsupported"),
        ("#EXTM3U\n#EXT-X-VERSION:99\n", "playlist-unsupported"),
        (MEDIA + "#EXTINF:4,\na.ts\n" * 101, "playlist-too-large"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n", "playlist-syntax"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=x\na.m3u8\n", "playlist-syntax"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\na.m3u8\n#EXTINF:4,\na.ts\n", "playlist-syntax"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, code: str) -> None:
    with pytest.raises(PlaylistError) as caught:
        parse_playlist(text.encode(), max_segments=100)
    assert caught.value.code == code and caught.value.remedy


def test_what_is_not_text_is_refused() -> None:
    with pytest.raises(PlaylistError, match="UTF-8"):
        parse_playlist(b"#EXTM3U\n\xff\xfe", max_segments=100)


def test_long_lines_take_no_time() -> None:
    for line in ("#EXT-X-MAP:" + "A=" * 200_000, "#EXT-X-KEY:" + ",," * 200_000, "#EXTINF:" + "1" * 500_000):
        with pytest.raises(PlaylistError):
            parse_playlist((MEDIA + line + "\n").encode(), max_segments=100)
