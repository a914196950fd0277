"""Playlists: rates by their definition, text that no name can break."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from pipeline.playlists import AudioTrack, MediaSegment, Rendition, Variant, master_playlist, media_playlist
from tests.hls_playlists import read_master, read_media


def rendition(*segments: tuple[Fraction | int, int], header: int = 100, file: str = "64p.mp4") -> Rendition:
    made, at = [], header
    for duration_s, size in segments:
        made.append(MediaSegment(Fraction(duration_s), at, size))
        at += size
    return Rendition(file, f"{file.partition('.')[0]}.m3u8", "avc1.64000A", header, tuple(made))


def test_the_peak_is_that_of_neighbours_that_last_about_a_target() -> None:
    # Two seconds of much are no peak by themselves, half a target (3 s) would be.
    short = rendition((6, 6000), (6, 6000), (2, 20_000))
    assert short.target_s == 6 and short.peak_bit_rate == 8 * 26_000 // 8
    assert rendition((6, 6000), (6, 6000), (3, 20_000)).peak_bit_rate == -(-8 * 20_000 // 3)
    assert rendition((1, 500), (1, 500)).peak_bit_rate == 4000 == rendition((1, 500), (1, 500)).average_bit_rate
    alone = rendition((Fraction(1, 10), 500))
    assert alone.target_s == 1 and alone.peak_bit_rate == alone.average_bit_rate == 40_000


def test_the_target_is_never_exceeded(tmp_path: Path) -> None:
    one = rendition((Fraction(1001, 100), 10), (Fraction(201, 200), 30))
    (tmp_path / "64p.mp4").write_bytes(bytes(140))
    (tmp_path / "64p.m3u8").write_text(media_playlist(one))
    read = read_media(tmp_path / "64p.m3u8")
    assert read.target_s == 11 and [(seg.start, seg.size) for seg in read.segments] == [(100, 10), (110, 30)]
    assert [str(seg.duration_s) for seg in read.segments] == ["10.010000", "1.005000"]


def test_names_cannot_break_a_playlist(tmp_path: Path) -> None:
    sound = rendition((6, 600), file="audio-1.m4a")
    tracks = [
        AudioTrack(replace(sound, codec="mp4a.40.2"), 'a "commentary",\nURI="x"', "de", 2, is_default=True),
        AudioTrack(replace(sound, codec="mp4a.40.2"), "Ünïcode, mit Komma", "", 6, is_default=False),
    ]
    for name in ("64p.m3u8", "audio-1.m3u8"):
        (tmp_path / name).touch()
    variant = Variant(rendition((6, 6000)), 96, 64, Fraction(30000, 1001))
    (tmp_path / "master.m3u8").write_text(master_playlist([variant], tracks))
    read = read_master(tmp_path / "master.m3u8")
    assert [one["NAME"] for one in read.audio] == ["\"a 'commentary', URI='x'\"", '"Ünïcode, mit Komma"']
    assert read.variants[0]["FRAME-RATE"] == "29.970" and read.variants[0]["BANDWIDTH"] == "8800"
    (tmp_path / "master.m3u8").write_text(master_playlist([variant], []))
    assert "AUDIO" not in read_master(tmp_path / "master.m3u8").variants[0]
