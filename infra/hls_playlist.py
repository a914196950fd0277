"""HLS playlists (RFC 8216) as other servers write them: read strictly, with nothing fetched.

Unknown tags are passed over, as section 6.3.1 demands; they cannot make this reader name anything else to be fetched.
Known tags that would change what the segments mean, and are not supported, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from infra.errors import PlaylistError

NEWEST_VERSION: Final = 12  # of the second edition's drafts
_ATTRIBUTE: Final = re.compile(r'([A-Z0-9-]+)=("[^"]*"|[^",\s][^",]*)(?:,\s*|$)')
_CONTROL: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_BYTE_RANGE: Final = re.compile(r"([0-9]{1,18})(?:@([0-9]{1,18}))?")
_WHOLE: Final = re.compile(r"[0-9]{1,18}")
_DURATION: Final = re.compile(r"([0-9]{1,8}(?:\.[0-9]{0,12})?)(?:,.*)?")
_RESOLUTION: Final = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
_REFUSED: Final = {
    "EXT-X-DEFINE": "variables",
    "EXT-X-SKIP": "delta updates",
    "EXT-X-I-FRAMES-ONLY": "a playlist of key pictures alone",
}


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Part of a file: bytes from `start` up to, not including, `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Key:
    """AES-128 in CBC mode (section 4.3.2.4). `iv` is None where the segment's number stands for it."""

    uri: str
    iv: bytes | None


@dataclass(frozen=True, slots=True)
class Header:
    """What a decoder needs before a segment (EXT-X-MAP)."""

    uri: str
    byte_range: ByteRange | None
    key: Key | None


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment; `number` is its media sequence number. A `gap` is listed, but its file is not there."""

    uri: str
    number: int
    duration_s: float
    byte_range: ByteRange | None = None
    key: Key | None = None
    header: Header | None = None
    is_discontinuous: bool = False
    is_gap: bool = False


@dataclass(frozen=True, slots=True)
class MediaPlaylist:
    """Segments of one rendition. `has_ended`: no more will be added."""

    target_s: int
    has_ended: bool
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Variant:
    """One of a stream's qualities; `height` is 0 where it is not said."""

    uri: str
    bandwidth: int
    height: int
    codecs: str


@dataclass(frozen=True, slots=True)
class MasterPlaylist:
    """A choice of qualities."""

    variants: tuple[Variant, ...]

    def best(self, max_height: int | None = None) -> Variant:
        """Return the largest picture that is not higher than `max_height`; if all are, the smallest."""
        moving = [one for one in self.variants if one.height or not one.codecs or _has_picture(one.codecs)]
        fitting = [one for one in moving if max_height is None or one.height <= max_height]
        if fitting:
            return max(fitting, key=lambda one: (one.height, one.bandwidth))
        if not moving:
            raise _refused("The playlist has no variant with a picture.", "playlist-media")
        return min(moving, key=lambda one: (one.height, one.bandwidth))


def parse_playlist(content: bytes, *, max_segments: int) -> MasterPlaylist | MediaPlaylist:
    """Return what a playlist says. URIs are as they stand there: relative, and unchecked.

    Raises:
        PlaylistError: `playlist-syntax`, `playlist-too-large`, or `playlist-unsupported`.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise _refused("The playlist is not UTF-8 text.", "playlist-syntax") from None
    lines = [line.rstrip() for line in re.split(r"\r?\n", text)]
    if lines[0] != "#EXTM3U":
        raise _refused("That is no HLS playlist: it does not begin with #EXTM3U.", "playlist-syntax")
    if _CONTROL.search("".join(lines)):
        raise _refused("The playlist has control characters.", "playlist-syntax")
    if any(line.startswith("#EXT-X-STREAM-INF:") for line in lines):
        return _master(_tags(lines))
    return _Reader(max_segments).read(_tags(lines))


def _tags(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (tag without #, value), and ("", URI) for the other lines; comments are left out."""
    for line in lines:
        if line.startswith("#EXT"):
            tag, _, value = line[1:].partition(":")
            if tag in _REFUSED:
                raise _refused(f"The playlist uses {_REFUSED[tag]} ({tag}).", "playlist-unsupported")
            if tag == "EXT-X-VERSION" and _whole(tag, value) > NEWEST_VERSION:
                raise _refused(f"The playlist has version {value}; {NEWEST_VERSION} is known.", "playlist-unsupported")
            yield tag, value
        elif line and not line.startswith("#"):
            yield "", line


def _master(tags: Iterator[tuple[str, str]]) -> MasterPlaylist:
    variants = []
    waiting: dict[str, str] | None = None
    for tag, value in tags:
        if tag == "EXT-X-STREAM-INF":
            waiting = _attributes(value)
        elif tag == "EXTINF":
            raise _refused("The playlist mixes variants and segments.", "playlist-syntax")
        elif not tag and waiting is not None:
            size = _RESOLUTION.fullmatch(waiting.get("RESOLUTION", ""))
            variants.append(
                Variant(
                    uri=value,
                    bandwidth=_whole("BANDWIDTH", waiting.get("BANDWIDTH", "0")),
                    height=int(size[2]) if size else 0,
                    codecs=_unquoted(waiting.get("CODECS", "")),
                )
            )
            waiting = None
    if not variants:
        raise _refused("The playlist names no variant.", "playlist-syntax")
    return MasterPlaylist(tuple(variants))


@dataclass(slots=True)
class _Reader:
    """Reads a media playlist line by line; what is said of the segments to come is kept here."""

    max_segments: int
    segments: list[Segment] = field(default_factory=list)
    target_s: int | None = None
    number: int = 0
    has_ended: bool = False
    duration_s: float | None = None
    length: tuple[int, int | None] | None = None  # of EXT-X-BYTERANGE: size, start
    key: Key | None = None
    header: Header | None = None
    is_discontinuous: bool = False
    is_gap: bool = False

    def read(self, tags: Iterator[tuple[str, str]]) -> MediaPlaylist:
        for tag, value in tags:
            self._take(tag, value)
        if self.target_s is None:
            raise _refused("The playlist has no target duration.", "playlist-syntax")
        return MediaPlaylist(self.target_s, self.has_ended, tuple(self.segments))

    def _take(self, tag: str, value: str) -> None:
        match tag:
            case "":
                self._segment(value)
            case "EXTINF":
                found = _DURATION.fullmatch(value)
                if found is None:
                    raise _refused("A segment's duration is no number.", "playlist-syntax")
                self.duration_s = float(found[1])
            case "EXT-X-BYTERANGE":
                self.length = _byte_range(value)
            case "EXT-X-KEY":
                self.key = _key(_attributes(value))
            case "EXT-X-MAP":
                self.header = self._map(_attributes(value))
            case "EXT-X-TARGETDURATION":
                self.target_s = _whole(tag, value)
            case "EXT-X-MEDIA-SEQUENCE":
                if self.segments:
                    raise _refused("The first segment's number comes after it.", "playlist-syntax")
                self.number = _whole(tag, value)
            case "EXT-X-DISCONTINUITY":
                self.is_discontinuous = True
            case "EXT-X-GAP":
                self.is_gap = True
            case "EXT-X-ENDLIST":
                self.has_ended = True

    def _segment(self, uri: str) -> None:
        if self.duration_s is None:
            raise _refused("A segment has no duration.", "playlist-syntax")
        if len(self.segments) >= self.max_segments:
            raise _refused(f"The playlist has more than {self.max_segments} segments.", "playlist-too-large")
        self.segments.append(
            Segment(
                uri=uri,
                number=self.number,
                duration_s=self.duration_s,
                byte_range=self._range_of(uri),
                key=self.key,
                header=self.header,
                is_discontinuous=self.is_discontinuous,
                is_gap=self.is_gap,
            )
        )
        self.number += 1
        self.duration_s, self.length = None, None
        self.is_discontinuous = self.is_gap = False

    def _range_of(self, uri: str) -> ByteRange | None:
        """Without a start, a range begins where the one before it, of the same file, has ended (section 4.3.2.2)."""
        if self.length is None:
            return None
        size, start = self.length
        if start is None:
            before = self.segments[-1] if self.segments else None
            if before is None or before.uri != uri or before.byte_range is None:
                raise _refused("A byte range has no start.", "playlist-syntax")
            start = before.byte_range.stop
        return ByteRange(start, start + size)

    def _map(self, attributes: dict[str, str]) -> Header:
        length = _byte_range(_unquoted(attributes["BYTERANGE"])) if "BYTERANGE" in attributes else None
        byte_range = None
        if length is not None:
            byte_range = ByteRange(length[1] or 0, (length[1] or 0) + length[0])
        if self.key is not None and self.key.iv is None:
            raise _refused("An encrypted header has no initialisation vector.", "playlist-syntax")
        return Header(_uri(attributes, "EXT-X-MAP"), byte_range, None if self.key is None else replace(self.key))


def _key(attributes: dict[str, str]) -> Key | None:
    method = attributes.get("METHOD", "")
    if method == "NONE":
        return None
    form = _unquoted(attributes.get("KEYFORMAT", '"identity"'))
    if method != "AES-128" or form != "identity":
        raise _refused(
            f"The stream is encrypted by {method[:30] or 'no method'} with keys of the form {form[:60]}.",
            "playlist-unsupported",
        )
    text = attributes.get("IV")
    if text is not None and not re.fullmatch(r"0[xX][0-9a-fA-F]{1,32}", text):
        raise _refused("A key's initialisation vector is no number of 128 bits.", "playlist-syntax")
    return Key(_uri(attributes, "EXT-X-KEY"), None if text is None else int(text, 16).to_bytes(16, "big"))


def _attributes(text: str) -> dict[str, str]:
    """Return an attribute list (section 4.2); quoted strings keep their quotation marks."""
    found: dict[str, str] = {}
    at = 0
    while at < len(text):
        match = _ATTRIBUTE.match(text, at)
        if match is None or match[1] in found:
            raise _refused("A tag's attributes cannot be read.", "playlist-syntax")
        found[match[1]] = match[2]
        at = match.end()
    return found


def _uri(attributes: dict[str, str], tag: str) -> str:
    uri = _unquoted(attributes.get("URI", ""))
    if not uri:
        raise _refused(f"{tag} names no URI.", "playlist-syntax")
    return uri


def _unquoted(text: str) -> str:
    return text[1:-1] if text.startswith('"') else text


def _byte_range(text: str) -> tuple[int, int | None]:
    found = _BYTE_RANGE.fullmatch(text)
    if found is None or not int(found[1]):
        raise _refused("A byte range is not of the form size@start.", "playlist-syntax")
    return int(found[1]), None if found[2] is None else int(found[2])


def _whole(tag: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise _refused(f"{tag} is not a whole number.", "playlist-syntax")
    return int(text)


def _has_picture(codecs: str) -> bool:
    sound = ("mp4a", "ac-3", "ec-3", "opus", "fLaC", "alac", "stpp", "wvtt")
    return any(not codec.strip().startswith(sound) for codec in codecs.split(","))


def _refused(message: str, code: str) -> PlaylistError:
    return PlaylistError(
        message, code=code, remedy="Use a plain HLS stream: MPEG-TS or fragmented MP4, AES-128 or none."
    )
