"""Everything of a source that is not the restored picture: copied packet by packet, never re-encoded.

`Passthrough` reads the source a second time (only the other streams), adds matching streams to the output and hands
packets over in step with the video, so that memory does not grow. What the output container cannot hold is named.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
from av.bitstream import BitStreamFilterContext

from pipeline.video_container import Limits, VideoSource, main_video_stream, open_input, source_name

_ATTACHMENTS_IN = {"matroska"}
# Text that describes the old encoding of the picture; wrong or meaningless for the new one.
_STALE_VIDEO_TAGS = ("encoder", "duration", "bps", "number_of_frames", "number_of_bytes", "_statistics", "vendor_id")
# MPEG-TS takes any stream, but gives those without a mapping of their own back as nameless bytes.
_IN_MPEGTS = {
    "mp1", "mp2", "mp3", "aac", "aac_latm", "ac3", "eac3", "dts", "truehd", "opus", "pcm_bluray", "s302m",
    "dvb_subtitle", "dvb_teletext", "hdmv_pgs_subtitle", "klv", "timed_id3", "scte_35", "smpte_2038",
    "h264", "hevc", "mpeg2video", "mpeg1video",
}  # fmt: skip
# ISO 639-2 gives twenty languages two codes; QuickTime knows the bibliographic ones, most other files use the others.
BIBLIOGRAPHIC = {
    "sqi": "alb", "hye": "arm", "eus": "baq", "mya": "bur", "zho": "chi", "ces": "cze", "nld": "dut", "fra": "fre",
    "kat": "geo", "deu": "ger", "ell": "gre", "isl": "ice", "mkd": "mac", "mri": "mao", "msa": "may", "fas": "per",
    "ron": "rum", "slk": "slo", "bod": "tib", "cym": "wel",
}  # fmt: skip
_NAMED_LAYOUTS = {"1 channels": "mono", "2 channels": "stereo", "6 channels": "5.1", "8 channels": "7.1"}
_STREAM_TAGS_IN = {"matroska", "webm"}
_CONTAINER_TAGS = ("major_brand", "minor_version", "compatible_brands", "encoder")


class Passthrough:
    """The copied streams of one source, bound to one output container.

    Args:
        source: opened once more, for itself.
        output: the container being written; its streams are added in the source's order.
        muxer: libav's name of the output format.

    Attributes:
        warnings: what cannot be carried, in words.
    """

    def __init__(self, source: VideoSource, output: av.container.OutputContainer, muxer: str) -> None:
        self.warnings: list[str] = []
        self._opened = open_input(source, Limits())
        self._source = self._opened.container
        self._output = output
        self._muxer = muxer
        self._map: dict[int, Any] = {}
        self._rewrites: dict[int, BitStreamFilterContext] = {}
        self._main_index = main_video_stream(self._source, source_name(source)).index
        self._packets: Iterator[Any] | None = None
        self._waiting: Any = None

    def streams_before_main(self) -> None:
        """Add the streams that come before the picture; call before the video stream is added."""
        self._add(stream for stream in self._source.streams if stream.index < self._main_index)

    def streams_after_main(self) -> None:
        """Add the remaining streams, chapters and the file's tags; call after the video stream was added."""
        self._add(stream for stream in self._source.streams if stream.index > self._main_index)
        chapters = self._source.chapters()
        if chapters:
            if self._muxer in ("mpegts",):
                self.warnings.append(f"{len(chapters)} chapters: {self._muxer} has none")
            else:
                self._output.set_chapters(chapters)
        tags = {key: value for key, value in self._source.metadata.items() if key.lower() not in _CONTAINER_TAGS}
        self._output.metadata.update(tags)
        if tags and self._muxer == "mpegts":
            self.warnings.append(f"tags of the file: mpegts has none ({', '.join(sorted(tags))})")
        wanted = [stream for stream in self._source.streams if stream.index in self._map]
        for stream in self._source.streams:
            if stream.index not in self._map:
                stream.discard = av.stream.Discard.all
        if wanted:
            self._packets = self._source.demux(wanted)

    def describe_main(self, stream: av.video.stream.VideoStream) -> None:
        """Copy tags and disposition of the source's picture to the new video stream."""
        main = self._source.streams[self._main_index]
        for key, value in main.metadata.items():
            if not key.lower().startswith(_STALE_VIDEO_TAGS):
                stream.metadata[key] = self._tag(key, value)
        self._name_lost_tags(main)
        if self._muxer == "mpegts" and "timecode" in main.metadata:
            self.warnings.append("the time code track: mpegts has none")
        stream.disposition = main.disposition
        if self._muxer == "mpegts":
            stream.id = main.id

    def mux_until(self, time_s: Fraction | None) -> None:
        """Write the copied packets that belong before `time_s`; None writes all that are left."""
        while True:
            packet = self._waiting or self._next()
            self._waiting = packet
            if packet is None:
                return
            at = packet.dts if packet.dts is not None else packet.pts
            if time_s is not None and at is not None and packet.time_base and at * packet.time_base > time_s:
                return
            self._waiting = None
            copy, rewrite = self._map[packet.stream.index], self._rewrites.get(packet.stream.index)
            for one in rewrite.filter(packet) if rewrite is not None else (packet,):
                one.stream = copy
                self._output.mux(one)

    def close(self) -> None:
        """Release the source file."""
        self._opened.close()

    def _next(self) -> Any:
        if self._packets is None:
            return None
        while True:
            try:
                packet = next(self._packets)
            except StopIteration:
                self._packets = None
                return None
            except (av.FFmpegError, EOFError) as error:
                self._packets = None
                self.warnings.append(f"the copied streams end early: {getattr(error, 'strerror', error)}")
                return None
            # The empty packets at the end only flush decoders.
            if packet.size and packet.stream.index in self._map and (packet.dts is not None or packet.pts is not None):
                return packet

    def _add(self, streams: Iterator[Any]) -> None:
        for stream in streams:
            name = describe_stream(stream)
            if is_regenerated(stream, self._source):
                continue
            problem = refusal(stream, self._muxer)
            if problem:
                self.warnings.append(f"{name} cannot be stored in {self._muxer} and was left out ({problem})")
                continue
            if stream.type == "attachment":
                self._attach(stream)
                continue
            copy = copy_of(stream, self._output)
            for key, value in stream.metadata.items():
                if key.lower() not in ("encoder", "vendor_id"):
                    copy.metadata[key] = self._tag(key, value)
            self._name_lost_tags(stream)
            copy.disposition = stream.disposition
            if self._muxer == "mpegts":
                copy.id = stream.id
            self._map[stream.index] = copy
            if self._muxer in ("mp4", "mov") and has_adts(stream):
                # libav does this by itself, but not where it writes fragments.
                self._rewrites[stream.index] = BitStreamFilterContext("aac_adtstoasc", stream)

    def _tag(self, key: str, value: str) -> str:
        return BIBLIOGRAPHIC.get(value, value) if self._muxer == "mov" and key == "language" else value

    def _name_lost_tags(self, stream: Any) -> None:
        if self._muxer not in _STREAM_TAGS_IN and "title" in stream.metadata:
            self.warnings.append(f"title of {describe_stream(stream)}: {self._muxer} has none")

    def _attach(self, stream: Any) -> None:
        copy = self._output.add_attachment(stream.name or "attachment", stream.mimetype or "", stream.data)
        copy.metadata.update(stream.metadata)


def refusal(stream: Any, muxer: str) -> str | None:
    """Why an output format cannot hold a copied stream, in libav's words; None if it can.

    It is found by writing a header with this stream alone, because formats differ in more than their list of codecs.
    """
    if stream.type == "attachment":
        return None if muxer in _ATTACHMENTS_IN else "it has no attachments"
    context = stream.codec_context
    if muxer == "mpegts" and (context.codec.canonical_name if context is not None else stream.name) not in _IN_MPEGTS:
        return "it has no mapping for this codec"
    trial = av.open(io.BytesIO(), mode="w", format=muxer)
    try:
        copy_of(stream, trial)
        trial.start_encoding()
        trial.close()  # MP4 writes what it knows of its streams at the end
    except (av.FFmpegError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None


def copy_of(stream: Any, output: av.container.OutputContainer) -> Any:
    """A stream of `output` for the packets of `stream`."""
    copy: Any = output.add_stream_from_template(stream)
    if stream.type == "audio" and copy.codec_context is not None:
        # AVI counts channels without naming them, which MP4 refuses at its very end.
        named = _NAMED_LAYOUTS.get(stream.codec_context.layout.name)
        if named:
            copy.codec_context.layout = named
    return copy


def has_adts(stream: Any) -> bool:
    """Whether it is AAC that says in each packet what it is, as in MPEG-TS, and not once in the header."""
    context = stream.codec_context
    return context is not None and context.codec.canonical_name == "aac" and not context.extradata


def is_regenerated(stream: Any, source: av.container.InputContainer) -> bool:
    """Time code tracks and chapter text: written anew by the muxer from the tags and the chapters."""
    if stream.type != "data":
        return False
    if "timecode" in stream.metadata and any("timecode" in other.metadata for other in source.streams.video):
        return True
    return stream.name == "bin_data" and bool(source.chapters()) and source.format.name.startswith("mov")


def describe_stream(stream: Any) -> str:
    """Such as `stream 2 (audio, aac, deu)`."""
    context = stream.codec_context
    codec = context.codec.canonical_name if context is not None else (stream.name or "unknown")
    language = stream.metadata.get("language")
    return f"stream {stream.index} ({stream.type}, {codec}{', ' + language if language else ''})"
