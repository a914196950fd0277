"""A strict reader of HLS playlists, by RFC 8216: what it does not know, or what breaks a rule, is an error.

It reads what tests find on the disk; it shares nothing with the code that writes playlists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

_ATTRIBUTE = re.compile(r'([A-Z0-9-]+)=("[^"\r\n]*"|[^",\s][^,\s]*)(?:,|$)')
_INTEGER = re.compile(r"\d{1,20}")
_STREAM_INF = {
    "BANDWIDTH": r"\d+",
    "AVERAGE-BANDWIDTH": r"\d+",
    "CODECS": r'"avc1\.[0-9A-F]{6}(,mp4a\.40\.2)?"',
    "RESOLUTION": r"[1-9]\d*x[1-9]\d*",
    "FRAME-RATE": r"\d+\.\d{3}",
    "VIDEO-RANGE": r"SDR|PQ|HLG",
    "AUDIO": r'"[^"]+"',
}
_MEDIA = {
    "TYPE": r"AUDIO",
    "GROUP-ID": r'"[^"]+"',
    "NAME": r'"[^"]+"',
    "LANGUAGE": r'"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*"',
    "DEFAULT": r"YES|NO",
    "AUTOSELECT": r"YES|NO",
    "CHANNELS": r'"[1-9]\d*"',
    "URI": r'"[^"]+"',
}


@dataclass
class Segment:
    duration_s: Decimal
    start: int
    size: int


@dataclass
class MediaPlaylist:
    path: Path
    file: Path
    header_bytes: int
    target_s: int
    segments: list[Segment] = field(default_factory=list)

    def content(self, number: int) -> bytes:
        """The header and the bytes of one segment, as a player would fetch them."""
        data, one = self.file.read_bytes(), self.segments[number]
        return data[: self.header_bytes] + data[one.start : one.start + one.size]


@dataclass
class MasterPlaylist:
    variants: list[dict[str, str]] = field(default_factory=list)
    audio: list[dict[str, str]] = field(default_factory=list)


def read_master(path: Path) -> MasterPlaylist:
    lines = _lines(path)
    found = MasterPlaylist()
    assert lines.count("#EXT-X-INDEPENDENT-SEGMENTS") == 1
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith("#EXT-X-MEDIA:"):
            found.audio.append(_attributes(line, _MEDIA, {"TYPE", "GROUP-ID", "NAME", "URI"}))
        elif line.startswith("#EXT-X-STREAM-INF:"):
            variant = _attributes(line, _STREAM_INF, set(_STREAM_INF) - {"AUDIO"})
            assert at < len(lines) and not lines[at].startswith("#"), "a URI follows each EXT-X-STREAM-INF"
            found.variants.append({**variant, "URI": lines[at]})
            at += 1
        else:
            assert line in ("#EXTM3U", "#EXT-X-INDEPENDENT-SEGMENTS", f"#EXT-X-VERSION:{_version(lines)}"), line
    assert found.variants
    groups = {one["GROUP-ID"] for one in found.audio}
    assert groups == {one["AUDIO"] for one in found.variants if "AUDIO" in one}, "groups that exist are used"
    if groups:
        assert all("AUDIO" in one and "mp4a" in one["CODECS"] for one in found.variants)
        names = [one["NAME"] for one in found.audio]
        assert len(set(names)) == len(names), "names of a group are unique"
        assert sum(one.get("DEFAULT") == "YES" for one in found.audio) == 1
    for one in found.variants:
        assert int(one["AVERAGE-BANDWIDTH"]) <= int(one["BANDWIDTH"])
    for one in [*found.variants, *found.audio]:
        assert (path.parent / one["URI"].strip('"')).is_file()
    return found


def read_media(path: Path) -> MediaPlaylist:
    lines = _lines(path)
    version = _version(lines)
    assert lines[-1] == "#EXT-X-ENDLIST" and lines.count("#EXT-X-ENDLIST") == 1
    once = {"#EXT-X-TARGETDURATION": None, "#EXT-X-MEDIA-SEQUENCE": None, "#EXT-X-PLAYLIST-TYPE": None}
    first_segment = next(number for number, line in enumerate(lines) if line.startswith("#EXTINF"))
    for number, line in enumerate(lines):
        tag, _, value = line.partition(":")
        if tag in once:
            assert once[tag] is None and number < first_segment, f"{tag} once, before the first segment"
            once[tag] = value
    assert once["#EXT-X-PLAYLIST-TYPE"] == "VOD" and _INTEGER.fullmatch(once["#EXT-X-MEDIA-SEQUENCE"] or "")
    target = int(once["#EXT-X-TARGETDURATION"] or "")
    (map_line,) = (line for line in lines if line.startswith("#EXT-X-MAP:"))
    assert version >= 6 and lines.index(map_line) < first_segment
    header = _attributes(map_line, {"URI": r'"[^"]+"', "BYTERANGE": r'"\d+@\d+"'}, {"URI"})
    length, start = map(int, header["BYTERANGE"].strip('"').split("@"))
    assert start == 0
    file = path.parent / header["URI"].strip('"')
    found = MediaPlaylist(path, file, length, target)
    known = {"#EXTM3U", "#EXT-X-VERSION", "#EXT-X-MAP", "#EXT-X-INDEPENDENT-SEGMENTS", "#EXT-X-ENDLIST", *once}
    duration: Decimal | None = None
    byte_range: tuple[int, int] | None = None
    for line in lines:
        tag, _, value = line.partition(":")
        if tag == "#EXTINF":
            assert duration is None
            duration = Decimal(re.fullmatch(r"(\d+\.\d+),", value)[1])  # type: ignore[index]
            # Section 4.3.3.1: rounded to the nearest whole number, no segment is longer than the target.
            assert duration > 0 and duration.quantize(Decimal(1), ROUND_HALF_UP) <= target
        elif tag == "#EXT-X-BYTERANGE":
            assert version >= 4 and byte_range is None
            size, offset = map(int, re.fullmatch(r"(\d+)@(\d+)", value).groups())  # type: ignore[union-attr]
            byte_range = (offset, size)
        elif not line.startswith("#"):
            assert duration is not None and byte_range is not None and path.parent / line == file
            found.segments.append(Segment(duration, *byte_range))
            duration = byte_range = None
        else:
            assert tag in known, line
    assert duration is None and byte_range is None and found.segments
    at = found.header_bytes
    for one in found.segments:
        assert one.start == at and one.size > 0, "segments lie one after the other"
        at += one.size
    assert at == file.stat().st_size, "and there is nothing else in the file"
    return found


def _lines(path: Path) -> list[str]:
    raw = path.read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf") and b"\r" not in raw and raw.endswith(b"\n")
    lines = raw.decode("utf-8").splitlines()
    assert lines[0] == "#EXTM3U" and all(line == line.strip() and line for line in lines)
    return lines


def _version(lines: list[str]) -> int:
    (line,) = (line for line in lines if line.startswith("#EXT-X-VERSION:"))
    return int(line.removeprefix("#EXT-X-VERSION:"))


def _attributes(line: str, known: dict[str, str], needed: set[str]) -> dict[str, str]:
    text = line.partition(":")[2]
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        match = _ATTRIBUTE.match(text, at)
        assert match is not None, f"no attribute at {text[at:]!r}"
        name, value = match.groups()
        assert name not in found, f"{name} twice"
        assert name in known and re.fullmatch(known[name], value), f"{name}={value}"
        found[name] = value
        at = match.end()
    assert not text.endswith(",") and needed <= set(found), needed - set(found)
    return found
