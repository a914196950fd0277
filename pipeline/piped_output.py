"""A restored video written once, front to back, while its source is still being read: fragmented MP4 into a pipe.

One demuxer serves both sides: the reader gets the picture's packets, and the sound that lies between them is kept here
until the pictures before it are encoded. Sound is copied, never encoded. The last box says how it ended.
"""

from __future__ import annotations

import json
import struct
import threading
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final, Protocol

import av
from av.bitstream import BitStreamFilterContext

from pipeline.encoder_options import EncoderSettings
from pipeline.passthrough import copy_of, describe_stream, has_adts, refusal
from pipeline.picture_encoder import PictureEncoder
from pipeline.video_container import Limits, VideoSource, main_video_stream, open_input, source_name
from pipeline.video_errors import EncodeError
from pipeline.video_probe import VideoInfo

MUXER: Final = "mp4"
END_BOX: Final = uuid.UUID("6f1d3f0c-6f0e-4c5a-9b0a-5d1c6a2f8e47")  # of the `uuid` box (ISO 14496-12, 11.1) at the end
KEY_SECONDS: Final = 2
_FRAGMENT_US: Final = 1_000_000
_LOOK_AHEAD: Final = 12  # pictures that x264 waits for before it gives the first: less than its 40, for a little rate
_SOUND_BYTES: Final = 64 << 20  # that may wait for the pictures before it
_SILENT_AFTER_S: Final = 2
_PACKETS_TO_TRY: Final = 20_000


class Sink(Protocol):
    """Where the bytes go."""

    def write(self, data: bytes, /) -> object:
        """Take all of `data`; may wait, and may raise to end the writing."""


@dataclass(frozen=True, slots=True)
class Sounds:
    """The streams of a source beside its picture: those that can be copied, those that are silent, and what is left.

    `left_out` says in words which are not copied, and why; the silent ones are among them.
    """

    copied: frozenset[int]
    silent: frozenset[int]
    left_out: tuple[str, ...]


def sounds(source: VideoSource, limits: Limits) -> Sounds:
    """Look for sound in the beginning of a source.

    A track counts if it is heard in the first two seconds of the picture: one that never comes would keep back the
    fragments of all others.
    """
    copied, silent = set(), set()
    left: list[str] = []
    with open_input(source, limits) as container:
        main = main_video_stream(container, source_name(source))
        others = [stream for stream in container.streams if stream.index != main.index]
        heard = _heard(container, main, frozenset(stream.index for stream in others if stream.type == "audio"))
        for stream in others:
            if stream.type != "audio":
                left.append(f"{describe_stream(stream)}: only sound is copied")
            elif stream.index not in heard:
                silent.add(stream.index)
                left.append(f"{describe_stream(stream)}: nothing of it in the first {_SILENT_AFTER_S} seconds")
            elif problem := refusal(stream, MUXER):
                left.append(f"{describe_stream(stream)}: {problem}")
            else:
                copied.add(stream.index)
    return Sounds(frozenset(copied), frozenset(silent), tuple(left))


def _heard(container: Any, main: Any, wanted: frozenset[int]) -> set[int]:
    heard: set[int] = set()
    first: Fraction | None = None
    try:
        for count, packet in enumerate(container.demux()):
            if heard == wanted or count > _PACKETS_TO_TRY:
                break
            if packet.stream.index in wanted and packet.size:
                heard.add(packet.stream.index)
            if packet.stream.index == main.index and packet.dts is not None:
                at = packet.dts * packet.time_base
                first = at if first is None else first
                if at - first > _SILENT_AFTER_S:
                    break
    except (av.FFmpegError, EOFError):
        pass
    return heard


class PipedOutput:
    """One result on its way into a pipe.

    Args:
        sink: takes the bytes; from one thread at a time.
        encoder: of the pictures; it is bound to this output.
        source: the probed source.
        copied: audio streams of the source to copy, as `sounds` found them.
    """

    def __init__(self, sink: Sink, encoder: PictureEncoder, source: VideoInfo, *, copied: frozenset[int]) -> None:
        self._sink = _Sink(sink)
        self._encoder, self._source, self._copied = encoder, source, copied
        self._output: Any = None
        self._streams: dict[int, Any] = {}
        self._rewrites: dict[int, BitStreamFilterContext] = {}
        self._sound: deque[Any] = deque()
        self._sound_bytes = 0
        self._lock = threading.Lock()

    def packets(self, container: av.container.InputContainer, main: av.video.stream.VideoStream) -> Iterator[Any]:
        """Yield the picture's packets of a source, and keep the sound between them: for `VideoReader`.

        Raises:
            EncodeError: the result cannot hold what the source has, or too much sound comes before its pictures.
        """
        self._begin(container)
        for index in self._copied:
            container.streams[index].discard = av.stream.Discard.default
        for packet in container.demux([main, *(container.streams[index] for index in sorted(self._copied))]):
            if packet.stream.index == main.index:
                yield packet
            elif packet.size and (packet.dts is not None or packet.pts is not None):
                self._keep(packet)

    def mux(self, packets: Iterable[Any]) -> None:
        """Write packets of the encoder, each after the sound that comes before it."""
        for packet in packets:
            if packet.dts is not None and packet.time_base:
                self._mux_sound(packet.dts * packet.time_base)
            self._output.mux(packet)

    def finish(self, told: Mapping[str, object]) -> None:
        """Write what is left, and the box that says how it ended: `told` as JSON.

        Raises:
            EncodeError: no picture came.
        """
        if self._output is None:
            raise EncodeError("The video has no picture.", remedy="Check that the source has pictures.")
        self.mux(self._encoder.flush())
        self._mux_sound(None)
        output, self._output = self._output, None
        output.close()
        text = json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
        self._sink.write(struct.pack(">I4s", 24 + len(text), b"uuid") + END_BOX.bytes + text)

    def abort(self) -> None:
        """Write nothing more; safe to call at any time and more than once. What the container held is dropped."""
        self._sink.mute()
        output, self._output = self._output, None
        if output is not None:
            try:
                output.close()
            except (av.FFmpegError, ValueError):
                pass
        with self._lock:
            self._sound.clear()

    def _begin(self, container: av.container.InputContainer) -> None:
        options = {
            "movflags": "frag_keyframe+delay_moov+default_base_moof+skip_trailer",
            "frag_duration": str(_FRAGMENT_US),
            "max_interleave_delta": str(_FRAGMENT_US),
            "flush_packets": "1",
        }
        output: Any = av.open(self._sink, mode="w", format=MUXER, container_options=options)
        self._output = output
        try:
            self._encoder.add_stream(output, _streaming(self._encoder.settings, self._source))
            for index in sorted(self._copied):
                stream: Any = container.streams[index]
                self._streams[index] = copy = copy_of(stream, output)
                copy.disposition = stream.disposition
                if "language" in stream.metadata:
                    copy.metadata["language"] = stream.metadata["language"]
                if has_adts(stream):
                    self._rewrites[index] = BitStreamFilterContext("aac_adtstoasc", stream)
            output.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            raise EncodeError(
                f"The result could not be started ({error}).", remedy="Choose another codec or size."
            ) from error

    def _keep(self, packet: Any) -> None:
        with self._lock:
            self._sound.append(packet)
            self._sound_bytes += packet.size
            if self._sound_bytes > _SOUND_BYTES:
                raise EncodeError(
                    f"More than {_SOUND_BYTES >> 20} MiB of sound come before their pictures.",
                    remedy="Interleave sound and pictures, as every muxer does by itself.",
                )

    def _mux_sound(self, time_s: Fraction | None) -> None:
        """Write the sound that belongs before `time_s`; None: all that is left."""
        while True:
            with self._lock:
                if not self._sound:
                    return
                packet = self._sound[0]
                at = packet.dts if packet.dts is not None else packet.pts
                if time_s is not None and at * packet.time_base > time_s:
                    return
                self._sound.popleft()
                self._sound_bytes -= packet.size
            index = packet.stream.index
            rewrite = self._rewrites.get(index)
            for one in rewrite.filter(packet) if rewrite is not None else (packet,):
                one.stream = self._streams[index]
                self._output.mux(one)


class _Sink:
    """A file that can only be written, as PyAV takes it."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._muted = False

    def write(self, data: bytes) -> int:
        if not self._muted:
            self._sink.write(data)
        return len(data)

    def mute(self) -> None:
        self._muted = True


def _streaming(settings: EncoderSettings, source: VideoInfo) -> dict[str, str]:
    """What makes an encoder give its first pictures early, and a player able to begin every few seconds."""
    options = {"g": str(max(1, round(source.average_rate * KEY_SECONDS)))}
    if settings.codec == "h264":
        options["rc-lookahead"] = str(_LOOK_AHEAD)
    return options
