"""What the copied streams of a file hold, in a form that two files can be compared by: hashes and time stamps.

Payloads are hashed as they are decoded, not as they are framed: AAC loses its ADTS headers on the way from MPEG-TS to
MP4 and gets them on the way back, and H.264 in a second video stream its start codes, by libav's own rules.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

import av

from pipeline.passthrough import is_regenerated, refusal
from pipeline.video_container import Limits, VideoSource, main_video_stream, open_input, source_name


@dataclass(slots=True)
class StreamFingerprint:
    """One copied stream: its packets' number, the hash of their payloads and their times in seconds.

    `refused_by` says for each muxer that was asked about why it cannot hold the stream, if it cannot.
    """

    index: int
    kind: str
    codec: str
    disposition: int
    metadata: dict[str, str]
    packets: int = 0
    sha256: str = ""
    times_s: array[float] = field(default_factory=lambda: array("d"))
    refused_by: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Such as `stream 2 (audio, aac)`."""
        return f"stream {self.index} ({self.kind}, {self.codec})"


def fingerprint(path: VideoSource, *, for_muxer: str | None = None) -> list[StreamFingerprint]:
    """Read every stream but the restored picture once, in constant memory but for the time stamps.

    Args:
        path: a video file, local or remote.
        for_muxer: also find out which streams this output format cannot hold.

    Raises:
        VideoNotFound, UnreadableVideo, NoVideoStream: see `video_errors`.
    """
    with open_input(path, Limits()) as container:
        main = main_video_stream(container, source_name(path))
        found: dict[int, StreamFingerprint] = {}
        hashes = {}
        for stream in container.streams:
            if stream.index == main.index or is_regenerated(stream, container):
                stream.discard = av.stream.Discard.all
                continue
            context: Any = stream.codec_context
            one = StreamFingerprint(
                stream.index,
                stream.type,
                context.codec.canonical_name if context is not None else (stream.name or "unknown"),
                int(stream.disposition),
                dict(stream.metadata),
            )
            reason = refusal(stream, for_muxer) if for_muxer else None
            if reason and for_muxer:
                one.refused_by[for_muxer] = reason
            found[stream.index] = one
            hashes[stream.index] = hashlib.sha256()
            if stream.type == "attachment":
                attachment: Any = stream
                hashes[stream.index].update(attachment.data)
        wanted = [stream for stream in container.streams if stream.index in found and stream.type != "attachment"]
        for packet in _packets(container, wanted):
            one = found[packet.stream.index]
            one.packets += 1
            hashes[packet.stream.index].update(_payload(bytes(packet), one.codec))
            stamp = packet.pts if packet.pts is not None else packet.dts
            one.times_s.append(float(stamp * packet.time_base) if stamp is not None else float("nan"))
        for index, one in found.items():
            one.sha256 = hashes[index].hexdigest()
        return list(found.values())


def _packets(container: av.container.InputContainer, streams: list[Any]) -> Any:
    """Packets with content; damage at the end of a file ends them."""
    if not streams:
        return
    try:
        for packet in container.demux(streams):
            if packet.size:
                yield packet
    except (av.FFmpegError, EOFError):
        return


def _payload(data: bytes, codec: str) -> bytes:
    """A packet without the ADTS header (ISO 13818-7, 6.2) that MPEG-TS puts before AAC."""
    if codec == "aac" and len(data) > 7 and data[0] == 0xFF and data[1] & 0xF6 == 0xF0:
        return data[7 if data[1] & 1 else 9 :]
    return data
