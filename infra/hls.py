"""An HLS stream as one file: playlists and segments are fetched here, and libav sees their bytes alone.

libav never opens a playlist itself: before FFmpeg 8.1.3 it does not check what a playlist inside one names
(CVE-2026-107697). Here every URI in a playlist is checked as if a user had given it, keys included, and what the
segments hold is fed to one demuxer that is fixed beforehand:

    with HlsSource(url, policy) as source, av.open(source, format=source.demuxer) as container: ...

Segments are fetched whole, one at a time, when the one before has been read: who does not read does not fetch.
"""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from typing import Any, Final, Literal

from infra.addresses import Resolver, system_resolver
from infra.downloads import again, fetch, fetch_whole
from infra.errors import FetchFailed, PlaylistError
from infra.hls_playlist import ByteRange, Header, Key, MasterPlaylist, MediaPlaylist, Segment, parse_playlist
from infra.network import Approved, FetchPolicy, approve, follow
from infra.urls import SafeUrl

_LIVE_EDGE_SEGMENTS: Final = 3  # RFC 8216, section 6.3.3: no nearer to the end, lest the next is late
_LEAST_RELOAD_S: Final = 0.5  # whatever target duration a playlist has
_MOST_RELOAD_S: Final = 10.0
_KEY_BYTES: Final = 16
_TS_PACKET: Final = 188
_MP4_BOXES: Final = (b"ftyp", b"styp", b"moof", b"moov", b"sidx", b"emsg", b"prft")


class HlsSource(io.RawIOBase):
    """The segments of one variant, one after the other, from a recorded or a live stream. Reading blocks at the edge.

    Attributes:
        demuxer: libav's name of the format, `mpegts` or `mp4`.
        is_live: the playlist had not ended when it was read first.
        received_bytes: of headers and segments, decrypted.
        skipped_segments: of a live stream: they were gone, or marked as gaps.
        discontinuities: how often time stamps or parameters began anew.

    Raises:
        UrlRefused: the playlist, or anything that it names, may not be fetched.
        FetchFailed: as `fetch`; `fetch-too-large` also for all segments together.
        PlaylistError: `playlist-syntax`, `playlist-unsupported`, `playlist-too-large`, `playlist-nested` (a master
            playlist inside one), `playlist-key` (wrong key), `playlist-media` (neither MPEG-TS nor MP4),
            `playlist-header` (other parameters from here on), `playlist-stalled` (nothing new for too long).
    """

    def __init__(
        self,
        url: str | SafeUrl,
        policy: FetchPolicy,
        *,
        resolver: Resolver = system_resolver,
        authorization: str | None = None,
        max_height: int | None = None,
        from_start: bool = False,
        endless: bool = False,
    ) -> None:
        """Open a stream and fetch its first segment.

        Args:
            authorization: value of the Authorization header; it goes to the first URL's scheme, host and port alone.
            max_height: of several variants, take the largest that is not higher.
            from_start: read a live stream from the first segment listed, not from the third last.
            endless: the limit for all bytes together does not hold; each segment's does.
        """
        super().__init__()
        self.received_bytes = 0
        self.skipped_segments = 0
        self.discontinuities = 0
        self._policy = policy
        self._resolver = resolver
        self._endless = endless
        self._stopped = threading.Event()
        self._waiting: deque[tuple[Approved, Segment]] = deque()
        self._next_number = 0
        self._header: tuple[Header, bytes] | None = None
        self._key: tuple[str, bytes] | None = None
        self._rest = memoryview(b"")

        self._media = approve(url, policy, resolver=resolver, authorization=authorization)
        where, playlist = again(self._load)
        if isinstance(playlist, MasterPlaylist):
            self._media = follow(where, playlist.best(max_height).uri, policy, resolver=resolver)
            where, playlist = again(self._load)
            if isinstance(playlist, MasterPlaylist):
                raise _refused("A master playlist names another one.", "playlist-nested")
        self.is_live = not playlist.has_ended
        if self.is_live and not from_start and len(playlist.segments) > _LIVE_EDGE_SEGMENTS:
            self._next_number = playlist.segments[-_LIVE_EDGE_SEGMENTS].number
        elif playlist.segments:
            self._next_number = playlist.segments[0].number
        self._loaded_at = time.monotonic()
        self._take(where, playlist)
        if not self._advance():
            raise _refused("The playlist has no segment with anything in it.", "playlist-media")
        self.demuxer: Literal["mpegts", "mp4"] = _demuxer_of(self._rest)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._checkClosed()
        if self._stopped.is_set() or (not self._rest and not self._advance()):
            return 0
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def stop(self) -> None:
        """End the stream: a read that waits, in another thread, returns b"" at once or after the request under way."""
        self._stopped.set()

    def close(self) -> None:
        self.stop()
        self._waiting.clear()
        self._rest = memoryview(b"")
        super().close()

    def _advance(self) -> bool:
        """Get the next segment's content ready; False at the end."""
        began = time.monotonic()
        while True:
            while not self._waiting:
                if self._ended or self._stopped.is_set():
                    return False
                self._reload()
                if not (self._waiting or self._ended or self._stopped.is_set()):
                    self._check_stall(began)
            base, segment = self._waiting.popleft()
            if segment.is_gap:
                self.skipped_segments += 1
                self._check_stall(began)
                continue
            try:
                content = self._content(base, segment.uri, segment.byte_range, segment.key, segment.number)
            except FetchFailed as error:
                if self.is_live and error.status in (404, 410):  # it has left the window meanwhile
                    self.skipped_segments += 1
                    self._check_stall(began)
                    continue
                raise
            self.discontinuities += segment.is_discontinuous
            header = self._new_header(base, segment.header) if segment.header is not None else b""
            self._rest = memoryview(header + content)
            if self._rest:
                return True
            self._check_stall(began)

    def _new_header(self, base: Approved, header: Header) -> bytes:
        """Return a header that has not been sent yet, b"" for the one that has."""
        if self._header is not None and self._header[0] == header:
            return b""
        content = self._content(base, header.uri, header.byte_range, header.key, 0)
        before = self._header
        self._header = header, content
        if before is None:
            return content
        if before[1] != content:
            # libav passes over a second header in the same file, and would decode with the parameters of the first.
            raise _refused("The stream goes on with other parameters.", "playlist-header", "Open the stream again.")
        return b""

    def _content(self, base: Approved, uri: str, part: ByteRange | None, key: Key | None, number: int) -> bytes:
        limits = self._policy.limits
        left = limits.segment_bytes if self._endless else min(limits.segment_bytes, limits.bytes - self.received_bytes)
        if part is not None and part.stop - part.start > left:
            raise _too_large(base.host, left)
        content = fetch_whole(
            follow(base, uri, self._policy, resolver=self._resolver),
            self._policy,
            resolver=self._resolver,
            byte_range=None if part is None else (part.start, part.stop),
            limit_bytes=left,
        )
        if key is not None:
            iv = number.to_bytes(16, "big") if key.iv is None else key.iv
            content = _decrypted(content, self._fetched_key(base, key.uri), iv)
        self.received_bytes += len(content)
        return content

    def _fetched_key(self, base: Approved, uri: str) -> bytes:
        where = follow(base, uri, self._policy, resolver=self._resolver)
        if self._key is None or self._key[0] != where.url.reveal():
            content = fetch_whole(where, self._policy, resolver=self._resolver, limit_bytes=_KEY_BYTES)
            if len(content) != _KEY_BYTES:
                raise _refused(f"A key has {len(content)} bytes; {_KEY_BYTES} are needed.", "playlist-key")
            self._key = where.url.reveal(), content
        return self._key[1]

    def _load(self) -> tuple[Approved, MasterPlaylist | MediaPlaylist]:
        """Return the playlist, and where it was in the end: what its URIs are relative to."""
        limits = self._policy.limits
        with fetch(self._media, self._policy, resolver=self._resolver, limit_bytes=limits.playlist_bytes) as download:
            content = download.readall()
        return download.source, parse_playlist(content, max_segments=limits.playlist_segments)

    def _take(self, where: Approved, playlist: MediaPlaylist) -> None:
        """Line up the segments that are new."""
        new = [one for one in playlist.segments if one.number >= self._next_number]
        if new:
            self.skipped_segments += new[0].number - self._next_number
            self._next_number = new[-1].number + 1
            self._waiting.extend((where, one) for one in new)
        self._had_news = bool(new)
        self._target_s = playlist.target_s
        self._ended = playlist.has_ended

    def _reload(self) -> None:
        """Read a live playlist again, when it is time (RFC 8216, section 6.3.4); passing failures bring no news."""
        pause_s = self._target_s if self._had_news else self._target_s / 2
        pause_s = min(max(pause_s, _LEAST_RELOAD_S), _MOST_RELOAD_S)
        if self._stopped.wait(max(self._loaded_at + pause_s - time.monotonic(), 0)):
            return
        self._loaded_at = time.monotonic()
        self._had_news = False
        try:
            # Hours may have gone by: the name is resolved, and its addresses are checked, anew.
            self._media = approve(
                self._media.url, self._policy, resolver=self._resolver, authorization=self._media.authorization
            )
            where, playlist = self._load()
        except FetchFailed as error:
            if not error.is_transient:
                raise
            return
        if isinstance(playlist, MasterPlaylist):
            raise _refused("A media playlist has become a master playlist.", "playlist-nested")
        self._take(where, playlist)

    def _check_stall(self, began: float) -> None:
        waited_s, limit_s = time.monotonic() - began, self._policy.limits.stall_seconds
        if waited_s > limit_s:
            raise _refused(
                f"The live stream of {self._media.host} has brought nothing for {waited_s:.1f} s; "
                f"the limit is {limit_s:g} s.",
                "playlist-stalled",
                "Open it again when the stream is on.",
            )


def _decrypted(content: bytes, key: bytes, iv: bytes) -> bytes:
    """AES-128, CBC, padded as in PKCS #7 (RFC 8216, section 4.3.2.4)."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.padding import PKCS7

    try:
        decryptor = Cipher(algorithms.AES(key), modes.CBC(iv)).decryptor()
        padded = decryptor.update(content) + decryptor.finalize()
        unpadder = PKCS7(128).unpadder()
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError:
        raise _refused("A segment cannot be decrypted with its key.", "playlist-key") from None


def _demuxer_of(content: memoryview) -> Literal["mpegts", "mp4"]:
    """Tell by the first bytes, not by names or types, which say little and can lie."""
    if bytes(content[4:8]) in _MP4_BOXES:
        return "mp4"
    if len(content) > _TS_PACKET and content[0] == content[_TS_PACKET] == 0x47:
        return "mpegts"
    raise _refused("The segments are neither MPEG-TS nor MP4.", "playlist-media")


def _too_large(host: str, limit_bytes: int) -> FetchFailed:
    return FetchFailed(
        f"A segment of {host} is larger than the limit of {limit_bytes} bytes.",
        code="fetch-too-large",
        remedy="Use a smaller source, or let the operator raise the limit.",
    )


def _refused(
    message: str, code: str, remedy: str = "Use a plain HLS stream: MPEG-TS or fragmented MP4, AES-128 or none."
) -> PlaylistError:
    return PlaylistError(message, code=code, remedy=remedy)
